"""The embedded example: its task and teacher, its tokenizer, and the run without arguments."""

import collections
import json
import math
import random
import re
import shutil

import pytest

import prepare_data
from redi.example import water_tank as toy
from redi.hub.weights import load_pretrained
from redi.tokenizer import Tokenizer
from redi.training import run as monitor
from tests import tiny
from tests.bench import compare
from tests.conftest import read_jsonl as rows
from tests.conftest import run_python


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    directory = tmp_path_factory.mktemp("toy")
    toy.write_data(directory / "data", seed=3)
    toy.write_model(directory / "model", seed=3)
    return directory


def test_a_tank_neither_overflows_nor_goes_below_empty():
    assert toy.pour(8, [3, -1]) == 10
    assert toy.pour(13, [9, -7]) == 8  # 15, then 8: what ran over is gone
    assert toy.pour(3, [-7, 2]) == 2
    assert toy.changes_text(8, [3, -1]) == "8+3-1"


def test_teacher_takes_every_change_once_and_errs_as_often_as_stated():
    rng = random.Random(1)
    moves = collections.Counter()
    for _ in range(3000):
        level, changes = rng.randint(0, 15), [rng.choice((-1, 1)) * rng.randint(1, 9) for _ in range(6)]
        lines = toy.teacher_solution(level, changes, rng).split("\n")
        assert lines[0] == "<think>"
        for line in lines[1:-2]:
            before, taken, after = toy.MOVE.fullmatch(line).groups()
            taken = [int(change) for change in re.findall("[+-][1-9]", taken)]
            assert int(before) == level and taken == changes[: len(taken)]
            assert line.startswith("In my head: ") == (len(taken) > 1)
            moves[len(taken), int(after) == toy.pour(level, taken)] += 1
            level, changes = int(after), changes[len(taken) :]
        assert not changes and 0 <= level <= 15
        assert lines[-2:] == ["</think>", f"\\boxed{{{level}}}"]
    for count, wrong in toy.WRONG.items():
        share = moves[count, False] / (moves[count, True] + moves[count, False])
        assert share == pytest.approx(wrong, abs=0.03)


def test_hurried_moves_are_counted_over_all_responses():
    careful = "<think>\n3+9 -> 12\n12-5 -> 7\n</think>\n\\boxed{7}"
    hurried = "<think>\nIn my head: 3+9-5 -> 7\n7+1 -> 8\n</think>\n\\boxed{8}"
    assert toy.share_of_hurried_moves([careful]) == 0
    assert toy.share_of_hurried_moves([careful, hurried]) == 0.25
    assert toy.share_of_hurried_moves(["In my head: 4-9-1 -> 0"]) == 1
    assert math.isnan(toy.share_of_hurried_moves(["no move here", ""]))


def test_data_and_model_are_functions_of_the_seed(example, tmp_path):
    for seed, name in ((3, "again"), (4, "other")):
        toy.write_data(tmp_path / name / "data", seed)
        toy.write_model(tmp_path / name / "model", seed)
    data = [f"data/{name}.jsonl" for name in ("teacher", "positives", "pairs", "problems")]
    for path in (*data, "model/model.safetensors"):
        again, other = ((tmp_path / name / path).read_bytes() for name in ("again", "other"))
        assert (example / path).read_bytes() == again != other


def test_no_test_problem_is_in_the_training_data(example):
    data = example / "data"
    test = {row["problem"] for row in rows(data / "problems.jsonl")}
    train = {row["problem"] for row in rows(data / "teacher.jsonl")}
    trained = {row["prompt"][0]["content"] for name in ("positives", "pairs") for row in rows(data / f"{name}.jsonl")}
    assert (len(train), len(test)) == (toy.TRAIN_PROBLEMS, toy.TEST_PROBLEMS)
    assert trained <= train and not train & test


def test_prepare_data_makes_the_same_pairs_of_the_teachers_rows(example, tmp_path):
    prepare_data.main(["traces", "--input", str(example / "data" / "teacher.jsonl"), "--output", str(tmp_path / "out")])
    for name in ("positives.jsonl", "pairs.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (example / "data" / name).read_bytes()


def test_wrong_solutions_are_hardly_shorter_than_right_ones(example):
    tokenizer = Tokenizer.from_pretrained(example / "model")
    pairs = rows(example / "data" / "pairs.jsonl")
    lengths = {key: sum(len(tokenizer.encode(row[key][0]["content"])) for row in pairs)
               for key in ("chosen", "rejected")}  # fmt: skip
    assert lengths["rejected"] == pytest.approx(lengths["chosen"], rel=0.06)


def test_tokenizer_knows_every_text_and_gives_it_back(example):
    tokenizer = Tokenizer.from_pretrained(example / "model")
    assert load_pretrained(example / "model").config.vocab_size == tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.end_of_turn_id, tokenizer.end_of_text_id], False) == "<|im_end|><|endoftext|>"
    unknown = tokenizer.encode("?")
    for row in rows(example / "data" / "pairs.jsonl"):
        prompt = tokenizer.encode_prompt(row["prompt"], prefill="<think>\n")
        text = f"<|im_start|>user\n{row['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n<think>\n"
        assert tokenizer.decode(prompt, skip_special_tokens=False) == text
        for solution in (row["chosen"][0]["content"], row["rejected"][0]["content"]):
            ids = tiny.completion_ids(tokenizer, solution)
            assert tokenizer.decode(ids) == solution
            assert not set(unknown) & set(prompt + ids)


# The example and a job of the comparison on a fraction of the data and steps. A process of its own: training joins a
# process group.
SMALL = """
import sys
from pathlib import Path
import evaluate
import train
from redi.example import water_tank as toy
from tests.bench import compare
toy.TRAIN_PROBLEMS, toy.TEST_PROBLEMS, toy.MAX_NEW_TOKENS = 60, 5, 12
for name, steps in (("sft", "4"), ("sft-continued", "2"), ("redi", "2")):
    toy.STAGES[name] += ["--steps", steps]
"""


def run_small(code, directory):
    run = run_python("-c", SMALL + code, cwd=directory)
    assert run.returncode == 0, run.stderr
    return run


def test_example_runs_from_data_to_table_and_keeps_what_is_done(tmp_path):
    run = run_small("toy.run_example(train.main, evaluate.main, 'out', seed=5)", tmp_path)
    shown = run.stdout[run.stdout.index("4 of 4") :]
    for title in ("SFT  ", "SFT continued  ", "REDI  "):
        assert re.search(rf"^{title} .*±.*%.*%", shown, re.MULTILINE), shown
    assert "correct traces" in shown and "wrong traces" in shown and "Tank of 15 litres: " in shown
    for name in toy.STAGES:
        load_pretrained(tmp_path / "out" / name / "final")
    assert (tmp_path / "out/page.html").is_file() and shown.endswith("wrote out/page.html\n")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/metrics.jsonl")}
    assert len(written) == 3

    # As after an interruption: the last stage is missing, and one model's samples.
    shutil.rmtree(tmp_path / "out" / "redi")
    shutil.rmtree(tmp_path / "out" / "greedy" / "sft-final")
    again = run_small("toy.run_example(train.main, evaluate.main, 'out', seed=5)", tmp_path)
    assert again.stdout[again.stdout.index("4 of 4") :] == shown
    assert [path.parent.name for path, time in written.items() if path.stat().st_mtime_ns != time] == ["redi"]

    other = run_small("""
try:
    toy.run_example(train.main, evaluate.main, 'out', seed=6)
except ValueError as error:
    print(error)""", tmp_path)
    assert "--seed 5" in other.stdout


def test_example_runs_with_two_processes_from_nothing(tmp_path):
    """Rank 0 makes the data, all make the model: the same number of collectives on both."""
    run_example = "toy.run_example(train.main, evaluate.main, 'out', seed=5)"
    script = f"{SMALL}from redi.cli import run_command\nrun_command(lambda: {run_example})"
    (tmp_path / "example.py").write_text(script)
    run = run_python("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", tiny.free_port(),
                     "example.py", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert re.search(r"^REDI  .*±.*%.*%", run.stdout, re.MULTILINE) and "terminate called" not in run.stderr


def test_pairs_of_own_samples_from_sft_to_redi(tmp_path):
    """SFT, samples of the training problems, pairs of those samples, REDI on the pairs: the recipe without a teacher's
    errors."""
    code = """
import torch
from redi import distributed
import prepare_data
torch.set_num_threads(1)
distributed.init_process_group()
toy.prepare(Path("out"), seed=5)
sft = [*toy.STAGES["sft"], "--steps", "60", "--lr", "3e-3"]
toy.train_stage(train.main, sft, Path("out/start"), Path("out/data/positives.jsonl"), Path("out/sft"), 5)
evaluate.main("--model out/sft/final --problems out/data/teacher.jsonl --output out/own --samples 4 "
              "--max-new-tokens 40 --rows 64".split())
prepare_data.main("traces --input out/own/sft-final/teacher/samples.jsonl --problems out/data/teacher.jsonl "
                  "--output out/pairs --processes 1".split())
redi = [*toy.STAGES["redi"], "--steps", "3"]
toy.train_stage(train.main, redi, Path("out/sft/final"), Path("out/pairs/pairs.jsonl"), Path("out/redi"), 5)
"""
    run_small(code, tmp_path)
    out = tmp_path / "out"
    problems = {row["id"]: row["problem"] for row in rows(out / "data/teacher.jsonl")}
    samples = {id: [] for id in problems}
    for row in rows(out / "own/sft-final/teacher/samples.jsonl"):
        samples[row["id"]].append((row["response"], row["correct"] and row["finish_reason"] == "stop"))
    pairs = rows(out / "pairs/pairs.jsonl")
    assert len(pairs) > 5
    for pair in pairs:
        assert pair["prompt"] == [{"role": "user", "content": problems[pair["id"]]}]
        [chosen], [rejected] = ([message["content"] for message in pair[key]] for key in ("chosen", "rejected"))
        assert chosen.startswith("<think>\n") and (chosen, True) in samples[pair["id"]]
        assert (rejected, False) in samples[pair["id"]]
    # The model's own samples are likely under it, more so than the teacher's, and REDI moves the two apart.
    steps = rows(out / "redi/metrics.jsonl")
    assert [row["step"] for row in steps] == [1, 2, 3] and steps[0]["chosen_logp"] > -1


def test_comparison_measures_a_method_at_every_learning_rate(tmp_path):
    code = """
toy.SFT_STEPS = compare.SFT_STEPS = 2
compare.STAGE_2_STEPS = 2
compare.LEARNING_RATES[:] = ["3e-5", "3e-4"]
for method in ("SFT continued", "SFT on everything", "REDI, alpha 0.8"):
    for seed in (1, 2):
        compare._compare_sft(Path("out"), seed)
        compare._compare_doubled_sft(Path("out"), seed)
        compare._compare_method(Path("out"), seed, method)
table = compare._comparison(Path("out"), [1, 2], ["SFT continued", "SFT on everything", "REDI, alpha 0.8"])
print(compare._comparison_text(table, [1, 2]))
"""
    run = run_small(code, tmp_path)
    assert "REDI, alpha 0.8 - SFT continued, greedy" in run.stdout
    seed = tmp_path / "out" / "seed-2"
    settings = {name: json.loads((seed / name / "3e-4" / "run.json").read_text())["settings"] for name in
                ("sft-continued", "sft-on-everything", "redi-alpha-0.8")}
    updates = {name: (setting["steps"], setting["lr"]) for name, setting in settings.items()}
    assert set(updates.values()) == {("2", "0.0003")}
    sequences = {name: int(setting["batch_size"]) * (2 if name.startswith("redi") else 1)
                 for name, setting in settings.items()}  # fmt: skip
    assert set(sequences.values()) == {32}
    assert {setting["model"] for setting in settings.values()} == {"out/seed-2/sft/final"}
    everything = rows(seed / "data" / "everything.jsonl")
    pairs = rows(seed / "data" / "pairs.jsonl")
    assert [row["completion"] for row in everything] == [pair[key] for pair in pairs for key in ("chosen", "rejected")]


def test_comparison_means_errors_and_paired_differences():
    def row(method, accuracies, lr=None):
        values = [{"accuracy": a, "greedy": a, "tokens": 40.0, "hurried": 0.5} for a in accuracies]
        return {"method": method, **({} if lr is None else {"lr": lr}), **compare._summary(values)}

    one = row("SFT continued", [0.5, 0.6, 0.7])
    assert one["accuracy"] == pytest.approx(0.6)
    assert one["sem"] == pytest.approx(0.1 / 3**0.5)  # standard deviation 0.1 over 3 seeds
    table = {"baselines": [row("SFT", [0.5, 0.6, 0.7]), row("SFT, twice the steps", [0.5, 0.6, 0.7])], "rows": []}
    for lr in map(float, compare.LEARNING_RATES):
        table["rows"] += [row("SFT continued", [0.5, 0.6, 0.7], lr), row("REDI, alpha 0.8", [0.7, 0.8, 0.6], lr)]
    text = compare._comparison_text(table, [1, 2, 3])
    # Differences 0.2, 0.2, -0.1: mean 0.1, standard deviation 0.1732, error 0.1.
    assert "REDI, alpha 0.8 - SFT continued, sampled: 10.0 ± 10.0, above 0 on 2 of 3 seeds" in text
    assert "SFT, twice the steps - SFT, greedy: 0.0 ± 0.0, above 0 on 0 of 3 seeds" in text


@pytest.mark.slow
@pytest.mark.parametrize("seed", [101, 102])
def test_negatives_help_on_a_seed_of_ones_own(seed, tmp_path):
    run_python("train.py", "example", "--seed", seed, "--output", tmp_path, timeout=None).check_returncode()
    for folder, least in (("sampled", 0.05), ("greedy", 0.1)):
        results = toy.results_by_model(tmp_path / folder)
        assert results["redi-final"]["pass@1"] > results["sft-continued-final"]["pass@1"] + least
    # The collapse monitor stays silent on the example's REDI, and reports the symmetric objective at twice its rate.
    import train

    train.main(["redi", "--alpha", "1", "--lr", "3e-4", "--steps", "150", "--batch-size", "16", "--model",
                str(tmp_path / "sft/final"), "--data", str(tmp_path / "data/pairs.jsonl"), "--output",
                str(tmp_path / "symmetric"), "--seed", str(seed), "--recompute", "nothing"])  # fmt: skip
    for run, collapses in (("redi", False), ("symmetric", True)):
        history, rows = monitor.new_history(), toy.read_rows(tmp_path / run / "metrics.jsonl")
        assert any([monitor.watch(history, row, 1.5) for row in rows]) == collapses, run

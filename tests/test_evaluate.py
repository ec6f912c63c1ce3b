import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import evaluate
from redi import toy
from redi.checkpoint import load_pretrained, save_pretrained
from redi.generation import generate
from redi.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A directory with random weights, a context of 128 tokens and a tokenizer."""
    directory = tmp_path_factory.mktemp("run") / "final"
    toy.write_model(directory, seed=0)
    return directory


@pytest.fixture
def problems(tmp_path) -> Path:
    return write(tmp_path / "sums.jsonl", [{"id": f"s{i}", "problem": f"{i}+{i}", "answer": str(2 * i)} for i in range(5)])


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(model, problems, output, *more) -> dict:
    """evaluate.py in this process. Returns results.json."""
    argv = ["--model", model, "--problems", problems, "--output", output, "--samples", 3, *more]
    evaluate.main([str(word) for word in argv])
    return json.loads((output / "results.json").read_text())


def command(*argv, ranks=None) -> list[str]:
    start = [sys.executable] if ranks is None else [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    return [*start, str(ROOT / "evaluate.py"), *map(str, argv)]


def test_samples_and_results(model, problems, tmp_path, capsys):
    results = run(model, problems, tmp_path / "out")
    [row] = results["results"]
    samples = read(tmp_path / "out" / row["model"] / "sums" / "samples.jsonl")
    assert [(s["id"], s["sample"]) for s in samples] == [(f"s{i}", k) for i in range(5) for k in range(3)]
    assert list(samples[0]) == ["id", "sample", "response", "finish_reason", "tokens", "answer", "correct"]
    assert all(s["response"].startswith("<think>\n") for s in samples)
    assert (row["benchmark"], row["problems"], row["samples"]) == ("sums", 5, 3)
    assert row["pass@1"] == sum(s["correct"] for s in samples) / 15
    assert row["truncated"] == sum(s["finish_reason"] == "length" for s in samples) / 15
    assert row["mean_tokens"] == sum(s["tokens"] for s in samples) / 15
    assert set(row["pass@k"]) == {"1", "2", "3"}
    assert row["settings"]["temperature"] == 0.6 and row["settings"]["prefill"] == "<think>\n"
    assert {"checker", "torch", "tokenizers"} <= set(row["versions"])
    printed = capsys.readouterr()
    assert re.search(r"sums +\S+-final +5 +\d+\.\d ± \d+\.\d +\d+\.\d \(k = 3\) +\d+\.\d % +\d+", printed.out)
    assert "context of 128 tokens" in printed.err


def test_the_response_is_the_text_of_the_sampled_ids(model, problems, tmp_path):
    """Against generate() called by hand: prompt, keys, stop ids, decoding."""
    run(model, problems, tmp_path / "out", "--seed", "4", "--samples", "1")
    tokenizer, weights = Tokenizer.from_pretrained(model), load_pretrained(model)
    for sample in read(next((tmp_path / "out").rglob("samples.jsonl"))):
        message = {"role": "user", "content": f"{sample['id'][1:]}+{sample['id'][1:]}"}
        prompt_ids = tokenizer.encode(tokenizer.render_prompt([message]) + "<think>\n")
        request = evaluate.Request(prompt_ids, evaluate.sample_key(4, sample["id"], 0), 128 - len(prompt_ids))
        [(_, ids, reason)] = generate(weights, [request], tokenizer.stop_ids)
        assert (sample["finish_reason"], sample["tokens"]) == (reason, len(ids))
        text = tokenizer.decode(ids[:-1] if reason == "stop" else ids)
        assert sample["response"] == "<think>\n" + text


def killed_after(lines: int, out: Path, start: list[str]) -> None:
    """Start a command and kill -9 it once it has drawn that many samples. Of torchrun only the parent is
    killed."""
    process = subprocess.Popen(start, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while sum(path.read_bytes().count(b"\n") for path in out.rglob("samples*.jsonl")) < lines:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()


def check_finishes_as_if_nothing_had_happened(start: list[str], expected: Path, out: Path) -> None:
    finished = subprocess.run(start, env=ENVIRONMENT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("pass@1") == 1  # one table, not one a rank
    folder = next(expected.rglob("samples.jsonl")).parent.relative_to(expected)
    assert sorted(path.name for path in (out / folder).iterdir()) == ["samples.jsonl", "settings.json"]
    for name in (folder / "samples.jsonl", folder / "settings.json", "results.json"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()


def test_killed_and_continued_with_two_ranks_gives_the_same_bytes(model, problems, tmp_path):
    run(model, problems, tmp_path / "expected", "--samples", "12")
    out = tmp_path / "out"
    argv = ("--model", model, "--problems", problems, "--output", out, "--samples", 12, "--rows", 2)
    killed_after(3, out, command(*argv))
    with open(next(out.rglob("samples.jsonl")), "ab") as file:
        file.write(b'{"id": "s1", "sam')  # what a kill in the middle of a write leaves
    check_finishes_as_if_nothing_had_happened(command(*argv, ranks=2), tmp_path / "expected", out)


@pytest.mark.slow
def test_killed_torchrun_and_continued_with_three_ranks_gives_the_same_bytes(model, problems, tmp_path):
    run(model, problems, tmp_path / "expected", "--samples", "40")
    out = tmp_path / "out"
    argv = ("--model", model, "--problems", problems, "--output", out, "--samples", 40, "--rows", 2)
    for lines in (5, 60, 110):
        killed_after(lines, out, command(*argv, ranks=2))
    check_finishes_as_if_nothing_had_happened(command(*argv, ranks=3), tmp_path / "expected", out)


def test_two_runs_do_not_write_to_one_folder(model, problems, tmp_path, monkeypatch):
    run(model, problems, tmp_path / "out")
    clock = iter(range(0, 10**6, 6))
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(evaluate.time, "sleep", lambda seconds: None)
    with evaluate.locked(next((tmp_path / "out").rglob("sums"))):
        with pytest.raises(ValueError, match="another evaluation is writing here"):
            run(model, problems, tmp_path / "out")


def test_a_rerun_draws_nothing_and_changes_no_byte(model, problems, tmp_path, monkeypatch):
    run(model, problems, tmp_path / "out")
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    (tmp_path / "out" / "results.json.partial-77").write_bytes(b"{")  # of a run killed while it wrote the table
    monkeypatch.setattr(evaluate, "load_pretrained", None)
    run(model, problems, tmp_path / "out")
    assert files == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_more_samples_continue_and_fewer_use_the_first(model, problems, tmp_path, monkeypatch):
    direct = run(model, problems, tmp_path / "direct", "--samples", "4")
    run(model, problems, tmp_path / "out", "--samples", "2", "--limit", "3")
    fewer = run(model, problems, tmp_path / "few", "--samples", "2")
    assert run(model, problems, tmp_path / "out", "--samples", "4") == direct
    monkeypatch.setattr(evaluate, "load_pretrained", None)
    assert run(model, problems, tmp_path / "out", "--samples", "2") == fewer


def test_a_rank_file_met_twice_counts_once(model, problems, tmp_path, monkeypatch):
    """A kill after the merged file was put in place and before the rank's file was removed."""
    run(model, problems, tmp_path / "out")
    main = next((tmp_path / "out").rglob("samples.jsonl"))
    whole = main.read_bytes()
    lines = whole.splitlines(keepends=True)
    (main.parent / "samples.rank-1.jsonl").write_bytes(b"".join(lines[4:9]) + b"{")
    (main.parent / "samples.jsonl.partial-77").write_bytes(b"{")
    main.write_bytes(b"".join(reversed(lines[:7])))
    (main.parent / "samples.rank-12.jsonl").write_bytes(b"".join(lines[9:]))
    monkeypatch.setattr(evaluate, "load_pretrained", None)
    run(model, problems, tmp_path / "out")
    assert main.read_bytes() == whole
    assert sorted(path.name for path in main.parent.iterdir()) == ["samples.jsonl", "settings.json"]


@pytest.mark.parametrize(
    "flag, key",
    [
        (("--temperature", "1.0"), "temperature"), (("--top-p", "1"), "top_p"), (("--seed", "1"), "seed"),
        (("--prefill", "<think>"), "prefill"), (("--system-prompt", "Be brief."), "system_prompt"),
        (("--max-new-tokens", "9"), "max_new_tokens"), (("--dtype", "bfloat16"), "dtype"),
        (("--prompt-template", "open-r1"), "prompt_template"),
    ],
)  # fmt: skip
def test_samples_of_other_settings_are_not_mixed(model, problems, tmp_path, flag, key):
    folder = tmp_path / "out" / evaluate.storage_name(str(model)) / "sums"
    folder.mkdir(parents=True)
    args = ["--model", str(model), "--problems", str(problems), "--output", str(tmp_path / "out")]
    parsed = evaluate.parse_arguments(args)
    settings = evaluate.Model(str(model), parsed, evaluate.torch.device("cpu")).settings
    digest = evaluate.read_benchmark(str(problems), None).digest
    (folder / "settings.json").write_text(json.dumps({**settings, "data_digest": digest}))
    write(folder / "samples.jsonl", [{"id": "s0", "sample": 0, "response": "", "correct": False}])
    before = (folder / "samples.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"holds samples made with {key} "):
        evaluate.main([*args, *flag])
    assert (folder / "samples.jsonl").read_bytes() == before


def test_changed_problems_or_weights_are_noticed(model, problems, tmp_path):
    other = tmp_path / model.parent.name / "final"
    shutil.copytree(model, other)
    run(other, problems, tmp_path / "out", "--limit", "1")
    toy.write_model(tmp_path / "new", seed=1)
    shutil.copy(tmp_path / "new" / "model.safetensors", other)
    with pytest.raises(ValueError, match="model_digest"):
        run(other, problems, tmp_path / "out", "--limit", "1")
    problems.write_text(problems.read_text() + '{"id": "x", "problem": "1", "answer": "1"}\n')
    with pytest.raises(ValueError, match="data_digest"):
        run(model, problems, tmp_path / "out", "--limit", "1")


def test_samples_are_scored_anew_when_the_checker_changes(model, problems, tmp_path, monkeypatch):
    assert run(model, problems, tmp_path / "out")["results"][0]["pass@1"] == 0
    monkeypatch.setattr(evaluate, "load_pretrained", None)
    monkeypatch.setattr(evaluate, "is_correct", lambda response, gold: True)
    monkeypatch.setattr(evaluate, "checker_version", lambda: "2")
    [row] = run(model, problems, tmp_path / "out")["results"]
    assert row["pass@1"] == 1 and row["versions"]["checker"] == "2"
    assert all(s["correct"] for s in read(next((tmp_path / "out").rglob("samples.jsonl"))))


def test_models_with_one_directory_name_and_several_benchmarks(model, problems, tmp_path):
    other = tmp_path / "sft" / "final"
    toy.write_model(other, seed=1)
    more = write(tmp_path / "more.jsonl", [{"problem": "1+1", "answer": 2}])
    argv = ["--problems", problems, more, "--output", tmp_path / "out", "--samples", 1, "--limit", 2, "--max-new-tokens", 5]
    evaluate.main([str(word) for word in ["--model", model, *argv]])
    evaluate.main([str(word) for word in ["--model", other, *argv]])  # results of the first stay
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    names = [f"{model.parent.name}-final", "sft-final"]
    assert {(row["benchmark"], row["model"]) for row in rows} == {(b, m) for b in ("sums", "more") for m in names}
    assert {row["mean_tokens"] <= 5 for row in rows} == {True}
    together = tmp_path / "together"
    argv[argv.index("--output") + 1] = together
    evaluate.main([str(word) for word in ["--model", other, model, *argv]])
    assert (together / "results.json").read_bytes() == (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(ValueError, match="both be stored as"):
        evaluate.main([str(word) for word in ["--model", other, tmp_path / "elsewhere" / "sft" / "final", *argv]])
    copy = write(tmp_path / "sft" / "sums.jsonl", [{"problem": "1", "answer": "1"}])
    with pytest.raises(ValueError, match="both be stored as 'sums'"):
        evaluate.main(["--model", str(other), "--problems", str(problems), str(copy), "--output", str(together)])


def test_storage_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "redi" / "step-000100").mkdir(parents=True)
    for path in ("redi/step-000100", "redi/step-000100/", tmp_path / "redi" / "step-000100"):
        assert evaluate.storage_name(str(path)) == "redi-step-000100"
    assert evaluate.storage_name("Qwen/Qwen2.5-Math-1.5B") == "Qwen-Qwen2.5-Math-1.5B"
    assert evaluate.storage_name("redi/..") == f"{tmp_path.parent.name}-{tmp_path.name}"


def captured_prompts(monkeypatch, model, problems, tmp_path, *flags) -> list[str]:
    prompts, tokenizer = [], Tokenizer.from_pretrained(model)

    def fake_generate(weights, requests, stop_ids, *rest):
        for i, request in enumerate(requests):
            prompts.append(tokenizer.decode(request.prompt_ids, skip_special_tokens=False))
            yield i, [tokenizer.end_of_turn_id], "stop"

    monkeypatch.setattr(evaluate, "generate", fake_generate)
    run(model, problems, tmp_path / "out", "--samples", "1", "--limit", "1", *flags)
    return prompts


def test_prompts(model, problems, tmp_path, monkeypatch):
    changed = tmp_path / "x" / "final"  # toy tokenizer knows few words: what it drops is not under test here
    shutil.copytree(model, changed)
    [prompt] = captured_prompts(monkeypatch, changed, problems, tmp_path, "--prefill", "<think>", "--system-prompt", "0")
    assert prompt.startswith("<|im_start|>system\n0<|im_end|>") and prompt.endswith("assistant\n<think>")
    [sample] = read(next((tmp_path / "out").rglob("samples.jsonl")))
    assert (sample["response"], sample["tokens"]) == ("<think>", 1)
    [prompt] = captured_prompts(monkeypatch, changed, problems, tmp_path / "2", "--prefill", r"<think>\n\n")
    assert prompt.endswith("assistant\n<think>\n\n") and "system" not in prompt


def test_samples_of_rows_without_an_id_and_other_spellings(tmp_path):
    path = write(
        tmp_path / "mixed.jsonl",
        [
            {"problem": "a", "answer": "1"},
            {"question": "b", "final_answer": ["2", "two"]},
            {"problem": "c", "solution": r"so \boxed{\frac{3}{4}}.", "unique_id": "u"},
            {"problem": "d", "answer": 142.0, "id": 7},
            {"problem": "e", "answer": [5, 0.5]},
            {"problem": "f", "answer": None, "solution": r"\boxed{6}"},
        ],
    )
    benchmark = evaluate.read_benchmark(str(path), None)
    assert benchmark.answers == {
        "mixed-0": ["1"], "mixed-1": ["2", "two"], "u": [r"\frac{3}{4}"], "7": ["142"], "mixed-4": ["5", "0.5"], "mixed-5": ["6"]
    }  # fmt: skip
    assert benchmark.problems["mixed-1"] == "b"
    assert list(evaluate.read_benchmark(str(path), 2).problems) == ["mixed-0", "mixed-1"]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"id": "s0", "problem": "p", "answer": "1"}', "line 6: id 's0' is already that of line 1"),
        ('{"id": "n", "problem": "p"}', "line 6: expected an answer"),
        ('{"id": "n", "problem": "p", "answer": " "}', "line 6: expected an answer"),
        ('{"id": "n", "problem": "p", "answer": []}', "line 6: the list of answers is empty"),
        ('{"id": "n", "problem": "p", "answer": ["1", null]}', "line 6: expected an answer"),
        ('{"id": "n", "problem": "p", "answer": true}', "line 6: expected an answer"),
        ('{"id": "n", "problem": "p", "solution": "no box"}', "line 6: expected an answer"),
        ('{"id": "n", "answer": "1"}', "line 6: expected a text under 'problem' or 'question'"),
        ('{"id": "n", "problem": 3, "answer": "1"}', "line 6: expected a text"),
        ('{"id": "n", "problem', "line 6: not valid JSON"),
        ('["n"]', "line 6: expected a JSON object"),
    ],
)
def test_bad_problems_are_named(problems, line, message):
    problems.write_text(problems.read_text() + line + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{problems}, {message}")):
        evaluate.read_benchmark(str(problems), None)


def test_bad_input_by_the_command_line(model, problems, tmp_path):
    """One clear sentence, exit status 1, nothing written."""
    long = write(tmp_path / "long.jsonl", [{"problem": "9" * 500, "answer": "1"}])
    weightless = tmp_path / "weightless"
    shutil.copytree(model, weightless)
    (weightless / "model.safetensors").unlink()
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    out = tmp_path / "out"
    for argv, message in [
        (("--model", model, "--problems", long, "--output", out), "problem 'long-0': the prompt has"),
        (("--model", model, "--problems", tmp_path / "none.jsonl", "--output", out), "none.jsonl cannot be read"),
        (("--model", model, "--problems", empty, "--output", out), "holds no problems"),
        (("--model", model, "--problems", problems, "--output", out, "--samples", 0), "--samples is 0"),
        (("--model", model, "--problems", problems, "--output", out, "--top-p", 0), "--top-p is 0"),
        (("--model", model, "--problems", problems, "--output", out, "--temperature", "nan"), "--temperature is nan"),
        (("--model", model, "--problems", problems), "give --model and --output"),
        (("--score", problems, "--problems", problems, "--model", model), "without --model"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            evaluate.main([str(word) for word in argv])
    assert not out.exists()
    broken = command("--model", weightless, "--problems", problems, "--output", out)
    finished = subprocess.run(broken, env=ENVIRONMENT, capture_output=True, text=True)
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    assert finished.stderr.startswith("error: ") and "weights" in finished.stderr and finished.stderr.count("\n") == 1


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(model, problems, tmp_path):
    small = tmp_path / "small" / "final"
    shutil.copytree(model, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 20}))
    with pytest.raises(ValueError, match="ids, the model only 20"):
        run(small, problems, tmp_path / "out")


def test_weights_that_are_not_finite_are_refused(model, problems, tmp_path):
    weights = load_pretrained(model)
    evaluate.torch.nn.init.constant_(weights.model.norm.weight, float("nan"))
    save_pretrained(weights, tmp_path / "nan", Tokenizer.from_pretrained(model))
    with pytest.raises(ValueError, match="not finite"):
        run(tmp_path / "nan", problems, tmp_path / "out")


def score(samples: Path, problems: Path, *more) -> None:
    evaluate.main(["--score", str(samples), "--problems", str(problems), *map(str, more)])


def test_scoring_our_own_samples_gives_our_own_table(model, problems, tmp_path):
    [ours] = run(model, problems, tmp_path / "out")["results"]
    samples = next((tmp_path / "out").rglob("samples.jsonl"))
    score(samples, problems, "--output", tmp_path / "scored")
    [row] = json.loads((tmp_path / "scored" / "results.json").read_text())["results"]
    same = set(ours) - {"model", "path", "settings"}
    assert {key: row[key] for key in same} == {key: ours[key] for key in same}
    assert next((tmp_path / "scored").rglob("samples.jsonl")).read_bytes() == samples.read_bytes()


def test_scoring_what_other_engines_write(problems, tmp_path, capsys):
    right = [rf"<think>Wait, Wait.</think> \boxed{{{2 * i}}}" for i in range(5)]
    forms = [
        {"id": "s0", "response": [right[0], "no box"]},
        {"id": "s1", "outputs": [{"text": right[1], "finish_reason": "stop", "token_ids": [1, 2]}, {"text": right[1]}]},
        {"id": "s2", "responses": ["no", "none"]},
        {"id": "s3", "sample": 1, "response": right[3]},
        {"id": "s4", "response": right[4]},
        {"id": "s3", "sample": 0, "response": r"\boxed{1} \ud800"},
        {"id": "s4", "response": r"\boxed{8.0}"},
    ]
    path = write(tmp_path / "vllm.jsonl", forms)
    score(path, problems, "--output", tmp_path / "out")
    [row] = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert row["pass@1"] == pytest.approx(6 / 10) and row["pass@k"]["2"] == pytest.approx(4 / 5)
    assert row["sem"] == pytest.approx(0)  # both columns: 3 of 5
    assert (row["truncated"], row["mean_tokens"], row["waits_per_token"]) == (None, None, None)
    assert row["waits_per_response"] == pytest.approx(2 * 5 / 10)
    scored = read(next((tmp_path / "out").rglob("samples.jsonl")))
    assert [s["correct"] for s in scored if s["id"] == "s3"] == [False, True]
    score(path, problems, "--samples", "1", "--limit", "1")
    assert "100.0" in capsys.readouterr().out

    whole = [{"id": f"s{i}", "outputs": [{"text": "a", "finish_reason": "length", "token_ids": [1, 2, 3]}]} for i in range(5)]
    score(write(tmp_path / "whole.jsonl", whole), problems, "--output", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [(r["truncated"], r["mean_tokens"]) for r in rows if "whole" in r["model"]] == [(1.0, 3.0)]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"id": "s0", "response": "a"}], "problem 's1' of sums lacks sample 0 of 1"),
        ([{"id": f"s{i}", "response": ["a"] * (2 - i // 4)} for i in range(5)], "problem 's4' of sums lacks sample 1 of 2"),
        ([{"id": "other", "response": "a"}], "line 1: id 'other' is not among the problems"),
        ([{"id": "s0", "text": "a"}], "line 1: expected 'response'"),
        ([{"id": "s0", "response": [3]}], "line 1: expected 'response'"),
        ([{"id": "s0", "sample": 0, "response": "a"}] * 2, "line 2: sample 0 of id 's0' is there twice"),
    ],
)
def test_samples_that_cannot_be_scored_are_named(problems, tmp_path, rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        score(write(tmp_path / "bad.jsonl", rows), problems, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_papers_benchmarks_are_read_whole(shared_data):
    sizes = {"math500": 500, "aime24": 30, "amc23": 83, "minerva": 272, "olympiad_bench": 675}
    for name, size in sizes.items():
        benchmark = evaluate.read_benchmark(str(shared_data / "benchmarks" / f"{name}.jsonl"), None)
        assert len(benchmark.problems) == size and all(benchmark.answers.values())
    amc = evaluate.read_benchmark(str(shared_data / "benchmarks" / "amc23.jsonl"), None)
    assert evaluate.scored({"id": "amc23-0", "response": r"\boxed{142}"}, amc)["correct"]


def test_hostile_responses_are_scored_in_bounded_time(shared_data, tmp_path):
    hostile = [json.loads(line) for line in open(shared_data / "answers" / "hostile.jsonl", encoding="utf-8")]
    rows = [{"id": str(i), "problem": "p", "answer": row["gold"] or "0"} for i, row in enumerate(hostile)]
    responses = [{"id": str(i), "response": rf"\boxed{{{row['pred']}}}"} for i, row in enumerate(hostile)]
    samples = write(tmp_path / "samples.jsonl", responses)
    started = time.process_time()
    score(samples, write(tmp_path / "hostile.jsonl", rows), "--output", tmp_path / "out")
    assert time.process_time() - started < 60
    scored = read(next((tmp_path / "out").rglob("samples.jsonl")))
    assert len(scored) == len(hostile)
    assert not [row for row, verdict in zip(hostile, scored) if row["expect"] is False and verdict["correct"]]

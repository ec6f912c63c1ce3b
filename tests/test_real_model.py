"""tests/bench/real_model.py: the split, the numbers of its table, and all of it on a tiny model and a few traces."""

import argparse
import json
import math
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import tiny

from bench import real_model

ROOT = Path(__file__).resolve().parent.parent
SIZES = ["--rows", 80, "--held-out", 10, "--eval-pairs", 3, "--eval-every", 1, "--sft-steps", 2, "--steps", 3,
         "--pairs", 2, "--max-new-tokens", 8, "--methods", "sft-continued", "redi", "--rates", "1e-3", "--seeds", 4,
         "--threads", 1, "--jobs", 2, "--max-prompt-tokens", 400, "--max-response-tokens", 400]  # fmt: skip


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(tmp_path: Path, *more) -> argparse.Namespace:
    words = ["--model", "none", "--traces", tmp_path / "traces.jsonl", "--output", tmp_path / "out", *more]
    return real_model.parse_arguments(list(map(str, words)))


def test_a_problem_is_on_one_side_whatever_the_order_of_its_rows(tmp_path):
    def trace(i, **changes):
        return {"problem": f"What is {i} + {i}?", "answer": 2 * i, "generations": ["a", "b"], **changes}

    traces = [trace(i) for i in range(40)] + [trace(i, problem=f" What is {i} + {i}?\n") for i in range(40)]
    unusable = [trace(50, problem_is_valid="No"), trace(51, answer=None), trace(52, generations=None)]
    unusable.append(trace(53, problem=None))
    sides = []
    for name, given in (("one", traces + unusable), ("other", unusable + traces[::-1])):
        write_rows(tmp_path / name / "traces.jsonl", given)
        args = arguments(tmp_path / name, "--held-out", 10)
        args.output.mkdir()
        real_model.split_problems(args)
        data = args.output / "data"
        problems, train, held_out = (rows(data / f"{file}.jsonl") for file in ("problems", "train", "held-out"))
        texts = {row["problem"] for row in problems}
        assert len(texts) == len(problems) == 10 and len(held_out) == 20 and len(train) == len(given) - 20
        assert {row["problem"].strip() for row in held_out} == texts
        assert not texts & {(row["problem"] or "").strip() for row in train}
        assert all(row["answer"] == [str(2 * int(row["problem"].split()[2]))] for row in problems)
        sides.append(problems)
    assert sides[0] == sides[1]


def test_too_few_problems(tmp_path):
    write_rows(tmp_path / "traces.jsonl", [{"problem": "?", "answer": "1", "generations": ["1"]}])
    args = arguments(tmp_path)
    args.output.mkdir()
    with pytest.raises(ValueError, match="1 usable problems, too few to hold out 200"):
        real_model.split_problems(args)


@pytest.mark.parametrize("jobs", [1, 2])
def test_runs_are_side_by_side_and_none_begins_after_a_failure(tmp_path, jobs):
    args, meeting, begun = arguments(tmp_path, "--jobs", jobs), threading.Barrier(jobs), []

    def fail():
        meeting.wait(60)  # where so many run at once, all pass
        raise SystemExit("it failed")

    with pytest.raises(SystemExit, match="it failed"):
        real_model.side_by_side(args, [fail] * jobs + [partial(begun.append, i) for i in range(100)])
    assert not begun


def test_an_output_is_of_one_setting(tmp_path):
    arguments(tmp_path).output.mkdir()
    for more in ([], ["--seeds", 5, 6], ["--rates", "1e-5", "--methods", "dpo", "--samples", 2]):
        real_model.keep_settings(arguments(tmp_path, *more))
    with pytest.raises(ValueError, match="out was begun with --sft-steps 60, not 61"):
        real_model.keep_settings(arguments(tmp_path, "--sft-steps", 61))


def test_errors_over_problems_and_over_seeds_by_hand(tmp_path):
    """Two seeds, four problems; REDI against SFT continued and SFT, each problem beside itself."""
    methods = ["--methods", "sft-continued", "redi"]
    args = arguments(tmp_path, "--held-out", 4, "--seeds", 0, 1, "--rates", "1e-3", *methods)
    write_rows(args.output / "data" / "problems.jsonl", [{"id": f"p{i}"} for i in range(4)])
    right = {"sft": ["1000"], "sft-continued-0.001": ["1000", "1100"], "redi-0.001": ["1100", "1110"]}
    for name, by_seed in right.items():
        for seed, marks in enumerate(by_seed):
            samples = [
                {"id": f"p{i}", "sample": 0, "correct": mark == "1", "tokens": 10 * i, "answer": "5" if i else None}
                for i, mark in enumerate(marks)
            ]
            run = args.output / name if name == "sft" else args.output / f"seed-{seed}" / name
            write_rows(run / "eval" / "model" / "problems" / "samples.jsonl", samples[::-1])
            lines = [{"step": 0, "eval_chosen_logp": -1.0}, {"step": 1}, {"step": 2, "eval_chosen_logp": -1.0 - seed}]
            write_rows(run / "metrics.jsonl", lines)
    sft, control, redi = real_model.summarise(args)["rows"]
    assert redi["method"] == "REDI, α 0.8" and redi["seeds"] == [0, 1] and redi["rate"] == 1e-3
    assert (redi["boxed"], redi["tokens"], redi["eval_chosen_logp"]) == (0.75, 15, -1.5)
    assert "eval_rejected_logp" not in redi
    # By problem (1, 1, 1/2, 0): standard deviation sqrt(0.6875 / 3). By seed 2/4, 3/4: sqrt(2) / 8.
    assert redi["accuracy"] == pytest.approx(
        {"mean": 0.625, "se_problems": math.sqrt(0.6875 / 3) / 2, "se_seeds": math.sqrt(2) / 8 / math.sqrt(2)})
    # REDI minus the control: (0, 1, 0, 0) and (0, 0, 1, 0); by problem (0, 1/2, 1/2, 0), by seed 1/4 twice.
    assert redi["minus SFT continued"] == pytest.approx(
        {"mean": 0.25, "se_problems": math.sqrt(4 / 16 / 3) / 2, "se_seeds": 0})
    assert redi["minus SFT"]["mean"] == 0.375 and "minus SFT continued" not in control and "minus SFT" not in sft
    assert sft["accuracy"] == pytest.approx({"mean": 0.25, "se_problems": 0.25, "se_seeds": None})
    half = real_model.summarise(argparse.Namespace(**{**vars(args), "part": "second half"}))
    assert half["problems"] == 2 and half["rows"][2]["accuracy"]["mean"] == 0.25
    assert "| REDI, α 0.8 | 0.001 | 25.0 ± 25.0 (± 25.0) | +25.0 ± 25.0 (± 25.0) | " in real_model.table_text(half)


@pytest.mark.peers("transformers", "matplotlib")
def test_traces_to_table_and_figure(shared_data, tmp_path):
    traces = shared_data / "traces" / "traces.jsonl"
    texts = [text for row in rows(traces) for text in row["generations"] or []]
    tiny.write_model(tmp_path / "model", texts[:200], 1000, model_type="llama", max_position_embeddings=1024)

    def run() -> str:
        words = ["tests/bench/real_model.py", "--model", tmp_path / "model", "--traces", traces, *SIZES, "--output",
                 tmp_path / "out"]  # fmt: skip
        result = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                                env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    first = run()
    parity = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert parity["prompts"] == parity["same_text"] == parity["same_ids"] == parity["same_greedy_tokens"] == 4
    assert parity["largest_logit_difference"] < 1e-4
    data = tmp_path / "out" / "data"
    held_out = {row["problem"] for row in rows(data / "problems.jsonl")}
    for name in ("train/positives", "train/pairs"):
        trained_on = {row["prompt"][-1]["content"].strip() for row in rows(data / f"{name}.jsonl")}
        assert len(trained_on) > 10 and not trained_on & held_out
    assert {row["prompt"][-1]["content"].strip() for row in rows(data / "eval-pairs.jsonl")} <= held_out
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    models = [(row["method"], row["rate"]) for row in table["rows"]]
    assert models == [("as it came", None), ("SFT", 2e-4), ("SFT continued", 1e-3), ("REDI, α 0.8", 1e-3)]
    assert all(0 <= row["accuracy"]["mean"] <= 1 for row in table["rows"])
    assert "eval_rejected_logp" in table["rows"][3] and "minus SFT continued" in table["rows"][3]
    curve = real_model.held_out_curve(tmp_path / "out" / "seed-4" / "redi-0.001")
    assert [line["step"] for line in curve] == [0, 1, 2, 3]
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "seed-4" / "redi-0.001" / "final" / "model.safetensors").exists()

    again = run()
    assert "->" in first and "->" not in again  # no command was run a second time
    assert again == first[first.index("Accuracy on") :]

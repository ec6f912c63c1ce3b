"""tests/bench/real_model.py: the choice of rates, the numbers of its table, and all of it on the embedded example."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from bench import real_model
from redi.example import water_tank as toy

ROOT = Path(__file__).resolve().parent.parent
SIZES = ["--prefill", r"<think>\n", "--sft-steps", 60, "--sft-rate", "3e-3", "--sft-batch-size", 16, "--steps", 3,
         "--pairs", 2, "--eval-every", 1, "--samples", 2, "--max-new-tokens", 40, "--max-tokens", 128, "--seeds", 4,
         "--methods", "sft-continued", "redi", "--rates", "1e-4", "--negatives", "own", "--threads", 1]  # fmt: skip


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_samples(output: Path, problems: str, marks: str) -> None:
    """A sample a problem (p0, p1, …), right where its mark is 1."""
    samples = [{"id": f"p{i}", "sample": 0, "correct": mark == "1", "tokens": 10 * i, "answer": "5" if i else None,
                "finish_reason": "stop" if i else "length"} for i, mark in enumerate(marks)]  # fmt: skip
    write_rows(output / "eval/model" / problems / "samples.jsonl", samples[::-1])


def arguments(tmp_path: Path, *more) -> argparse.Namespace:
    for name in ("validation", "test"):
        write_rows(tmp_path / f"{name}.jsonl", [{"id": f"p{i}", "problem": "?", "answer": 1} for i in range(4)])
    words = ["--model", "none", "--output", tmp_path / "out", "--samples", 1, *more]
    for name in ("train", "validation", "test"):
        words += [f"--{name}", tmp_path / f"{name}.jsonl"]
    return real_model.parse_arguments(list(map(str, words)))


def test_errors_over_problems_and_over_seeds_by_hand(tmp_path):
    """Two seeds, four problems; REDI against SFT continued and SFT, each problem beside itself."""
    args = arguments(tmp_path, "--seeds", 0, 1, "--rates", "1e-3", "--methods", "sft-continued", "redi", "--negatives",
                     "own")  # fmt: skip
    right = {"sft": ["1000"], "sft-continued": ["1000", "1100"], "redi": ["1100", "1110"]}
    for name, by_seed in right.items():
        for seed, marks in enumerate(by_seed):
            run = args.output / name if name == "sft" else args.output / f"own/{name}-0.001-seed-{seed}"
            write_samples(run, "test", marks)
            lines = [{"step": 0, "eval_chosen_logp": -1.0}, {"step": 1}, {"step": 2, "eval_chosen_logp": -1.0 - seed}]
            write_rows(run / "metrics.jsonl", lines)
    sft, control, redi = real_model.summarise(args)["rows"]
    assert (redi["method"], redi["negatives"], redi["seeds"], redi["rate"]) == ("REDI, α 0.8", "own", [0, 1], 1e-3)
    assert [redi[key] for key in ("boxed", "truncated", "tokens", "eval_chosen_logp")] == [0.75, 0.25, 15, -1.5]
    assert "eval_rejected_logp" not in redi
    # By problem (1, 1, 1/2, 0): standard deviation sqrt(0.6875 / 3). By seed 2/4, 3/4: sqrt(2) / 8.
    assert redi["accuracy"] == pytest.approx(
        {"mean": 0.625, "se_problems": math.sqrt(0.6875 / 3) / 2, "se_seeds": math.sqrt(2) / 8 / math.sqrt(2)})
    # REDI minus the control: (0, 1, 0, 0) and (0, 0, 1, 0); by problem (0, 1/2, 1/2, 0), by seed 1/4 twice.
    assert redi["minus SFT continued"] == pytest.approx(
        {"mean": 0.25, "se_problems": math.sqrt(4 / 16 / 3) / 2, "se_seeds": 0})
    assert redi["minus SFT"]["mean"] == 0.375 and "minus SFT continued" not in control and "minus SFT" not in sft
    assert sft["accuracy"] == pytest.approx({"mean": 0.25, "se_problems": 0.25, "se_seeds": None})
    text = real_model.table_text(real_model.summarise(args))
    assert "| REDI, α 0.8 | own | 0.001 | 62.5 ± 23.9 (± 12.5) | +25.0 ± 14.4 (± 0.0) | +37.5 ± " in text


def test_a_rate_is_chosen_on_the_validation_problems(tmp_path):
    args = arguments(tmp_path, "--rates", "1e-3", "1e-4", "1e-5", "--seeds", 7)
    assert real_model.best_rate(args, "own", "redi") == 1e-5  # nothing is done
    for rate, marks in (("0.001", "1000"), ("0.0001", "1010"), ("1e-05", "1000")):
        run = args.output / f"own/redi-{rate}-seed-7"
        (run / "final").mkdir(parents=True)
        write_samples(run, "validation", marks)
    assert real_model.best_rate(args, "own", "redi") == 1e-4
    (args.output / "teachers/redi-0.001-seed-7/final").mkdir(parents=True)
    assert real_model.best_rate(args, "teachers", "redi") == 1e-3  # the only one


@pytest.mark.peers("transformers")
def test_parity_with_transformers(tmp_path):
    from bench import parity

    tiny.write_model(tmp_path / "model", model_type="llama")
    tiny.write_rows(tmp_path, examples=3)
    problems = write_rows(tmp_path / "problems.jsonl", [{"problem": f"What is {i} + 1?", "answer": "1"} for i in "12"])
    words = ["--model", tmp_path / "model", "--problems", problems, "--pairs", tmp_path / "pairs.jsonl", "--prefill",
             "<think>\n", "--batch-size", 3, "--tokens", 8, "--output", tmp_path / "parity.json"]  # fmt: skip
    parity.main(list(map(str, words)))
    result = json.loads((tmp_path / "parity.json").read_text())
    assert result["prompts"] == result["same_text"] == result["same_ids"] == result["same_greedy_tokens"] == 2
    assert result["largest_logit_difference"] < 1e-4 and result["redi_loss_difference"] < 1e-5
    assert result["largest_relative_gradient_difference"] < 1e-4


@pytest.mark.peers("matplotlib")
def test_own_samples_to_table_and_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "TRAIN_PROBLEMS", 120)
    monkeypatch.setattr(toy, "TEST_PROBLEMS", 5)
    toy.write_data(tmp_path / "data", seed=5)
    toy.write_model(tmp_path / "model", seed=5)
    teacher = rows(tmp_path / "data/teacher.jsonl")
    train = write_rows(tmp_path / "train.jsonl", teacher[:100])
    validation = write_rows(tmp_path / "validation.jsonl", teacher[100:])
    files = ["--train", train, "--validation", validation, "--test", tmp_path / "data/problems.jsonl"]

    def run() -> str:
        words = ["tests/bench/real_model.py", "--model", tmp_path / "model", *files, *SIZES, "--output",
                 tmp_path / "out"]  # fmt: skip
        result = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                                env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    first, out = run(), tmp_path / "out"
    samples = {row["response"] for row in rows(next(out.glob("own-samples/eval/*/train/samples.jsonl")))}
    pairs = rows(out / "data/own/pairs.jsonl")
    assert len(pairs) > 5 and {pair[key][0]["content"] for pair in pairs for key in ("chosen", "rejected")} <= samples
    assert [row["completion"] for row in rows(out / "data/own/chosen.jsonl")] == [pair["chosen"] for pair in pairs]
    table = json.loads((out / "table.json").read_text())
    models = [(row["method"], row["negatives"], row["rate"]) for row in table["rows"]]
    assert models == [("as it came", "", None), ("SFT", "", 3e-3), ("SFT continued", "own", 1e-4),
                      ("REDI, α 0.8", "own", 1e-4)]  # fmt: skip
    assert table["rows"][0]["accuracy"]["mean"] == 0 < table["rows"][1]["boxed"]
    assert "eval_rejected_logp" in table["rows"][3] and "minus SFT continued" in table["rows"][3]
    curve = real_model.held_out_curve(out / "own/redi-0.0001-seed-4")
    assert [line["step"] for line in curve] == [0, 1, 2, 3]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    again = run()
    assert "->" in first and "->" not in again  # no command was run a second time
    assert again == first[first.index("Accuracy on") :]

"""Real traces through every command: openr1 -> sft -> redi, dpo, simpo -> evaluation on MATH-500 problems."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import tiny

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments) -> None:
    run = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert run.returncode == 0, run.stderr


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_traces_to_table_by_the_command_line(shared_data, tmp_path):
    traces = shared_data / "traces" / "traces.jsonl"
    texts = [text for row in rows(traces) for text in row["generations"] or []]
    tiny.write_model(tmp_path / "base", texts[:200], vocab_size=1000, max_position_embeddings=4096)
    command("prepare_data.py", "openr1", "--input", traces, "--tokenizer", tmp_path / "base",
            "--output", tmp_path / "data")  # fmt: skip
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert report["positives"] == len(rows(tmp_path / "data" / "positives.jsonl")) > 100
    assert report["pairs_written"] == len(rows(tmp_path / "data" / "pairs.jsonl")) > 50

    settings = ["--steps", 2, "--batch-size", 6, "--micro-batch-tokens", 2048]
    for method in ("sft", "redi", "dpo", "simpo"):
        data = tmp_path / "data" / ("positives.jsonl" if method == "sft" else "pairs.jsonl")
        start = tmp_path / ("base" if method == "sft" else "sft/final")
        command("train.py", method, "--model", start, "--data", data, "--output", tmp_path / method, *settings)
        steps = rows(tmp_path / method / "metrics.jsonl")
        assert [row["step"] for row in steps] == [1, 2] and all(math.isfinite(row["loss"]) for row in steps)
        if method == "dpo":
            assert abs(steps[0]["loss"] - math.log(2)) < 1e-5

    models = [tmp_path / method / "final" for method in ("sft", "redi", "dpo", "simpo")]
    command("evaluate.py", "--model", *models, "--problems", shared_data / "benchmarks/math500.jsonl", "--limit", 20,
            "--samples", 2, "--max-new-tokens", 16, "--output", tmp_path / "eval")  # fmt: skip
    results = json.loads((tmp_path / "eval" / "results.json").read_text())["results"]
    assert {(row["model"], row["problems"]) for row in results} == {(f"{m.parent.name}-final", 20) for m in models}
    for model in models:
        samples = rows(tmp_path / "eval" / f"{model.parent.name}-final" / "math500" / "samples.jsonl")
        assert len({(row["id"], row["sample"]) for row in samples}) == len(samples) == 40

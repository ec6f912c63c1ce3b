"""The figures: what is drawn, from the files of real runs. Most tests need matplotlib."""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from redi import plot
from redi.tokenizer import Tokenizer
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent


def command(folder: Path, *arguments: str, check=True, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=check
    )


def test_without_matplotlib_one_line_says_what_to_install(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "chosen_logp": -1.0, "lr_grad_norm": 0.1}\n')
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    done = command(
        tmp_path,
        "-m",
        "redi.plot",
        "run",
        "--output",
        "a.png",
        check=False,
        PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}",
    )
    assert done.returncode == 1
    assert done.stderr == "error: drawing needs matplotlib, which is not installed: pip install matplotlib\n"


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were drawn, by file name, beside what is written."""
    pytest.importorskip("matplotlib", reason="needs the libraries of tests/requirements.txt")
    figures, save = {}, plot._save

    def keep(figure, path):
        figures[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(plot, "_save", keep)
    return figures


def write_log(run: Path, rows: list[dict], model: str = "base") -> Path:
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "run.json").write_text(json.dumps({"settings": {"model": model}}))
    return run


def result(path, benchmark: str, accuracy: float, sem: float | None = 0.01) -> dict:
    return {"model": "m", "path": str(path), "benchmark": benchmark, "pass@1": accuracy, "sem": sem}


def lines_of(axes) -> list:
    return [line for line in axes.lines if len(line.get_xdata())]


def test_four_panels_hold_the_runs_numbers(tmp_path, drawn, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair_rows = [
        {
            "step": s,
            "chosen_logp": -0.1 * s,
            "rejected_logp": -0.2 * s if s != 3 else None,
            "lr_grad_norm": 1e-6 * s,
        }
        for s in range(1, 7)
    ]
    pair_rows[3] |= {"eval_chosen_logp": -0.5, "eval_rejected_logp": -0.9}
    write_log(Path("out/redi"), pair_rows, model="out/sft/final")
    write_log(
        Path("out/sft"), [{"step": s, "chosen_logp": -1 / s, "lr_grad_norm": 1e-3} for s in range(1, 4)]
    )
    rows = [
        result("out/redi/step-000004", "math500", 0.5),
        result("out/redi/final", "math500", 0.6, None),
        result("out/sft/final", "math500", 0.4),
        result(tmp_path / "out/redi/step-000002", "aime24", 0.1),
        result("out/other/step-000001", "aime24", 0.9),
        result("out/redi/step-000004-copy", "aime24", 0.9),
    ]
    Path("results.json").write_text(json.dumps({"results": rows[:3]}))
    Path("more.json").write_text(json.dumps({"results": rows[3:]}))
    plot.main(
        [
            "out/redi",
            "out/sft",
            "--labels",
            "REDI",
            "SFT",
            "--results",
            "results.json",
            "more.json",
            "--output",
            "a.png",
        ]
    )
    data = Path("a.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (1575, 1020)
    assert sorted(os.listdir()) == ["a.png", "more.json", "out", "results.json"]

    accuracy, chosen, rejected, step_size = drawn["a.png"].axes
    points = {tuple(map(tuple, line.get_xydata().round(6))) for line in lines_of(accuracy)}
    # REDI on math500 begins from SFT's end; then SFT itself, at its last step; aime24 by an absolute path.
    assert {((0, 40), (4, 50), (6, 60)), ((3, 40),), ((2, 10),)} <= points
    assert not any(y == 90 for line in points for _, y in line)
    redi, held_out, sft = (line.get_xydata() for line in lines_of(chosen))
    assert redi == pytest.approx(np.array([[s, -0.1 * s] for s in range(1, 7)]))
    assert held_out.tolist() == [[4, -0.5]] and sft[:, 1] == pytest.approx([-1, -1 / 2, -1 / 3])
    redi, held_out = (line.get_xydata() for line in lines_of(rejected))
    assert (
        math.isnan(redi[2, 1])
        and redi[5] == pytest.approx([6, -0.2 * 6])
        and held_out.tolist() == [[4, -0.9]]
    )
    assert [len(line.get_xdata()) for line in lines_of(step_size)] == [6, 3]
    assert [text.get_text() for text in drawn["a.png"].legends[0].get_texts()] == [
        "REDI",
        "SFT",
        "held-out pairs",
    ]


def test_runs_without_evaluations_or_rejected_responses_say_so(tmp_path, drawn):
    run = write_log(tmp_path / "sft", [{"step": 1, "chosen_logp": -1.0, "lr_grad_norm": 1e-3}])
    plot.main([str(run), "--output", str(tmp_path / "a.svg")])
    svg = (tmp_path / "a.svg").read_text()
    assert svg.startswith("<?xml") and ">sft</text>" in svg
    assert "no evaluations of checkpoints" in svg and "no run has rejected responses" in svg


def test_running_mean_is_centred_and_skips_what_is_missing():
    values = np.array([1.0, 2, math.nan, 4, 9])
    assert plot.running_mean(values, 3).tolist() == [1.5, 1.5, 3, 6.5, 6.5]
    assert plot.running_mean(values[:2], 1).tolist() == [1, 2]
    assert math.isnan(plot.running_mean(values, 1)[2])


def test_sweep_of_learning_rates(tmp_path, drawn):
    rows = [
        {"method": m, "lr": lr, "accuracy": accuracy, "sem": sem}
        for m, lr, accuracy, sem in [
            ("REDI", 1e-4, 0.5, 0.02),
            ("DPO", 1e-4, 0.4, None),
            ("REDI", 1e-5, 0.45, 0.01),
        ]
    ]
    plot.plot_sweep(rows, tmp_path / "a.png", baseline=("SFT", 0.3))
    [axes] = drawn["a.png"].axes
    redi, dpo = axes.containers
    assert redi.lines[0].get_xydata().tolist() == [[1e-5, 45], [1e-4, 50]]
    heights = [np.ptp(segment[:, 1]) for segment in redi.lines[2][0].get_segments()]
    assert heights == pytest.approx([2, 4])  # twice the standard errors
    assert {text.get_text() for text in drawn["a.png"].legends[0].get_texts()} == {"SFT", "REDI", "DPO"}
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize("file", ["positives.jsonl", "pairs.jsonl"])
def test_lengths_of_a_data_file(tmp_path, drawn, file):
    tiny.write_tokenizer(tmp_path / "model")
    tiny.write_rows(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "model")
    rows = [json.loads(line) for line in (tmp_path / file).read_text().splitlines()]
    lengths = plot.read_lengths(tmp_path / file, tokenizer)
    characters = plot.read_lengths(tmp_path / file, None)
    for name in lengths:
        contents = [row[name][0]["content"] for row in rows]
        assert characters[name] == [len(text) for text in contents]
        texts = [tokenizer.render_prompt(row["prompt"]) for row in rows] if name == "prompt" else contents
        assert lengths[name] == [len(tokenizer.encode(text)) for text in texts]
    assert set(lengths) == ({"prompt", "chosen", "rejected"} if "pairs" in file else {"prompt", "completion"})

    plot.main(
        [
            "--lengths",
            str(tmp_path / file),
            "--tokenizer",
            str(tmp_path / "model"),
            "--output",
            str(tmp_path / "a.svg"),
        ]
    )
    svg = (tmp_path / "a.svg").read_text()
    assert f"longest {max(lengths['prompt'])}</text>" in svg and ">tokens</text>" in svg
    heights = drawn["a.svg"].axes[1].patches[0].get_xy()[:, 1]
    assert max(heights) >= 1 and heights.sum() > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--output", "a.png"], "give one or more runs, or --lengths DATA"),
        (["run", "--lengths", "d.jsonl", "--output", "a.png"], "give one or more runs, or --lengths DATA"),
        (["run", "--output", "a.jpg"], "a.jpg: figures are written as .png or .svg"),
        (["run", "--labels", "a", "b", "--output", "a.png"], "--labels names 2 runs, but 1 are given"),
        (["nowhere", "--output", "a.png"], "nowhere/metrics.jsonl cannot be read: No such file"),
        (["empty", "--output", "a.png"], "empty/metrics.jsonl holds no step yet"),
        (
            ["run", "--results", "list.json", "--output", "a.png"],
            "list.json: expected 'results' with benchmark, pass@1",
        ),
        (["run", "--results", "cut.json", "--output", "a.png"], "cut.json: not valid JSON"),
        (
            ["run", "--results", "other.json", "--output", "a.png"],
            "no row of the results is of a checkpoint in run",
        ),
        (["--lengths", "cut.json", "--output", "a.png"], "cut.json, line 1: not valid JSON"),
        (["--lengths", "empty/metrics.jsonl", "--output", "a.png"], "empty/metrics.jsonl holds no row"),
    ],
)
def test_bad_input(tmp_path, drawn, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_log(Path("run"), [{"step": 1, "chosen_logp": -1.0, "lr_grad_norm": 1e-3}])
    write_log(Path("empty"), [])
    Path("list.json").write_text('{"results": [1]}')
    Path("cut.json").write_text('{"results"')
    Path("other.json").write_text(json.dumps({"results": [result("elsewhere/final", "math500", 0.5)]}))
    with pytest.raises(ValueError, match=message.replace(".", r"\.").replace("(", r"\(")):
        plot.main(arguments)
    assert not list(tmp_path.glob("a.*"))


def test_from_training_and_evaluation_to_a_figure(tmp_path, drawn):
    """The commands that a user types: train, evaluate every checkpoint, draw."""
    tiny.write_model(tmp_path / "model")
    tiny.write_rows(tmp_path)
    problems = [{"id": str(i), "problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(2)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    command(
        tmp_path,
        str(ROOT / "train.py"),
        "redi",
        "--model",
        "model",
        "--data",
        "pairs.jsonl",
        "--eval-data",
        "pairs.jsonl",
        "--output",
        "out/redi",
        "--batch-size",
        "4",
        "--steps",
        "4",
        "--save-every",
        "2",
        "--keep-checkpoints",
        "0",
    )
    models = [str(path.relative_to(tmp_path)) for path in sorted((tmp_path / "out/redi").glob("step-*"))]
    command(
        tmp_path,
        str(ROOT / "evaluate.py"),
        "--model",
        "model",
        *models,
        "--problems",
        "sums.jsonl",
        "--samples",
        "2",
        "--max-new-tokens",
        "4",
        "--output",
        "out/eval",
    )
    command(
        tmp_path, "-m", "redi.plot", "out/redi", "--results", "out/eval/results.json", "--output", "a.svg"
    )
    svg = (tmp_path / "a.svg").read_text()
    assert ">sums</text>" in svg and ">held-out pairs</text>" in svg and "no evaluations" not in svg
    results = plot.read_results([tmp_path / "out/eval/results.json"])
    log = [json.loads(line) for line in (tmp_path / "out/redi/metrics.jsonl").read_text().splitlines()]
    curves = plot.accuracy_curves(tmp_path / "out/redi", log, results)
    assert [step for step, _, _ in curves["sums"]] == [0, 2, 4]

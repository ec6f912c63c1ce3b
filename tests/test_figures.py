"""The dynamics figure: what is drawn, from the files of real runs. Most tests need matplotlib."""

import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from redi.analysis import figures
from redi.evaluation.scoring import read_results
from tests import tiny
from tests.bench.compare import plot_sweep
from tests.conftest import ROOT, read_jsonl, run_python, write_jsonl


def test_without_matplotlib_one_line_says_what_to_install(tmp_path):
    write_log(tmp_path / "run", [{"step": 1, "chosen_logp": -1.0, "lr_grad_norm": 0.1}])
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    done = run_python("-m", "redi.analysis.figures", "run", "--output", "a.png", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.endswith("pip install matplotlib\n")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, by file name, as well as the files."""
    kept, save = {}, figures.save_figure

    def keep(figure, path):
        kept[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(figures, "save_figure", keep)
    return kept


def write_log(run: Path, rows: list[dict], model: str = "base") -> Path:
    run.mkdir(parents=True)
    write_jsonl(run / "metrics.jsonl", rows)
    (run / "run.json").write_text(json.dumps({"settings": {"model": model}}))
    return run


def result(path, benchmark: str, accuracy: float, sem: float | None = 0.01) -> dict:
    return {"model": "m", "path": str(path), "benchmark": benchmark, "pass@1": accuracy, "sem": sem}


def lines_of(axes) -> list:
    return [line for line in axes.lines if len(line.get_xdata())]


def titles(figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def labels(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.peers("matplotlib")
def test_the_panels_hold_the_runs_numbers(tmp_path, drawn, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair_rows = [
        {"step": s, "chosen_logp": -0.1 * s, "rejected_logp": -0.2 * s if s != 3 else None, "margin": 0.1 * s,
         "lr_grad_norm": 1e-6 * s}
        for s in range(1, 7)
    ]
    pair_rows[3] |= {"eval_chosen_logp": -0.5, "eval_rejected_logp": -0.9, "eval_margin": 0.4}
    pair_rows.insert(0, {"step": 0, "eval_chosen_logp": -0.3, "eval_rejected_logp": -0.4, "eval_margin": 0.1})
    write_log(Path("out/redi"), pair_rows, model="out/sft/final")
    write_log(Path("out/sft"), [{"step": s, "chosen_logp": -1 / s, "lr_grad_norm": 5e-6} for s in range(1, 4)])
    rows = [
        result("out/redi/final", "math500", 0.6, None), result("out/redi/step-000004", "math500", 0.5),
        result("out/sft/final", "math500", 0.4), result(tmp_path / "out/redi/step-000002", "aime24", 0.1),
        result("out/other/step-000001", "aime24", 0.9), result("out/redi/step-000004-copy", "aime24", 0.9),
    ]  # fmt: skip
    Path("results.json").write_text(json.dumps({"results": rows[:3]}))
    Path("more.json").write_text(json.dumps({"results": rows[3:]}))
    figures.main(["out/redi", "out/sft", "--labels", "REDI", "SFT", "--results", "results.json", "more.json",
                  "--output", "a.png"])
    data = Path("a.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (1890, 990)
    assert sorted(os.listdir()) == ["a.png", "more.json", "out", "results.json"]

    accuracy, chosen, rejected, margin, step_size = drawn["a.png"].axes
    points = {tuple(map(tuple, line.get_xydata().round(6))) for line in lines_of(accuracy)}
    # REDI on math500 starts at SFT's end; then SFT itself, at its last step; aime24 by an absolute path.
    assert {((0, 40), (4, 50), (6, 60)), ((3, 40),), ((2, 10),)} <= points
    assert not any(y == 90 for line in points for _, y in line)
    steps, mean, held_out, *of_sft = (line.get_xydata() for line in lines_of(chosen))
    assert steps == pytest.approx(np.array([[s, -0.1 * s] for s in range(1, 7)])) and (mean == steps).all()
    assert held_out.tolist() == [[0, -0.3], [4, -0.5]]
    assert len(of_sft) == 2 and of_sft[0][:, 1] == pytest.approx([-1, -1 / 2, -1 / 3])
    steps, _, held_out = (line.get_xydata() for line in lines_of(rejected))
    assert math.isnan(steps[2, 1]) and steps[5] == pytest.approx([6, -0.2 * 6])
    assert held_out.tolist() == [[0, -0.4], [4, -0.9]]
    steps, _, held_out = (line.get_xydata() for line in lines_of(margin))
    assert steps[:, 1] == pytest.approx(0.1 * np.arange(1, 7)) and held_out.tolist() == [[0, 0.1], [4, 0.4]]
    assert [len(line.get_xdata()) for line in lines_of(step_size)] == [6, 6, 3, 3]
    assert labels(drawn["a.png"]) == ["REDI", "SFT", "aime24", "math500", "held-out"]


@pytest.mark.peers("matplotlib")
def test_error_bars_are_over_samples_or_else_over_problems(tmp_path, drawn):
    run = write_log(tmp_path / "run", [{"step": s, "chosen_logp": -1.0} for s in (1, 2, 3, 4)])
    rows = [result(run / "step-000001", "b", 0.5, 0.02), result(run / "step-000002", "b", 0.5, None),
            result(run / "step-000003", "b", 0.5, None) | {"sem_problems": 0.05},
            result(run / "step-000004", "b", 0.5, 0.01) | {"sem_problems": 0.05}]
    (tmp_path / "results.json").write_text(json.dumps({"results": rows}))
    figures.main([str(run), "--results", str(tmp_path / "results.json"), "--output", str(tmp_path / "a.png")])
    [bars] = drawn["a.png"].axes[0].containers
    heights = [np.ptp(segment[:, 1]) if len(segment) else 0 for segment in bars.lines[2][0].get_segments()]
    assert np.nan_to_num(heights) == pytest.approx([4, 0, 10, 2])  # twice the errors, in per cent


@pytest.mark.peers("matplotlib")
def test_no_panel_is_empty(tmp_path, drawn):
    """SFT has no rejected responses; without results there is no accuracy; what is never finite is not drawn."""
    sft = write_log(tmp_path / "sft", [{"step": 1, "chosen_logp": -1.0, "lr_grad_norm": 1e-3}])
    pairs = {"chosen_logp": -1.0, "rejected_logp": -2.0, "margin": 1.0, "lr_grad_norm": None}
    redi = write_log(tmp_path / "redi", [{"step": 1, **pairs}])
    (tmp_path / "results.json").write_text(json.dumps({"results": [result(sft / "final", "b", 0.5)]}))
    with_results = ["--results", str(tmp_path / "results.json")]
    cases = {"sft": [sft], "redi": [redi], "both": [sft, redi], "accuracy": [sft, *with_results]}
    for name, arguments in cases.items():
        figures.main([*map(str, arguments), "--output", str(tmp_path / f"{name}.svg")])
        assert all(lines_of(axes) for axes in drawn[f"{name}.svg"].axes)
    chosen, step_size = figures.PANELS["chosen_logp"], figures.PANELS["lr_grad_norm"]
    assert titles(drawn["sft.svg"]) == [chosen, step_size]
    assert titles(drawn["redi.svg"]) == [title for title in figures.PANELS.values() if title != step_size]
    assert titles(drawn["both.svg"]) == list(figures.PANELS.values())
    assert titles(drawn["accuracy.svg"])[1:] == [chosen, step_size]
    svg = (tmp_path / "sft.svg").read_text()
    assert svg.startswith("<?xml") and ">sft</text>" in svg


@pytest.mark.peers("matplotlib")
def test_strong_lines_are_running_means(tmp_path, drawn):
    values = [float(i % 7) for i in range(250)]
    run = write_log(tmp_path / "run", [{"step": s, "chosen_logp": v} for s, v in enumerate(values, 1)])
    figures.main([str(run), "--output", str(tmp_path / "a.png")])
    _, mean = (line.get_ydata() for line in lines_of(drawn["a.png"].axes[0]))
    assert mean[0] == pytest.approx(np.mean(values[:3])) and mean[100] == pytest.approx(np.mean(values[98:103]))
    assert len(mean) == 250 and mean[249] == pytest.approx(np.mean(values[247:]))


@pytest.mark.peers("matplotlib")
def test_sweep_of_learning_rates(tmp_path, drawn):
    points = [("REDI", 1e-4, 0.5, 0.02), ("DPO", 1e-4, 0.4, None), ("REDI", 1e-5, 0.45, 0.01)]
    rows = [dict(zip(("method", "lr", "accuracy", "sem"), point)) for point in points]
    plot_sweep(rows, tmp_path / "a.png", baseline=("SFT", 0.3))
    [axes] = drawn["a.png"].axes
    redi, dpo = axes.containers
    assert redi.lines[0].get_xydata().tolist() == [[1e-5, 45], [1e-4, 50]]
    heights = [np.ptp(segment[:, 1]) for segment in redi.lines[2][0].get_segments()]
    assert heights == pytest.approx([2, 4])  # twice the standard errors
    assert set(labels(drawn["a.png"])) == {"SFT", "REDI", "DPO"}
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize("arguments, message", [
    ([], "RUN"), (["run", "--output", "a.xyz"], "xyz"), (["run", "--labels", "a", "b"], "--labels names 2 runs"),
    (["nowhere"], "nowhere/metrics.jsonl"), (["empty"], "empty/metrics.jsonl holds no step"),
    (["begun"], "begun/metrics.jsonl holds no step"), (["never-finite"], "never-finite/metrics.jsonl holds no step"),
    (["run", "--results", "list.json"], "list.json: expected 'results'"),
    (["run", "--results", "cut.json"], "cut.json: not valid JSON"),
    (["run", "--results", "other.json"], "no row of the results .* run"),
])  # fmt: skip
@pytest.mark.peers("matplotlib")
def test_bad_input(tmp_path, drawn, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_log(Path("run"), [{"step": 1, "chosen_logp": -1.0, "lr_grad_norm": 1e-3}])
    write_log(Path("empty"), [])
    write_log(Path("begun"), [{"step": 0, "eval_chosen_logp": -1.0}])
    write_log(Path("never-finite"), [{"step": 1, "chosen_logp": None, "lr_grad_norm": None, "lr": 1e-3}])
    Path("list.json").write_text('{"results": [1]}')
    Path("cut.json").write_text('{"results"')
    Path("other.json").write_text(json.dumps({"results": [result("elsewhere/final", "math500", 0.5)]}))
    with pytest.raises(ValueError, match=message):
        figures.main(["--output", "a.png", *arguments])
    assert not list(tmp_path.glob("a.*"))


@pytest.mark.peers("matplotlib")
def test_from_training_and_evaluation_to_a_figure(tmp_path, monkeypatch):
    """The commands that a user types: train, evaluate every checkpoint, draw."""
    tiny.write_model(tmp_path / "model")
    tiny.write_rows(tmp_path)
    (tmp_path / "held_out").mkdir()
    tiny.write_rows(tmp_path / "held_out", examples=5, seed=9)
    write_jsonl(tmp_path / "sums.jsonl", [{"problem": f"What is {i} + 1?", "answer": i + 1} for i in range(2)])
    train = [ROOT / "train.py", "redi", "--model", "model", "--data", "pairs.jsonl", "--eval-data",
             "held_out/pairs.jsonl", "--output", "out/redi", "--batch-size", "4", "--steps", "4", "--save-every", "2",
             "--keep-checkpoints", "0"]
    evaluate = [ROOT / "evaluate.py", "--model", "model", "out/redi/step-000002", "out/redi/step-000004", "--problems",
                "sums.jsonl", "--samples", "2", "--max-new-tokens", "4", "--output", "out/eval"]
    draw = ["-m", "redi.analysis.figures", "out/redi", "--results", "out/eval/results.json", "--output", "a.svg"]
    for command in (train, evaluate, draw):
        done = run_python(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    svg = (tmp_path / "a.svg").read_text()
    assert ">sums</text>" in svg and ">held-out</text>" in svg
    assert all(f">{title}</text>" in svg for title in ("Accuracy (pass@1, %)", *figures.PANELS.values()))
    results = read_results(tmp_path / "out/eval/results.json")
    log = read_jsonl(tmp_path / "out/redi/metrics.jsonl")
    monkeypatch.chdir(tmp_path)
    curves = figures.accuracy_curves(tmp_path / "out/redi", log, results)
    assert [step for step, _, _ in curves["sums"]] == [0, 2, 4]

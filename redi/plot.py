"""Figures (with matplotlib): the paper's training dynamics of any number of runs; the lengths in a data file.

    python -m redi.plot out/redi out/dpo --results out/eval/results.json --output dynamics.png
    python -m redi.plot --lengths pairs.jsonl --tokenizer Qwen/Qwen2.5-Math-1.5B --output lengths.svg
"""

import argparse
import json
import math
import os
import re
import sys
from itertools import islice
from pathlib import Path

import numpy as np

from redi.data import read_examples, read_jsonl
from redi.tokenizer import Tokenizer

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
LINE_STYLES = ["-", "--", ":", "-."]
PANELS = [  # metrics.jsonl key, held-out key, title
    ("chosen_logp", "eval_chosen_logp", "Chosen LogPS (nats a token)"),
    ("rejected_logp", "eval_rejected_logp", "Rejected LogPS (nats a token)"),
    ("lr_grad_norm", None, "Learning rate × gradient norm"),
]
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4",
    "axes.axisbelow": True, "axes.titlesize": 11, "axes.titlelocation": "left", "font.size": 10,
    "legend.frameon": False, "legend.fontsize": 9, "svg.fonttype": "none",
}


def plot_dynamics(runs: list[Path], labels: list[str], results: list[dict], path: Path) -> None:
    """Four panels over steps: accuracy, chosen LogPS, rejected LogPS, learning rate x gradient norm.

    Args: runs: output directories of train.py; labels: their names; results: rows of evaluate.py's
    results.json, of which those of a run's checkpoints (and of the model it began from, at step 0) are drawn;
    path: PNG or SVG.
    Faint lines are single steps, strong ones means over a fiftieth of the run, dashed ones held-out pairs.
    """
    figure, ((accuracy, *left), right) = _subplots(path, 2, 2, (10.5, 6.8))
    logs = [[row for _, row in read_jsonl(run / "metrics.jsonl")] for run in runs]
    for run, log in zip(runs, logs):
        if not log:
            raise ValueError(f"{run / 'metrics.jsonl'} holds no step yet")
    curves = [accuracy_curves(run, log, results) for run, log in zip(runs, logs)]
    if results and not any(curves):
        raise ValueError(f"no row of the results is of a checkpoint in {', '.join(map(str, runs))}")
    benchmarks = sorted({name for run_curves in curves for name in run_curves})
    for i, run_curves in enumerate(curves):
        for name, points in run_curves.items():
            b = benchmarks.index(name)
            steps, means, sems = (np.array(column, dtype=float) for column in zip(*points))
            accuracy.errorbar(
                steps, 100 * means, 100 * np.nan_to_num(sems), color=_color(i), linewidth=1.6, markersize=4.5,
                marker=MARKERS[b % len(MARKERS)], linestyle=LINE_STYLES[b % len(LINE_STYLES)], capsize=2.5,
                elinewidth=1,
            )
    accuracy.set_title("Accuracy (pass@1, %)")
    if benchmarks:
        for b, name in enumerate(benchmarks):
            accuracy.plot([], [], color="#555555", marker=MARKERS[b % len(MARKERS)], markersize=4.5,
                          linestyle=LINE_STYLES[b % len(LINE_STYLES)], label=name)
        accuracy.legend()
    else:
        _say(accuracy, "no evaluations of checkpoints\n(evaluate.py --model RUN/step-*, then --results)")

    held_out = False
    for axes, (key, held_out_key, title) in zip([*left, *right], PANELS):
        axes.set_title(title)
        for i, log in enumerate(logs):
            steps, values = _series(log, key)
            window = max(1, len(steps) // 50)
            if window > 1:
                axes.plot(steps, values, color=_color(i), linewidth=0.8, alpha=0.25)
            if len(steps):
                axes.plot(steps, running_mean(values, window), color=_color(i), linewidth=1.7)
            steps, values = _series(log, held_out_key)
            if len(steps):
                held_out = True
                axes.plot(steps, values, "--o", color=_color(i), linewidth=1.3, markersize=3)
        if not axes.lines:
            _say(axes, "no run has rejected responses")
    right[1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    for axes in figure.axes:
        axes.set_xlim(0, max(log[-1]["step"] for log in logs) * 1.02)
    for axes in right:
        axes.set_xlabel("optimiser step")
    handles = []
    for i, label in enumerate(labels):
        handles += accuracy.plot([], [], color=_color(i), linewidth=2.5, label=label)
    if held_out:
        handles += accuracy.plot([], [], "--o", color="#555555", markersize=3, label="held-out pairs")
    figure.legend(handles=handles, loc="outside upper center", ncols=5, fontsize=10)
    _save(figure, path)


def accuracy_curves(run: Path, log: list[dict], results: list[dict]) -> dict[str, list[tuple]]:
    """benchmark -> [(step, pass@1, SEM or None)] by step, of the rows whose model is a checkpoint of the run.

    RUN/step-NNNNNN stands at its step, RUN/final at the last, and the model that the run began from at 0.
    """
    run, record, start = run.resolve(), run / "run.json", None
    if record.is_file():
        start = json.loads(record.read_text())["settings"]["model"]
    curves = {}
    for row in results:
        path = Path(row["path"])
        match = re.fullmatch(r"step-(\d+)|final", path.name)
        if match and is_same(path.parent, run):
            step = int(match[1]) if match[1] else log[-1]["step"]
        elif start is not None and is_same(path, Path(start)):
            step = 0
        else:
            continue
        curves.setdefault(row["benchmark"], {})[step] = (step, row["pass@1"], row["sem"])
    return {name: [points[step] for step in sorted(points)] for name, points in sorted(curves.items())}


def is_same(first: Path, second: Path) -> bool:
    """Whether two paths are one place, or may be: one is the end of the other, as where the commands that wrote
    them ran in different directories."""
    if first.resolve() == second.resolve():
        return True
    shared = min(len(first.parts), len(second.parts))
    return shared > 0 and first.parts[-shared:] == second.parts[-shared:]


def plot_sweep(rows: list[dict], path: str | Path, baseline: tuple[str, float] | None = None) -> None:
    """Accuracy against the learning rate, one line a method, with error bars.

    Args: rows: {"method": str, "lr": float, "accuracy": share, "sem": its standard error or None}, any order;
    path: PNG or SVG; baseline: (label, accuracy) of a model that the methods began from, as a dashed line.
    """
    path = Path(path)
    figure, axes = _subplots(path, 1, 1, (6.4, 4.6))
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        ours = sorted((row for row in rows if row["method"] == method), key=lambda row: row["lr"])
        axes.errorbar(
            [row["lr"] for row in ours], [100 * row["accuracy"] for row in ours],
            [100 * (row["sem"] or 0.0) for row in ours], label=method, color=_color(i), linewidth=1.7,
            marker=MARKERS[i % len(MARKERS)], markersize=5, capsize=3, elinewidth=1,
            linestyle=LINE_STYLES[i // len(COLORS) % len(LINE_STYLES)],
        )
    if baseline:
        label, value = baseline
        axes.axhline(100 * value, color="#777777", linestyle="--", linewidth=1.3, label=label)
    rates = sorted({row["lr"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("peak learning rate")
    axes.set_title("Accuracy (pass@1, %)")
    figure.legend(loc="outside upper center", ncols=3, fontsize=10)
    _save(figure, path)


def plot_lengths(data: Path, tokenizer: Tokenizer | None, path: Path) -> None:
    """Distribution of the lengths of prompts and responses in a positives or pairs file, in tokens, or in
    characters without a tokenizer. Responses are counted without what ends a turn."""
    lengths = read_lengths(data, tokenizer)
    figure, axes = _subplots(path, 1, 2, (10.5, 3.8))
    unit = "tokens" if tokenizer else "characters"
    for panel, names in zip(axes, (["prompt"], [name for name in lengths if name != "prompt"])):
        longest = max(max(lengths[name]) for name in names)
        width = -(-longest // 60)  # a whole number, so that every bar stands for as many lengths
        bins = np.arange(-0.5, longest + width, width)
        for i, name in enumerate(names):
            values = np.array(lengths[name])
            middle, high = np.percentile(values, [50, 95])
            color = "#777777" if name == "prompt" else _color(i)
            panel.hist(values, bins, histtype="stepfilled", alpha=0.25, color=color)
            panel.hist(values, bins, histtype="step", linewidth=1.6, color=color,
                       label=f"{name}: median {middle:,.0f}, 95 % up to {high:,.0f}, longest {max(values):,}")
            panel.axvline(middle, color=color, linestyle="--", linewidth=1.2)
        panel.set_title("Prompts" if names == ["prompt"] else "Responses")
        panel.set_xlabel(unit)
        panel.set_xlim(0, bins[-1])
        panel.locator_params(axis="x", integer=True)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panel.margins(y=0.3)  # room for the legend above the bars
        panel.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none")
    axes[0].set_ylabel(f"rows of {len(lengths['prompt']):,}")
    _save(figure, path)


def read_lengths(data: Path, tokenizer: Tokenizer | None) -> dict[str, list[int]]:
    """"prompt" and "completion", or "prompt", "chosen" and "rejected" -> the length of each row's."""
    first = next(read_jsonl(data), None)
    if first is None:
        raise ValueError(f"{data} holds no row")
    pairs = "chosen" in first[1]
    names = ["prompt", "chosen", "rejected"] if pairs else ["prompt", "completion"]
    lengths = {name: [] for name in names}
    examples = read_examples(data, pairs)
    while batch := list(islice(examples, 256)):
        prompts = [prompt_text(example.prompt, tokenizer) for example in batch]
        for name, texts in zip(names, (prompts, *zip(*(example.completions for example in batch)))):
            lengths[name] += map(len, tokenizer.encode_batch(list(texts)) if tokenizer else texts)
    return lengths


def prompt_text(prompt: list[dict] | str, tokenizer: Tokenizer | None) -> str:
    if isinstance(prompt, str):
        return prompt
    return tokenizer.render_prompt(prompt) if tokenizer else "".join(message["content"] for message in prompt)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the about `window` values around each one, over fewer at both ends; NaN is left out."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0.0], np.cumsum(known)])
    middle = np.arange(len(values))
    start, stop = np.maximum(middle - window // 2, 0), np.minimum(middle + window // 2 + 1, len(values))
    sums, counts = sums[stop] - sums[start], counts[stop] - counts[start]
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _series(log: list[dict], key: str | None) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines that have the key; NaN for a value that was not finite."""
    rows = [row for row in log if key in row]
    values = [math.nan if row[key] is None else row[key] for row in rows]
    return np.array([row["step"] for row in rows]), np.array(values, dtype=float)


def _color(i: int) -> str:
    return COLORS[i % len(COLORS)]


def _say(axes, text: str) -> None:
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#777777")


def _subplots(path: Path, rows: int, columns: int, size: tuple[float, float]):
    """A figure and its axes. No pyplot: it would look for a screen."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"{path}: figures are written as .png or .svg")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing needs matplotlib, which is not installed: pip install matplotlib") from None
    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    return figure, figure.subplots(rows, columns)


def _save(figure, path: Path) -> None:
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        figure.savefig(partial, format=path.suffix[1:].lower())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_results(paths: list[Path]) -> list[dict]:
    """The rows of several results.json files of evaluate.py."""
    rows, keys = [], {"path", "benchmark", "pass@1", "sem"}
    for path in paths:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not valid JSON in UTF-8: {error}") from None
        found = found.get("results") if isinstance(found, dict) else None
        if not isinstance(found, list) or not all(isinstance(row, dict) and keys <= {*row} for row in found):
            wanted = ", ".join(sorted(keys))
            raise ValueError(f"{path}: expected 'results' with {wanted} in each, as evaluate.py writes")
        rows += found
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m redi.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="output directories of train.py")
    add("--output", required=True, type=Path, help="the figure: .png or .svg")
    add("--labels", nargs="+", help="names of the runs (default: their directories')")
    add("--results", nargs="+", type=Path, default=[], help="evaluate.py's results.json, over checkpoints")
    add("--lengths", type=Path, metavar="DATA", help="draw the lengths in a positives or pairs file instead")
    add("--tokenizer", help="model directory or hub id: lengths in tokens, not in characters")
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.lengths):
        raise ValueError("give one or more runs, or --lengths DATA")
    if args.lengths:
        tokenizer = Tokenizer.from_pretrained(args.tokenizer) if args.tokenizer else None
        return plot_lengths(args.lengths, tokenizer, args.output)
    labels = args.labels or [run.resolve().name for run in args.runs]
    if len(labels) != len(args.runs):
        raise ValueError(f"--labels names {len(labels)} runs, but {len(args.runs)} are given")
    plot_dynamics(args.runs, labels, read_results(args.results), args.output)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)

"""The training dynamics of any number of runs as a figure (needs matplotlib): accuracy, LogPS, margin, step size.

    python -m redi.analysis.figures out/redi out/dpo --results out/eval/results.json --output dynamics.png
"""

import math
import re
from pathlib import Path

import numpy as np

from redi.cli import Parser, run_command
from redi.evaluation.scoring import read_results
from redi.files import read_json, read_jsonl, replacing

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito's
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
PANELS = {  # key in metrics.jsonl (held-out values: with the prefix eval_) -> title
    "chosen_logp": "Chosen LogPS (nats per token)",
    "rejected_logp": "Rejected LogPS (nats per token)",
    "margin": "Margin: chosen − rejected LogPS",
    "lr_grad_norm": "Learning rate × gradient norm",
}
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4",
         "axes.titlesize": 11, "axes.titlelocation": "left", "legend.frameon": False, "svg.fonttype": "none"}


def plot_dynamics(runs: list[Path], labels: list[str], results: list[dict], path: Path) -> None:
    """Draw accuracy (if there are results) and those of PANELS that at least one run has values for, over steps.

    Args: runs: output directories of train.py; labels: their names; results: rows of evaluate.py's results.json, of
    which those of the runs' checkpoints and start models are drawn; path: PNG or SVG.
    Each run has a colour, each benchmark a marker. Faint lines are single steps, solid ones running means over 1/50
    of the run, hollow markers held-out values. Raises ValueError for a run without values and for unrelated results.
    """
    logs = [[row for _, row in read_jsonl(run / "metrics.jsonl")] for run in runs]
    for run, log in zip(runs, logs):
        if not any(row["step"] and row.get(key) is not None for row in log for key in PANELS):
            raise ValueError(f"{run / 'metrics.jsonl'} holds no step with values to draw yet")
    curves = [accuracy_curves(run, log, results) if results else {} for run, log in zip(runs, logs)]
    if results and not any(curves):
        raise ValueError(f"no row of the results is of a checkpoint in {', '.join(map(str, runs))}")
    found = {key for log in logs for row in log for key in row if row[key] is not None}
    keys = [key for key in PANELS if {key, f"eval_{key}"} & found]
    figure, panels = new_figure(["Accuracy (pass@1, %)"] * bool(results) + [PANELS[key] for key in keys])
    colors = [COLORS[i % len(COLORS)] for i in range(len(runs))]
    legend = {label: dict(linewidth=2.5, color=color) for label, color in zip(labels, colors)}
    for b, benchmark in enumerate(sorted({name for run_curves in curves for name in run_curves})):
        marker = dict(marker=MARKERS[b % len(MARKERS)], markersize=4.5)
        legend[benchmark] = dict(color="#555555", linewidth=0, **marker)
        for color, run_curves in zip(colors, curves):
            steps, means, errors = np.array(run_curves.get(benchmark, []), dtype=float).reshape(-1, 3).T
            panels[0].errorbar(steps, 100 * means, 100 * errors, color=color, linewidth=1.6, capsize=2.5, **marker)
    held_out = dict(marker="o", markersize=3.5, markerfacecolor="white", linewidth=1.2)
    if any(f"eval_{key}" in found for key in keys):
        legend["held-out"] = dict(color="#555555", **held_out)
    for axes, key in zip(panels[-len(keys) :], keys):
        for color, log in zip(colors, logs):
            steps, values = _series(log, key)
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.25)
            reach = len(steps) // 100
            means = [values[max(i - reach, 0) : i + reach + 1].mean() for i in range(len(values))]
            axes.plot(steps, means, color=color, linewidth=1.7)
            axes.plot(*_series(log, f"eval_{key}"), color=color, **held_out)
        axes.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
    figure.supxlabel("optimiser step", fontsize="medium")
    handles = [panels[0].plot([], [], label=label, **style)[0] for label, style in legend.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 5), handlelength=3)
    save_figure(figure, path)


def accuracy_curves(run: Path, log: list[dict], results: list[dict]) -> dict[str, list[tuple]]:
    """benchmark -> [(step, pass@1, standard error or None)] of the results whose model is a checkpoint of the run.

    The model that the run started from is at step 0. The error is over samples or, with one sample each, over problems.
    """
    run, curves = run.resolve(), {}
    steps = {Path(read_json(run / "run.json")["settings"]["model"]).resolve(): 0, run / "final": log[-1]["step"]}
    for row in results:
        path = Path(row["path"]).resolve()
        match = re.fullmatch(r"step-(\d+)", path.name)
        step = int(match[1]) if match and path.parent == run else steps.get(path)
        if step is not None:
            error = row.get("sem_problems") if row["sem"] is None else row["sem"]
            curves.setdefault(row["benchmark"], []).append((step, row["pass@1"], error))
    return {benchmark: sorted(points) for benchmark, points in curves.items()}


def _series(log: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows that have the key; NaN where the value was not finite."""
    rows = [row for row in log if key in row]
    return np.array([row["step"] for row in rows]), np.array([row[key] for row in rows], dtype=float)


def new_figure(titles: list[str], panel_size: tuple[float, float] = (4.2, 3.3)):
    """(figure, its axes), at most three columns wide. Avoids pyplot, which needs a display."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("figures need matplotlib, which is not installed: pip install matplotlib") from None
    matplotlib.rcParams.update(STYLE)
    rows = math.ceil(len(titles) / 3)
    columns = math.ceil(len(titles) / rows)
    figure = Figure((panel_size[0] * columns, panel_size[1] * rows), dpi=150, layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i, title=title) for i, title in enumerate(titles, 1)]


def save_figure(figure, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:])


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m redi.analysis.figures", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="output directories of train.py")
    add("--output", required=True, type=Path, help="the figure: .png or .svg")
    add("--labels", nargs="+", help="names of the runs (default: their directories')")
    add("--results", nargs="+", type=Path, default=[], help="evaluate.py's results.json with the runs' checkpoints")
    args = parser.parse_args(argv)
    labels = args.labels or [run.resolve().name for run in args.runs]
    if len(labels) != len(args.runs):
        raise ValueError(f"--labels names {len(labels)} runs, but {len(args.runs)} are given")
    results = [row for path in args.results for row in read_results(path)]
    plot_dynamics(args.runs, labels, results, args.output)


if __name__ == "__main__":
    run_command(main)

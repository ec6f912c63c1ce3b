"""Figures (with matplotlib): the paper's training dynamics of any number of runs; the lengths in a data file.

    python -m redi.analysis.figures out/redi out/dpo --results out/eval/results.json --output dynamics.png
    python -m redi.analysis.figures --lengths pairs.jsonl --tokenizer Qwen/Qwen2.5-Math-1.5B --output lengths.svg
"""

import re
from itertools import islice
from pathlib import Path

import numpy as np

from redi.cli import Parser, run_command
from redi.evaluation.scoring import read_results
from redi.files import read_json, read_jsonl, replacing
from redi.rows import read_examples
from redi.tokenizer import Tokenizer

# Okabe and Ito's colours, which the colour-blind can tell apart. The eighth line has the first one again, dashed.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
DASHES = ["-", "--", ":", "-."]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
PANELS = {  # key in metrics.jsonl (of held-out rows: eval_ before it) -> title
    "chosen_logp": "Chosen LogPS (nats a token)",
    "rejected_logp": "Rejected LogPS (nats a token)",
    "margin": "Margin: chosen − rejected LogPS",
    "lr_grad_norm": "Learning rate × gradient norm",
}
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4",
    "axes.axisbelow": True, "axes.titlesize": 11, "axes.titlelocation": "left", "font.size": 10,
    "legend.frameon": False, "legend.fontsize": 9, "svg.fonttype": "none",
}


def plot_dynamics(runs: list[Path], labels: list[str], results: list[dict], path: Path) -> None:
    """Over steps: accuracy where there are results, and those of PANELS that some run has numbers for.

    Args: runs: output directories of train.py; labels: their names; results: rows of evaluate.py's results.json,
    of which those of a run's checkpoints (and of the model it began from, at step 0) are drawn; path: PNG or SVG.
    A run has a colour and a dash, a benchmark a marker. Faint lines are single steps, strong ones means over a
    fiftieth of the run, hollow points held-out rows.
    """
    logs = [[row for _, row in read_jsonl(run / "metrics.jsonl")] for run in runs]
    for run, log in zip(runs, logs):
        if not any(row["step"] and row.get(key) is not None for row in log for key in PANELS):
            raise ValueError(f"{run / 'metrics.jsonl'} holds no step with numbers to draw yet")
    curves = [accuracy_curves(run, log, results) for run, log in zip(runs, logs)]
    if results and not any(curves):
        raise ValueError(f"no row of the results is of a checkpoint in {', '.join(map(str, runs))}")
    found = {key for log in logs for row in log for key in row if row[key] is not None}
    keys = [key for key in PANELS if {key, f"eval_{key}"} & found]
    figure, panels = new_figure(path, ["accuracy"] * bool(results) + keys, panel_size=(4.2, 3.3))
    legend = [(label, dict(linewidth=2.5, **line_style(i))) for i, label in enumerate(labels)]
    if results:
        legend += _draw_accuracy(panels["accuracy"], curves)
    held_out = dict(marker="o", markersize=3.5, markerfacecolor="white", linewidth=1.2)
    if any(f"eval_{key}" in found for key in keys):
        legend.append(("held-out rows", dict(color="#555555", **held_out)))
    for key in keys:
        axes = panels[key]
        axes.set_title(PANELS[key])
        for i, log in enumerate(logs):
            steps, values = _series(log, key)
            if len(steps):
                axes.plot(steps, values, color=line_style(i)["color"], linewidth=0.8, alpha=0.25)
                axes.plot(steps, running_mean(values, len(steps) // 50), linewidth=1.7, **line_style(i))
            axes.plot(*_series(log, f"eval_{key}"), **held_out, **line_style(i))
        _set_scale(axes)
    last = max(log[-1]["step"] for log in logs)
    for axes in panels.values():
        axes.set_xlim(-0.02 * last, 1.02 * last)
        axes.set_xlabel("optimiser step")
    handles = [axes.plot([], [], label=label, **style)[0] for label, style in legend]
    columns = int(12 * figure.get_figwidth() / (8 + max(len(label) for label, _ in legend)))
    figure.legend(handles=handles, loc="outside upper center", ncols=max(columns, 1), handlelength=3, fontsize=10)
    save_figure(figure, path)


def _draw_accuracy(axes, curves: list[dict[str, list[tuple]]]) -> list[tuple[str, dict]]:
    """Draw the accuracy_curves of each run. Returns what tells the benchmarks apart: (name, style of its points)."""
    benchmarks = sorted({name for run_curves in curves for name in run_curves})
    markers = {name: dict(marker=MARKERS[b % len(MARKERS)], markersize=4.5) for b, name in enumerate(benchmarks)}
    for i, run_curves in enumerate(curves):
        for name, points in run_curves.items():
            steps, means, errors = (np.array(column, dtype=float) for column in zip(*points))
            axes.errorbar(steps, 100 * means, 100 * np.nan_to_num(errors), linewidth=1.6, capsize=2.5, elinewidth=1,
                          **markers[name], **line_style(i))
    axes.set_title("Accuracy (pass@1, %)")
    return [(name, dict(color="#555555", linewidth=0, **marker)) for name, marker in markers.items()]


def _set_scale(axes) -> None:
    """A logarithmic axis where the scales of two lines (nine in ten of their values stay below) differ by more than
    ten; values that are all negative are mirrored, and where some cross zero, the axis is linear around it."""
    lines = [values[np.isfinite(values)] for values in (line.get_ydata() for line in axes.lines)]
    values = np.concatenate(lines)
    scales = [np.percentile(np.abs(line), 90) for line in lines if line.any()]
    if not scales or max(scales) <= 10 * min(scales):
        return axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    if values.min() > 0:
        axes.set_yscale("log")
    else:
        mirrored = values.max() < 0
        exponent = np.floor(np.log10(np.percentile(-values, 5))) if mirrored else np.ceil(np.log10(min(scales)))
        axes.set_yscale("symlog", linthresh=10**exponent)
        axes.yaxis.get_major_locator().set_params(subs=[1, 2, 5] if mirrored else [1])
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(f"{axes.get_title(loc='left')}, logarithmic")


def accuracy_curves(run: Path, log: list[dict], results: list[dict]) -> dict[str, list[tuple]]:
    """benchmark -> [(step, pass@1, its error or None)] by step, of the rows whose model is a checkpoint of the run.

    RUN/step-NNNNNN stands at its step, RUN/final at the last, and the model that the run began from at 0. The error
    is the standard error over samples or, where each problem has one only, over problems.
    """
    run, record, curves = run.resolve(), run / "run.json", {}
    start = read_json(record)["settings"]["model"] if record.is_file() else None
    for row in results:
        path = Path(row["path"])
        match = re.fullmatch(r"step-(\d+)|final", path.name)
        if match and is_same(path.parent, run):
            step = int(match[1]) if match[1] else log[-1]["step"]
        elif start is not None and is_same(path, Path(start)):
            step = 0
        else:
            continue
        error = row.get("sem_problems") if row["sem"] is None else row["sem"]
        curves.setdefault(row["benchmark"], {})[step] = (step, row["pass@1"], error)
    return {name: [points[step] for step in sorted(points)] for name, points in sorted(curves.items())}


def is_same(first: Path, second: Path) -> bool:
    """Whether two paths are one place, or may be: one is the end of the other, as where the commands that wrote
    them ran in different directories."""
    shared = min(len(first.parts), len(second.parts))
    return first.resolve() == second.resolve() or (shared > 0 and first.parts[-shared:] == second.parts[-shared:])


def plot_lengths(data: Path, tokenizer: Tokenizer | None, path: Path) -> None:
    """Distribution of the lengths of prompts and responses in a positives or pairs file, in tokens, or in
    characters without a tokenizer. Responses are counted without what ends a turn."""
    lengths = read_lengths(data, tokenizer)
    figure, panels = new_figure(path, ["Prompts", "Responses"], panel_size=(5.2, 3.8))
    for (title, panel), names in zip(panels.items(), (["prompt"], [name for name in lengths if name != "prompt"])):
        longest = max(max(lengths[name]) for name in names)
        width = -(-longest // 60)  # a whole number, so that every bar stands for as many lengths
        bins = np.arange(-0.5, longest + width, width)
        for i, name in enumerate(names):
            values = np.array(lengths[name])
            middle, high = np.percentile(values, [50, 95])
            color = "#777777" if name == "prompt" else COLORS[i]
            panel.hist(values, bins, histtype="stepfilled", linewidth=1.6, facecolor=(color, 0.25), edgecolor=color,
                       label=f"{name}: median {middle:,.0f}, 95 % up to {high:,.0f}, longest {max(values):,}")
            panel.axvline(middle, color=color, linestyle="--", linewidth=1.2)
        panel.set_title(title)
        panel.set_xlabel("tokens" if tokenizer else "characters")
        panel.set_xlim(0, bins[-1])
        panel.locator_params(axis="x", integer=True)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panel.margins(y=0.3)  # room for the legend above the bars
        panel.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none")
    panels["Prompts"].set_ylabel(f"rows of {len(lengths['prompt']):,}")
    save_figure(figure, path)


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
    known, ones = np.isfinite(values), np.ones(2 * (window // 2) + 1)
    sums, counts = (np.convolve(each, ones, "same") for each in (np.where(known, values, 0.0), known))
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _series(log: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines that have the key; NaN for a value that was not finite."""
    rows = [row for row in log if key in row]
    return np.array([row["step"] for row in rows]), np.array([row[key] for row in rows], dtype=float)


def line_style(i: int) -> dict:
    """How the i-th of any number of lines is told from the others."""
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}


def new_figure(path: Path, names: list[str], panel_size: tuple[float, float]):
    """(figure, its panels by name): up to three side by side, more in two rows without a gap.
    No pyplot: it would look for a screen."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"{path}: figures are written as .png or .svg")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing needs matplotlib, which is not installed: pip install matplotlib") from None
    matplotlib.rcParams.update(STYLE)
    half = (len(names) + 1) // 2
    rows = [names] if len(names) <= 3 else [names[:half], names[half:]]
    size = panel_size[0] * len(rows[0]), panel_size[1] * len(rows)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    return figure, figure.subplot_mosaic([np.repeat(row, 6 // len(row)).tolist() for row in rows])


def save_figure(figure, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:].lower())


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m redi.analysis.figures", description=__doc__)
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
    results = [row for path in args.results for row in read_results(path)]
    plot_dynamics(args.runs, labels, results, args.output)


if __name__ == "__main__":
    run_command(main)

"""The comparison on the embedded example: every method at every learning rate, over several seeds.

    python tests/bench/compare.py --seeds 5

Each method starts from the same SFT model and takes as many updates on as many sequences (a pair is two). A seed
decides the problems, the teacher's solutions, the first weights and the order. Prints a table of means and standard
errors, and writes it to OUTPUT/table.json with the figures. What is done already is kept: rerun to continue.
"""

import contextlib
import importlib.util
import math
import multiprocessing
import os
import re
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import evaluate
import train
from redi.analysis import figures as plot
from redi.cli import Parser, count, positive_int, run_command
from redi.files import json_line, write_atomically, write_json
from redi.evaluation.scoring import read_results
from redi.example.water_tank import (
    SAMPLING, SFT_STEPS, STAGE_2_STEPS, STAGES, evaluate_models, prepare, read_rows, read_samples, results_by_model,
    share_of_hurried_moves, train_stage,
)  # fmt: skip

LEARNING_RATES = ["3e-5", "7e-5", "1.5e-4", "3e-4", "6e-4"]
METHODS = {
    "SFT continued": ["sft"],
    "SFT on everything": ["sft"],
    "REDI, alpha 0.8": ["redi", "--alpha", "0.8"],
    "REDI, alpha 0.5": ["redi", "--alpha", "0.5"],
    "REDI, alpha 0.2": ["redi", "--alpha", "0.2"],
    "symmetric (alpha 1)": ["redi", "--alpha", "1"],
    "DPO, beta 0.1": ["dpo", "--beta", "0.1"],
    "DPO, beta 0.01": ["dpo", "--beta", "0.01"],
    "SimPO, beta 2": ["simpo", "--beta", "2", "--gamma", "1"],
}
DYNAMICS = ["REDI, alpha 0.8", "symmetric (alpha 1)", "DPO, beta 0.1"]  # drawn step by step, for the first seed
DYNAMICS_LR = "3e-4"


def compare(output: Path, seeds: list[int], jobs: int, methods: list[str]) -> None:
    """Train and evaluate every method at every learning rate and seed, `jobs` at a time; print and write the table.

    A job is what the commands train.py and evaluate.py do, in a process of its own. What is done already is kept.
    """
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        try:
            drawn = [method for method in DYNAMICS if method in methods]
            for title, function, tasks in (
                ("SFT", _compare_sft, [(output, seed) for seed in seeds]),
                ("stage 2", _compare_method, [(output, seed, method) for method in methods for seed in seeds]),
                ("twice the SFT", _compare_doubled_sft, [(output, seed) for seed in seeds]),
                ("dynamics", _compare_dynamics, [(output, seeds[0], method) for method in drawn]),
            ):
                futures = [pool.submit(function, *task) for task in tasks]
                for future in tqdm(as_completed(futures), title, len(futures)):
                    future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    table = _comparison(output, seeds, methods)
    write_json(output / "table.json", table)
    print(_comparison_text(table, seeds))
    if importlib.util.find_spec("matplotlib") is None:
        return print("\nfor the figures install matplotlib and run this again")
    sft = table["baselines"][0]
    plot_sweep(table["rows"], output / "sweep.png", ("SFT", sft["accuracy"]))
    runs = {method: output / "dynamics" / _slug(method) for method in DYNAMICS if method in methods}
    if runs:
        results = [row for run in runs.values() for row in read_results(run / "sampled" / "results.json")]
        plot.plot_dynamics(list(runs.values()), list(runs), results, output / "dynamics.png")
    print(f"\nwrote {output}/table.json and the figures beside it")


def _compare_sft(output: Path, seed: int) -> None:
    """The data, and the SFT model that every method starts from."""
    directory = output / f"seed-{seed}"
    data = directory / "data"
    with _output_to(directory / "log.txt"):
        prepare(directory, seed)
        if not (data / "everything.jsonl").exists():
            with write_atomically(data / "everything.jsonl") as file:  # wrong solutions as if they were right
                for pair in read_rows(data / "pairs.jsonl"):
                    for key in ("chosen", "rejected"):
                        file.write(json_line({"prompt": pair["prompt"], "completion": pair[key]}))
        train_stage(train.main, STAGES["sft"], directory / "start", data / "positives.jsonl", directory / "sft", seed)
        _evaluate_both(directory, [directory / "sft/final"], seed, data)


def _compare_doubled_sft(output: Path, seed: int) -> None:
    """SFT of twice the steps, which tells whether the SFT model has reached its plateau."""
    directory = output / f"seed-{seed}"
    data, run = directory / "data", directory / "sft-doubled"
    with _output_to(directory / "sft-doubled.log"):
        arguments = [*STAGES["sft"], "--steps", str(2 * SFT_STEPS)]  # the last of two equal flags counts
        train_stage(train.main, arguments, directory / "start", data / "positives.jsonl", run, seed)
        _evaluate_both(directory, [run / "final"], seed, data)


def _compare_method(output: Path, seed: int, method: str) -> None:
    directory = output / f"seed-{seed}"
    folder = directory / _slug(method)
    with _output_to(folder / "log.txt"):
        for lr in LEARNING_RATES:
            arguments = [*_stage_2(method), "--lr", lr]
            train_stage(train.main, arguments, directory / "sft/final", _data_of(method, directory), folder / lr, seed)
        _evaluate_both(folder, [folder / lr / "final" for lr in LEARNING_RATES], seed, directory / "data")


def _compare_dynamics(output: Path, seed: int, method: str) -> None:
    """One run with a checkpoint every 15 steps, each evaluated: for redi.analysis.figures's figure of four panels."""
    directory = output / f"seed-{seed}"
    run = output / "dynamics" / _slug(method)
    with _output_to(run.with_name(f"{run.name}.log")):
        arguments = [*_stage_2(method), "--lr", DYNAMICS_LR, "--save-every", "15", "--keep-checkpoints", "0"]
        train_stage(train.main, arguments, directory / "sft/final", _data_of(method, directory), run, seed)
        models = [directory / "sft/final", *sorted(run.glob("step-*")), run / "final"]
        _evaluate_both(run, models, seed, directory / "data")


def _evaluate_both(output: Path, models: list[Path], seed: int, data: Path) -> None:
    for folder, arguments in SAMPLING.items():
        arguments = [*arguments, "--seed", str(seed)]
        evaluate_models(evaluate.main, models, data / "problems.jsonl", output / folder, arguments)


def _stage_2(method: str) -> list[str]:
    sequences = ["--batch-size", "32"] if METHODS[method][0] == "sft" else ["--batch-size", "16"]  # a pair is two
    return [*METHODS[method], "--steps", str(STAGE_2_STEPS), *sequences]


def _data_of(method: str, directory: Path) -> Path:
    name = {"SFT continued": "positives", "SFT on everything": "everything"}.get(method, "pairs")
    return directory / "data" / f"{name}.jsonl"


def _slug(method: str) -> str:
    return re.sub("[^a-z0-9.]+", "-", method.lower()).strip("-")


@contextlib.contextmanager
def _output_to(path: Path):
    """What is printed goes to the end of a file: several jobs would talk at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def plot_sweep(rows: list[dict], path: Path, baseline: tuple[str, float] | None = None) -> None:
    """Accuracy against the learning rate, one line a method, with error bars.

    Args: rows: {"method": str, "lr": float, "accuracy": share, "sem": its standard error or None}, any order;
    path: PNG or SVG; baseline: (label, accuracy) of a model that the methods began from, as a dashed line.
    """
    figure, [axes] = plot.new_figure(["Accuracy (pass@1, %)"], panel_size=(6.4, 4.6))
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        ours = sorted((row for row in rows if row["method"] == method), key=lambda row: row["lr"])
        axes.errorbar(
            [row["lr"] for row in ours], [100 * row["accuracy"] for row in ours],
            [100 * (row["sem"] or 0.0) for row in ours], label=method, linewidth=1.7,
            marker=plot.MARKERS[i % len(plot.MARKERS)], markersize=5, capsize=3, elinewidth=1,
            color=plot.COLORS[i % len(plot.COLORS)], linestyle="-" if i < len(plot.COLORS) else "--",
        )
    if baseline:
        axes.axhline(100 * baseline[1], color="#777777", linestyle="--", linewidth=1.3, label=baseline[0])
    rates = sorted({row["lr"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("peak learning rate")
    figure.legend(loc="outside upper center", ncols=3, fontsize=10)
    plot.save_figure(figure, path)


def _comparison(output: Path, seeds: list[int], methods: list[str]) -> dict:
    """Means over seeds and their standard errors, and each seed's values."""
    table = {"seeds": seeds, "baselines": [], "rows": []}
    for method, name in (("SFT", "sft"), ("SFT, twice the steps", "sft-doubled")):
        values = [_measured(output / f"seed-{seed}", f"{name}-final") for seed in seeds]
        table["baselines"].append({"method": method, **_summary(values)})
    for method in methods:
        for lr in LEARNING_RATES:
            values = [_measured(output / f"seed-{seed}" / _slug(method), f"{lr}-final") for seed in seeds]
            table["rows"].append({"method": method, "lr": float(lr), **_summary(values)})
    return table


def _measured(directory: Path, model: str) -> dict[str, float]:
    sampled, greedy = (results_by_model(directory / folder)[model] for folder in SAMPLING)
    responses = [sample["response"] for sample in read_samples(directory / "sampled" / model)]
    return {"accuracy": sampled["pass@1"], "greedy": greedy["pass@1"], "tokens": sampled["mean_tokens"],
            "hurried": share_of_hurried_moves(responses)}


def _summary(values: list[dict[str, float]]) -> dict:
    """Means over seeds; sem and greedy_sem: the standard error (ddof 1) of the accuracy, None for one seed."""
    summary = {key: [one[key] for one in values] for key in values[0]}
    means = {key: statistics.fmean(column) for key, column in summary.items()}
    return {**means, "sem": _sem(summary["accuracy"]), "greedy_sem": _sem(summary["greedy"]), "seeds": summary}


def _sem(values: list[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _comparison_text(table: dict, seeds: list[int]) -> str:
    rows = {(row["method"], row["lr"]): row for row in table["rows"]}
    methods = list(dict.fromkeys(method for method, _ in rows))
    rates = [float(lr) for lr in LEARNING_RATES]
    sft, doubled = table["baselines"]
    lines = []
    for title, key, sem in (("sampled", "accuracy", "sem"), ("greedy", "greedy", "greedy_sem")):
        lines.append(f"\npass@1 in %, {title}: mean over {len(seeds)} seeds ± standard error, by peak learning rate")
        lines.append(f"{'':24}" + "".join(f"{lr:>14}" for lr in LEARNING_RATES))
        lines += [f"{row['method']:24}{_percent(row[key], row[sem]):>14}" for row in table["baselines"]]
        for method in methods:
            cells = (_percent(rows[method, lr][key], rows[method, lr][sem]) for lr in rates)
            lines.append(f"{method:24}" + "".join(f"{cell:>14}" for cell in cells))
    best = {method: max((rows[method, lr] for lr in rates), key=lambda row: row["accuracy"]) for method in methods}
    lines.append("\nat the learning rate that is best for the method (sampled):")
    lines.append(f"{'':24}{'learning rate':>14}{'sampled':>14}{'greedy':>14}{'hurried moves':>15}{'tokens':>9}")
    lines += [f"{row['method']:24}{row.get('lr', ''):>14}{_percent(row['accuracy'], row['sem']):>14}"
              f"{_percent(row['greedy'], row['greedy_sem']):>14}{100 * row['hurried']:>13.1f} %{row['tokens']:>9.1f}"
              for row in [*table["baselines"], *best.values()]]
    lines.append("\ndifferences, paired by seed:")
    pairs = [(sft, doubled)]
    if "SFT continued" in best:
        pairs += [(best["SFT continued"], row) for method, row in best.items() if method != "SFT continued"]
    for before, after in pairs:
        for title, key in (("sampled", "accuracy"), ("greedy", "greedy")):
            gains = [a - b for b, a in zip(before["seeds"][key], after["seeds"][key])]
            mean = _percent(statistics.fmean(gains), _sem(gains))
            above = f"above 0 on {sum(gain > 0 for gain in gains)} of {len(gains)} seeds"
            lines.append(f"    {after['method']} - {before['method']}, {title}: {mean}, {above}")
    return "\n".join(lines)


def _percent(mean: float, sem: float | None) -> str:
    return f"{100 * mean:.1f}" + ("" if sem is None else f" ± {100 * sem:.1f}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--seeds", type=positive_int, default=5, help="how many")
    add("--first-seed", type=count, default=10, help="0 to 3 were used to tune the example")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD",
        help=f"these and no others, of: {'; '.join(METHODS)}")  # fmt: skip
    add("--jobs", type=positive_int, default=os.cpu_count(), help="processes at once, one a core")
    add("--output", type=Path, default=Path("out/compare"), help="directory")
    args = parser.parse_args(argv)
    compare(args.output, list(range(args.first_seed, args.first_seed + args.seeds)), args.jobs, args.methods)


if __name__ == "__main__":
    run_command(main, "interrupted; the same command continues where it stopped")

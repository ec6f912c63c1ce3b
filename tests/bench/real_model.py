"""A real pretrained model through the method: SFT, stage 2 and its control, accuracy on problems never trained on.

    pip install -r tests/requirements.txt
    python tests/bench/real_model.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct --train train.jsonl \\
        --validation validation.jsonl --test test.jsonl --prefill "" --output out/student

--train holds rows of problem, answer and other models' generations: the first correct and the first incorrect one are a
teachers' pair. Own pairs are made in the same way of the SFT model's samples of these problems. From one SFT model each
method takes as many updates on as many sequences (a pair is two); the control, SFT continued, trains on the chosen
responses of the same pairs. With several --rates each method takes the one with the highest accuracy on --validation,
and only that one meets other seeds and --test. prepare_data.py, train.py and evaluate.py run as they are, one after the
other. Finished work is kept: the same command continues, and a command with other methods, rates, seeds or samples adds
to it. A table and a figure of all that is done come at the end.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np

from redi.cli import Parser, count, not_negative, positive, positive_int, run_command
from redi.files import json_line, read_jsonl, write_atomically, write_json
from redi.problems import read_benchmark

CONTROL = "SFT continued"
METHODS = {  # name: title, arguments of train.py, colour (Okabe and Ito's) and dashes in the figure
    "sft-continued": (CONTROL, ["sft"], "#000000", "-"),
    "redi": ("REDI, α 0.8", ["redi", "--alpha", "0.8"], "#0072B2", "-"),
    "symmetric": ("symmetric, α 1", ["redi", "--alpha", "1"], "#D55E00", "--"),
    "dpo": ("DPO, β 0.1", ["dpo", "--beta", "0.1"], "#009E73", "-."),
}
NEGATIVES = ("teachers", "own")
LOGPS = {"eval_chosen_logp": "chosen", "eval_rejected_logp": "rejected"}


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if not args.table:
        run_all(args)
    table = summarise(args)
    write_json(args.output / "table.json", table)
    print(table_text(table))
    if importlib.util.find_spec("matplotlib") is None:
        return print("for the figure install matplotlib and run this again")
    draw(args, args.output / "curves.png")


def run_all(args) -> None:
    data = args.output / "data"
    prepare(args, args.train, data / "train")
    prepare(args, args.validation, data / "validation")
    if not args.sft:
        train(args, args.output / "sft", ["sft"], args.model, data / "train/positives.jsonl",
              data / "validation/positives.jsonl", args.sft_steps, args.sft_rate, args.sft_batch_size, seed=0)
    evaluate(args, sft_model(args), args.output / "sft", args.test)
    for negatives in args.negatives:
        if negatives == "own":
            evaluate(args, sft_model(args), args.output / "own-samples", args.train, args.own_samples)
            [samples] = args.output.glob(f"own-samples/eval/*/{args.train.stem}/samples.jsonl")
            prepare(args, samples, data / "own", "--problems", args.train, "--pairs-per-problem", args.own_pairs)
        for name in args.methods:
            for rate in args.rates:
                stage_2(args, negatives, name, rate, args.seeds[0])
            rate = best_rate(args, negatives, name)
            for seed in args.seeds:
                stage_2(args, negatives, name, rate, seed)
                output = run_directory(args, negatives, name, rate, seed)
                evaluate(args, output / "final", output, args.test)
    evaluate(args, args.model, args.output / "as-it-came", args.test)  # last: its answers are the longest


def sft_model(args) -> Path:
    return args.sft or args.output / "sft/final"


def prepare(args, source: Path, output: Path, *more) -> None:
    """Positives and pairs, and chosen.jsonl, the chosen responses of the pairs as rows of SFT."""
    if (output / "chosen.jsonl").exists():
        return
    run(args, output, "prepare_data.py", "traces", "--input", source, "--output", output, "--overwrite", "--tokenizer",
        args.model, "--max-prompt-tokens", args.max_tokens, "--max-response-tokens", args.max_tokens, "--prefill",
        args.prefill, "--processes", args.threads, *more)  # fmt: skip
    with write_atomically(output / "chosen.jsonl") as file:
        for _, pair in read_jsonl(output / "pairs.jsonl"):
            file.write(json_line({"prompt": pair["prompt"], "completion": pair["chosen"]}))


def stage_2(args, negatives: str, name: str, rate: float, seed: int) -> None:
    """Train, and where a rate must be chosen evaluate on --validation."""
    output, arguments = run_directory(args, negatives, name, rate, seed), METHODS[name][1]
    rows, size = ("chosen.jsonl", 2 * args.pairs) if arguments[0] == "sft" else ("pairs.jsonl", args.pairs)
    pairs = args.output / "data" / ("train" if negatives == "teachers" else "own")
    train(args, output, arguments, sft_model(args), pairs / rows, args.output / "data/validation" / rows, args.steps,
          rate, size, seed)  # fmt: skip
    if len(args.rates) > 1 and seed == args.seeds[0]:
        evaluate(args, output / "final", output, args.validation)


def run_directory(args, negatives: str, name: str, rate: float, seed: int) -> Path:
    return args.output / negatives / f"{name}-{rate:g}-seed-{seed}"


def best_rate(args, negatives: str, name: str) -> float:
    """Of the --rates that are done (first seed), the one with the highest accuracy on --validation."""
    runs = {rate: run_directory(args, negatives, name, rate, args.seeds[0]) for rate in sorted(args.rates)}
    done = {rate: output for rate, output in runs.items() if (output / "final").is_dir()}
    if len(done) < 2:
        return next(iter(done or runs))
    correct = {rate: correct_share(output, args.validation, args.samples) for rate, output in done.items()}
    return max(correct, key=lambda rate: -1 if correct[rate] is None else correct[rate].mean())


def train(args, output: Path, method: list[str], start, rows: Path, held_out: Path, steps: int, rate: float,
          batch_size: int, seed: int) -> None:  # fmt: skip
    if (output / "final").is_dir():
        return
    run(args, output, "train.py", *method, "--model", start, "--data", rows, "--output", output, "--steps", steps,
        "--lr", f"{rate:g}", "--batch-size", batch_size, "--seed", seed, "--eval-data", held_out, "--eval-every",
        args.eval_every, "--prefill", args.prefill, "--max-tokens", args.max_tokens, "--micro-batch-tokens",
        args.micro_batch_tokens, "--recompute", "nothing", "--save-every", args.save_every, "--keep-checkpoints", 1,
        "--dtype", args.dtype, "--resume")  # fmt: skip


def evaluate(args, model, output: Path, problems: Path, samples: int | None = None) -> None:
    """Draw what is missing in OUTPUT/eval. Every model meets the same random numbers."""
    samples = samples or args.samples
    if correct_share(output, problems, samples) is not None:
        return
    run(args, output / "eval", "evaluate.py", "--model", model, "--problems", problems, "--output", output / "eval",
        "--samples", samples, "--temperature", args.temperature, "--max-new-tokens", args.max_new_tokens, "--prefill",
        args.prefill, "--threads", args.threads, "--tile", args.tile, "--dtype", args.dtype)  # fmt: skip


def run(args, output: Path, *command) -> None:
    """A command as a process of its own; its output goes to OUTPUT.log. An interrupt from the terminal reaches it too:
    it saves and ends, and is waited for."""
    log = output.with_name(f"{output.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{command[0]} -> {output}", flush=True)
    with open(log, "ab") as file:
        arguments = [sys.executable, ROOT / command[0], *map(str, command[1:])]
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        process = subprocess.Popen(arguments, stdout=file, stderr=file, env=environment)
        try:
            process.wait()
        except BaseException:
            process.wait()
            raise
    if process.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        sys.exit(f"{tail}\nerror: {command[0]} ended with status {process.returncode}; its output is in {log}")


def read_samples(output: Path, problems: Path) -> dict[tuple[str, int], dict]:
    """(id, number) -> sample."""
    rows = [row for file in output.glob(f"eval/*/{problems.stem}/samples.jsonl") for _, row in read_jsonl(file)]
    return {(row["id"], row["sample"]): row for row in rows}


def correct_share(output: Path, problems: Path, samples: int) -> np.ndarray | None:
    """Of each problem, the share of its first samples, so many, that are correct; None where some are missing."""
    found, ids = read_samples(output, problems), read_benchmark(problems).problems
    if any((id, number) not in found for id in ids for number in range(samples)):
        return None
    return np.array([np.mean([found[id, number]["correct"] for number in range(samples)]) for id in ids])


def summarise(args) -> dict:
    """What each model does on --test, over the seeds that are done so far."""
    runs = {("as it came", "", None): {None: args.output / "as-it-came"},
            ("SFT", "", None if args.sft else args.sft_rate): {None: args.output / "sft"}}  # fmt: skip
    for negatives in args.negatives:
        for name in args.methods:
            rate = best_rate(args, negatives, name)
            runs[METHODS[name][0], negatives, rate] = {
                seed: run_directory(args, negatives, name, rate, seed) for seed in args.seeds
            }
    rows, correct = [], {}  # correct[title, negatives][seed] (problems,)
    for (title, negatives, rate), directories in runs.items():
        found = {seed: correct_share(directory, args.test, args.samples) for seed, directory in directories.items()}
        found = correct[title, negatives] = {seed: share for seed, share in found.items() if share is not None}
        if not found:
            continue
        samples = [sample for seed in found for (_, number), sample in
                   read_samples(directories[seed], args.test).items() if number < args.samples]  # fmt: skip
        row = {"method": title, "negatives": negatives, "rate": rate, "seeds": list(found),
               "accuracy": estimate(found.values()),
               "boxed": np.mean([sample["answer"] is not None for sample in samples]),
               "truncated": np.mean([sample["finish_reason"] == "length" for sample in samples]),
               "tokens": np.mean([sample["tokens"] for sample in samples])}  # fmt: skip
        for other, of in ((CONTROL, negatives), ("SFT", "")):
            baseline = correct.get((other, of), {})
            if negatives and title != other and (both := [seed for seed in found if baseline.keys() & {seed, None}]):
                row[f"minus {other}"] = estimate(found[seed] - baseline.get(seed, baseline.get(None)) for seed in both)
        ends = [curve[-1] for curve in map(held_out_curve, (directories[seed] for seed in found)) if curve]
        row |= {key: np.mean([end[key] for end in ends]) for key in LOGPS if ends and key in ends[0]}
        rows.append(row)
    settings = {key: str(value) for key, value in vars(args).items()}
    return {"settings": settings, "problems": len(read_benchmark(args.test).problems), "rows": rows}


def estimate(by_seed) -> dict[str, float | None]:
    """The mean of (seeds, problems), and its standard errors: over problems (each its mean over seeds) and over seeds
    (None for one seed)."""
    values = np.array(list(by_seed))
    by_problem, by_seed = values.mean(0), values.mean(1)
    return {"mean": values.mean(), "se_problems": by_problem.std(ddof=1) / len(by_problem) ** 0.5,
            "se_seeds": by_seed.std(ddof=1) / len(by_seed) ** 0.5 if len(by_seed) > 1 else None}  # fmt: skip


def held_out_curve(directory: Path) -> list[dict]:
    """The lines of metrics.jsonl that have held-out values."""
    path = directory / "metrics.jsonl"
    return [row for _, row in read_jsonl(path) if "eval_chosen_logp" in row] if path.exists() else []


def table_text(table: dict) -> str:
    """Markdown."""
    others = (f"minus {CONTROL}", "minus SFT")
    lines = [f"Accuracy on {table['problems']} problems, {table['settings']['samples']} samples each, in % ± standard "
             "error over problems (± over seeds); LogPS on the validation pairs at the end, in nats a token\n",
             f"| | negatives | rate | accuracy | {' | '.join(others)} | boxed | truncated | tokens | "
             f"{' | '.join(LOGPS.values())} |",
             "|---" * 11 + "|"]  # fmt: skip
    for row in table["rows"]:
        rate = "" if row["rate"] is None else f"{row['rate']:g}"
        differences = [percent(row[other], "+") if other in row else "" for other in others]
        logps = [f"{row[key]:.3f}" if key in row else "" for key in LOGPS]
        shares = [f"{100 * row[key]:.0f} %" for key in ("boxed", "truncated")]
        cells = [row["method"], row["negatives"], rate, percent(row["accuracy"]), *differences, *shares]
        lines.append(f"| {' | '.join([*cells, str(round(row['tokens'])), *logps])} |")
    return "\n".join(lines)


def percent(value: dict, sign: str = "") -> str:
    over_seeds = "" if value["se_seeds"] is None else f" (± {100 * value['se_seeds']:.1f})"
    return f"{100 * value['mean']:{sign}.1f} ± {100 * value['se_problems']:.1f}{over_seeds}"


def draw(args, path: Path) -> None:
    """LogPS on the validation pairs over the steps of stage 2, chosen above rejected: seeds thin, their mean thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), dpi=130, layout="constrained", facecolor="white")
    panels, handles = figure.subplots(2, len(args.negatives), squeeze=False, sharex=True), {}
    for (row, column), panel in np.ndenumerate(panels):
        key, negatives = list(LOGPS)[row], args.negatives[column]
        panel.set_title(f"Held-out {LOGPS[key]} LogPS, {negatives} pairs", loc="left", fontsize=11)
        panel.grid(color="#e4e4e4")
        panel.spines[["top", "right"]].set_visible(False)
        panel.set(ylabel="nats a token", xlabel="optimiser step of stage 2")
        for name in args.methods:
            title, _, color, dashes = METHODS[name]
            rate = best_rate(args, negatives, name)
            runs = [run_directory(args, negatives, name, rate, seed) for seed in args.seeds]
            curves = [held_out_curve(run) for run in runs if (run / "final").is_dir()]
            curves = [[(line["step"], line[key]) for line in curve] for curve in curves if curve and key in curve[0]]
            for curve in curves:
                panel.plot(*zip(*curve), dashes, color=color, linewidth=0.8, alpha=0.45)
            if curves:
                mean = np.mean(curves, axis=0).T  # steps, values
                [handles[title]] = panel.plot(*mean, dashes, color=color, linewidth=2.2, marker="o", markersize=3)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path)


def parse_arguments(argv: list[str] | None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="model directory or hub id")
    add("--train", required=True, type=Path, metavar="FILE", help="JSONL: id, problem, answer, generations")
    add("--validation", required=True, type=Path, metavar="FILE", help="the same; decides nothing but --rates")
    add("--test", required=True, type=Path, metavar="FILE", help="JSONL: id, problem, answer")
    add("--output", type=Path, default=Path("out/student"), help="directory")
    add("--prefill", default="", help="start of every response, forced in evaluation")
    add("--max-tokens", type=positive_int, default=512, help="longer sequences, prompt included, are not trained on")
    add("--sft", type=Path, metavar="DIRECTORY", help="begin stage 2 from this model instead of making one by SFT")
    add("--sft-steps", type=positive_int, default=84, help="updates of SFT")
    add("--sft-batch-size", type=positive_int, default=16, help="rows an update of SFT")
    add("--sft-rate", type=positive, default=1e-5, help="peak learning rate of SFT")
    add("--steps", type=positive_int, default=23, help="updates of stage 2")
    add("--pairs", type=positive_int, default=16, help="pairs an update; SFT continued takes twice as many rows")
    add("--rates", type=positive, nargs="+", default=[1e-6, 2e-6], help="peak learning rates of stage 2")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="of stage 2")
    add("--negatives", nargs="+", choices=NEGATIVES, default=list(NEGATIVES), help="whose wrong responses")
    add("--own-samples", type=positive_int, default=4, help="of each training problem, for own pairs")
    add("--own-pairs", type=positive_int, default=1, help="own pairs a problem at most")
    add("--seeds", type=count, nargs="+", default=[0, 1, 2], help="of the order of the rows")
    add("--samples", type=positive_int, default=4, help="of each problem of --validation and --test")
    add("--temperature", type=not_negative, default=0.6, help="of the samples; 0 is greedy")
    add("--max-new-tokens", type=positive_int, default=256, help="of a sample")
    add("--tile", type=positive_int, default=16, help="evaluate.py's: samples in one call of the model on a CPU")
    add("--eval-every", type=positive_int, default=8, help="steps between measurements of the validation pairs' LogPS")
    add("--save-every", type=count, default=20, help="steps between checkpoints; 0 for none")
    add("--micro-batch-tokens", type=positive_int, default=1024, help="tokens in memory at once")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation; bfloat16 on a GPU")
    add("--threads", type=positive_int, default=os.cpu_count(), help="of each command; other numbers round differently")
    add("--table", action="store_true", help="only the table and the figure, of what is done so far")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, "interrupted; the same command continues where it stopped")

"""A real pretrained model on a laptop's CPU: parity with transformers, SFT, stage 2 and its control, accuracy, curves.

    pip install -r tests/requirements.txt
    python tests/bench/real_model.py --model HuggingFaceTB/SmolLM2-135M-Instruct --traces TRACES --output out/real

TRACES: a parquet or JSONL file, or a directory of them, laid out as OpenR1-Math-Raw is, or rows of problem, answer and
generations. Some problems are held out before anything else: their pairs give the held-out LogPS, and every model is
evaluated on some of them. From one SFT model each method takes as many updates on as many sequences (a pair is two) at
each rate and seed, which is that of the order of the rows and of the samples; SFT continued is the control. train.py,
evaluate.py and prepare_data.py run as they are, one after the other, or --jobs of them side by side. At the end come a
table and a figure; what is done is kept, and the same command continues.
"""

import argparse
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np

from redi.cli import Parser, count, not_negative, positive, positive_int, run_command
from redi.files import json_line, read_json, read_jsonl, write_atomically, write_json
from redi.problems import gold_answers

CONTROL = "SFT continued"
METHODS = {  # name: title, arguments of train.py, colour (Okabe and Ito's) and dashes in the figure
    "sft-continued": (CONTROL, ["sft"], "#000000", "-"),
    "redi": ("REDI, α 0.8", ["redi", "--alpha", "0.8"], "#0072B2", "-"),
    "symmetric": ("symmetric, α 1", ["redi", "--alpha", "1"], "#D55E00", "--"),
    "dpo": ("DPO, β 0.1", ["dpo", "--beta", "0.1"], "#009E73", "-."),
}
MAY_CHANGE = ("output", "rates", "methods", "seeds", "problems", "samples", "threads", "jobs", "keep_models", "part",
              "table")  # fmt: skip
LOGPS = {"eval_chosen_logp": "chosen", "eval_rejected_logp": "rejected"}
COSTS = threading.Lock()  # of OUTPUT/costs.json


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.table:
        keep_settings(args)
        split_problems(args)
        check_parity(args)
        prepare_rows(args)
        sft = args.sft or args.output / "sft/final"
        untrained = partial(evaluate, args, args.model, args.output / "untrained", 0)
        side_by_side(args, [untrained, partial(run_stage_1, args, sft)])
        side_by_side(args, [partial(run_stage_2, args, sft, seed, name, rate)
                            for seed in args.seeds for rate in args.rates for name in args.methods])  # fmt: skip
    table = summarise(args)
    write_json(args.output / "table.json", table)
    print(table_text(table))
    if importlib.util.find_spec("matplotlib") is None:
        return print("for the figure install matplotlib and run this again")
    draw(args, args.output / "curves.png")


def side_by_side(args, tasks: list[Callable[[], None]]) -> None:
    """--jobs of them at a time. Where one fails or the user interrupts, those that have not begun do not."""
    pool, failed = ThreadPoolExecutor(args.jobs), threading.Event()

    def attempt(task):
        if failed.is_set():
            return
        try:
            task()
        except BaseException:
            failed.set()  # here and not where the result is read: this thread takes its next task before that
            raise

    try:
        for future in [pool.submit(attempt, task) for task in tasks]:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def keep_settings(args) -> None:
    """OUTPUT is of one setting, but for what may be added to it. Raises ValueError naming the flag that differs."""
    path = args.output / "settings.json"
    settings = {key: str(value) for key, value in vars(args).items() if key not in MAY_CHANGE}
    for key, value in (read_json(path) if path.exists() else settings).items():
        if settings.get(key) != value:
            raise ValueError(f"{args.output} was begun with --{key.replace('_', '-')} {value}, not {settings.get(key)}")
    write_json(path, settings)


def read_traces(args):
    """The first --rows rows, as dictionaries."""
    files, left = [args.traces], args.rows
    if args.traces.is_dir():
        files = sorted(args.traces.rglob("*.parquet")) or sorted(args.traces.rglob("*.jsonl"))
    for file in files:
        for row in read_parquet(file) if file.suffix == ".parquet" else (row for _, row in read_jsonl(file)):
            if left == 0:
                return
            left -= 1
            yield row


def read_parquet(file: Path):
    from pyarrow.parquet import ParquetFile

    for batch in ParquetFile(file).iter_batches(64):
        yield from batch.to_pylist()


def usable_rows(args):
    """Rows that may be held out: with a valid problem, an answer and generations."""
    for row in read_traces(args):
        valid = str(row.get("problem_is_valid", "yes")).strip().lower() == "yes"
        if valid and (row.get("problem") or "").strip() and row.get("generations") and gold_answers(row.get("answer")):
            yield row


def split_problems(args) -> None:
    """data/train.jsonl and held-out.jsonl, rows of the traces, and problems.jsonl. A problem's text alone decides
    whether it is held out, and all of its rows go to one side."""
    data = args.output / "data"
    if (data / "problems.jsonl").exists():  # written last
        return
    data.mkdir(exist_ok=True)
    answers = {row["problem"].strip(): gold_answers(row["answer"]) for row in usable_rows(args)}
    if len(answers) < 2 * args.held_out:
        raise ValueError(f"{args.traces}: {len(answers)} usable problems, too few to hold out {args.held_out}")
    held_out = sorted(answers, key=problem_id)[: args.held_out]
    with write_atomically(data / "train.jsonl") as train, write_atomically(data / "held-out.jsonl") as rest:
        for row in read_traces(args):
            (rest if (row.get("problem") or "").strip() in held_out else train).write(json_line(row))
    with write_atomically(data / "problems.jsonl") as file:
        for text in held_out:
            file.write(json_line({"id": problem_id(text), "problem": text, "answer": answers[text]}))


def problem_id(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()


def check_parity(args) -> None:
    if importlib.util.find_spec("transformers") is None:
        return print("transformers is not installed: not compared with it")
    if not (args.output / "parity.json").exists():
        run(args, "parity", args.output / "parity", "tests/bench/parity.py", "--model", args.model, "--problems",
            args.output / "data/problems.jsonl", "--output", args.output / "parity.json")  # fmt: skip


def prepare_rows(args) -> None:
    """Positives and pairs of both sides by prepare_data.py; eval-pairs.jsonl and their chosen half as rows of SFT."""
    data = args.output / "data"
    if (data / "eval-pairs.jsonl").exists():  # written last
        return
    command = "openr1" if any(name.startswith("correctness") for name in next(usable_rows(args))) else "traces"
    for side in ("train", "held-out"):
        run(args, "data", data / side, "prepare_data.py", command, "--input", data / f"{side}.jsonl", "--output",
            data / side, "--overwrite", "--tokenizer", args.model, "--max-response-tokens", args.max_response_tokens,
            "--max-prompt-tokens", args.max_prompt_tokens, "--processes", args.threads,
            *shlex.split(args.prepare_flags))  # fmt: skip
    pairs = [row for _, row in read_jsonl(data / "held-out/pairs.jsonl")][: args.eval_pairs]
    with write_atomically(data / "eval-chosen.jsonl") as file:
        file.writelines(json_line({"prompt": pair["prompt"], "completion": pair["chosen"]}) for pair in pairs)
    with write_atomically(data / "eval-pairs.jsonl") as file:
        file.writelines(map(json_line, pairs))


def run_stage_1(args, sft: Path) -> None:
    if not args.sft:
        train(args, "SFT", args.output / "sft", 0, ["sft"], args.model, args.sft_steps, args.sft_rate)
    evaluate(args, sft, args.output / "sft", 0)


def run_stage_2(args, sft: Path, seed: int, name: str, rate: float) -> None:
    output = stage_2(args, seed, name, rate)
    if is_evaluated(args, output):  # its weights may be gone
        return
    train(args, "stage 2", output, seed, METHODS[name][1], sft, args.steps, rate)
    evaluate(args, output / "final", output, seed)
    if not args.keep_models:
        (output / "final/model.safetensors").unlink()


def stage_2(args, seed: int, name: str, rate: float) -> Path:
    return args.output / f"seed-{seed}" / f"{name}-{rate:g}"


def train(args, kind: str, output: Path, seed: int, method: list[str], start, steps: int, rate: float) -> None:
    if (output / "final").is_dir():
        return
    data = args.output / "data"
    rows, held_out, size = data / "train/pairs.jsonl", data / "eval-pairs.jsonl", args.pairs
    if method[0] == "sft":
        rows, held_out = data / "train/positives.jsonl", data / "eval-chosen.jsonl"
        size = args.sft_batch_size if kind == "SFT" else 2 * args.pairs
    run(args, kind, output, "train.py", *method, "--model", start, "--data", rows, "--output", output, "--steps", steps,
        "--lr", f"{rate:g}", "--batch-size", size, "--seed", seed, "--eval-data", held_out, "--eval-every",
        args.eval_every, "--max-tokens", args.max_prompt_tokens + args.max_response_tokens, "--micro-batch-tokens",
        args.micro_batch_tokens, "--recompute", "nothing", "--save-every", 0, "--dtype", args.dtype,
        "--resume")  # fmt: skip


def evaluate(args, model, output: Path, seed: int) -> None:
    """Draw what is missing in OUTPUT/eval of the held-out problems' samples."""
    if not is_evaluated(args, output):
        run(args, "evaluation", output / "eval", "evaluate.py", "--model", model, "--problems",
            args.output / "data/problems.jsonl", "--limit", args.problems, "--output", output / "eval", "--samples",
            args.samples, "--rows", args.decoded_together,
            "--temperature", args.temperature, "--max-new-tokens", args.max_new_tokens, "--seed", seed,
            "--threads", args.threads, "--dtype", args.dtype)  # fmt: skip


def is_evaluated(args, output: Path) -> bool:
    done = read_samples(args, output)
    return all((id, sample) in done for id in problem_ids(args) for sample in range(args.samples))


def problem_ids(args) -> list[str]:
    """Of the held-out problems that every model is sampled on."""
    return [row["id"] for _, row in read_jsonl(args.output / "data/problems.jsonl")][: args.problems]


def read_samples(args, output: Path) -> dict[tuple[str, int], dict]:
    """(id, sample) -> row, of samples 0 to --samples - 1."""
    rows = [row for file in output.glob("eval/*/problems/samples.jsonl") for _, row in read_jsonl(file)]
    return {(row["id"], row["sample"]): row for row in rows if row["sample"] < args.samples}


def run(args, kind: str, output: Path, *command) -> None:
    """A command as a process of its own; what it says goes to OUTPUT.log. An interrupt from the terminal reaches it
    too: it saves and ends, and is waited for."""
    log = output.with_name(f"{output.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{command[0]} -> {output}", flush=True)
    with open(log, "ab") as file:
        arguments = [sys.executable, ROOT / command[0], *map(str, command[1:])]
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        process = subprocess.Popen(arguments, stdout=file, stderr=file, env=environment)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    with COSTS:
        costs = read_if_there(args.output / "costs.json")
        spent = usage.ru_utime + usage.ru_stime
        write_json(args.output / "costs.json", {**costs, kind: round(costs.get(kind, 0) + spent)})
    if process.returncode:
        words = log.read_text(errors="replace")[-2000:]
        sys.exit(f"{words}\nerror: {command[0]} ended with status {process.returncode}; its words are in {log}")


def read_if_there(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


def summarise(args) -> dict:
    """What each model does on the held-out problems (--part of them), over the seeds that are done so far."""
    ids = problem_ids(args)
    middle = len(ids) // 2
    ids = {"all": ids, "first half": ids[:middle], "second half": ids[middle:]}[args.part]
    runs = {("as it came", None): dict.fromkeys(args.seeds, args.output / "untrained"),
            ("SFT", args.sft_rate): dict.fromkeys(args.seeds, args.output / "sft")}  # fmt: skip
    for rate in args.rates:
        for name in args.methods:
            runs[METHODS[name][0], rate] = {seed: stage_2(args, seed, name, rate) for seed in args.seeds}
    rows, right = [], {}  # right[title, rate][seed]: of each problem, the share of its samples that are right
    for model, directories in runs.items():
        done = {seed: directory for seed, directory in directories.items() if is_evaluated(args, directory)}
        if not done:
            continue
        samples = {seed: read_samples(args, directory) for seed, directory in done.items()}
        asked = [found[id, k] for found in samples.values() for id in ids for k in range(args.samples)]
        correct = np.array([sample["correct"] for sample in asked]).reshape(len(done), len(ids), args.samples)
        right[model] = dict(zip(done, correct.mean(-1)))
        runs_of_its_own = list(right[model].values())[: len(set(done.values()))]  # stage 1 is one run for all seeds
        row = {"method": model[0], "rate": model[1], "seeds": list(done), "accuracy": estimate(runs_of_its_own),
               "boxed": np.mean([sample["answer"] is not None for sample in asked]),
               "tokens": np.mean([sample["tokens"] for sample in asked])}  # fmt: skip
        for other in ((CONTROL, model[1]), ("SFT", args.sft_rate)):
            both = [seed for seed in done if seed in right.get(other, {})]
            if both and model != other:
                row[f"minus {other[0]}"] = estimate(right[model][seed] - right[other][seed] for seed in both)
        ends = [curve[-1] for curve in map(held_out_curve, done.values()) if curve]
        for key in LOGPS:
            if ends and key in ends[0]:
                row[key] = np.mean([end[key] for end in ends])
        rows.append(row)
    return {"settings": {key: str(value) for key, value in vars(args).items()}, "problems": len(ids), "rows": rows,
            "parity": read_if_there(args.output / "parity.json"),
            "cpu_seconds": read_if_there(args.output / "costs.json")}  # fmt: skip


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
    lines = [f"Accuracy on {table['problems']} held-out problems in % ± standard error over problems (± over seeds); "
             "held-out LogPS at the end in nats a token\n",
             f"| | rate | accuracy | {' | '.join(others)} | boxed | tokens | {' | '.join(LOGPS.values())} |",
             "|---" * 9 + "|"]  # fmt: skip
    for row in table["rows"]:
        rate = "" if row["rate"] is None else f"{row['rate']:g}"
        differences = [percent(row[other], "+") if other in row else "" for other in others]
        logps = [f"{row[key]:.2f}" if key in row else "" for key in LOGPS]
        cells = [row["method"], rate, percent(row["accuracy"]), *differences, f"{100 * row['boxed']:.0f} %"]
        lines.append(f"| {' | '.join([*cells, str(round(row['tokens'])), *logps])} |")
    return "\n".join([*lines, "", f"CPU seconds: {table['cpu_seconds']}", f"parity: {table['parity']}"])


def percent(value: dict, sign: str = "") -> str:
    over_seeds = "" if value["se_seeds"] is None else f" (± {100 * value['se_seeds']:.1f})"
    return f"{100 * value['mean']:{sign}.1f} ± {100 * value['se_problems']:.1f}{over_seeds}"


def draw(args, path: Path) -> None:
    """Held-out LogPS over the steps of stage 2, chosen above rejected, a column a rate: seeds thin, mean thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), dpi=130, layout="constrained", facecolor="white")
    panels = figure.subplots(2, len(args.rates), squeeze=False, sharex=True)
    handles = {}
    for (row, column), panel in np.ndenumerate(panels):
        key, rate = list(LOGPS)[row], args.rates[column]
        panel.set_title(f"Held-out {LOGPS[key]} LogPS, rate {rate:g}", loc="left", fontsize=11)
        panel.grid(color="#e4e4e4")
        panel.spines[["top", "right"]].set_visible(False)
        for name in args.methods:
            title, _, color, dashes = METHODS[name]
            runs = [stage_2(args, seed, name, rate) for seed in args.seeds]
            curves = [held_out_curve(run) for run in runs if (run / "final").is_dir()]
            curves = [[(line["step"], line[key]) for line in curve] for curve in curves if curve and key in curve[0]]
            for curve in curves:
                panel.plot(*zip(*curve), dashes, color=color, linewidth=0.8, alpha=0.45)
            if curves:
                mean = np.mean(curves, axis=0).T  # steps, values
                [handles[title]] = panel.plot(*mean, dashes, color=color, linewidth=2.2, marker="o", markersize=3)
    for panel in panels[-1]:
        panel.set_xlabel("optimiser step of stage 2")
    for panel in panels[:, 0]:
        panel.set_ylabel("nats a token")
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="model directory or hub id")
    add("--traces", required=True, type=Path, help="parquet or JSONL file, or a directory of them")
    add("--output", type=Path, default=Path("out/real"), help="directory")
    add("--rows", type=positive_int, default=2000, help="rows of the traces that are used, from their start")
    add("--held-out", type=positive_int, default=200, help="problems never trained on")
    add("--problems", type=positive_int, help="of these, sampled from every model (default: all)")
    add("--eval-pairs", type=positive_int, default=20, help="held-out pairs whose LogPS are measured")
    add("--eval-every", type=positive_int, default=6, help="steps between these measurements")
    add("--max-prompt-tokens", type=positive_int, default=192, help="rows with a longer prompt are not trained on")
    add("--max-response-tokens", type=positive_int, default=192, help="pairs with a longer response are left out")
    add("--prepare-flags", default="", help="more for prepare_data.py, as in --prepare-flags='--pairs-per-problem 3'")
    add("--sft", type=Path, metavar="DIRECTORY", help="begin stage 2 from this model instead of making one by SFT")
    add("--sft-steps", type=positive_int, default=60, help="updates of SFT")
    add("--sft-batch-size", type=positive_int, default=8, help="rows an update of SFT")
    add("--sft-rate", type=positive, default=2e-4, help="peak learning rate of SFT")
    add("--steps", type=positive_int, default=24, help="updates of stage 2")
    add("--pairs", type=positive_int, default=4, help="pairs an update; SFT continued takes twice as many rows")
    add("--rates", type=positive, nargs="+", default=[3e-5, 2e-4], help="peak learning rates of stage 2")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="of stage 2")
    add("--seeds", type=count, nargs="+", default=[0, 1, 2], help="of the order of the rows, and of samples")
    add("--samples", type=positive_int, default=1, help="of each held-out problem")
    add("--temperature", type=not_negative, default=0.0, help="of the samples; 0 is greedy")
    add("--max-new-tokens", type=positive_int, default=192, help="of a sample")
    add("--decoded-together", type=positive_int, default=64, help="samples side by side in evaluation")
    add("--micro-batch-tokens", type=positive_int, default=1024, help="tokens in memory at once")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation; bfloat16 on a GPU")
    add("--jobs", type=positive_int, default=1, help="runs side by side")
    add("--threads", type=positive_int, default=os.cpu_count(), help="of each command; other numbers round differently")
    add("--keep-models", action="store_true", help="keep the weights of stage 2 when they have been evaluated")
    add("--part", choices=("all", "first half", "second half"), default="all", help="of the problems, for the table")
    add("--table", action="store_true", help="only the table and the figure, of what is done so far")
    args = parser.parse_args(argv)
    args.problems = min(args.problems or args.held_out, args.held_out)
    return args


if __name__ == "__main__":
    run_command(main, "interrupted; the same command continues where it stopped")

"""Resident memory over 200 training steps with varying token counts, with and without limits on oneDNN's caches.

    python tests/bench/memory.py sft redi

Per method two processes run train.py's own loop on the same rows and the same random model (24.9M parameters, that of
training.py) and alternate steps, so that load on a shared machine affects both: one with the limits of
`redi.cli.prepare_process` on the primitive caches of oneDNN and ideep, one with the libraries' default of 1,024 entries
each. Token counts differ between micro-batches, and the largest come early, so that later growth is not due to larger
micro-batches. One thread. Linux only (/proc).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes too
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench.training import SHAPES, Turns, write_model_directory, write_rows

SIDES = {
    "16 entries": {},
    "1,024 entries": {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"},
}
SHOWN = (2, 20, 60, 200)  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", choices=("sft", "redi"), metavar="method", help="sft, redi")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sequences", type=int, default=8, help="per step; a pair counts two")
    parser.add_argument("--worker", type=Path, metavar="DIRECTORY", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return train_in_turns(args.worker, args)
    steps = [step for step in SHOWN if step < args.steps] + [args.steps]
    print("Resident MB (peak so far) after so many steps; CPU seconds of all steps after the second\n")
    print(f"| | {' | '.join(map(str, steps))} | from step 20 to the end | CPU seconds |")
    print("|---" * (len(steps) + 3) + "|")
    for method in args.methods:
        with tempfile.TemporaryDirectory() as directory:
            prepare(Path(directory), args)
            for side, reports in run_sides(method, directory, args).items():
                print(table_row(f"{method}, {side}", reports, steps), flush=True)


def prepare(directory: Path, args) -> None:
    """Write a random model, and rows with long-tailed response lengths: 35 to 240 tokens with the prompt, mean 80."""
    import numpy as np
    import torch

    shape = {"num_hidden_layers": 8, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048,
             "rope_theta": 10000.0, **SHAPES["standard"]}  # fmt: skip
    write_model_directory(directory / "model", shape, torch.float32)
    lengths = np.exp(np.random.default_rng(0).normal(3.9, 0.5, (400, 2))).clip(20, 200).astype(int)
    write_rows(directory, lengths, (15, 40), shape["vocab_size"])


def run_sides(method: str, directory: str, args) -> dict[str, list[dict]]:
    """The reports of each side, one per step."""
    workers = {}
    for side, settings in SIDES.items():
        command = [sys.executable, __file__, method, "--steps", str(args.steps), "--sequences", str(args.sequences)]
        output = Path(directory, side)
        output.mkdir()
        (output / "model").symlink_to(Path(directory, "model"))
        (output / "rows.jsonl").symlink_to(Path(directory, "sft.jsonl" if method == "sft" else "pairs.jsonl"))
        workers[side] = subprocess.Popen([*command, "--worker", output], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=open(output / "log", "w"), text=True, env={**os.environ, **settings})
    reports = {side: [] for side in SIDES}
    for _ in range(args.steps):
        for side, worker in workers.items():
            worker.stdin.write("step\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
            if not line:
                log = Path(directory, side, "log").read_text()
                sys.exit(f"{log[-2000:]}\nerror: the process '{side}' exited with status {worker.wait()}")
            reports[side].append(json.loads(line))
    for worker in workers.values():
        worker.communicate()
    return reports


def train_in_turns(directory: Path, args) -> None:
    """Run train.py's loop unchanged, except that it waits for its turn before each step and reports after it."""
    import train
    from redi.training.run import Run

    turns, steps, (method,) = Turns(), Run.steps, args.methods

    def in_turns(run, total_steps, make_batch):
        for batch in steps(run, total_steps, make_batch):
            turns.begin()
            yield batch
            turns.end(**memory_in_mb())

    Run.steps = in_turns
    examples = args.sequences if method == "sft" else args.sequences // 2
    train.main([method, "--model", str(directory / "model"), "--data", str(directory / "rows.jsonl"), "--output",
                str(directory / "run"), "--batch-size", str(examples), "--steps", str(args.steps), "--lr", "1e-6",
                "--micro-batch-tokens", "384", "--save-every", "0", "--dtype", "float32"])  # fmt: skip


def memory_in_mb() -> dict[str, float]:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[key].split()[0]) / 1024 for name, key in (("resident", "VmRSS"), ("peak", "VmHWM"))}


def table_row(title: str, reports: list[dict], steps: list[int]) -> str:
    cells = [f"{reports[step - 1]['resident']:.0f} ({reports[step - 1]['peak']:.0f})" for step in steps]
    growth = {key: reports[-1][key] / reports[min(19, len(reports) - 1)][key] - 1 for key in ("resident", "peak")}
    seconds = sum(report["cpu_seconds"] for report in reports[2:])
    return (f"| {title} | {' | '.join(cells)} | {100 * growth['resident']:+.1f} % ({100 * growth['peak']:+.1f} %) | "
            f"{seconds:.0f} |")


if __name__ == "__main__":
    main()

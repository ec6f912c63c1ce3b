"""CPU seconds of training with every check on, beside the same training with them taken out.

    python tests/bench/overhead.py

Steps of one REDI run, with and without in turn, so that both see the same weights, rows of the same lengths and the
same state of a shared machine. Without: no collapse monitor, no look at whether numbers are finite, no sums of
LogPS and margins, no line in metrics.jsonl. The checksums of a checkpoint are timed apart, and count
as one save every --save-every steps. One thread.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import train
from redi.training import run as monitor
from redi.training import checkpoint
from redi.hub import weights as pretrained
from redi.hub.config import load_config
from redi.training.run import MetricsLog
from tests import tiny

SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6,
         "num_key_value_heads": 2, "max_position_embeddings": 4096}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8, help="in a step")
    parser.add_argument("--tokens", type=int, default=300, help="of a response")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=9, help="counted steps of each side")
    parser.add_argument("--save-every", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        write_inputs(place, args)
        seconds = {"with": [], "without": []}
        parts = measure(place, args, seconds)
    print(f"{args.pairs} pairs a step, responses of {args.tokens} tokens; medians [quartiles] of {args.rounds} steps")
    for side, values in seconds.items():
        print(f"{side:8} {spread(values)} CPU seconds a step")
    calm = median(seconds["without"])
    each = [a / b - 1 for a, b in zip(seconds["with"], seconds["without"])]
    print(f"difference of neighbours: {spread([100 * value for value in each])} %")
    for name, values in parts.items():
        share = median(values) / calm / (args.save_every if name == "checksums of a save" else 1)
        print(f"  {name}: {1000 * median(values):.2f} ms, {100 * share:.3f} %")


def spread(values: list[float]) -> str:
    low, _, high = quantiles(values, n=4)
    return f"{median(values):.3f} [{low:.3f}, {high:.3f}]"


def write_inputs(place: Path, args) -> None:
    tiny.write_model(place / "model", vocab_size=400, **SHAPE)
    config = json.loads((place / "model" / "config.json").read_text())
    (place / "model" / "config.json").write_text(json.dumps({**config, "vocab_size": args.vocabulary}))
    model = train.CausalLM(load_config(place / "model"))
    model.init_weights(seed=0)
    pretrained.save_pretrained(model, place / "model", train.Tokenizer.from_pretrained(place / "model"))
    response = " ".join("xyzw"[i % 4] for i in range(args.tokens // 2))  # a letter and a space: two tokens
    rows = [{"prompt": f"Question {i}: ", "chosen": f"yes {response} {i}", "rejected": f"no {response} {i}"}
            for i in range(args.pairs)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(place: Path, args, seconds: dict) -> dict[str, list[float]]:
    """Fill `seconds` with the CPU time of each counted step. Returns that of each check."""
    parts = {}

    def timed(name, function):
        def call(*arguments, **options):
            start = time.process_time()
            result = function(*arguments, **options)
            parts[name][-1] += time.process_time() - start
            return result

        parts[name] = []
        return call

    checks = {
        "LogPS and margins": (train, "metric_terms", lambda method, loss, *_: {"loss": loss, "chosen_logp": loss}),
        "collapse monitor": (monitor, "watch", lambda *a: None),
        "metrics.jsonl": (MetricsLog, "write", lambda *a: None),
        "finite or not": (train.math, "isfinite", lambda *a: True),
    }
    originals = {name: getattr(owner, key) for name, (owner, key, _) in checks.items()}
    measured = {name: timed(name, originals[name]) for name in originals if name != "finite or not"}
    set_lr, began = train.set_lr, None

    def step_begins(optimizer, step, *rest):
        """The first thing that a step does: note the step before, and choose the side of this one."""
        nonlocal began
        now = time.process_time()
        if step > 4:  # two of each warm up
            seconds["with" if step % 2 else "without"].append(now - began)
        on = step % 2 == 0
        for name, (owner, key, without) in checks.items():
            setattr(owner, key, measured.get(name, originals[name]) if on else without)
        if on and step >= 4:
            for values in parts.values():
                values.append(0.0)
        elif on:
            for values in parts.values():
                values[:] = [0.0]
        result = set_lr(optimizer, step, *rest)
        began = time.process_time()
        return result

    digest = checkpoint.file_digest

    def timed_digest(path):
        start = time.process_time()
        result = digest(path)
        checksums.append(time.process_time() - start)
        return result

    checksums = []
    words = ["redi", "--model", place / "model", "--data", place / "pairs.jsonl", "--output", place / "out",
             "--lr", "1e-5", "--batch-size", args.pairs,
             "--steps", 5 + 2 * args.rounds, "--save-every", 5 + 2 * args.rounds,
             "--recompute", "nothing", "--micro-batch-tokens", 2 * args.tokens, "--max-tokens", 4096]
    with mock.patch.object(train, "set_lr", step_begins), mock.patch.object(checkpoint, "file_digest", timed_digest):
        try:
            train.main(list(map(str, words)))
        finally:
            for name, (owner, key, _) in checks.items():
                setattr(owner, key, originals[name])
    seconds["with"] = seconds["with"][: args.rounds]
    seconds["without"] = seconds["without"][: args.rounds]
    return {**{name: values[1:] for name, values in parts.items()}, "checksums of a save": [sum(checksums)]}


if __name__ == "__main__":
    main()

"""Scaling of one micro-batch: CPU seconds with its packed tokens, peak memory with the vocabulary.

    python tests/bench/scaling.py                one thread; needs requirements.txt only
    python tests/bench/scaling.py --recompute    cost of each --recompute of train.py on a sequence of 8,000 tokens
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from redi.hub.config import parse_config  # noqa: E402
from redi.losses import token_logps  # noqa: E402
from redi.model import RECOMPUTE, CausalLM  # noqa: E402

SHAPE = {
    "model_type": "qwen2", "vocab_size": 8_000, "hidden_size": 256, "intermediate_size": 704,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 32_768, "tie_word_embeddings": True,
}  # fmt: skip
SEQUENCE = 512  # tokens; larger micro-batches hold more sequences, not longer ones
LONG = 8_000  # tokens of the sequence in --recompute
LABELS, WIDTH = 8192, 64  # positions and hidden size of the head whose memory is measured
CHUNK = 2048  # positions; the default of token_logps on CUDA


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--largest", type=int, default=16_384, help="tokens of the largest micro-batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recompute", action="store_true", help="cost of each --recompute of train.py instead")
    parser.add_argument("--one", choices=list(RECOMPUTE), help=argparse.SUPPRESS)
    parser.add_argument("--head", type=int, metavar="VOCABULARY", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.head:
        return print(head_growth(args.head))
    if args.one:
        return print(*long_sequence(args.one, args.repeats))
    if args.recompute:
        return measure_recompute(args.repeats)
    measure_memory()  # first: on Linux a child's peak starts at its parent's resident size
    measure_time(args)


def measure_time(args) -> None:
    model = CausalLM(parse_config(SHAPE))
    model.init_weights(seed=0)
    sizes = [args.largest * i // 8 // SEQUENCE * SEQUENCE for i in (1, 2, 3, 4, 6, 8)]
    step(model, sizes[0])
    # Sizes alternate, so that load on the machine affects all of them.
    seconds = np.array([[step(model, size) for size in sizes] for _ in range(args.repeats)])
    medians = [median(column) for column in seconds.T]
    slope, start = np.polyfit(sizes, medians, 1)
    rest = np.array(medians) - (slope * np.array(sizes) + start)
    explained = 1 - (rest**2).sum() / ((np.array(medians) - np.mean(medians)) ** 2).sum()
    for size, value in zip(sizes, medians):
        print(f"{size:6} packed tokens: {value:7.2f} CPU s, {value / size * 1e3:.3f} ms per token")
    print(f"fit: {start:.3f} s + {slope * 1e3:.4f} ms per token, R² {explained:.5f}, largest deviation "
          f"{np.abs(rest / medians).max():.1%}")


def measure_recompute(repeats: int) -> None:
    for recompute in RECOMPUTE:
        command = [sys.executable, __file__, "--one", recompute, "--repeats", str(repeats)]
        seconds, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        print(f"{LONG} tokens, --recompute {recompute:18} {float(seconds):6.2f} CPU s, peak {float(peak):5.0f} MB")


def long_sequence(recompute: str, repeats: int) -> tuple[float, float]:
    """Median CPU seconds of forward and backward over one sequence of LONG tokens, and peak memory in MB."""
    model = CausalLM(parse_config(SHAPE), recompute)
    model.init_weights(seed=0)
    step(model, SEQUENCE)
    return median(step(model, LONG, LONG) for _ in range(repeats)), peak_mb()


def step(model: CausalLM, tokens: int, length: int = SEQUENCE) -> float:
    """CPU seconds of forward and backward over sequences of `length` tokens."""
    ids = torch.arange(tokens) % SHAPE["vocab_size"]
    positions = torch.arange(tokens) % length
    bounds = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    started = cpu_seconds()
    model(ids, positions, bounds, length, ids).sum().backward()
    model.zero_grad()
    return cpu_seconds() - started


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure_memory() -> None:
    print(f"{LABELS} labels, chunks of {CHUNK}; growth of peak memory without the gradient of the head")
    for vocabulary in (16_000, 32_000, 64_000, 151_936):
        command = [sys.executable, __file__, "--head", str(vocabulary)]
        grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        chunk = CHUNK * vocabulary * 4 / 2**20
        print(f"vocabulary {vocabulary:7}: {grown:6.0f} MB = {grown / chunk:.2f} chunks of logits; "
              f"all logits would be {LABELS * vocabulary * 4 / 2**20:5.0f} MB")


def head_growth(vocabulary: int) -> float:
    """MB that forward and backward of the head add to the peak memory, without the gradient they return."""
    hidden, head = (torch.randn(n, WIDTH, requires_grad=True) for n in (LABELS, vocabulary))
    labels = torch.arange(LABELS) % vocabulary
    token_logps(hidden[:64], head[:4096], labels[:64] % 4096).sum().backward()  # initialises libraries
    hidden.grad, head.grad = torch.zeros_like(hidden), None
    before = peak_mb()
    token_logps(hidden, head, labels, CHUNK).sum().backward()
    return peak_mb() - before - head.grad.nbytes / 2**20


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()

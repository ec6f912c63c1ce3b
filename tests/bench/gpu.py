"""Training and sampling at the full shape of Qwen2.5-Math-1.5B with random weights, on one GPU.

    python tests/bench/gpu.py                      everything below, one after the other
    python tests/bench/gpu.py redi longest         some of it: backends sft redi dpo simpo longest sampling
    python tests/bench/gpu.py redi --train-flags="--compile --micro-batch-tokens 20480"
    python tests/bench/gpu.py --dry-run            the same code with a tiny shape; runs on a CPU

Training runs train.py itself on random pairs and reads its metrics.jsonl; nothing is downloaded.

Model FLOPs utilisation = model FLOPs / seconds / peak. Model FLOPs of a step, recomputation not counted, are
6 x (parameters of the layers' matrix products x tokens + those of the head x labels), plus causal attention:
6 x layers x heads x head size x the sum of squared sequence lengths. A step's seconds are all of it: data,
forward, backward, clipping, AdamW and the log.

Sampling is compared with the bandwidth limit of one decoding step: (bytes of the weights + bytes of all keys
and values cached) / peak bandwidth.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from training import write_model_directory, write_rows  # noqa: E402

import train  # noqa: E402
from redi.attention import cached_attention, packed_attention  # noqa: E402
from redi.data import step_rows  # noqa: E402
from redi.generation import Request, generate  # noqa: E402
from redi.losses import token_logps  # noqa: E402
from redi.pretrained import load_config, load_pretrained  # noqa: E402
from redi.sampling import sample_key  # noqa: E402
from redi.tokenizer import Tokenizer  # noqa: E402

METHODS = ["sft", "redi", "dpo", "simpo"]
PARTS = ["backends", *METHODS, "longest", "sampling"]
QWEN_MATH_1_5B = {
    "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 32_768,
    "rope_theta": 300_000.0,
}
TINY = {
    "vocab_size": 500, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048,
    "rope_theta": 300_000.0,
}
# Dense bf16 FLOP/s and bytes/s, from the makers' data sheets. Found by a part of the device's name.
PEAKS = {
    "H200": (989e12, 4.8e12), "H100 PCIe": (756e12, 2.0e12), "H100": (989e12, 3.35e12),
    "A100-SXM4-80GB": (312e12, 2.039e12), "A100": (312e12, 1.555e12),
}


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS) + " (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape and short rows, on a CPU too")
    parser.add_argument("--pairs", type=int, default=32, help="per optimiser step (sft: their 64 responses)")
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps; the first one is not counted")
    parser.add_argument("--peak-flops", type=float, help="bf16 FLOP/s of the device, if it is not a known one")
    parser.add_argument("--peak-bandwidth", type=float, help="its bytes/s")
    parser.add_argument("--train-flags", type=shlex.split, default=[], help="more flags for train.py")
    args = parser.parse_args()
    parts = args.parts or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)[0]}; expected some of {', '.join(PARTS)}")
    if not torch.cuda.is_available() and not args.dry_run:
        parser.error("no GPU is visible to torch; --dry-run checks this script on a CPU with a tiny shape")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    known = next((peaks for part, peaks in PEAKS.items() if part in name), (None, None))
    args.peak_flops, args.peak_bandwidth = args.peak_flops or known[0], args.peak_bandwidth or known[1]
    print(f"{name}, torch {torch.__version__}{', DRY RUN: these figures mean nothing' if args.dry_run else ''}")
    if "backends" in parts:
        compare_backends(device)
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        write_model_directory(directory / "model", TINY if args.dry_run else QWEN_MATH_1_5B, torch.bfloat16)
        for method in METHODS:
            if method in parts:
                measure_training(directory, method, args)
        if "longest" in parts:
            measure_longest(directory, args)
        if "sampling" in parts:
            measure_sampling(directory / "model", device, args)


@torch.no_grad()
def compare_backends(device: str) -> None:
    """The largest differences between bf16 on this device and fp32 on the CPU, from the same bf16 inputs."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    bounds = torch.tensor([0, 1, 130, 643, 1000], dtype=torch.int32)
    q, k, v, upstream = (random(1000, heads, 128) for heads in (12, 2, 2, 12))

    def attention(device, dtype):
        with torch.enable_grad():
            inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
            out = packed_attention(*inputs, bounds.to(device), 513)
            return out, *torch.autograd.grad(out, inputs, upstream.to(device, dtype))

    cached = random(5, 12, 128), random(5, 700, 2, 128), random(5, 700, 2, 128)
    lengths = torch.tensor([1, 2, 300, 699, 700], dtype=torch.int32)

    def decoding(device, dtype):
        return (cached_attention(*(x.to(device, dtype) for x in cached), lengths.to(device)),)

    hidden, head = random(300, 256), random(3001, 256) / 16
    labels = torch.randint(3001, (300,), generator=generator)
    labels[::3] = -100

    def logps(device, dtype):
        with torch.enable_grad():
            inputs = [x.to(device, dtype).requires_grad_() for x in (hidden, head)]
            out = token_logps(*inputs, labels.to(device), chunk_size=64)
            return out, *torch.autograd.grad(out.sum(), inputs)

    functions = {"packed_attention": attention, "cached_attention": decoding, "token_logps": logps}
    for name, function in functions.items():
        exact, ours = function("cpu", torch.float32), function(device, torch.bfloat16)
        # Relative to the largest element: bf16 keeps 8 bits.
        worst = max(((a - b.cpu().float()).abs().max() / a.abs().max()).item() for a, b in zip(exact, ours))
        print(f"{name}: value and gradients on {device} in bf16 are within {worst:.4f} of fp32 on the CPU, "
              "relative to the largest element")
        if worst > 0.03:
            sys.exit(f"error: {name} is wrong: that is more than 0.03")


def measure_training(directory: Path, method: str, args) -> None:
    """Pairs with responses of log-normal lengths: mean about 5,500 tokens, none above 19,000."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(8.36, 0.75, (args.pairs * args.steps, 2))).clip(300, 18_999)
    prompts = (40, 800)
    if args.dry_run:
        lengths, prompts = lengths / 100, (2, 8)
    print(run_training(directory, method, lengths.astype(int), prompts, args.pairs, args))


def measure_longest(directory: Path, args) -> None:
    """One pair as long as the defaults of train.py let through: 2 x 19,800 tokens."""
    longest, prompt = (190, 8) if args.dry_run else (18_999, 800)  # one more token ends a response
    lengths = np.full((args.steps, 2), longest)
    print("longest pair alone, " + run_training(directory, "redi", lengths, (prompt, prompt), 1, args))


def run_training(directory: Path, method: str, lengths: np.ndarray, prompts, pairs: int, args) -> str:
    """Run train.py on pairs of these response lengths, and put its metrics into words."""
    files = write_rows(directory, lengths, prompts, TINY["vocab_size"])
    output = directory / "output"
    data = files["sft" if method == "sft" else "pairs"]
    flags = [
        method, "--model", str(directory / "model"), "--data", str(data),
        "--output", str(output), "--overwrite", "--steps", str(args.steps), "--save-every", "0",
        "--batch-size", str(pairs * (2 if method == "sft" else 1)), "--dtype", "bfloat16", *args.train_flags,
    ]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], check=True, stdout=subprocess.DEVNULL)
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][1:]

    train_args = train.parse_args(flags)
    model_config = load_config(directory / "model")
    dataset = train.load_data(train_args, train_args.data, Tokenizer.from_pretrained(directory / "model"),
                              model_config.max_position_embeddings)
    assert len(dataset) == lengths.size // dataset.sequences_per_example, "rows were left out"
    flops = []
    for row in metrics:
        _, rows = step_rows(len(dataset), train_args.batch_size, train_args.seed, row["step"] - 1)
        lengths, labels = dataset.input_lengths[rows], dataset.label_counts[rows]
        flops.append(3 * model_config.forward_flops(lengths, labels).sum())
    rate = median(row["tokens"] / row["seconds"] for row in metrics)
    achieved = median(amount / row["seconds"] for amount, row in zip(flops, metrics))
    peak = args.peak_flops
    share = f"{achieved / peak:.1%} of {peak / 1e12:.0f}" if peak else "no known peak"
    return (
        f"{method}: {rate:,.0f} tokens/s, {median(row['seconds'] for row in metrics):.2f} s a step of "
        f"{median(row['tokens'] for row in metrics):,.0f} tokens, {dataset.input_lengths.mean():,.0f} a sequence, "
        f"{achieved / 1e12:.1f} model TFLOP/s ({share}), peak memory {metrics[-1]['peak_memory_gib']:.1f} GiB"
    )


def measure_sampling(directory: Path, device: str, args) -> None:
    """Time of decoding alone: of 257 new tokens a row, less that of 1, which is the prompts' share."""
    model = load_pretrained(directory, device=device, dtype=torch.bfloat16)
    config, scale = model.config, 100 if args.dry_run else 1
    weight_bytes = 2 * sum(p.numel() for p in model.parameters())
    token_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    new_tokens = 256 // scale + 2
    for rows in (4, 8) if args.dry_run else (64, 256):
        for contexts in ([2048], [16_128], [2048 + 2011 * i for i in range(8)]):
            contexts = [context // scale for context in contexts]
            lengths = [contexts[i * len(contexts) // rows] for i in range(rows)]  # neighbours share a prompt
            try:
                decode(model, lengths, 3)  # memory reserved, kernels chosen
                seconds = decode(model, lengths, 1 + new_tokens) - decode(model, lengths, 1)
            except torch.OutOfMemoryError:
                print(f"sampling, {rows} rows of {min(contexts)} to {max(contexts)} tokens: out of memory")
                continue
            step_bytes = weight_bytes + (sum(lengths) + rows * new_tokens / 2) * token_bytes
            reached = new_tokens * step_bytes / seconds
            share = f" ({reached / args.peak_bandwidth:.1%} of the limit)" if args.peak_bandwidth else ""
            print(
                f"sampling, {rows} rows of {min(contexts)} to {max(contexts)} tokens: "
                f"{rows * new_tokens / seconds:,.0f} tokens/s, {reached / 1e9:,.1f} GB/s{share}"
            )


def decode(model, lengths: list[int], new_tokens: int) -> float:
    """Seconds for new_tokens after each of the prompts of these lengths; no token ends a response."""
    requests = [Request([7] * n, sample_key(0, "problem", i), new_tokens) for i, n in enumerate(lengths)]
    synchronize(model)
    started = time.perf_counter()
    for _ in generate(model, requests, stop_ids=[], rows=len(requests)):
        pass
    synchronize(model)
    return time.perf_counter() - started


def synchronize(model) -> None:
    if model.head_weight.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

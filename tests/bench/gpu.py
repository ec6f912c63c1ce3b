"""Training and sampling at the full shape of Qwen2.5-Math-1.5B with random weights, on one GPU.

    python tests/bench/gpu.py                          all parts, one after the other
    python tests/bench/gpu.py --parts redi longest     these parts
    python tests/bench/gpu.py --parts redi --train-flags="--compile --micro-batch-tokens 20480"
    python tests/bench/gpu.py --dry-run                the same code at a tiny shape, also on a CPU

Training runs train.py itself on random pairs and reads its metrics.jsonl; nothing is downloaded. --peers measures sft,
redi and longest also with the step that one would write with transformers (`plain_step`; tests/requirements.txt), and
sampling also with transformers.generate, on the same lengths.

Model FLOPs utilisation (MFU) = model FLOPs / seconds / peak. The model FLOPs of a step do not count recomputation: 6 x
(parameters of the layers' matrix products x tokens + those of the head x labels), plus causal attention, 6 x layers x
heads x head size x the sum of squared sequence lengths. The time of a step includes data, forward, backward, clipping,
AdamW and logging.

Sampling is compared with the bandwidth limit of a decode step: (bytes of the weights + bytes of all cached keys and
values) / peak bandwidth. Prefill, cache growth and graph capture come with the first two tokens and are subtracted: the
time of n + 2 tokens per row minus that of 2.
"""

import argparse
import gc
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from training import write_model_directory, write_rows  # noqa: E402

import train  # noqa: E402
from redi.attention import cached_attention, packed_attention  # noqa: E402
from redi.cli import run_command  # noqa: E402
from redi.data import step_rows  # noqa: E402
from redi.evaluation.generation import CACHE_BLOCK, Request, generate  # noqa: E402
from redi.evaluation.sampling import sample_key  # noqa: E402
from redi.hub.config import load_config  # noqa: E402
from redi.hub.weights import load_pretrained  # noqa: E402
from redi.losses import token_logps  # noqa: E402
from redi.tokenizer import Tokenizer  # noqa: E402
from redi.training.plan import forward_flops  # noqa: E402

METHODS = ["sft", "redi", "dpo", "simpo"]
SAMPLING = {"sampling-64": 64, "sampling-256": 256}  # rows
PARTS = ["backends", *METHODS, "longest", *SAMPLING]
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
# Dense bf16 FLOP/s and bytes/s from data sheets, looked up by substring of the device name.
PEAKS = {
    "H200": (989e12, 4.8e12), "H100 PCIe": (756e12, 2.0e12), "H100": (989e12, 3.35e12),
    "A100-SXM4-80GB": (312e12, 2.039e12), "A100": (312e12, 1.555e12),
}


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
                        help=", ".join(PARTS) + " (default: all)")
    parser.add_argument("--peers", nargs="*", choices=PARTS, default=PARTS, metavar="PART",
                        help="the parts that are also measured with transformers (default: all that can be)")
    parser.add_argument("--model", type=Path,
                        help="directory for the random weights, 3 GB; created if missing, and kept")
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape and short rows, also on a CPU")
    parser.add_argument("--pairs", type=int, default=32, help="per optimiser step (sft: their 64 responses)")
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps; the first is not counted")
    parser.add_argument("--peak-flops", type=float, help="bf16 FLOP/s of the device, if unknown")
    parser.add_argument("--peak-bandwidth", type=float, help="bytes/s of the device, if unknown")
    parser.add_argument("--train-flags", type=shlex.split, default=[], help="more flags for train.py")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.dry_run:
        parser.error("no GPU is visible to torch; --dry-run checks this script on a CPU with a tiny shape")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    known = next((peaks for part, peaks in PEAKS.items() if part in name), (None, None))
    args.device = device
    args.peak_flops, args.peak_bandwidth = args.peak_flops or known[0], args.peak_bandwidth or known[1]
    print(f"{name}, torch {torch.__version__}{', DRY RUN: these figures mean nothing' if args.dry_run else ''}")
    if "backends" in args.parts:
        compare_backends(device)
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        args.model = args.model or directory / "model"
        if not args.model.exists():  # takes half a minute
            write_model_directory(directory / "unfinished", TINY if args.dry_run else QWEN_MATH_1_5B, torch.bfloat16)
            shutil.move(directory / "unfinished", args.model)
        for method in METHODS:
            if method in args.parts:
                measure_training(directory, method, args)
        if "longest" in args.parts:
            measure_longest(directory, args)
        for part, rows in SAMPLING.items():
            if part in args.parts:
                measure_sampling(part, rows // 16 if args.dry_run else rows, args)


@torch.no_grad()
def compare_backends(device: str) -> None:
    """Print the largest differences between bf16 on this device and fp32 on the CPU, from the same bf16 inputs."""
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
    """One pair at the default length limits of train.py: 2 x 19,800 tokens."""
    longest, prompt = (190, 8) if args.dry_run else (18_999, 800)  # plus the end of turn
    lengths = np.full((args.steps, 2), longest)
    print("longest pair alone, " + run_training(directory, "longest", lengths, (prompt, prompt), 1, args))


def run_training(directory: Path, part: str, lengths: np.ndarray, prompts, pairs: int, args) -> str:
    """Run train.py on pairs of these response lengths. Returns its metrics as text."""
    method = "redi" if part == "longest" else part
    files = write_rows(directory, lengths, prompts, TINY["vocab_size"])
    output = directory / "output"
    data = files["sft" if method == "sft" else "pairs"]
    flags = [
        method, "--model", str(args.model), "--data", str(data),
        "--output", str(output), "--overwrite", "--steps", str(args.steps), "--save-every", "0",
        "--batch-size", str(pairs * (2 if method == "sft" else 1)), "--dtype", "bfloat16", *args.train_flags,
    ]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], check=True, stdout=subprocess.DEVNULL)
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][1:]

    train_args = train.parse_args(flags)
    model_config = load_config(args.model)
    dataset = train.load_data(train_args, train_args.data, Tokenizer.from_pretrained(args.model), model_config)
    assert len(dataset) == lengths.size // dataset.sequences_per_example, "rows were dropped"
    batches = []  # tokens and labels of the sequences of each step but the first
    for step in range(1, args.steps):
        _, rows = step_rows(len(dataset), train_args.batch_size, train_args.seed, step)
        batches.append((dataset.input_lengths[rows].ravel(), dataset.label_counts[rows].ravel()))
    flops = [3 * forward_flops(model_config, *batch).sum() for batch in batches]

    def words(seconds: list[float], peak_memory: float) -> str:
        tokens = [lengths.sum() for lengths, _ in batches]
        rate = median(count / each for count, each in zip(tokens, seconds))
        achieved = median(amount / each for amount, each in zip(flops, seconds))
        peak = args.peak_flops
        share = f"{achieved / peak:.1%} of {peak / 1e12:.0f}" if peak else "no known peak"
        return (f"{rate:,.0f} tokens/s, {median(seconds):.2f} s a step of {median(tokens):,.0f} tokens, "
                f"{dataset.input_lengths.mean():,.0f} a sequence, {achieved / 1e12:.1f} model TFLOP/s ({share}), "
                f"peak memory {peak_memory:.1f} GiB")

    ours = [row["seconds"] for row in metrics]
    text = f"{method}: {words(ours, metrics[-1]['peak_memory_gib'])}"
    if method not in ("sft", "redi") or part not in args.peers:
        return text
    try:
        theirs, peak_memory = plain_steps(args.model, batches, args.device)
    except (ImportError, torch.OutOfMemoryError) as error:
        return f"{text}\n    plain transformers: {type(error).__name__}: {error}"
    return (f"{text}\n    plain transformers: {words(theirs, peak_memory)}\n    ours / plain, steps in order: "
            + " ".join(f"{b / a:.2f}" for a, b in zip(ours, theirs)) + " times as fast")


def load_plain(directory: Path, device: str, dtype: torch.dtype):
    """The transformers model, with FlashAttention 2 if installed, else SDPA."""
    import transformers

    flash = device == "cuda" and importlib.util.find_spec("flash_attn")
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="flash_attention_2" if flash else "sdpa").to(device)


def plain_steps(directory: Path, batches, device: str) -> tuple[list[float], float]:
    """Seconds of each step after an uncounted one, and peak memory in GiB."""
    model = load_plain(directory, device, torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=1e-4, fused=True)
    seconds = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for lengths, labels in batches[:1] + batches:
        synchronize(device)
        started = time.perf_counter()
        plain_step(model, optimizer, lengths.tolist(), labels.tolist())
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    peak_memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    del model, optimizer
    release(device)
    return seconds[1:], peak_memory


def plain_step(model, optimizer, lengths: list[int], labels: list[int]) -> None:
    """One sequence at a time, so without padding and with the logits of one sequence, which is better than most code:
    bf16 autocast over fp32 weights, fp32 logits of the completion only, and the mean NLL as the loss. (Weighting chosen
    and rejected responses takes no measurable time.)"""
    device = model.device
    for length, count in zip(lengths, labels):
        ids = torch.randint(3, model.config.vocab_size, (1, length + 1), device=device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], logits_to_keep=count).logits[0]
        (F.cross_entropy(logits.float(), ids[0, -count:]) / len(lengths)).backward()
        del logits
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def measure_sampling(part: str, rows: int, args) -> None:
    """Decoding throughput: rows of equal length, and of unequal lengths whose mean is about half the longest."""
    model = load_pretrained(args.model, device=args.device, dtype=torch.bfloat16)
    try:
        plain = load_plain(args.model, args.device, torch.bfloat16) if part in args.peers else None
    except ImportError as error:
        plain = print(f"transformers.generate not measured: {error}")
    config, scale = model.config, 100 if args.dry_run else 1
    weight_bytes = 2 * sum(p.numel() for p in model.parameters())
    token_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    for contexts in ([1700], [7900], [16_000], [2000 * i for i in range(1, 9)]):
        new_tokens = 256
        assert max(contexts) // CACHE_BLOCK == (max(contexts) + new_tokens + 1) // CACHE_BLOCK, "the cache would grow"
        contexts, new_tokens = [context // scale for context in contexts], new_tokens // scale
        lengths = sorted(contexts * -(-rows // len(contexts)))[:rows]  # equal prompts are adjacent
        name = f"sampling, {rows} rows of {min(contexts)} to {max(contexts)} tokens"
        step_bytes = weight_bytes + (sum(lengths) + rows * (2 + new_tokens / 2)) * token_bytes
        for who, run in {"ours": partial(decode, model), "generate": plain and partial(decode_plain, plain)}.items():
            if run is None:
                continue
            try:
                run(lengths, 3)  # selects kernels, fills the allocator
                seconds = run(lengths, new_tokens + 2) - run(lengths, 2)
            except torch.OutOfMemoryError:
                print(f"{name}, {who}: out of memory")
            else:
                reached = new_tokens * step_bytes / seconds
                share = f" ({reached / args.peak_bandwidth:.1%} of the limit)" if args.peak_bandwidth else ""
                print(f"{name}, {who}: {rows * new_tokens / seconds:,.0f} tokens/s, {reached / 1e9:,.1f} GB/s{share}")
            release(args.device)


def decode(model, lengths: list[int], new_tokens: int) -> float:
    """Seconds for new_tokens after prompts of these lengths, without stop tokens."""
    requests = [Request([7] * n, sample_key(0, "problem", i), new_tokens) for i, n in enumerate(lengths)]
    synchronize(model.head_weight.device.type)
    started = time.perf_counter()
    for _ in generate(model, requests, stop_ids=[], max_batch_size=len(requests)):
        pass
    synchronize(model.head_weight.device.type)
    return time.perf_counter() - started


def decode_plain(model, lengths: list[int], new_tokens: int) -> float:
    """The same with transformers.generate on left-padded prompts."""
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    mask = mask.long().to(model.device)
    synchronize(model.device.type)
    started = time.perf_counter()
    model.generate(7 * mask, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0,
                   do_sample=True, temperature=0.6, top_p=0.95, top_k=0)
    synchronize(model.device.type)
    return time.perf_counter() - started


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_command(main)

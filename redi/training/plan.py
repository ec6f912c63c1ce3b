"""What a run would take, computed before it begins: steps, tokens, arithmetic, time, and memory of each rank.

    python train.py redi --model DIR --data pairs.jsonl --output out/redi --plan --world-size 8

Rows are tokenised and dealt out to ranks by the functions that training uses; weights are never read. The
memory is a count of tensors, as torch.cuda.max_memory_allocated sees them, without torch.compile. On one H200 the
shape of Qwen2.5-Math-1.5B trained at 0.41 of 989 TFLOP/s and held 35.4 GiB where 36.6 were counted; where a step is one
micro-batch, gradients come after the fullest moment, and it held 29.6 where 36.5 were counted.
On one core of a cloud machine (AMD EPYC), models of 12M and 135M parameters trained in fp32 at 0.6 of the 0.09 TFLOP/s
of matrix products (0.054 to 0.061), and their processes held 0.7 to 1.2 GiB beside the tensors.
"""

import os
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from redi.data import Dataset, assign_to_ranks, step_rows
from redi.losses import logit_rows
from redi.model import FAMILIES, RECOMPUTE, CausalLM, ModelConfig

GIB = 2**30
FP32 = 4  # bytes; of master weights, gradients, AdamW's moments and logits, whatever the run computes in
SAFE = 0.9  # share of the memory that a recommended setting may take by this count


def complete(args) -> bool:
    """Fill in what train.py's flags leave open of the device. Returns args.on_gpu: whether the plan is for GPUs, which
    the flags describe or which are here; else it is for one process on this CPU."""
    args.on_gpu = torch.cuda.is_available() or any((args.world_size, args.peak_tflops, args.memory_gib))
    ranks, memory = int(os.environ.get("WORLD_SIZE", 1)), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    values = (ranks, 989, 0.4, 80) if args.on_gpu else (1, 0.09 * torch.get_num_threads(), 0.6, round(memory, 1))
    for name, value in zip(("world_size", "peak_tflops", "utilization", "memory_gib"), values):
        setattr(args, name, getattr(args, name) or value)
    return args.on_gpu


def training_flops(config: ModelConfig, lengths, labels, recompute: str, keep_layers: int = 0) -> np.ndarray:
    """FLOPs of forward and backward of sequences of `lengths` tokens (an array), `labels` of them predicted.

    Backward is twice the forward; in layers that recompute (a key of RECOMPUTE; the last keep_layers do not) the
    forward comes again, but for the last product, which no gradient needs, and where it is kept the attention. Head:
    predicted positions only, and 8 a parameter, since its logits are computed again (but for a micro-batch's last
    chunk, which is not counted off).
    """
    last = config.num_hidden_layers * config.intermediate_size * config.hidden_size
    again = config.forward_flops(lengths) - 2.0 * last * lengths
    if recompute == "all-but-attention":
        again -= config.attention_flops(lengths)
    share = 0 if recompute == "nothing" else max(0, 1 - keep_layers / config.num_hidden_layers)
    head = config.hidden_size * config.vocab_size
    return 3 * config.forward_flops(lengths) + share * again + 8.0 * head * labels


def peak_memory(
    config: ModelConfig, tokens: int, ranks: int, itemsize: int, recompute: str, keep_layers=0, on_gpu=True
) -> dict[str, dict[str, float]]:
    """Bytes of one rank by component, in the loss and in a layer's backward: one of them is a step's fullest moment.
    tokens: of a rank's fullest micro-batch; itemsize: bytes of the dtype computed in; the rest as in training_flops."""
    with torch.device("meta"):
        model = CausalLM(replace(config, num_hidden_layers=1))
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    root = sum(p.numel() for p in model.parameters()) - layer  # embedding, final norm, head: gathered through a step
    parameters = root + layer * config.num_hidden_layers
    head = config.vocab_size * config.hidden_size
    width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    # What a layer keeps for its backward: both norms' outputs and the stream between them; q, k, v and the
    # attention's output; gate, up and the product. The stream that enters counts as a checkpoint.
    channels = 3 * width + 2 * (heads + kv_heads) * config.head_dim + 3 * config.intermediate_size
    if FAMILIES[config.model_type][1]:  # q and k as they were before their norms
        channels += (heads + kv_heads) * config.head_dim
    layer_activations = tokens * (channels * itemsize + heads * FP32)
    whole = config.num_hidden_layers if recompute == "nothing" else min(keep_layers, config.num_hidden_layers)
    # Of a layer that recomputes: the attention's output and its sums in fp32, or nothing.
    attention = tokens * heads * (config.head_dim * itemsize + FP32) if recompute == "all-but-attention" else 0
    kept = tokens * width * itemsize * (config.num_hidden_layers + 1)  # checkpoints
    kept += layer_activations * whole + attention * (config.num_hidden_layers - whole)

    sharded = {
        "master weights (fp32)": FP32 * parameters / ranks,
        "gradients (fp32)": FP32 * parameters / ranks,
        "AdamW moments (fp32)": 2 * FP32 * parameters / ranks,
    }
    copy = itemsize if ranks > 1 or itemsize < FP32 else 0  # bytes of a weight that FSDP gathers or casts
    logits = min(logit_rows(config.vocab_size, on_gpu), tokens) * config.vocab_size * FP32
    # One chunk's logits beside their rounded copy; at the end the rounded gradient of the head beside it.
    workspace = max(1.5 * logits, itemsize * head) if itemsize < FP32 else logits
    return {
        "loss": {
            **sharded,
            "gathered weights": copy * root,
            "kept activations": kept,
            "hidden states and their gradient": 3 * tokens * width * itemsize,
            "logits chunk": workspace,
            "gradient of the head (fp32)": FP32 * head,
        },
        "backward of a layer": {
            **sharded,
            "gathered weights": copy * (root + 3 * layer),  # in use, coming next, and being copied
            "kept activations": kept,
            # The last layers go first: the fullest moment is the last one's, which holds all that the others keep.
            "activations of one layer": 0 if whole else layer_activations - attention,
            "their gradients": tokens * (4 * config.intermediate_size + 2 * width) * itemsize,
            "gradients of one layer and the head": copy and copy * (head + 2 * layer) + 2 * FP32 * layer,
        },
    }


@dataclass
class Plan:
    """Figures of a whole run. Tokens are all that go through the model, as in metrics.jsonl."""

    step_tokens: list[int]  # of each step, all ranks
    micro_batches: list[int]  # of each step: forward and backward passes of a rank
    longest_example: int  # tokens of the largest example: a pair counts both responses
    fullest: int  # tokens of the fullest micro-batch of a rank
    flops: float  # of all ranks together
    busy: float  # share of the time in which an average rank does not wait for the busiest one


def make_plan(args, config: ModelConfig, dataset: Dataset, total_steps: int, reference: bool) -> Plan:
    """Go through the steps of a run without running them.

    Args: args: train.py's; reference: whether the method needs log-probs of the model that it begins from.
    """
    lengths, labels, tokens = dataset.input_lengths, dataset.label_counts, dataset.input_lengths.sum(1)
    flops = training_flops(config, lengths, labels, args.recompute, args.keep_layers).sum(1)
    step_tokens, micro_batches, fullest, total, possible = [], [], 0, 0.0, 0.0
    for step in range(total_steps):
        _, rows = step_rows(len(dataset), args.batch_size, args.seed, step)
        parts = assign_to_ranks(dataset, rows, config.forward_flops, args.micro_batch_tokens, args.world_size)
        step_tokens.append(int(tokens[rows].sum()))
        micro_batches.append(len(parts))
        fullest = max(fullest, max(int(tokens[part].sum()) for micro in parts for part in micro))
        total += float(flops[rows].sum())
        # Ranks exchange gradients after each micro-batch, so all wait for the busiest.
        possible += sum(len(micro) * max(float(flops[part].sum()) for part in micro) for micro in parts)
    of_reference = float(config.forward_flops(lengths, labels).sum()) if reference else 0.0  # a forward over all
    return Plan(step_tokens, micro_batches, int(tokens.max()), fullest, total + of_reference, total / possible)


def describe(plan: Plan, args, config: ModelConfig, dataset: Dataset, itemsize: int) -> str:
    """The plan in words and a table. args: train.py's, after `complete`."""
    tokens, ranks = plan.step_tokens, args.world_size
    seconds = plan.flops / (ranks * args.peak_tflops * 1e12 * args.utilization * plan.busy)
    any_setting = partial(peak_memory, config, ranks=ranks, itemsize=itemsize, on_gpu=args.on_gpu)
    memory = partial(any_setting, recompute=args.recompute, keep_layers=args.keep_layers)
    steps, table = len(tokens), memory(plan.fullest)
    cpu = "this CPU (GPUs: --world-size, --peak-tflops or --memory-gib)"
    lines = [
        f"planned for     {f'GPUs ({ranks})' if args.on_gpu else cpu}, {'fp32' if itemsize == FP32 else 'bf16'}",
        f"examples        {len(dataset):,} ({dataset.dropped:,} too long and left out)",
        f"steps           {steps:,} of {args.batch_size} ({steps / -(-len(dataset) // args.batch_size):.3g} epochs)",
        f"tokens          {sum(tokens):,}; a step {min(tokens):,} to {max(tokens):,}, mean {sum(tokens) / steps:,.0f}",
        f"longest         sequence {dataset.input_lengths.max():,} tokens, example {plan.longest_example:,}",
        f"micro-batches   {sum(plan.micro_batches) / steps:.2f} a step on a rank, the fullest {plan.fullest:,} tokens",
        f"arithmetic      {plan.flops:.3e} FLOPs (--recompute {args.recompute} --keep-layers {args.keep_layers})",
        f"fastest         {fastest(partial(any_setting, plan.fullest), args, config, dataset)}",
        f"time            {duration(seconds)} at {args.utilization:.0%} of {ranks} x {args.peak_tflops:g} TFLOP/s; an "
        f"average rank is busy {plan.busy:.1%} of it",
        "",
        f"{'GiB of each rank':40}" + "".join(f"{moment:>22}" for moment in table),
    ]
    for name in dict.fromkeys(name for column in table.values() for name in column if column[name]):
        values = [column.get(name) for column in table.values()]
        lines.append(f"{name:40}" + "".join(f"{'' if v is None else f'{v / GIB:.2f}':>22}" for v in values))
    lines.append(f"{'sum':40}" + "".join(f"{sum(column.values()) / GIB:>22.2f}" for column in table.values()))
    return "\n".join([*lines, "", verdict(plan, memory, args)])


def fastest(memory: Callable, args, config: ModelConfig, dataset: Dataset) -> str:
    """What of --recompute and --keep-layers takes the least arithmetic, of what fits into SAFE of the memory."""

    def flops(setting) -> float:
        return float(training_flops(config, dataset.input_lengths, dataset.label_counts, *setting).sum())

    settings = [("nothing", 0)]
    settings += [(name, n) for name in RECOMPUTE if name != "nothing" for n in range(config.num_hidden_layers)]
    peaks = {setting: peak(memory(recompute=setting[0], keep_layers=setting[1])) for setting in settings}
    fitting = [setting for setting in settings if peaks[setting] <= SAFE * args.memory_gib]
    if not fitting:
        return f"no --recompute fits into {SAFE:.0%} of {args.memory_gib:g} GiB with these micro-batches"
    best = min(fitting, key=flops)
    change = flops(best) / flops((args.recompute, args.keep_layers)) - 1
    return (f"of what fits into {SAFE:.0%} of {args.memory_gib:g} GiB: --recompute {best[0]} --keep-layers {best[1]} "
            f"({peaks[best]:.1f} GiB, arithmetic {change:+.1%})")


def peak(table: dict[str, dict[str, float]]) -> float:
    """GiB of the fullest moment."""
    return max(sum(column.values()) for column in table.values()) / GIB


def duration(seconds: float) -> str:
    """In the largest unit of which there is one, to three digits: "2.5 h", "48 min", "0.031 s"."""
    size, unit = (3600, "h") if seconds >= 3600 else (60, "min") if seconds >= 60 else (1, "s")
    return f"{seconds / size:,.0f} {unit}" if seconds >= 100 * size else f"{seconds / size:.3g} {unit}"


def verdict(plan: Plan, memory: Callable, args) -> str:
    """Whether the run fits, else what would make it fit. memory(tokens of a micro-batch) -> the table."""

    def needed(tokens: int) -> float:
        return peak(memory(tokens))

    besides = "what CUDA and NCCL need" if args.on_gpu else "torch itself and what its allocator keeps (0.7 to 1.2)"
    here = f"{needed(plan.fullest):.1f} of {args.memory_gib:g} GiB, not counting {besides}"
    if needed(plan.fullest) <= args.memory_gib:
        return f"fits: {here}"
    if needed(0) > args.memory_gib:
        return (f"does not fit: {here}; weights, gradients and moments alone take {needed(0):.1f}: more GPUs "
                "(--world-size) share them")
    if needed(plan.longest_example) > args.memory_gib:
        return (f"does not fit: {here}; the largest example, {plan.longest_example:,} tokens, takes "
                f"{needed(plan.longest_example):.1f} by itself: leave out longer ones (--max-response-tokens, "
                "--max-tokens), or share the rest of the memory among more GPUs (--world-size)")
    too_many = bisect(range(plan.fullest), args.memory_gib, lo=plan.longest_example, key=needed)
    return f"does not fit: {here}; --micro-batch-tokens {too_many - 1} would"

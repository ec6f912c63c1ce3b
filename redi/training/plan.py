"""What a run would take on GPUs, computed before it starts: steps, tokens, FLOPs, time, and memory of each rank.

    python train.py redi --model DIR --data pairs.jsonl --output out/redi --plan --world-size 8

Rows are tokenised and assigned to ranks by the functions that training uses; weights are never read. Memory is a count
of tensors, comparable with torch.cuda.max_memory_allocated, without torch.compile. tests/bench/README.md compares plan
and measurement on one H200.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from redi.cli import positive, positive_int
from redi.data import Dataset, assign_to_ranks
from redi.losses import logit_rows
from redi.model import FAMILIES, RECOMPUTE, CausalLM, ModelConfig

GIB = 2**30
FP32 = 4  # bytes: master weights, gradients, AdamW's moments and logits, whatever the compute dtype
SAFE = 0.9  # share of the memory that a recommended setting may take by this count


def add_plan_flags(add: Callable) -> None:
    """Add the flags of --plan; `add` is the add_argument of a parser."""
    add("--plan", action="store_true", help="print what the run would take on GPUs, and do not train")
    add("--world-size", type=positive_int, default=int(os.environ.get("WORLD_SIZE", 1)), help="number of GPUs")
    add("--peak-tflops", type=positive, default=989, help="peak rate of a GPU (989: H100 or H200 in bf16)")
    add("--memory-gib", type=positive, default=80, help="memory of a GPU")
    add("--utilization", type=positive, default=0.4, help="share of the peak rate that is reached")


def forward_flops(config: ModelConfig, lengths, labels=0):
    """FLOPs of a forward over sequences of `lengths` tokens (an array), `labels` of them predicted; same shape.

    2 per token and parameter in matrix products; 2 x layers x H x D x S² for causal attention over S tokens.
    """
    channels = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    layer = config.hidden_size * (channels + 3 * config.intermediate_size)
    products = config.num_hidden_layers * layer * lengths + config.hidden_size * config.vocab_size * labels
    return 2.0 * products + attention_flops(config, lengths)


def attention_flops(config: ModelConfig, lengths):
    """The part of forward_flops that is attention's."""
    return 2.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * lengths**2.0


def training_flops(config: ModelConfig, lengths, labels, recompute: str, keep_layers: int = 0) -> np.ndarray:
    """FLOPs of forward and backward of sequences of `lengths` tokens (an array), `labels` of them predicted.

    Backward costs twice the forward. Layers that recompute (a key of RECOMPUTE; the last keep_layers do not) run the
    forward again, except for the down projection, whose output no gradient needs, and for attention if it is stored.
    The head costs 8 per parameter at predicted positions, since backward recomputes the logits.
    """
    down_projection = 2.0 * config.num_hidden_layers * config.intermediate_size * config.hidden_size * lengths
    recomputed = forward_flops(config, lengths) - down_projection
    if recompute == "all-but-attention":
        recomputed -= attention_flops(config, lengths)
    share = 0 if recompute == "nothing" else max(0, 1 - keep_layers / config.num_hidden_layers)
    head = 8.0 * config.hidden_size * config.vocab_size * labels
    return 3 * forward_flops(config, lengths) + share * recomputed + head


def peak_memory(config: ModelConfig, tokens: int, ranks: int, itemsize: int, recompute: str, keep_layers=0,
                on_gpu=True) -> dict[str, dict[str, float]]:
    """Bytes of one rank by component, during the loss and during a layer's backward: memory peaks at one of the two.
    tokens: of a rank's largest micro-batch; itemsize: bytes of the compute dtype; the rest as in training_flops."""
    with torch.device("meta"):
        model = CausalLM(replace(config, num_hidden_layers=1))
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    root = sum(p.numel() for p in model.parameters()) - layer  # embedding, final norm, head: gathered throughout a step
    parameters = root + layer * config.num_hidden_layers
    head = config.vocab_size * config.hidden_size
    width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    # Activations of a layer: both norms' outputs and the residual stream between them; q, k, v and the output of
    # attention; gate, up and their product. The layer's input counts as its checkpoint.
    channels = 3 * width + 2 * (heads + kv_heads) * config.head_dim + 3 * config.intermediate_size
    if FAMILIES[config.model_type][1]:  # q and k before their norms
        channels += (heads + kv_heads) * config.head_dim
    layer_activations = tokens * (channels * itemsize + heads * FP32)
    stored = config.num_hidden_layers if recompute == "nothing" else min(keep_layers, config.num_hidden_layers)
    # Stored of a layer that recomputes: the output of attention and its fp32 log-sum-exp, or nothing.
    attention = tokens * heads * (config.head_dim * itemsize + FP32) if recompute == "all-but-attention" else 0
    kept = tokens * width * itemsize * (config.num_hidden_layers + 1)  # layer inputs
    kept += layer_activations * stored + attention * (config.num_hidden_layers - stored)

    sharded = {
        "master weights (fp32)": FP32 * parameters / ranks,
        "gradients (fp32)": FP32 * parameters / ranks,
        "AdamW moments (fp32)": 2 * FP32 * parameters / ranks,
    }
    copy = itemsize if ranks > 1 or itemsize < FP32 else 0  # bytes of a weight that FSDP gathers or casts
    logits = min(logit_rows(config.vocab_size, on_gpu), tokens) * config.vocab_size * FP32
    # A chunk's logits and their copy in the compute dtype, or the head's gradient in the compute dtype.
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
            "gathered weights": copy * (root + 3 * layer),  # the current, the prefetched, and a copy
            "kept activations": kept,
            # Memory peaks in the backward of the last layer, while all others still hold their activations.
            "activations of one layer": 0 if stored else layer_activations - attention,
            "their gradients": tokens * (4 * config.intermediate_size + 2 * width) * itemsize,
            "gradients of one layer and the head": copy and copy * (head + 2 * layer) + 2 * FP32 * layer,
        },
    }


def describe(args: argparse.Namespace, config: ModelConfig, dataset: Dataset, batches: list[np.ndarray], itemsize: int,
             reference: bool) -> str:
    """The plan as text. args: the flags above, and micro_batch_tokens, recompute, keep_layers; batches: the example
    indices of each optimiser step; itemsize: bytes of the compute dtype; reference: whether the method needs log-probs
    of the initial model."""
    lengths, labels, tokens = dataset.input_lengths, dataset.label_counts, dataset.input_lengths.sum(1)
    step_tokens, micro_batches, largest = [int(tokens[rows].sum()) for rows in batches], 0, 0
    for rows in batches:
        parts = assign_to_ranks(dataset, rows, partial(forward_flops, config), args.micro_batch_tokens, args.world_size)
        micro_batches += len(parts)
        largest = max(largest, *(int(tokens[part].sum()) for micro in parts for part in micro))
    rows = np.concatenate(batches)

    def flops(recompute: str, keep_layers: int) -> float:
        training = training_flops(config, lengths, labels, recompute, keep_layers).sum(1)[rows].sum()
        return training + (forward_flops(config, lengths, labels).sum() if reference else 0)

    memory = partial(peak_memory, config, largest, args.world_size, itemsize)
    setting = args.recompute, args.keep_layers
    total, table = flops(*setting), memory(*setting)
    seconds = total / (args.world_size * args.peak_tflops * 1e12 * args.utilization)
    lines = [
        f"examples        {len(dataset):,} ({dataset.dropped:,} too long, dropped)",
        f"steps           {len(batches):,} of {len(batches[0]):,} ({len(rows) / len(dataset):.3g} epochs)",
        f"tokens          {sum(step_tokens):,}; a step {min(step_tokens):,} to {max(step_tokens):,}",
        f"longest         sequence {lengths.max():,} tokens, example {tokens.max():,}",
        f"micro-batches   {micro_batches / len(batches):.2f} per step and rank, the largest {largest:,} tokens",
        f"arithmetic      {total:.3e} FLOPs (--recompute {args.recompute} --keep-layers {args.keep_layers})",
        f"time            {seconds / 3600:.3g} h at {args.utilization:.0%} of {args.world_size} x {args.peak_tflops:g} "
        "TFLOP/s",
        "",
        f"{'GiB of each rank':40}" + "".join(f"{moment:>22}" for moment in table),
    ]
    for name in dict.fromkeys(name for column in table.values() for name in column if column[name]):
        values = [column.get(name) for column in table.values()]
        lines.append(f"{name:40}" + "".join(f"{'' if v is None else f'{v / GIB:.2f}':>22}" for v in values))
    lines.append(f"{'sum':40}" + "".join(f"{sum(column.values()) / GIB:>22.2f}" for column in table.values()))

    fits = "fits" if peak_gib(table) <= args.memory_gib else "does not fit"
    lines += ["", f"{fits}: {peak_gib(table):.1f} of {args.memory_gib:g} GiB, not counting what CUDA and NCCL need"]
    settings = [("nothing", 0), *((name, n) for name in RECOMPUTE for n in range(config.num_hidden_layers))]
    fitting = [setting for setting in settings if peak_gib(memory(*setting)) <= SAFE * args.memory_gib]
    if fitting:
        name, layers = min(fitting, key=lambda setting: flops(*setting))
        lines.append(f"fastest setting within {SAFE:.0%} of the memory: --recompute {name} --keep-layers {layers} "
                     f"({peak_gib(memory(name, layers)):.1f} GiB, arithmetic {flops(name, layers) / total - 1:+.1%})")
    else:
        lines.append(f"no --recompute takes less than {SAFE:.0%} of the memory: use more GPUs (--world-size), smaller "
                     f"micro-batches (--micro-batch-tokens), or drop longer rows (--max-response-tokens)")
    return "\n".join(lines)


def peak_gib(table: dict[str, dict[str, float]]) -> float:
    """GiB at the larger of the two moments of `peak_memory`."""
    return max(sum(column.values()) for column in table.values()) / GIB

"""What a run would take, computed before it begins: steps, tokens, arithmetic, hours, and memory of each GPU.

    python train.py redi --model DIR --data pairs.jsonl --output out/redi --plan --world-size 8

Rows are tokenised and dealt out to ranks by the functions that training uses; weights are never read. The
memory is a count of tensors, as torch.cuda.max_memory_allocated sees them, without torch.compile.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from redi.data import Dataset, step_rows
from redi.losses import token_logps
from redi.model import FAMILIES, CausalLM, ModelConfig

GIB = 2**30
FP32 = 4  # bytes; of master weights, gradients, AdamW's moments and logits, whatever the run computes in
LOGIT_ROWS = inspect.signature(token_logps).parameters["chunk_size"].default


def training_flops(config: ModelConfig, lengths, labels, recompute: bool) -> np.ndarray:
    """FLOPs of forward and backward of sequences of `lengths` tokens (an array), `labels` of them predicted.

    Layers, forward: 2 a token and parameter in matrix products, and for causal attention over S tokens
    2 x layers x heads x head size x S². Backward is twice that; with `recompute` the forward comes again, but
    for the last product of each layer, which no gradient needs. Head: predicted positions only, and 8 a
    parameter, since its logits are computed again (but for a micro-batch's last chunk, which is not counted off).
    """
    head = config.matmul_parameters()[1]
    layers_forward = forward_flops(config, lengths, 0)
    flops = 3 * layers_forward + 8.0 * head * labels
    if recompute:
        last = config.num_hidden_layers * config.intermediate_size * config.hidden_size
        flops += layers_forward - 2.0 * last * lengths
    return flops


def forward_flops(config: ModelConfig, lengths, labels) -> np.ndarray:
    """FLOPs of forward alone. Arguments as for training_flops."""
    layers, head = config.matmul_parameters()
    attention = 2.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 2.0 * layers * lengths + attention * lengths**2 + 2.0 * head * labels


def peak_memory(
    config: ModelConfig, tokens: int, ranks: int, itemsize: int, recompute: bool
) -> dict[str, dict[str, float]]:
    """Bytes on one GPU by component: in the loss and in a layer's backward, of which one is the fullest moment
    of a step with many tokens, and in AdamW's turn, which is that of a step with few.

    Args: tokens: of a rank's fullest micro-batch; itemsize: bytes of the dtype computed in.
    """
    with torch.device("meta"):
        model = CausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    # Embedding, final norm and head: gathered all through a step.
    root = parameters - layer * config.num_hidden_layers
    head = config.vocab_size * config.hidden_size
    width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    # What a layer keeps for its backward: both norms' outputs and the stream between them; q, k, v and the
    # attention's output; gate, up and the product. The stream that enters counts as a checkpoint.
    channels = 3 * width + 2 * (heads + kv_heads) * config.head_dim + 3 * config.intermediate_size
    if FAMILIES[config.model_type][1]:  # q and k as they were before their norms
        channels += (heads + kv_heads) * config.head_dim
    layer_activations = tokens * (channels * itemsize + heads * FP32)
    checkpoints = tokens * width * itemsize * (config.num_hidden_layers + 1)
    kept = checkpoints if recompute else checkpoints + layer_activations * config.num_hidden_layers

    sharded = {
        "master weights (fp32)": FP32 * parameters / ranks,
        "gradients (fp32)": FP32 * parameters / ranks,
        "AdamW moments (fp32)": 2 * FP32 * parameters / ranks,
    }
    gathered = "gathered weights"
    logits = min(LOGIT_ROWS, tokens) * config.vocab_size * FP32
    # One chunk's logits beside their rounded copy; or that copy beside a second head gradient, of one chunk.
    rounded = 0.5 if itemsize < FP32 else 0
    one_more_head = FP32 * head if itemsize < FP32 else 0
    workspace = max((1 + rounded) * logits, rounded * logits + one_more_head)
    largest_shard = FP32 * head / ranks
    return {
        "loss": {
            **sharded,
            gathered: itemsize * root,
            "kept activations": kept,
            "hidden states and their gradient": 3 * tokens * width * itemsize,
            "logits chunk": workspace,
            "gradient of the head (fp32)": FP32 * head,
        },
        "backward of a layer": {
            **sharded,
            gathered: itemsize * (root + 3 * layer),  # in use, coming next, and being copied
            "kept activations": kept,
            "activations of one layer": layer_activations if recompute else 0,
            "their gradients": tokens * (4 * config.intermediate_size + 2 * width) * itemsize,
            "gradients of one layer and the head": itemsize * (head + 2 * layer) + 2 * FP32 * layer,
        },
        "optimiser": {**sharded, "AdamW's next update, for its norm": 5 * largest_shard},
    }


@dataclass
class Plan:
    """Figures of a whole run. Tokens are all that go through the model, as in metrics.jsonl."""

    step_tokens: list[int]  # of each step, all ranks
    micro_batches: list[int]  # of each step: forward and backward passes of a rank
    longest: int  # tokens of the longest sequence
    longest_example: int  # tokens of the largest example: a pair counts both responses
    fullest: int  # tokens of the fullest micro-batch of a rank
    flops: float  # of all ranks together
    busy: float  # share of the time in which an average rank does not wait for the busiest one


def make_plan(args, config: ModelConfig, dataset: Dataset, total_steps: int, deal: Callable) -> Plan:
    """Go through the steps of a run without running them.

    Args: args: train.py's; deal(rows) -> parts[micro][rank], lists of example indices: how training spreads
    the rows of a step.
    """
    lengths, labels = dataset.input_lengths, dataset.label_counts
    flops = training_flops(config, lengths, labels, args.gradient_checkpointing).sum(1)
    tokens = lengths.sum(1)
    step_tokens, micro_batches, fullest, total, possible = [], [], 0, 0.0, 0.0
    for step in range(total_steps):
        _, rows = step_rows(len(dataset), args.batch_size, args.seed, step)
        parts = deal(rows)
        step_tokens.append(int(tokens[rows].sum()))
        micro_batches.append(len(parts))
        fullest = max(fullest, max(int(tokens[part].sum()) for micro in parts for part in micro))
        total += float(flops[rows].sum())
        # Ranks exchange gradients after each micro-batch, so all wait for the busiest.
        possible += sum(len(micro) * max(float(flops[part].sum()) for part in micro) for micro in parts)
    busy = total / possible
    if args.method == "dpo":  # the reference's log-probs: one forward over all pairs
        total += float(forward_flops(config, lengths, labels).sum())
    return Plan(step_tokens, micro_batches, int(lengths.max()), int(tokens.max()), fullest, total, busy)


def describe(plan: Plan, args, config: ModelConfig, dataset: Dataset, itemsize: int) -> str:
    """The plan in words and a table. args: train.py's."""
    steps, ranks, tokens = len(plan.step_tokens), args.world_size, plan.step_tokens
    epochs = steps / -(-len(dataset) // args.batch_size)
    rate = ranks * args.peak_tflops * 1e12 * args.utilization * plan.busy
    again = "layers computed twice" if args.gradient_checkpointing else "activations kept"

    def memory(micro_batch: int) -> dict:
        return peak_memory(config, micro_batch, ranks, itemsize, args.gradient_checkpointing)

    table = memory(plan.fullest)
    components = list(dict.fromkeys(name for column in table.values() for name in column))
    lines = [
        f"examples        {len(dataset):,} ({dataset.dropped:,} too long and left out)",
        f"steps           {steps:,} of {args.batch_size} ({epochs:.3g} epochs)",
        f"tokens          {sum(tokens):,}; a step {min(tokens):,} to {max(tokens):,}, on average "
        f"{sum(tokens) / steps:,.0f}",
        f"longest         sequence {plan.longest:,} tokens, example {plan.longest_example:,}",
        f"micro-batches   {sum(plan.micro_batches) / steps:.2f} a step on each of {ranks} GPUs, the fullest "
        f"{plan.fullest:,} tokens",
        f"arithmetic      {plan.flops:.3e} FLOPs ({again})",
        f"time            {plan.flops / rate / 3600:.2f} hours at {args.utilization:.0%} of {ranks} x "
        f"{args.peak_tflops:g} TFLOP/s; an average rank is busy {plan.busy:.1%} of it",
        "",
        f"{'GiB a GPU':40}" + "".join(f"{moment:>22}" for moment in table),
    ]
    for name in components:
        values = [column.get(name) for column in table.values()]
        lines.append(f"{name:40}" + "".join(f"{'' if v is None else f'{v / GIB:.2f}':>22}" for v in values))
    lines.append(f"{'sum':40}" + "".join(f"{sum(column.values()) / GIB:>22.2f}" for column in table.values()))
    lines += ["", verdict(plan, memory, args)]
    return "\n".join(lines)


def verdict(plan: Plan, memory: Callable, args) -> str:
    """Whether the run fits, else what would make it fit. memory(tokens of a micro-batch) -> the table."""

    def peak(tokens: int) -> float:
        return max(sum(column.values()) for column in memory(tokens).values()) / GIB

    here = f"{peak(plan.fullest):.1f} of {args.memory_gib:g} GiB a GPU, not counting what CUDA and NCCL need"
    if peak(plan.fullest) <= args.memory_gib:
        return f"fits: {here}"
    if peak(0) > args.memory_gib:
        return (f"does not fit: {here}; weights, gradients and moments alone take {peak(0):.1f}: more GPUs "
                "(--world-size) share them")
    if peak(plan.longest_example) > args.memory_gib:
        return (f"does not fit: {here}; the largest example, {plan.longest_example:,} tokens, takes "
                f"{peak(plan.longest_example):.1f} by itself: leave out longer ones (--max-response-tokens, "
                "--max-tokens), or share the rest of the memory among more GPUs (--world-size)")
    fitting, too_many = plan.longest_example, plan.fullest
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if peak(middle) <= args.memory_gib else (fitting, middle)
    return f"does not fit: {here}; --micro-batch-tokens {fitting} would"

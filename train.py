"""Train a model: SFT on correct traces, then REDI (or DPO, SimPO) on pairs of a correct and a wrong trace.

    torchrun train.py                                   the embedded example, end to end
    torchrun --nproc-per-node 8 train.py sft  --model Qwen/Qwen2.5-Math-1.5B --data positives.jsonl --output out/sft
    torchrun --nproc-per-node 8 train.py redi --model out/sft/final --data pairs.jsonl --output out/redi
"""

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from redi import cli

cli.prepare_process()

import torch

import evaluate
from redi import data, distributed, losses
from redi.cli import Parser, count, not_negative, number, positive, positive_int, run_command, share
from redi.distributed import print_rank0
from redi.example import water_tank
from redi.files import resolve_directory
from redi.hub.config import load_config
from redi.hub.weights import DTYPES, MODEL_FILES, load_sharded, weights_digest
from redi.losses import sequence_logps
from redi.model import RECOMPUTE, CausalLM, ModelConfig
from redi.rows import add_token_flags, token_settings
from redi.tokenizer import Tokenizer
from redi.training import dataset_logps, plan
from redi.training.run import Run, add_run_flags


@dataclass(frozen=True)
class Method:
    """An objective with its settings.

    losses(logps (N,), lengths (N,), reference (B, 2) or None, progress, **flags) -> (B,), unreduced. Of pairs, logps
    and lengths hold all chosen responses first, then all rejected ones; progress is the share of steps done, in [0, 1).
    """

    losses: Callable[..., torch.Tensor]
    lr: float  # this and what follows are the paper's settings, Appendix C
    batch_size: int
    epochs: float
    pairs: bool = True  # else rows of one completion, whose loss is divided by the batch's completion tokens
    reference: bool = False  # needs log π_ref of both responses under the initial model
    flags: dict[str, dict] = field(default_factory=dict)  # keyword arguments of losses -> options of add_argument


METHODS = {
    "sft": Method(
        lambda logps, lengths, reference, progress, loss_on_prompt: losses.sft_loss(logps),  # the labels tell the rest
        lr=5e-5, batch_size=128, epochs=5, pairs=False,
        flags={"loss_on_prompt": dict(action="store_true", help="train on the prompt too, as the official code does")},
    ),
    "redi": Method(
        lambda logps, lengths, reference, progress, alpha: losses.redi_loss(*logps.chunk(2), *lengths.chunk(2), alpha),
        lr=1e-6, batch_size=32, epochs=1,
        flags={"alpha": dict(type=not_negative, default=0.8, help="weight of the rejected responses: 1 is symmetric")},
    ),
    "dpo": Method(
        lambda logps, lengths, reference, progress, beta, label_smoothing: losses.dpo_loss(
            *logps.chunk(2), *reference.unbind(1), beta, label_smoothing),
        lr=2e-7, batch_size=32, epochs=1, reference=True,
        flags={"beta": dict(type=positive, default=0.001, help="scale of the margin"),
               "label_smoothing": dict(type=number(float, "a probability below one half", below=0.5), default=0.0,
                                       help="probability that a label is wrong")},
    ),
    "simpo": Method(
        lambda logps, lengths, reference, progress, beta, gamma: losses.simpo_loss(
            *logps.chunk(2), *lengths.chunk(2), beta, gamma),
        lr=5e-7, batch_size=32, epochs=1,
        flags={"beta": dict(type=positive, default=2.0, help="scale of the margin"),
               "gamma": dict(type=float, default=1.0, help="target margin")},
    ),
}  # fmt: skip
# A resumed run must agree in these and in its method's own; the rest (ranks, micro-batches, logging) may change.
SETTINGS = (
    "method", "model", "data", "lr", "batch_size", "epochs", "steps", "warmup", "weight_decay", "max_grad_norm",
    "seed", "rope_theta", "max_position_embeddings", "max_prompt_tokens", "max_response_tokens", "max_tokens",
    "prefill", "system_prompt", "append_end_of_text", "dtype",
)


def train(args: argparse.Namespace) -> None:
    """Run one stage, from rows to OUTPUT/final. Every rank calls."""
    method, device = METHODS[args.method], distributed.init_process_group()
    objective = partial(method.losses, **{name: getattr(args, name) for name in method.flags})
    run = Run(args, SETTINGS, method.flags)
    if run.is_finished:
        return print_rank0(f"{args.output / 'final'} exists: nothing to do")
    directory, tokenizer, config = distributed.run_on_ranks(True, partial(read_inputs, args, MODEL_FILES))
    for notice in tokenizer.notices:
        print_rank0(notice)
    model = load_sharded(directory, config, device, DTYPES[args.dtype], args.recompute, args.keep_layers, args.compile)
    dataset = load_data(args, args.data, tokenizer, config)
    eval_dataset = args.eval_data and load_data(args, args.eval_data, tokenizer, config)
    if eval_dataset:
        dataset_logps.compare_held_out(dataset, eval_dataset, args.data, args.eval_data)
    model_digest = weights_digest(directory)
    # Nothing is written before all inputs are checked.
    run.prepare_output_dir(model_digest, dataset.digest, eval_dataset and eval_dataset.digest)
    batching = {"batch_size": args.batch_size, "micro_batch_tokens": args.micro_batch_tokens}
    reference = None
    if method.reference:
        path = dataset_logps.reference_path(args.data, args.output, model_digest, config, args.dtype, dataset)
        reference = dataset_logps.reference(path, model, dataset, **batching)
    optimizer = build_optimizer(model, args.lr, args.weight_decay)
    run.restore(model, optimizer, tokenizer,
                held_out=eval_dataset and partial(dataset_logps.held_out, model, eval_dataset, **batching))
    total_steps = count_steps(args, len(dataset))
    print_rank0(f"{args.method}: {len(dataset)} examples ({dataset.dropped} too long, dropped), {total_steps} steps of "
                f"{args.batch_size}, from step {run.state['step']}; {sum(p.numel() for p in model.parameters()):,} "
                f"parameters on {distributed.world_size()} x {device.type}, {args.dtype}")

    for step, (epoch, rows, micro_batches) in run.steps(total_steps, partial(make_batch, args, config, dataset)):
        lr = set_lr(optimizer, step, total_steps, args.lr, args.warmup)
        # Counted over all ranks and micro-batches, so that the gradient does not depend on how a step is split.
        normalizer = len(rows) if method.pairs else int(dataset.label_counts[rows].sum())
        totals = defaultdict(float)
        for micro in micro_batches:
            micro = micro.to(device)
            token_logps = model(*micro.model_inputs())
            logps, lengths = sequence_logps(token_logps, micro.labels, micro.cu_seqlens)
            references = None if reference is None else reference[micro.rows]
            loss = micro.weight * objective(logps, lengths, references, step / total_steps).sum() / normalizer
            (loss * distributed.world_size()).backward()  # FSDP averages gradients over ranks
            for name, term in metric_terms(method, loss, logps, lengths, references, micro.weight / len(rows)).items():
                totals[name] += term

        grad_norm = distributed.clip_grad_norm(model, args.max_grad_norm)
        metrics = distributed.sums_by_name(totals, grad_norm=grad_norm)  # the only device synchronisation of a step
        finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        if finite:
            optimizer.step()
        # On a CPU, keep the gradient buffers to avoid heap fragmentation (40 MB of 1,240).
        optimizer.zero_grad(set_to_none=device.type != "cpu")
        if step == 0 and method.reference:
            dataset_logps.check_reference(metrics["reference_gap"], args.dtype, path)
        metrics |= {"lr": lr, "lr_grad_norm": lr * metrics["grad_norm"], "tokens": dataset.input_lengths[rows].sum()}
        run.after_step(step + 1, epoch, metrics, dataset.lines[rows], updated=finite)
    run.finish()


@torch.no_grad()
def metric_terms(method: Method, loss, logps, lengths, references, share: float) -> dict[str, torch.Tensor]:
    """What metrics.jsonl reports of a step, by name: scalars on the device that add up over micro-batches and ranks.

    Args: loss: the micro-batch's term; logps, lengths (N,), references (B, 2) or None: as in `Method`; share: weight
    of one example in the means over the step.
    """
    loss, averages = loss.detach(), logps / lengths  # a loss with its graph would keep the activations in memory
    if not method.pairs:
        return {"loss": loss, "chosen_logp": share * averages.sum()}
    chosen, rejected = averages.chunk(2)  # nats per token: the paper's LogPS
    terms = {
        "loss": loss,
        "chosen_logp": share * chosen.sum(),
        "rejected_logp": share * rejected.sum(),
        "margin": share * (chosen - rejected).sum(),
        "reward_accuracy": share * (chosen > rejected).sum(),
    }
    if references is not None:
        gaps = (logps - references.t().flatten()).abs() / lengths  # 0 at the first step, where DPO's loss is ln 2
        terms["reference_gap"] = share / 2 * gaps.sum()
    return terms


def set_lr(optimizer, step: int, total_steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then linear to zero. Returns this step's rate."""
    warmup_steps = math.ceil(warmup * total_steps)
    if step < warmup_steps:
        lr = peak * (step + 1) / warmup_steps
    else:
        lr = peak * (total_steps - step) / (total_steps - warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def count_steps(args: argparse.Namespace, examples: int) -> int:
    return args.steps or math.ceil(args.epochs * math.ceil(examples / args.batch_size))


def make_batch(args: argparse.Namespace, config: ModelConfig, dataset: data.Dataset, step: int):
    """(epoch, rows of the step over all ranks, this rank's micro-batches)."""
    epoch, rows = data.step_rows(len(dataset), args.batch_size, args.seed, step)
    flops, ranks = partial(plan.forward_flops, config), (distributed.rank(), distributed.world_size())
    return epoch, rows, data.micro_batches(dataset, rows, flops, args.micro_batch_tokens, *ranks)


def read_inputs(args: argparse.Namespace, patterns: list[str]) -> tuple[Path, Tokenizer, ModelConfig]:
    """(directory, tokenizer, config) of --model. Raises ValueError where they or the data files are missing."""
    for path in filter(None, (args.data, args.eval_data)):
        if not path.is_file():
            raise ValueError(f"{path}: no such data file")
    directory = resolve_directory(args.model, patterns)
    tokenizer = Tokenizer.from_pretrained(directory)
    return directory, tokenizer, load_config(directory, tokenizer, rope_theta=args.rope_theta,
                                             max_position_embeddings=args.max_position_embeddings)


def build_optimizer(model: CausalLM, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over fp32 master weights; norms and biases, the one-dimensional parameters, do not decay."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def load_data(args: argparse.Namespace, path: Path, tokenizer: Tokenizer, config: ModelConfig) -> data.Dataset:
    settings = token_settings(args, METHODS[args.method].pairs, config.max_position_embeddings)
    load = partial(data.load_dataset, path, tokenizer, settings, args.output)
    distributed.run_on_ranks(distributed.local_rank() == 0, load)  # tokenises, once per machine
    return load()


def show_plan(args: argparse.Namespace) -> None:
    """Print what the run would take. Reads no weights, and writes nothing but the cached token ids."""
    _, tokenizer, config = read_inputs(args, ["*.json", "*.jinja"])
    dataset = load_data(args, args.data, tokenizer, config)
    steps = range(count_steps(args, len(dataset)))
    batches = [data.step_rows(len(dataset), args.batch_size, args.seed, step)[1] for step in steps]
    print(plan.describe(args, config, dataset, batches, DTYPES[args.dtype].itemsize, METHODS[args.method].reference))


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="method", required=True, metavar="METHOD",
                                     help=f"{', '.join(METHODS)}, example; train.py METHOD --help shows its flags")
    for name, method in METHODS.items():
        add_flags(commands.add_parser(name, description=f"Train with the {name} objective."), method)
    example = commands.add_parser("example", description=water_tank.__doc__)
    example.add_argument("--output", type=Path, default=Path("out/example"), help="directory")
    example.add_argument("--seed", type=count, default=0, help="of its problems, solutions, initial weights, samples")
    return parser


def add_flags(parser: Parser, method: Method) -> None:
    add = parser.add_argument_group("model and data").add_argument
    add("--model", required=True, help="model directory or Hugging Face hub id to start from")
    add("--data", required=True, type=Path, help="pairs.jsonl" if method.pairs else "positives.jsonl")
    add("--eval-data", type=Path, help="held-out rows in the same format, whose log-probs are logged")
    add("--rope-theta", type=positive, help="replaces the model's (the paper: 300000)")
    add("--max-position-embeddings", type=positive_int, help="replaces the model's, in tokens (the paper: 32768)")
    add_token_flags(add)

    add = parser.add_argument_group("optimisation").add_argument
    for name, options in method.flags.items():
        add(f"--{name.replace('_', '-')}", **options)
    add("--lr", type=positive, default=method.lr, help="peak learning rate")
    add("--batch-size", type=positive_int, default=method.batch_size,
        help=f"{'pairs' if method.pairs else 'examples'} per optimiser step, over all ranks")
    add("--epochs", type=positive, default=method.epochs, help="passes over the data; may be a fraction")
    add("--steps", type=positive_int, help="optimiser steps, instead of --epochs")
    add("--warmup", "--warmup-ratio", type=share, default=0.1, help="share of the steps with linear warm-up")
    add("--weight-decay", type=not_negative, default=1e-4, help="AdamW's, on matrices only")
    add("--max-grad-norm", type=positive, default=1.0, help="gradients are clipped to this norm")
    add("--seed", type=count, default=0, help="decides the order of the examples")

    add = parser.add_argument_group("memory and speed").add_argument
    add("--dtype", choices=list(DTYPES), help="of the computation (default: bfloat16 on a GPU, float32 on a CPU)")
    add("--micro-batch-tokens", type=positive_int, default=40960, help="most tokens of a rank's micro-batch")
    add("--recompute", choices=list(RECOMPUTE), default="all-but-attention", help="activation checkpointing of layers")
    add("--keep-layers", type=count, default=0, help="number of final layers that store all activations")
    add("--compile", action="store_true", help="torch.compile the layers; for GPUs")

    add_run_flags(parser.add_argument_group("output").add_argument)
    plan.add_plan_flags(parser.add_argument_group("plan").add_argument)


def parse_args(argv: list[str]) -> argparse.Namespace:
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0]
        owners = [m for m, method in METHODS.items() if name.removeprefix("--").replace("-", "_") in method.flags]
        owner = f": it belongs to {' and '.join(owners)}" if owners else ""
        raise ValueError(f"{args.method} has no flag {name}{owner}")
    if args.method == "example":
        return args
    args.dtype = args.dtype or ("bfloat16" if args.plan or torch.cuda.is_available() else "float32")
    args.eval_every = args.eval_every or args.save_every or 200
    if args.resume and args.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args((sys.argv[1:] if argv is None else argv) or ["example"])
    if args.method == "example":
        water_tank.run_example(main, evaluate.main, args.output, args.seed)
    elif args.plan:
        show_plan(args)
    else:
        train(args)


if __name__ == "__main__":
    run_command(main, at_end=distributed.leave_process_group)

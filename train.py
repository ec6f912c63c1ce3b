"""Train a model: SFT on correct traces, then REDI (or DPO, SimPO) on pairs of a correct and a wrong trace.

    torchrun train.py                                   the embedded example, end to end
    torchrun --nproc-per-node 8 train.py sft  --model Qwen/Qwen2.5-Math-1.5B --data positives.jsonl --output out/sft
    torchrun --nproc-per-node 8 train.py redi --model out/sft/final --data pairs.jsonl --output out/redi
"""

import argparse
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from redi import checkpoint, data, distributed, monitor, plan
from redi.losses import dpo_loss, redi_loss, sequence_logps, sft_loss, simpo_loss
from redi.metrics import MetricsLog
from redi.model import DTYPES, CausalLM, ModelConfig
from redi.tokenizer import Tokenizer, resolve_directory

# Paper, Appendix C.
STAGES = {
    "sft": {"lr": 5e-5, "batch_size": 128, "epochs": 5},
    "redi": {"lr": 1e-6, "batch_size": 32, "epochs": 1},
    "dpo": {"lr": 2e-7, "batch_size": 32, "epochs": 1, "beta": 0.001},
    "simpo": {"lr": 5e-7, "batch_size": 32, "epochs": 1, "beta": 2.0},
}
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja"]
# A resumed run must agree in these; the rest (ranks, micro-batches, logging) may change.
SETTINGS = (
    "method", "model", "data", "lr", "batch_size", "epochs", "steps", "alpha", "beta", "gamma", "label_smoothing",
    "warmup", "weight_decay", "max_grad_norm", "seed", "rope_theta", "max_position_embeddings", "max_prompt_tokens",
    "max_response_tokens", "max_tokens", "prefill", "system_prompt", "loss_on_prompt", "append_end_of_text", "dtype",
)


def train(args: argparse.Namespace) -> None:
    """Run one stage, from rows to OUTPUT/final. Every rank calls."""
    device = distributed.init_process_group()
    stop = catch_signals()
    if is_finished(args):
        return say(f"{args.output / 'final'} is there already: nothing to do")
    directory = resolve_directory(args.model, MODEL_FILES)
    tokenizer = Tokenizer.from_pretrained(directory)
    model = build_model(args, directory, tokenizer, device)
    dataset = load_data(args, args.data, tokenizer, model.config.max_position_embeddings)
    eval_dataset = args.eval_data and load_data(args, args.eval_data, tokenizer, model.config.max_position_embeddings)
    claim_output(args, dataset)  # nothing is written, or overwritten, before the inputs are known to be good
    reference = reference_logps(args, model, dataset, directory, device) if args.method == "dpo" else None
    optimizer = build_optimizer(args, model)
    total_steps = count_steps(args, dataset)
    state = {"step": 0, "skipped": 0, "skipped_in_a_row": 0, "best_step": None, "best_margin": None}
    state["collapse"] = monitor.new_history()
    if args.resume and (newest := checkpoint.newest_checkpoint(args.output)):
        state = checkpoint.load_checkpoint(newest, model, optimizer)
    log_path = args.output / "metrics.jsonl"
    log = distributed.run_where(distributed.rank() == 0, lambda: MetricsLog(log_path, state["step"]))
    describe(args, model, dataset, total_steps, state["step"], device)

    batches = prefetch(range(state["step"], total_steps), lambda step: make_batch(args, model, dataset, step))
    bar = tqdm(batches, args.method, total_steps, initial=state["step"], disable=hide_bar(), unit="step")
    started = time.perf_counter()
    for step, (epoch, rows, micro_batches) in bar:
        lr = set_lr(args, optimizer, step, total_steps)
        # Counted over all ranks and micro-batches, so that the gradient does not depend on how they are cut.
        normalizer = int(dataset.label_counts[rows].sum() if args.method == "sft" else len(rows))
        sums = torch.zeros(4, device=device)
        for micro in micro_batches:
            micro = micro.to(device)
            token_logps = model(*micro.model_inputs())
            logps, lengths = sequence_logps(token_logps, micro.labels, micro.cu_seqlens)
            losses = objective(args, logps, lengths, reference, micro.rows)
            loss = micro.weight * losses.sum() / normalizer
            (loss * distributed.world_size()).backward()  # FSDP averages gradients over ranks
            sums += micro.weight * monitored(args, loss, logps, lengths)

        grad_norm = distributed.clip_grad_norm(model, args.max_grad_norm)
        # The one wait for the device in a step: all that the host wants to know, at once.
        values = host_values(sums, update_norm_squared(optimizer), grad_norm, stopping=bool(stop))
        finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        if finite:
            optimizer.step()
        # On a CPU gradients keep their place: made anew among a step's activations they leave holes, 40 MB of 1,240.
        optimizer.zero_grad(set_to_none=device.type != "cpu")

        state["step"] = step + 1
        state["skipped"] += not finite
        state["skipped_in_a_row"] = 0 if finite else state["skipped_in_a_row"] + 1
        seconds = time.perf_counter() - started
        metrics = step_metrics(args, dataset, rows, values, step + 1, epoch, lr, seconds, state["skipped"])
        saving = bool(args.save_every) and (step + 1) % args.save_every == 0
        if eval_dataset and (saving or step + 1 == total_steps):
            metrics.update(held_out(args, model, eval_dataset, device, state))
        if log:
            log.write(metrics)
        if step == 0 or (step + 1) % args.log_every == 0:
            say(readable(metrics))
        if not finite:
            report_skipped(args, dataset, rows, state)
        collapsing = args.method != "sft" and monitor.watch(state["collapse"], metrics, args.collapse_threshold)
        if collapsing:
            say(collapsing)
        if saving or values["stopping"] or (collapsing and args.stop_on_collapse):
            save(args, model, optimizer, tokenizer, state)
        if collapsing and args.stop_on_collapse:
            raise ValueError(f"stopped after step {step + 1}, as --stop-on-collapse asks")
        if values["stopping"]:
            how = "" if args.resume else " with --resume"
            say(f"stopped after step {step + 1} of {total_steps}: run the same command{how} to continue")
            raise SystemExit(128 + (stop[0] if stop else signal.SIGTERM))
        started = time.perf_counter()

    final = checkpoint.save_final(args.output, model, tokenizer, DTYPES[args.dtype])
    say(f"wrote {final}")


def show_plan(args: argparse.Namespace) -> None:
    """Print what the run would take. Reads no weights, and writes nothing but the cached token ids."""
    directory = resolve_directory(args.model, ["*.json", "*.jinja"])
    tokenizer = Tokenizer.from_pretrained(directory)
    config = load_config(args, directory, tokenizer)
    dataset = load_data(args, args.data, tokenizer, config.max_position_embeddings)
    run = plan.make_plan(
        args, config, dataset, count_steps(args, dataset),
        lambda rows: deal(args, config, dataset, rows, args.world_size),
    )
    print(plan.describe(run, args, config, dataset, DTYPES[args.dtype].itemsize))


def count_steps(args, dataset: data.Dataset) -> int:
    return args.steps or math.ceil(args.epochs * math.ceil(len(dataset) / args.batch_size))


def objective(args, logps, lengths, reference, rows) -> torch.Tensor:
    """The method's loss of each example: logps and lengths (N,), reference (examples, 2) or None -> (B,)."""
    if args.method == "sft":
        return sft_loss(logps)
    chosen_logps, rejected_logps = logps.chunk(2)
    chosen_lengths, rejected_lengths = lengths.chunk(2)
    if args.method == "redi":
        return redi_loss(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, args.alpha)
    if args.method == "simpo":
        return simpo_loss(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, args.beta, args.gamma)
    references = reference[rows].unbind(1)
    return dpo_loss(chosen_logps, rejected_logps, *references, args.beta, args.label_smoothing)


@torch.no_grad()
def monitored(args, loss, logps, lengths) -> torch.Tensor:
    """(4,): the loss, and sums over examples of: chosen and rejected log-prob per token, margins above 0."""
    averages = logps / lengths
    if args.method == "sft":
        return torch.stack([loss, averages.sum(), averages.new_zeros(()), averages.new_zeros(())])
    chosen, rejected = averages.chunk(2)
    return torch.stack([loss, chosen.sum(), rejected.sum(), (chosen > rejected).float().sum()])


def set_lr(args, optimizer, step: int, total_steps: int) -> float:
    """Linear warm-up over the first part of all steps, then linear to zero. Returns the rate of this step."""
    warmup = math.ceil(args.warmup * total_steps)
    if step < warmup:
        lr = args.lr * (step + 1) / warmup
    else:
        lr = args.lr * (total_steps - step) / (total_steps - warmup)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


@torch.no_grad()
def update_norm_squared(optimizer) -> torch.Tensor:
    """Squared norm of the update that AdamW is about to make on this rank's rows, from its moments.

    Foretold rather than measured: a copy of the weights would cost as much memory as a moment.
    """
    device = checkpoint.local(optimizer.param_groups[0]["params"][0]).device
    # In pieces that stay in a CPU's cache: five times faster than one temporary after another of a tensor's size.
    size = 2**18 if device.type == "cpu" else 2**62
    total = torch.zeros((), device=device)
    for group in optimizer.param_groups:
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        for parameter in group["params"]:
            weight, grad = checkpoint.local(parameter), checkpoint.local(parameter.grad)
            moments = optimizer.state.get(parameter) or {
                "exp_avg": torch.zeros_like(grad), "exp_avg_sq": torch.zeros_like(grad), "step": torch.zeros(())
            }
            averages = (checkpoint.local(moments[key]) for key in ("exp_avg", "exp_avg_sq"))
            count = moments["step"].to(device) + 1
            pieces = (tensor.reshape(-1).split(size) for tensor in (weight, grad, *averages))
            for w, g, exp_avg, exp_avg_sq in zip(*pieces):
                denominator = (exp_avg_sq * beta2).addcmul_(g, g, value=1 - beta2).div_(1 - beta2**count).sqrt_()
                update = exp_avg.lerp(g, 1 - beta1).div_(1 - beta1**count).div_(denominator.add_(group["eps"]))
                total += update.add_(w, alpha=decay).square_().sum() * lr**2
    return total


def host_values(sums, update_squared, grad_norm, stopping: bool) -> dict:
    """Sum over ranks what differs between them, and bring it to the host with the (global) gradient norm."""
    ours = torch.cat([sums, update_squared[None], sums.new_full((1,), float(stopping))])
    loss, chosen, rejected, positive, update_squared, stopping, norm = torch.cat(
        [distributed.sum_over_ranks(ours), grad_norm[None]]
    ).tolist()
    return {
        "loss": loss, "chosen": chosen, "rejected": rejected, "positive": positive,
        "update_norm": math.sqrt(update_squared) if update_squared >= 0 else math.nan,
        "grad_norm": norm, "stopping": stopping > 0,
    }


def step_metrics(args, dataset, rows, values, step, epoch, lr, seconds, skipped) -> dict:
    """One line of metrics.jsonl. The log-probs are averages per token (the paper's LogPS), in nats."""
    tokens = int(dataset.input_lengths[rows].sum())
    metrics = {"step": step, "epoch": epoch, "loss": values["loss"], "lr": lr, "grad_norm": values["grad_norm"]}
    metrics["lr_grad_norm"] = lr * values["grad_norm"]
    metrics["update_norm"] = values["update_norm"]
    metrics["chosen_logp"] = values["chosen"] / len(rows)
    if args.method != "sft":
        metrics["rejected_logp"] = values["rejected"] / len(rows)
        metrics["margin"] = metrics["chosen_logp"] - metrics["rejected_logp"]
        metrics["reward_accuracy"] = values["positive"] / len(rows)
    metrics.update(tokens=tokens, tokens_per_second=tokens / seconds, peak_memory_gib=peak_memory(), seconds=seconds)
    metrics["skipped"] = skipped
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}


def peak_memory() -> float:
    """GiB: of this rank's GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def readable(metrics: dict) -> str:
    shown = ["step", "loss", "chosen_logp", "rejected_logp", "grad_norm", "lr", "tokens_per_second"]
    return "  ".join(f"{key} {metrics[key]:.5g}" for key in shown if metrics.get(key) is not None)


def prefetch(steps, make):
    """Yield (step, make(step)), made in a thread one step ahead, while the device is at work."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for step in steps:
            ready = coming or pool.submit(make, step)
            coming = pool.submit(make, step + 1) if step + 1 in steps else None
            yield step, ready.result()


def make_batch(args, model: CausalLM, dataset: data.Dataset, step: int):
    """(epoch, rows of the whole step, this rank's micro-batches)."""
    epoch, rows = data.step_rows(len(dataset), args.batch_size, args.seed, step)
    return epoch, rows, micro_batches(args, model.config, dataset, rows)


def micro_batches(args, config, dataset, rows: np.ndarray) -> list[data.MicroBatch]:
    parts = deal(args, config, dataset, rows, distributed.world_size())
    return [data.pack(dataset, part[distributed.rank()]) for part in parts]


def deal(args, config, dataset, rows: np.ndarray, ranks: int) -> list[list[list[int]]]:
    """Spread a step's rows evenly: result[micro][rank] is a list of rows."""
    lengths = dataset.input_lengths[rows]
    # Arithmetic of a token, forward: 2 x parameters, and 2 x layers x heads x head size x its context.
    quadratic = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    costs = (lengths + lengths.astype(float) ** 2 * quadratic / sum(config.matmul_parameters())).sum(1)
    return data.partition(rows, lengths.sum(1), costs, ranks, args.micro_batch_tokens)


def load_config(args, directory: Path, tokenizer: Tokenizer) -> ModelConfig:
    overrides = {"rope_theta": args.rope_theta, "max_position_embeddings": args.max_position_embeddings}
    config = checkpoint.load_config(directory, **{k: v for k, v in overrides.items() if v is not None})
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, "
            f"but the model's vocabulary has {config.vocab_size} entries"
        )
    return config


def build_model(args, directory: Path, tokenizer: Tokenizer, device: torch.device) -> CausalLM:
    config = load_config(args, directory, tokenizer)
    with torch.device("meta"):
        model = CausalLM(config, gradient_checkpointing=args.gradient_checkpointing)
    checkpoint.check_weights(model, directory)
    if args.compile:
        for layer in model.model.layers:
            layer.compile()
    distributed.shard(model, DTYPES[args.dtype])
    model.to_empty(device=device)
    checkpoint.load_weights(model, directory)
    return model


def build_optimizer(args, model: CausalLM) -> torch.optim.AdamW:
    """AdamW over fp32 master weights; norms and biases, the one-dimensional parameters, do not decay."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def load_data(args, path: Path, tokenizer: Tokenizer, context: int) -> data.Dataset:
    pairs = args.method != "sft"
    settings = data.TokenSettings(
        pairs=pairs,
        max_prompt=args.max_prompt_tokens if pairs else args.max_tokens,
        max_response=args.max_response_tokens if pairs else args.max_tokens,
        max_total=min(context, args.max_tokens),
        prefill=args.prefill,
        system_prompt=args.system_prompt,
        append_end_of_text=args.append_end_of_text,
        loss_on_prompt=args.loss_on_prompt,
    )
    cache = cache_path(args, data.cache_name(path, tokenizer, settings))

    def load():
        return data.load_dataset(path, tokenizer, settings, cache)

    distributed.run_where(distributed.local_rank() == 0, load)  # tokenises, once a machine
    return load()


def cache_path(args, name: str) -> Path:
    """Beside the data, for other runs to use; in the run's own directory where that cannot be written."""
    if os.access(args.data.parent, os.W_OK):
        return args.data.parent / name
    args.output.mkdir(parents=True, exist_ok=True)
    return args.output / name


def reference_logps(args, model, dataset, directory: Path, device) -> torch.Tensor:
    """log π_ref of (chosen, rejected), (examples, 2) fp32: the start's, kept beside the data for other runs.

    The name holds digests of the weights, the config in use, the arithmetic and the token ids.
    """
    identity = f"{checkpoint.weights_digest(directory)} {model.config} {args.dtype} {dataset.digest}"
    path = cache_path(args, f"{args.data.name}.reference-{data.text_digest(identity)}.safetensors")
    # Decided by rank 0 alone: a file that one rank sees and another does not would leave them waiting.
    known = distributed.gather(path.is_file())[0]
    if not known:
        tensors = {"reference_logps": completion_logps(args, model, dataset, device, "reference log-probs").cpu()}
        distributed.run_where(distributed.local_rank() == 0, lambda: checkpoint.save_tensors(tensors, path))
    return checkpoint.load_tensors(path)["reference_logps"].to(device)


@torch.no_grad()
def completion_logps(args, model, dataset, device, title: str) -> torch.Tensor:
    """log π of each example's completions under the current weights, (examples, k) fp32, on every rank."""
    logps = torch.zeros(len(dataset), dataset.sequences_per_example, device=device)
    blocks = np.array_split(np.arange(len(dataset)), -(-len(dataset) // args.batch_size))
    for rows in tqdm(blocks, title, disable=hide_bar(), unit="batch", leave=False):
        for micro in micro_batches(args, model.config, dataset, rows):
            micro = micro.to(device)
            sums, _ = sequence_logps(model(*micro.model_inputs()), micro.labels, micro.cu_seqlens)
            if micro.weight:
                logps[micro.rows] = torch.stack(sums.chunk(dataset.sequences_per_example), 1)
    distributed.reshard(model)
    return distributed.sum_over_ranks(logps)


def held_out(args, model, dataset, device, state: dict) -> dict:
    """Per-token log-probs on --eval-data, for the log; and which step had the best margin, for the checkpoints."""
    logps = completion_logps(args, model, dataset, device, "held-out pairs")
    chosen, rejected = (logps.cpu() / torch.from_numpy(dataset.label_counts)).mean(0).tolist()
    if state["best_step"] is None or chosen - rejected > state["best_margin"]:
        state.update(best_step=state["step"], best_margin=chosen - rejected)
    return {"eval_chosen_logp": chosen, "eval_rejected_logp": rejected, "eval_margin": chosen - rejected}


def is_finished(args) -> bool:
    """Whether the run in the output directory has ended. Raises ValueError where that run is not ours to go on with."""

    def check() -> bool:
        ours = run_files(args.output)
        record = args.output / "run.json"
        if ours and not args.resume and not args.overwrite:
            raise ValueError(
                f"{args.output} holds another run ({ours[0].name}): --resume continues it, --overwrite replaces it"
            )
        if args.overwrite and any(Path(args.model).resolve().is_relative_to(path.resolve()) for path in ours):
            raise ValueError(f"{args.model} is part of the run that --overwrite would replace; choose another --output")
        if args.resume and record.is_file():
            settings = read_record(record)["settings"]
            for key in SETTINGS:
                if settings.get(key) != str(getattr(args, key)):
                    raise ValueError(
                        f"{args.output} was begun with --{key.replace('_', '-')} {settings.get(key)}, "
                        f"not {getattr(args, key)}; a resumed run keeps its settings"
                    )
        return args.resume and (args.output / "final").is_dir()

    return distributed.gather(distributed.run_where(distributed.rank() == 0, check))[0]


def read_record(path: Path) -> dict:
    """run.json: {"settings": what the run was begun with, as strings, "data_digest": that of its token ids}."""
    try:
        record = json.loads(path.read_text())
        return {"settings": dict(record["settings"]), "data_digest": str(record["data_digest"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); --overwrite begins anew") from None


def claim_output(args, dataset: data.Dataset) -> None:
    """Make the output directory this run's, and write down its settings."""

    def claim() -> None:
        record = args.output / "run.json"
        if args.resume and record.is_file() and read_record(record)["data_digest"] != dataset.digest:
            raise ValueError(f"{args.data} or the tokenizer has changed since the run in {args.output} was begun")
        args.output.mkdir(parents=True, exist_ok=True)
        if args.overwrite:
            for path in run_files(args.output):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        checkpoint.remove_leftovers(args.output)
        with data.write_atomically(record) as file:
            settings = {key: str(getattr(args, key)) for key in SETTINGS}
            json.dump({"settings": settings, "data_digest": dataset.digest}, file, indent=2)

    distributed.run_where(distributed.rank() == 0, claim)


def run_files(output: Path) -> list[Path]:
    """What a run has left in its output directory."""
    if not output.is_dir():
        return []
    named = [output / name for name in ("run.json", "metrics.jsonl", "final")]
    return [path for path in named if path.exists()] + checkpoint.checkpoints(output)


def save(args, model, optimizer, tokenizer, state: dict) -> None:
    """Commit a checkpoint, then let go of the oldest, but never of the best on held-out pairs.

    Where it cannot be written, say so and train on; the next one is tried again.
    """
    try:
        saved = checkpoint.save_checkpoint(args.output, model, optimizer, tokenizer, state, DTYPES[args.dtype])
    except OSError as error:
        return say(f"checkpoint of step {state['step']} not saved, going on without it: {error}")
    if distributed.rank() == 0 and args.keep_checkpoints:
        # One newer than this was damaged, and passed over at --resume: it does not count.
        good = [path for path in checkpoint.checkpoints(args.output) if path <= saved]
        for path in good[: -args.keep_checkpoints]:
            if path.name != checkpoint.step_name(state["best_step"]):
                shutil.rmtree(path, ignore_errors=True)


def catch_signals() -> list[int]:
    """A list that the first SIGTERM or SIGINT is put into; a second one ends the process at once."""
    received = []

    def handler(number, frame):
        if received:
            os._exit(128 + number)
        received.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
    return received


def report_skipped(args, dataset, rows, state) -> None:
    say(f"step {state['step']}: loss or gradient is not finite, update skipped ({state['skipped']} so far); "
        f"lines {dataset.lines[rows].tolist()} of {args.data}")
    if state["skipped_in_a_row"] > args.max_skipped:
        raise ValueError(f"{state['skipped_in_a_row']} updates in a row had a loss or gradient that is not finite")


def describe(args, model, dataset, total_steps, step, device) -> None:
    say(f"{args.method}: {len(dataset)} examples ({dataset.dropped} too long and left out), {total_steps} steps of "
        f"{args.batch_size}, from step {step}; {sum(p.numel() for p in model.parameters()):,} parameters on "
        f"{distributed.world_size()} x {device.type}, {args.dtype}")


def hide_bar() -> bool | None:
    """For tqdm's `disable`: one rank shows a bar, and only on a terminal."""
    return None if distributed.rank() == 0 else True


def say(text: str) -> None:
    if distributed.rank() == 0:
        tqdm.write(text)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("method", choices=list(STAGES))
    add("--model", required=True, help="model directory or Hugging Face hub id to start from")
    add("--data", required=True, type=Path, help="positives.jsonl for sft, pairs.jsonl otherwise")
    add("--eval-data", type=Path, help="held-out rows in the same form: their log-probs are logged at every save, and "
        "the checkpoint with the best margin is kept")
    add("--output", required=True, type=Path, help="directory for checkpoints, the final model and metrics.jsonl")
    add("--lr", type=float, help="peak learning rate (default: the paper's for the method)")
    add("--batch-size", type=int, help="examples or pairs per optimiser step, over all ranks")
    add("--epochs", type=float, help="passes over the data; may be a fraction")
    add("--steps", type=int, help="optimiser steps, instead of --epochs")
    add("--alpha", type=float, default=0.8, help="redi: weight of the rejected responses (1 is symmetric, 0 none)")
    add("--beta", type=float, help="dpo, simpo: scale of the margin")
    add("--gamma", type=float, default=1.0, help="simpo: target margin")
    add("--label-smoothing", type=float, default=0.0, help="dpo: probability that a label is wrong")
    add("--warmup", type=float, default=0.1, help="share of the steps in which the rate rises")
    add("--weight-decay", type=float, default=1e-4, help="AdamW's, on matrices only")
    add("--max-grad-norm", type=float, default=1.0, help="gradients are clipped to this norm")
    add("--seed", type=int, default=0, help="decides the order of the examples")
    add("--rope-theta", type=float, help="replaces the model's (the paper: 300000)")
    add("--max-position-embeddings", type=int, help="replaces the model's, in tokens (the paper: 32768)")
    add("--max-prompt-tokens", type=int, default=800, help="pairs with a longer prompt are left out")
    add("--max-response-tokens", type=int, default=19000, help="pairs with a longer response are left out")
    add("--max-tokens", type=int, default=32768, help="longer sequences, prompt included, are left out")
    add("--prefill", default="<think>\n", help="start of a response that evaluation forces; encoded apart")
    add("--system-prompt", help="system message (default: the chat template's)")
    add("--loss-on-prompt", action="store_true", help="sft: train on the prompt too, as the official stage 1 does")
    add("--append-end-of-text", action="store_true", help="end responses with a newline and <|endoftext|> after the "
        "end of turn, counted in |y|, as the official code does")
    add("--dtype", choices=list(DTYPES), help="of the computation (default: bfloat16 on a GPU, float32 on a CPU); "
        "master weights are float32")
    add("--micro-batch-tokens", type=int, default=40960, help="tokens of one rank in memory at once")
    add("--no-gradient-checkpointing", dest="gradient_checkpointing", action="store_false",
        help="keep activations instead of computing them again")
    add("--compile", action="store_true", help="torch.compile the layers")
    add("--save-every", type=int, default=200, help="steps between checkpoints; 0 for none")
    add("--keep-checkpoints", type=int, default=2, help="how many to keep; 0 for all")
    add("--log-every", type=int, default=10, help="steps between lines on the screen")
    add("--collapse-threshold", type=float, default=1.5, help="nats per token that the chosen LogPS may lose before "
        "a warning (redi/monitor.py)")
    add("--stop-on-collapse", action="store_true", help="save and stop at that warning")
    add("--max-skipped", type=int, default=10, help="updates in a row that may be skipped for numbers not finite")
    add("--resume", action="store_true", help="continue the run in --output, or begin it where there is none")
    add("--overwrite", action="store_true", help="replace the run in --output")
    add("--plan", action="store_true", help="print what the run would take (steps, tokens, hours, memory of each "
        "GPU), and do not train")
    add("--world-size", type=int, default=int(os.environ.get("WORLD_SIZE", 1)), help="--plan: number of GPUs")
    add("--utilization", type=float, default=0.4, help="--plan: share of the peak rate that a GPU reaches")
    add("--peak-tflops", type=float, default=989, help="--plan: a GPU's peak rate (989: H100 or H200 in bf16)")
    add("--memory-gib", type=float, default=80, help="--plan: a GPU's memory")
    args = parser.parse_args(argv)
    for key, value in STAGES[args.method].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() or args.plan else "float32")
    args.prefill = args.prefill.replace("\\n", "\n")
    # torchrun --max-restarts started this worker again: go on where its predecessor was.
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        args.resume, args.overwrite = True, False
    check_args(args)
    return args


def check_args(args) -> None:
    positive = ("batch_size", "micro_batch_tokens", "max_prompt_tokens", "max_response_tokens", "max_tokens",
                "log_every", "max_grad_norm", "lr", "epochs", "world_size", "utilization", "peak_tflops", "memory_gib")
    not_negative = ("alpha", "weight_decay", "seed", "save_every", "keep_checkpoints", "max_skipped")
    for keys, low, words in ((positive, math.ulp(0), "above 0"), (not_negative, 0, "0 or more")):
        for key in keys:
            if not low <= getattr(args, key) < math.inf:
                raise ValueError(f"--{key.replace('_', '-')} is {getattr(args, key)}; it must be {words}, and finite")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps is {args.steps}; it must be at least 1")
    if args.beta is not None and not 0 < args.beta < math.inf:
        raise ValueError(f"--beta is {args.beta}; it must be above 0, and finite")
    if not 0 <= args.label_smoothing < 0.5:
        raise ValueError(f"--label-smoothing is {args.label_smoothing}; it must be a probability below one half")
    if not 0 <= args.warmup <= 1:
        raise ValueError(f"--warmup is {args.warmup}; it must be a share from 0 to 1")
    if args.loss_on_prompt and args.method != "sft":
        raise ValueError("--loss-on-prompt is for sft: the other methods compare responses")
    if args.resume and args.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    for path in filter(None, (args.data, args.eval_data)):
        if not path.is_file():
            raise ValueError(f"{path}: no such data file")
    if args.eval_data and args.method == "sft":
        raise ValueError("--eval-data holds pairs, whose margin decides which checkpoint is best: not for sft")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv:
        args = parse_args(argv)
        return show_plan(args) if args.plan else train(args)
    from redi.toy import run_example

    run_example()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        # The ranks of a machine have the same to say, and the first of them says it. Another machine may lack a file.
        if distributed.local_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)

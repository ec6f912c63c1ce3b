"""Throughput and peak memory of training steps beside TRL 1.16, on the same rows and random model.

    python tests/bench/training.py sft dpo simpo redi         one table row per method (redi: beside TRL's SimPO)
    python tests/bench/training.py simpo --shape wide-vocabulary
    python tests/bench/training.py sft dpo --new-rows --steps 60    peak memory with full allocators and caches

Needs tests/requirements.txt. Per method two processes, one with train.py's own loop and one with TRL's trainer,
alternate optimiser steps, so that load on a shared machine affects both. Both load the same model directory, read the
same text whose words are tokens, form the same micro-batches (1 pair; sft: 2 sequences) without activation
checkpointing, and must agree on loss and gradient norm of the first step.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parents[2]
METHODS = ["sft", "dpo", "simpo", "redi"]
SHAPES = {
    "standard": {
        "vocab_size": 32_000, "hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6,
    },
    "wide-vocabulary": {
        "vocab_size": 151_936, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4,
    },
}  # fmt: skip
MICRO_BATCH = {"sft": 2}  # examples; 1 pair otherwise
BATCH_SIZE = {"sft": 16}  # examples; 8 pairs otherwise: the same 16 sequences
# Targets, relative to TRL: least throughput, largest peak memory.
TARGETS = {"sft": (1.9, 0.5), "dpo": (2.3, 0.5), "simpo": (1.7, 0.65), "redi": (1.7, 0.65)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", choices=METHODS, metavar="method", help=", ".join(METHODS))
    parser.add_argument("--shape", choices=list(SHAPES), default="standard")
    parser.add_argument("--warmup", type=int, default=2, help="steps before counting")
    parser.add_argument("--steps", type=int, default=5, help="steps counted")
    parser.add_argument("--new-rows", action="store_true", help="new rows in each step, a third as long")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "DIRECTORY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if args.worker:
        side, directory = args.worker
        run = {"prepare": prepare, "ours": run_ours, "trl": run_trl}[side]
        return run(Path(directory), args)
    print(f"shape {args.shape}, one thread, medians [quartiles] of {args.steps} steps after {args.warmup}")
    print(f"{'method':8}{'tokens/CPU-s':>26}{'TRL':>24}{'ratio':>18}{'target':>8}"
          f"{'MB':>8}{'TRL':>8}{'ratio':>7}{'target':>8}")
    with tempfile.TemporaryDirectory() as directory:
        start_worker("prepare", directory, args, args.methods[0]).wait()
        for method in args.methods:
            print(compare(method, directory, args), flush=True)


def compare(method: str, directory: str, args) -> str:
    """One row of the table."""
    workers = {side: start_worker(side, directory, args, method) for side in ("ours", "trl")}
    reports = {side: [] for side in workers}
    for _ in range(args.warmup + args.steps):
        for side, worker in workers.items():
            worker.stdin.write("step\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
            if not line:
                log = Path(directory, f"{side}.log").read_text()
                sys.exit(f"{log[-2000:]}\nerror: the {side} process exited with status {worker.wait()}")
            reports[side].append(json.loads(line))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    if method != "redi":  # which TRL does not have
        for key in ("loss", "grad_norm"):
            ours, theirs = (reports[side][0][key] for side in ("ours", "trl"))
            if abs(ours - theirs) > 5e-5 * max(1, abs(theirs)):
                sys.exit(f"error: {method}: {key} of the first step is {ours:.6f} here, {theirs:.6f} in TRL")
    tokens = [report["tokens"] for report in reports["ours"]]
    speeds = {side: [n / r["cpu_seconds"] for n, r in list(zip(tokens, rs))[args.warmup :]]
              for side, rs in reports.items()}  # fmt: skip
    # Ratios of adjacent steps.
    ratios = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds["trl"])]
    memory = {side: rs[-1]["peak_mb"] for side, rs in reports.items()}
    faster, smaller = TARGETS[method]
    return (
        f"{method:8}{spread(speeds['ours'], 0):>26}{spread(speeds['trl'], 0):>24}{spread(ratios, 2):>18}"
        f"{faster:8}{memory['ours']:8.0f}{memory['trl']:8.0f}{memory['ours'] / memory['trl']:7.2f}{smaller:8}"
    )


def spread(values: list[float], digits: int) -> str:
    low, _, high = quantiles(values, n=4)
    return f"{median(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def start_worker(side: str, directory: str, args, method: str) -> subprocess.Popen:
    # This process imports no torch: on Linux a child's peak memory starts at its parent's resident size.
    command = [sys.executable, __file__, method, "--shape", args.shape, "--warmup", str(args.warmup)]
    command += ["--steps", str(args.steps), *["--new-rows"] * args.new_rows, "--worker", side, directory]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                   "TOKENIZERS_PARALLELISM": "false"}
    log = open(f"{directory}/{side}.log", "w")
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                            env=environment)


def prepare(directory: Path, args) -> None:
    """Write a random model, and 8 pairs (--new-rows: 8 per step) with long-tailed response lengths."""
    import numpy as np
    import torch

    shape = {"num_hidden_layers": 8, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048,
             "rope_theta": 10000.0, **SHAPES[args.shape]}
    write_model_directory(directory / "model", shape, torch.float32)
    middle, longest, pairs = (4.3, 300, 8 * (args.warmup + args.steps)) if args.new_rows else (5.4, 1000, 8)
    lengths = np.exp(np.random.default_rng(0).normal(middle, 0.8, (pairs, 2))).clip(50, longest).astype(int)
    write_rows(directory, lengths, (24, 60), shape["vocab_size"])


def write_model_directory(directory: Path, shape: dict, dtype) -> None:
    """Write random Qwen2 weights with a tied head, and a tokenizer with one token per word: w3, w4, …"""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models, pre_tokenizers

    from redi.hub.config import parse_config
    from redi.hub.weights import save_pretrained
    from redi.model import CausalLM
    from redi.tokenizer import CHATML_TEMPLATE, Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = special + [f"w{i}" for i in range(len(special), shape["vocab_size"])]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = FastTokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML_TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }))
    model = CausalLM(parse_config({
        "model_type": "qwen2", "rms_norm_eps": 1e-6, "tie_word_embeddings": True, **shape,
    }))
    model.init_weights(seed=0)
    save_pretrained(model, directory, Tokenizer.from_pretrained(directory), dtype)


def write_rows(directory: Path, lengths, prompts: tuple[int, int], vocab_size: int) -> dict[str, Path]:
    """Write random text to pairs.jsonl, and the same responses to sft.jsonl.

    Args: lengths: (pairs, 2) words of each response; prompts: smallest and largest number of words of a prompt.
    """
    import numpy as np

    rng = np.random.default_rng(1)

    def text(length):
        return " ".join(f"w{i}" for i in rng.integers(3, vocab_size, length))

    pairs, positives = [], []
    for row in lengths:
        prompt = text(rng.integers(prompts[0], prompts[1] + 1))
        chosen, rejected = (" " + text(length) for length in row)
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        positives += [{"prompt": prompt, "completion": response} for response in (chosen, rejected)]
    files = {"pairs": directory / "pairs.jsonl", "sft": directory / "sft.jsonl"}
    for path, rows in zip(files.values(), (pairs, positives)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


class Turns:
    """The worker's end of the pipe: waits for its turn, then reports the cost of the step."""

    def __init__(self):
        self.replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keeps the output of libraries out of the replies

    def begin(self) -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        self.started = cpu_seconds()

    def end(self, **report) -> None:
        report["cpu_seconds"] = cpu_seconds() - self.started
        report["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(report), file=self.replies, flush=True)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def data_file(directory: Path, method: str) -> Path:
    return directory / ("sft.jsonl" if method == "sft" else "pairs.jsonl")


def run_ours(directory: Path, args) -> None:
    """Run train.py's loop unchanged, except for the order of rows, their micro-batches, and waiting for its turn."""
    import numpy as np
    import torch

    import train
    from redi import data
    from redi.training.run import Run

    torch.set_num_threads(1)
    turns, (method,), output = Turns(), args.methods, directory / f"ours-{args.methods[0]}"

    def micro_batches(dataset, rows, *_):
        rows, size = sorted(rows), MICRO_BATCH.get(method, 1)
        return [data.pack(dataset, rows[i : i + size]) for i in range(0, len(rows), size)]

    def in_turns(run, total_steps, make_batch):
        for batch in steps(run, total_steps, make_batch):
            turns.begin()
            yield batch
            last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
            turns.end(loss=last["loss"], grad_norm=last["grad_norm"], tokens=last["tokens"])

    steps, Run.steps, data.micro_batches = Run.steps, in_turns, micro_batches
    data.epoch_order = lambda examples, seed, epoch: np.arange(examples)
    train.main([
        method, "--model", str(directory / "model"), "--data", str(data_file(directory, method)),
        "--output", str(output), "--batch-size", str(BATCH_SIZE.get(method, 8)), "--lr", "1e-6",
        "--steps", str(args.warmup + args.steps), "--recompute", "nothing", "--save-every", "0",
    ])


def run_trl(directory: Path, args) -> None:
    """Run TRL's trainer of the method (redi: of SimPO)."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

    torch.set_num_threads(1)
    turns, (method,) = Turns(), args.methods

    class InTurns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            turns.begin()

        def on_log(self, arguments, state, control, logs, **_):
            if "loss" in logs:  # logged at the end of each step; the summary of the run has no loss
                turns.end(loss=logs["loss"], grad_norm=logs["grad_norm"])

    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    rows = [json.loads(line) for line in open(data_file(directory, method))]
    micro_batch = MICRO_BATCH.get(method, 1)
    trainer, options = trl_trainer(method)
    options = dict(
        output_dir=str(directory / f"trl-{method}"), per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=BATCH_SIZE.get(method, 8) // micro_batch,
        max_steps=args.warmup + args.steps, learning_rate=1e-6, weight_decay=1e-4, max_grad_norm=1.0,
        gradient_checkpointing=False, bf16=False, use_cpu=True, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, max_length=2048, train_sampling_strategy="sequential", **options,
    )
    config = trainer.__init__.__annotations__["args"]
    config = next(kind for kind in config.__args__ if kind is not type(None))
    trainer(
        model=model, args=config(**options), train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast.from_pretrained(directory / "model"),
        callbacks=[InTurns()],
    ).train()


def trl_trainer(method: str):
    """(trainer class, its options), with the hyper-parameters that train.py has by default."""
    if method == "sft":
        from trl import SFTTrainer

        return SFTTrainer, {}
    if method == "dpo":
        from trl import DPOTrainer

        return DPOTrainer, {"beta": 0.001, "precompute_ref_log_probs": True}
    from trl.experimental.cpo import CPOTrainer

    return CPOTrainer, {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}


if __name__ == "__main__":
    main()

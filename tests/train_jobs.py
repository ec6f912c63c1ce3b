"""Several runs of train.py one after another in one torchrun launch, because starting ranks takes seconds.

    torchrun --nproc-per-node 2 tests/train_jobs.py jobs.json

jobs.json is a list of {"argv": command line of train.py, and any of:
  "gradients": file that the first step's gradients are written to, whole and before clipping,
  "stop_at": step after which rank 1 receives SIGTERM, "unwritable_at": step whose checkpoint rank 1 cannot write,
  "copy": [a step directory, output directory]: load the checkpoint into a model and save it again, in place of a run}.
Each job's outcome, "ok" or what was raised, is written to jobs.json.outcomes.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import train
from redi import distributed
from redi.training import checkpoint
from redi.cli import run_command


def capture_gradients(path: Path):
    """A patch of the loop: before gradients are clipped for the first time, write them down."""
    clip, seen = distributed.clip_grad_norm, []

    def capture(model, max_norm):
        if not seen:
            seen.append(True)
            gradients = {
                name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
                for name, p in model.named_parameters()
            }
            if distributed.rank() == 0:
                save_file(gradients, path)
        return clip(model, max_norm)

    return mock.patch.object(distributed, "clip_grad_norm", capture)


def signal_at(step: int):
    """A patch of the loop: this process receives SIGTERM while the step is under way."""
    set_lr = train.set_lr

    def wrapped(optimizer, index, *rest):
        if index + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return set_lr(optimizer, index, *rest)

    return mock.patch.object(train, "set_lr", wrapped)


def unwritable_at(step: int):
    """A patch of the saving: this rank's disk is full at one step's checkpoint."""
    write = checkpoint.save_tensors

    def wrapped(path, tensors):
        if f"step-{step:06d}" in str(path):
            raise OSError(28, "No space left on device")
        write(path, tensors)

    return mock.patch.object(checkpoint, "save_tensors", wrapped)


def copy_checkpoint(argv: list[str], source: Path, output: Path) -> None:
    args = train.parse_args(argv)
    device = distributed.init_process_group()
    directory, tokenizer, config = train.read_inputs(args, train.MODEL_FILES)
    model = train.load_sharded(directory, config, device, train.DTYPES[args.dtype])
    optimizer = train.build_optimizer(model, args.lr, args.weight_decay)
    state = checkpoint.load_checkpoint(source, model, optimizer)
    checkpoint.save_checkpoint(output, model, optimizer, tokenizer, state, train.DTYPES[args.dtype])


def run(job: dict) -> str:
    try:
        with contextlib.ExitStack() as patches:
            if "gradients" in job:
                patches.enter_context(capture_gradients(Path(job["gradients"])))
            if "stop_at" in job and distributed.rank() == distributed.world_size() - 1:
                patches.enter_context(signal_at(job["stop_at"]))
            if "unwritable_at" in job and distributed.rank() == distributed.world_size() - 1:
                patches.enter_context(unwritable_at(job["unwritable_at"]))
            if "copy" in job:
                copy_checkpoint(job["argv"], *map(Path, job["copy"]))
            else:
                train.main(job["argv"])
    except (ValueError, OSError, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def main() -> None:
    distributed.init_process_group()
    path = Path(sys.argv[1])
    outcomes = []
    for job in json.loads(path.read_text()):
        outcomes.append(distributed.all_gather_object(run(job)))
        if distributed.rank() == 0:
            Path(f"{path}.outcomes").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    run_command(main)

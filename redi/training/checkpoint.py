"""Atomic checkpoints, resumed exactly at any world size.

OUTPUT/step-000123/ is a model directory with a folder training_state/ in it: rank-00000-of-00002.safetensors
(that rank's rows of every parameter and AdamW moment, its RNG state) and state.json (step, counters, checksums
of those files and of itself). It is renamed to that name once all of it is on disk. Nothing in it is a pickle.
"""

import json
import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import torch

from redi.distributed import all_gather_object, local_tensor, print_rank0, rank, run_on_ranks, world_size
from redi.files import (
    error_context, file_digest, fsync, make_directory, naming, read_json, remove, replace_directory, write_json,
)  # fmt: skip
from redi.hub.weights import chunk_rows, local_rows, open_safetensors, save_pretrained, save_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(output: Path, model, optimizer, tokenizer, state: dict, dtype: torch.dtype) -> Path:
    """Write OUTPUT/step-NNNNNN for state["step"]. All ranks call. Returns the path.

    Raises OSError on every rank if any rank cannot write; earlier checkpoints are untouched then.
    """

    def write(partial: Path) -> None:
        folder = partial / "training_state"
        path = folder / _rank_file(rank(), world_size())

        def write_rows() -> str:
            tensors = {"rng_state": torch.get_rng_state()}
            for name, parameter in model.named_parameters():
                tensors[f"model.{name}"] = local_tensor(parameter).detach().cpu().contiguous()
                if parameter in optimizer.state:
                    moments = optimizer.state[parameter]
                    tensors |= {f"{key}.{name}": local_tensor(moments[key]).cpu().contiguous() for key in MOMENTS}
            save_tensors(path, tensors)
            return file_digest(path)

        digests = all_gather_object(run_on_ranks(True, write_rows))
        save_pretrained(model, partial, tokenizer, dtype)
        updates = [int(moments["step"].item()) for moments in optimizer.state.values()]
        full_state = {
            **state,
            "updates": updates[0] if updates else 0,
            "world_size": world_size(),
            "sha256": {_rank_file(r, world_size()): digest for r, digest in enumerate(digests)},
        }
        full_state["digest"] = _state_digest(full_state)

        def write_state() -> None:
            for name in full_state["sha256"]:
                if not (folder / name).is_file():
                    raise OSError(f"{folder / name} is missing: do all machines share {output}?")
            write_json(folder / "state.json", full_state)
            fsync(folder)

        run_on_ranks(rank() == 0, write_state)

    return _commit(output / step_name(state["step"]), write)


def save_model(path: Path, model, tokenizer, dtype: torch.dtype) -> Path:
    """Write a model directory (OUTPUT/final, OUTPUT/best), replacing an earlier one. All ranks call. Raises OSError as
    save_checkpoint does."""
    return _commit(path, lambda partial: save_pretrained(model, partial, tokenizer, dtype))


def _commit(path: Path, write: Callable[[Path], None]) -> Path:
    """Call write(partial) to fill a directory beside `path`, then rename it to `path`."""
    partial = path.with_name(f"{path.name}.partial")
    run_on_ranks(rank() == 0, lambda: remove(partial) or make_directory(partial))
    try:
        with naming(path):
            write(partial)
    except OSError:
        if rank() == 0:  # frees the space on a full disk
            remove(partial)
        raise
    run_on_ranks(rank() == 0, lambda: fsync(partial) or replace_directory(partial, path))
    return path


def load_checkpoint(path: Path, model, optimizer) -> dict:
    """Restore parameters, AdamW moments and RNG from a step directory, at any world size. Returns state.json.

    Creates the optimiser's state. Bitwise exact.
    """
    state = read_json(path / "training_state" / "state.json")
    saved_ranks = state["world_size"]
    with error_context(str(path)):
        files = [open_safetensors(path / "training_state" / _rank_file(r, saved_ranks)) for r in range(saved_ranks)]

    @torch.no_grad()
    def restore(target: torch.Tensor, key: str) -> None:
        """Fill this rank's rows from the files of the saved ranks that hold them."""
        rows = local_rows(target)
        for saved_rank, file in enumerate(files):
            saved = chunk_rows(target.shape[0], saved_rank, saved_ranks)
            start, stop = max(rows.start, saved.start), min(rows.stop, saved.stop)
            if start < stop:
                piece = file.get_slice(key)[start - saved.start : stop - saved.start]
                local_tensor(target)[start - rows.start : stop - rows.start].copy_(piece)

    for name, parameter in model.named_parameters():
        restore(parameter, f"model.{name}")
        if state["updates"]:
            moments = {key: torch.zeros_like(parameter) for key in MOMENTS}
            for key, value in moments.items():
                restore(value, f"{key}.{name}")
            moments["step"] = torch.tensor(float(state["updates"]), device=parameter.device)
            optimizer.state[parameter] = moments
    torch.set_rng_state(files[min(rank(), saved_ranks - 1)].get_tensor("rng_state"))
    return state


def newest_checkpoint(output: Path) -> Path | None:
    """The newest intact checkpoint, the same on all ranks; None where there is none. Corrupt ones are reported and
    skipped.

    Raises ValueError where all are corrupt: whether to start over is the user's decision.
    """
    found = all_gather_object(list(map(str, checkpoints(output))))[0]
    for path in map(Path, reversed(found)):
        problems = [problem for problem in all_gather_object(_corruption(path)) if problem]
        if not problems:
            return path
        print_rank0(f"{path} is corrupt and skipped: {problems[0]}")
    if found:
        raise ValueError(f"{output}: every checkpoint is corrupt; --overwrite starts over")
    return None


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def checkpoints(output: Path) -> list[Path]:
    """Complete step directories, oldest first."""
    found = [path for path in output.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def remove_leftovers(output: Path) -> None:
    """Delete what an interrupted save left behind. For rank 0, before training."""
    for old in output.glob("*.replaced"):  # moved aside by replace_directory
        if not old.with_suffix("").exists():
            old.rename(old.with_suffix(""))
    for pattern in ("*.partial", "*.partial-[0-9]*", "*.replaced"):
        for path in output.glob(pattern):
            remove(path)


def _corruption(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, of which each rank reads its share; None if nothing is."""
    try:
        state = read_json(path / "training_state" / "state.json")
        if state.get("digest") != _state_digest(state):
            return "state.json does not match its checksum"
        for name, digest in sorted(state["sha256"].items())[rank() :: world_size()]:
            if file_digest(path / "training_state" / name) != digest:
                return f"{name} does not match its checksum"
    except ValueError as error:
        return str(error)
    return None


def _state_digest(state: dict) -> str:
    text = json.dumps({key: value for key, value in state.items() if key != "digest"})
    return sha256(text.encode()).hexdigest()


def _rank_file(index: int, ranks: int) -> str:
    return f"rank-{index:05d}-of-{ranks:05d}.safetensors"

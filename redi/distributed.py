"""The process group, FSDP2 sharding, and collectives on small values. Without a process group there is one rank."""

import argparse
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Collection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from redi.cli import handle_signals
from redi.files import LOCK, file_digest, lock_directory, make_directory, text_digest

SECONDS_TO_SHOW = 15  # in which a network file system shows a new file to all machines

_job: tuple[dist.Store, str] | None = None  # torchrun's store, which outlives its workers, and the attempt's name


def init_process_group() -> torch.device:
    """Join the processes that torchrun started, or form a group of one without it. Returns this process's device.

    Calling again changes nothing. The device is this rank's GPU if there is one, otherwise the CPU.
    """
    device = torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            raise ValueError("srun started several tasks that are no process group (RANK is not set): start one "
                             "torchrun per machine with it, such as srun --ntasks-per-node 1 torchrun train.py")
        with handle_signals(None):  # the other processes are awaited in C++
            _join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def _join(backend: str) -> None:
    global _job
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://"))
        attempt = _name_attempt(store, rank, world_size)
        dist.init_process_group(backend, store=dist.PrefixStore(attempt, store), rank=rank, world_size=world_size)
        _job = store, attempt
        return
    try:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    except RuntimeError as error:
        if "Unable to find" not in str(error):
            raise
        raise ValueError("there is no network interface, which Gloo needs even for one process: bring up the loopback "
                         "interface (ip link set lo up)") from None


def _name_attempt(store: dist.Store, rank: int, world_size: int) -> str:
    """A name that the processes started together share, and no process started before or after them.

    torchrun keeps its store over restarts, in which new workers would find the addresses of dead ones, and each of its
    agents has a restart count of its own (PyTorch issues 108158, 135712). So every process publishes a token. Rank 0
    publishes the list of all tokens until each process has found its own in it: then the list is a new one.
    """
    token = uuid.uuid4().hex
    store.set(f"redi/token/{rank}", token)
    if rank == 0:
        joined = [f"redi/{token}/{other}" for other in range(1, world_size)]
        while True:
            tokens = [store.get(f"redi/token/{other}").decode() for other in range(world_size)]
            store.set("redi/tokens", json.dumps(tokens))
            if not joined or store.check(joined):
                return token
            time.sleep(0.02)
    while True:
        tokens = json.loads(store.get("redi/tokens"))
        if tokens[rank : rank + 1] == [token]:
            store.set(f"redi/{tokens[0]}/{rank}", "")
            return tokens[0]
        time.sleep(0.02)


def leave_process_group() -> None:
    """For the end of a command: NCCL expects it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def note_start(name: str) -> None:
    """Note that this attempt has started something, for the workers by which torchrun may replace these (rank 0)."""
    if _job:
        store, attempt = _job
        store.set(f"redi/started/{name}", attempt)


def was_started(name: str) -> bool:
    """Whether an earlier attempt of the same torchrun has noted that it started this, as rank 0 sees it. Collective."""
    found = False
    if _job:
        store, attempt = _job
        key = f"redi/started/{name}"
        found = store.check([key]) and store.get(key).decode() != attempt
    return all_gather_object(found)[0]


def shard(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Shard parameters, gradients and optimiser state over all ranks, layer by layer (ZeRO-3).

    Master weights keep the parameters' fp32; forward and backward run on copies in compute_dtype; gradients
    are averaged in fp32. A tied embedding stays one parameter, in the root's group with the final norm.
    A single process that computes in fp32 has nothing to shard or cast; there FSDP would only cost time (8 % of the
    CPU seconds of a step with 25M parameters and micro-batches of one pair).
    """
    if dist.get_world_size() == 1 and compute_dtype == torch.float32:
        return
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters of the root, which a forward without backward leaves unsharded."""
    if isinstance(model, FSDPModule):
        model.reshard()


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The unsharded tensor. Collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_grad_norm(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Clip the gradients to a global norm of max_norm. Returns the norm before clipping, a scalar on the device."""
    return full_tensor(clip_grad_norm_(model.parameters(), max_norm))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Rank among the processes of this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def print_rank0(text: str) -> None:
    """Print a line on rank 0, above a progress bar."""
    if rank() == 0:
        tqdm.write(text)


def hide_bar() -> bool | None:
    """For tqdm's `disable`: only rank 0 shows a bar, and only on a terminal."""
    return None if rank() == 0 else True


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum, in place, the same on every rank."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def sums_by_name(terms: dict[str, torch.Tensor], **common: torch.Tensor) -> dict[str, float]:
    """Copy scalars from the device: `terms` summed over ranks, `common` (equal on all ranks) unchanged.

    One collective, and one synchronisation with the device.
    """
    sums = sum_over_ranks(torch.stack(list(terms.values())))
    values = torch.cat([sums, *(value[None] for value in common.values())])
    return dict(zip([*terms, *common], values.tolist()))


def any_rank(condition: bool) -> bool:
    """Whether the condition holds on some rank. Does not synchronise with the device."""
    return bool(sum_over_ranks(torch.tensor(int(condition))))


def all_gather_object(value) -> list:
    """One small value (None, number, string, list, dict) of every rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(values: dict[str, object]) -> None:
    """Raise ValueError on every rank, naming the difference, unless all ranks have the same values. Collective."""
    first, *others = all_gather_object({name: str(value) for name, value in values.items()})
    for rank, found in enumerate(others, 1):
        for name in {**first, **found}:
            if found.get(name) != first.get(name):
                raise ValueError(f"rank {rank} has {name} {found.get(name)}, rank 0 {first.get(name)}: all ranks need "
                                 "the same")


def agree_on_flags(args: argparse.Namespace, paths: Collection[str]) -> None:
    """Compare the flags of all ranks, and the version of the code. Collective.

    paths: flags that name files, whose content is to be compared: here only whether they are given.
    """
    flags = {f"--{name.replace('_', '-')}": value is not None if name in paths else value
             for name, value in vars(args).items()}
    sources = [Path(sys.argv[0]), *sorted(Path(__file__).parent.rglob("*.py"))]
    code = text_digest(" ".join(file_digest(path) for path in sources if path.is_file()))
    agree({**flags, "code (SHA-256)": code, "torch": torch.__version__})


def lock_output(directory: Path) -> None:
    """Make a directory this run's, as lock_directory does for rank 0. Collective.

    Raises ValueError where another run holds it, and where a rank does not see the lock file.
    """
    content = run_on_ranks(rank() == 0, lambda: make_directory(directory) or lock_directory(directory))
    content, path = all_gather_object(content)[0], directory / LOCK

    def find() -> None:
        deadline = time.monotonic() + SECONDS_TO_SHOW
        while not path.is_file() or path.read_text() != content:
            if time.monotonic() > deadline:
                raise ValueError(f"{directory} of rank {rank()} on {socket.gethostname()} is not that of rank 0: all "
                                 "machines need the same --output, on a shared file system")
            time.sleep(0.1)

    run_on_ranks(rank() > 0, find)


def raise_together(failure: Exception | None) -> None:
    """If any rank has failed, raise on every rank, so that none waits for another in a collective.

    The other ranks raise an OSError or a ValueError with the same message.
    """
    found = failure and [isinstance(failure, OSError), str(failure)]
    failures = [f for f in all_gather_object(found) if f]
    if failure:
        raise failure
    if failures:
        is_os_error, message = failures[0]
        raise (OSError if is_os_error else ValueError)(message)


def run_on_ranks(condition: bool, function: Callable):
    """Call the function on the ranks where the condition holds, while the others wait. A failure is raised on all."""
    result, failure = None, None
    if condition:
        try:
            result = function()
        except (OSError, ValueError) as error:
            failure = error
    raise_together(failure)
    return result

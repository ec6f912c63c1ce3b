"""The process group, FSDP2 sharding, and what ranks tell each other. Without a process group there is one rank."""

import atexit
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm


def init_process_group() -> torch.device:
    """Join the processes that torchrun started, or stand alone without it. Returns this process's device.

    Calling again changes nothing. The device is this rank's GPU where there is one, otherwise the CPU.
    """
    device = torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def _join(backend: str) -> None:
    """Make the process group: torchrun's ranks, or one process alone where torchrun did not start it."""
    if "RANK" in os.environ:
        store, rank, size = next(dist.rendezvous("env://"))
        # torchrun keeps one store over its restarts: new workers would find the addresses of dead ones in it.
        store = dist.PrefixStore(f"attempt-{restarts()}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(_leave)


def restarts() -> int:
    """How often torchrun (--max-restarts) has started this worker again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _leave() -> None:
    """Destroy the process group, but not after an unexpected error: other ranks may be in the middle of something,
    which NCCL would await."""
    if dist.is_initialized() and not hasattr(sys, "last_type"):
        dist.destroy_process_group()


def shard(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Shard parameters, gradients and optimiser state over all ranks, layer by layer (ZeRO-3).

    Master weights keep the parameters' fp32; forward and backward run on copies in compute_dtype; gradients
    are averaged in fp32. A tied embedding stays one parameter, in the root's group with the final norm.
    One process that computes in fp32 has nothing to share or to cast, and keeps the model as it is: FSDP
    would cost it 8 % more CPU seconds a step (measured with 25M parameters and micro-batches of one pair).
    """
    if dist.get_world_size() == 1 and compute_dtype == torch.float32:
        return
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def reshard(model: nn.Module) -> None:
    """Let go of parameters that a forward without backward has left gathered: the root's."""
    if isinstance(model, FSDPModule):
        model.reshard()


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor: the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all ranks' parts of it, a collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_grad_norm(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale the gradients down to a global norm of max_norm. Returns the norm before, a scalar on the device."""
    return full_tensor(clip_grad_norm_(model.parameters(), max_norm))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Rank among the processes of this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def print_rank0(text: str) -> None:
    """Print a line once, not on every rank, and above a progress bar."""
    if rank() == 0:
        tqdm.write(text)


def hide_bar() -> bool | None:
    """For tqdm's `disable`: one rank shows a bar, and only on a terminal."""
    return None if rank() == 0 else True


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum, in place, the same on every rank."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def sums_by_name(terms: dict[str, torch.Tensor], **common: torch.Tensor) -> dict[str, float]:
    """Bring scalars on the device to the host: `terms` summed over ranks, `common` as they are, the same on all.

    One collective, and one wait for the device.
    """
    sums = sum_over_ranks(torch.stack(list(terms.values())))
    values = torch.cat([sums, *(value[None] for value in common.values())])
    return dict(zip([*terms, *common], values.tolist()))


def any_rank(condition: bool) -> bool:
    """Whether the condition holds on some rank. Does not wait for the device."""
    return bool(sum_over_ranks(torch.tensor(int(condition))))


def all_gather_object(value) -> list:
    """One small value (None, number, string, list) of every rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_together(failure: Exception | None) -> None:
    """Where a rank has failed, raise on every rank, so that none waits for the others in a collective.

    The other ranks raise an OSError or a ValueError with the same words.
    """
    found = failure and [isinstance(failure, OSError), str(failure)]
    failures = [f for f in all_gather_object(found) if f]
    if failure:
        raise failure
    if failures:
        is_os_error, words = failures[0]
        raise (OSError if is_os_error else ValueError)(words)


def run_on_ranks(condition: bool, function: Callable):
    """Call the function on the ranks where the condition holds; the others wait. Failures reach every rank."""
    result, failure = None, None
    if condition:
        try:
            result = function()
        except (OSError, ValueError) as error:
            failure = error
    raise_together(failure)
    return result

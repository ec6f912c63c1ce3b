"""The process group, FSDP2 sharding, and what ranks tell each other. Without a process group there is one rank."""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from redi.model import CausalLM


def init_process_group() -> torch.device:
    """Join the processes that torchrun started, or stand alone without it. Returns this process's device.

    Calling again changes nothing. The device is this rank's GPU where there is one, otherwise the CPU.
    """
    device = torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            _end_with_torchrun()
            store, index, size = next(dist.rendezvous("env://"))
            # torchrun keeps one store over its restarts: new workers would find the addresses of dead ones in it.
            attempt = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group(backend, store=attempt, rank=index, world_size=size)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(_leave)
    return device


def _leave() -> None:
    """Before the interpreter shuts down, let Gloo's threads have it once more: they free the tensors of the last
    collective, and coming too late for that aborted one finished run in seven. After an unexpected error other
    ranks may be in the middle of something, which NCCL would await."""
    if dist.is_initialized() and not hasattr(sys, "last_type"):
        time.sleep(0.1)
        dist.destroy_process_group()


def _end_with_torchrun() -> None:
    """A torchrun killed with -9 leaves its processes running: they would go on for hours beside the next run."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent, main = os.getppid(), threading.main_thread()

    def watch():
        while main.is_alive():
            main.join(0.5)
            if os.getppid() != parent:
                os._exit(1)

    # Ends with the main thread. A daemon could still wake up while the interpreter shuts down, and abort the process.
    threading.Thread(target=watch).start()


def shard(model: CausalLM, compute_dtype: torch.dtype) -> None:
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


def clip_grad_norm(model: CausalLM, max_norm: float) -> torch.Tensor:
    """Scale the gradients down to a global norm of max_norm. Returns the norm before, a scalar on the device."""
    norm = clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def reshard(model: CausalLM) -> None:
    """Let go of parameters that a forward without backward has left gathered: the root's."""
    if isinstance(model, FSDPModule):
        model.reshard()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Rank among the processes of this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum, in place, the same on every rank."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(value) -> list:
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
    failures = [f for f in gather(found) if f]
    if failure:
        raise failure
    if failures:
        is_os_error, words = failures[0]
        raise (OSError if is_os_error else ValueError)(words)


def run_where(condition: bool, function: Callable):
    """Call the function on the ranks where the condition holds; the others wait. Failures reach every rank."""
    result, failure = None, None
    if condition:
        try:
            result = function()
        except (OSError, ValueError) as error:
            failure = error
    raise_together(failure)
    return result

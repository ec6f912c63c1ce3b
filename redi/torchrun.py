"""Joining the processes that torchrun started, and leaving them: restarts and orphans."""

import atexit
import os
import sys
import threading

import torch.distributed as dist


def join(backend: str) -> None:
    """Make the process group: torchrun's ranks, or one process alone where torchrun did not start it."""
    if "RANK" in os.environ:
        _end_with_torchrun()
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

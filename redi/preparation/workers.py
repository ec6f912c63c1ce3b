"""A function over chunks of work, by several processes. Imports no torch, nor does a worker."""

import collections
import contextlib
import itertools
import multiprocessing
import multiprocessing.resource_tracker
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait

from redi.cli import uninterrupted

SPAWN = multiprocessing.get_context("spawn")


def in_parallel(function: Callable, chunks: Iterable, processes: int) -> Iterator:
    """function(chunk) of every chunk, in order, by `processes`; few chunks are held at a time. function is pickled.

    A worker has a pipe of its own and one chunk at a time. Nothing is shared, no queue, thread or lock, that a killed
    or interrupted process could leave in a state that others wait on. Raises what function raises of ValueError and
    OSError, for the first chunk that has an error whichever worker is faster, and ValueError when a worker dies.
    """
    chunks = iter(chunks)
    first = list(itertools.islice(chunks, processes))
    chunks = itertools.chain(first, chunks)
    if len(first) < 2:
        yield from map(function, chunks)
        return
    workers, idle = [], []
    at_work = {}  # pipe -> where its answer goes: an empty list, to be filled with (error, result)
    pending = collections.deque()  # these lists, in the order of the chunks
    try:
        for _ in first:
            ours, its = multiprocessing.Pipe()
            workers.append(SPAWN.Process(target=_work, args=(its, function), daemon=True))
            uninterrupted(_start, workers[-1])
            its.close()  # so that ours ends when the worker does
            at_work[ours] = []
        for chunk in chunks:
            while not idle or len(pending) > 2 * processes:
                idle += _receive(at_work)
                while pending and pending[0]:
                    yield _result(*pending.popleft())
            pipe = idle.pop()
            with _noticing_death():
                pipe.send(chunk)
            at_work[pipe] = []
            pending.append(at_work[pipe])
        while pending:
            while not pending[0]:
                _receive(at_work)
            yield _result(*pending.popleft())
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join()


def _start(worker: multiprocessing.Process) -> None:
    """Ctrl-C goes to all processes of a terminal and is the parent's to handle: a worker inherits that it is masked."""
    multiprocessing.resource_tracker.ensure_running()  # would be started, and unblock it, before the first worker
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        worker.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _receive(at_work: dict[Connection, list]) -> list[Connection]:
    """Wait for answers. Returns the pipes of the workers that are now idle."""
    ready = wait(at_work)
    for pipe in ready:
        with _noticing_death():
            at_work[pipe] += pipe.recv()
        del at_work[pipe]
    return ready


def _result(error: Exception | None, result):
    if error:
        raise error
    return result


@contextlib.contextmanager
def _noticing_death() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):
        raise ValueError("a worker process died (killed, or out of memory); nothing was written") from None


def _work(pipe: Connection, function: Callable) -> None:
    """In a worker: say that it is there, then one result for every chunk, until the parent has gone."""
    with contextlib.suppress(EOFError, ConnectionError):
        pipe.send((None, None))
        while True:
            chunk = pipe.recv()
            try:
                answer = None, function(chunk)
            except (ValueError, OSError) as error:
                answer = error, None
            pipe.send(answer)

"""Worker processes: what they give, how few chunks are held, and how they end."""

import functools
import multiprocessing
import os
import signal
import time

import pytest

from redi.cli import SIGNALS
from redi.preparation.corpus import in_parallel
from tests.conftest import run_python


def refuse(chunk):
    raise ValueError(f"chunk {chunk} is bad")


def first_after_second(chunk):
    """The first of the chunks is done when another process has done the second."""
    number, place = chunk
    if number == 1:
        (place / "second").touch()
    deadline = time.monotonic() + 60
    while number == 0 and not (place / "second").exists():
        if time.monotonic() > deadline:
            raise ValueError("nobody does the second chunk")
        time.sleep(0.01)
    return number, os.getpid()


def refuse_first_after_second(chunk):
    refuse(first_after_second(chunk)[0])


def second_dies(chunk):
    if first_after_second(chunk)[0] == 1:
        os._exit(9)


def blocked_signals(chunk):
    return sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def process_id(chunk):
    return os.getpid()


def test_a_worker_that_dies_while_others_work_is_reported(tmp_path):
    with pytest.raises(ValueError, match="a worker process died"):
        list(in_parallel(second_dies, [(number, tmp_path) for number in range(9)], processes=3))
    assert not multiprocessing.active_children()


def test_an_error_of_the_function_is_raised_here():
    with pytest.raises(ValueError, match="chunk 1 is bad"):
        list(in_parallel(refuse, [1, 1, 1], processes=1))


def test_the_error_raised_is_that_of_the_first_bad_chunk(tmp_path):
    with pytest.raises(ValueError, match="chunk 0 is bad"):
        list(in_parallel(refuse_first_after_second, [(0, tmp_path), (1, tmp_path)], 2))


def test_few_chunks_are_held_at_a_time():
    taken = []

    def chunks():
        for number in range(50):
            taken.append(number)
            yield number

    results = in_parallel(functools.partial(pow, 2), chunks(), processes=2)
    for number, result in enumerate(results):
        assert result == 2**number and len(taken) <= number + 6


def test_results_come_in_the_order_of_the_chunks(tmp_path):
    results = list(in_parallel(first_after_second, [(number, tmp_path) for number in range(12)], processes=3))
    assert [number for number, _ in results] == list(range(12))
    assert results[0][1] != results[1][1]


def test_one_chunk_needs_no_worker():
    assert list(in_parallel(process_id, [1], processes=3)) == [os.getpid()]
    assert list(in_parallel(process_id, [1, 2], processes=1)) == [os.getpid()] * 2
    assert list(in_parallel(process_id, [], processes=3)) == []


def test_closing_ends_the_workers():
    results = in_parallel(process_id, iter(range(1000)), processes=2)
    pids = {next(results) for _ in range(8)}
    results.close()
    assert os.getpid() not in pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("place", ["multiprocessing.util.spawnv_passfds", "multiprocessing.process.BaseProcess.start"])
def test_an_interrupt_while_a_worker_starts(place):
    """After the process has been created and before it receives its task, or before the pool knows it."""
    script = f"""
import multiprocessing.process, multiprocessing.resource_tracker, multiprocessing.util, os, signal
from redi.cli import run_command
from redi.preparation.corpus import in_parallel
multiprocessing.resource_tracker.ensure_running()
original, calls = {place}, []
def interrupted(*arguments):
    result = original(*arguments)
    calls.append(arguments)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return result
{place} = interrupted
run_command(lambda: print(*in_parallel(abs, [1, 2], processes=2)))
"""
    result = run_python("-c", script)
    assert (result.returncode, result.stdout, result.stderr) == (143, "", "interrupted\n")


def test_signals_to_all_processes_reach_no_worker():
    """Not even while it starts: it inherits that they are blocked. The parent does not keep them so."""
    blocked = list(in_parallel(blocked_signals, [1, 2], processes=2))
    assert blocked == [sorted(SIGNALS)] * 2 and blocked_signals(0) == []

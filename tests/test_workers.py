"""Worker processes: what they give, how few chunks are held, and how they end."""

import functools
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from redi.preparation.workers import in_parallel

ROOT = Path(__file__).resolve().parent.parent


def die(chunk):
    os._exit(9)


def die_in_the_middle_of_an_answer(chunk):
    """Half of an answer is in the pipe: its length (four bytes), and less than so many bytes."""
    [pipe] = [number for number in map(int, os.listdir("/proc/self/fd")) if number > 2 and is_socket(number)]
    os.write(pipe, (1 << 20).to_bytes(4, "big") + b"half")
    os._exit(9)


def is_socket(descriptor: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:  # the one that listed them
        return False


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


def last_dies(place):
    """Two processes wait for each other, then the one that was started later dies."""
    number = int(multiprocessing.current_process().name.rpartition("-")[2])
    (place / str(number)).touch()
    deadline = time.monotonic() + 60
    while len(numbers := [int(path.name) for path in place.iterdir()]) < 2:
        if time.monotonic() > deadline:
            raise ValueError("alone")
        time.sleep(0.01)
    if number == max(numbers):
        os._exit(9)


def blocks_sigint(chunk):
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def process_id(chunk):
    return os.getpid()


def modules(chunk):
    return sorted(name for name in sys.modules if name in ("torch", "redi.preparation.workers"))


@pytest.mark.parametrize("death", [die, die_in_the_middle_of_an_answer])
def test_a_worker_that_dies_is_reported(death):
    with pytest.raises(ValueError, match="a worker process died"):
        list(in_parallel(death, [1, 2], processes=2))


def test_an_error_of_the_function_is_raised_here():
    for processes in (1, 2):
        with pytest.raises(ValueError, match="chunk 1 is bad"):
            list(in_parallel(refuse, [1, 1, 1], processes))


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


def test_a_worker_loads_no_torch():
    assert list(in_parallel(modules, [1, 2], processes=2)) == [["redi.preparation.workers"]] * 2


def test_closing_ends_the_workers():
    results = in_parallel(process_id, iter(range(1000)), processes=2)
    pids = {next(results) for _ in range(8)}
    results.close()
    assert os.getpid() not in pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def run(script: str) -> tuple[int, str, str]:
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60, capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    return result.returncode, result.stdout, result.stderr


def test_the_death_of_the_last_worker_is_noticed_too(tmp_path):
    """Its end of the pipe must not stay open in the parent."""
    status, out, errors = run(f"""
from pathlib import Path
import test_workers
from redi.cli import run_command
from redi.preparation.workers import in_parallel
chunks = [Path({str(tmp_path)!r})] * 2
run_command(lambda: print(*in_parallel(test_workers.last_dies, chunks, processes=2)))
""")
    assert (status, out) == (1, "") and errors.startswith("error: a worker process died")


@pytest.mark.parametrize("place", ["multiprocessing.util.spawnv_passfds", "multiprocessing.process.BaseProcess.start"])
def test_an_interrupt_while_a_worker_starts(place):
    """After the process is there and before it has been told what to do, or before it is written down that it is
    there: such a worker was waited for until the end of days, or wrote a traceback."""
    script = f"""
import multiprocessing.process, multiprocessing.resource_tracker, multiprocessing.util, os, signal
from redi.cli import run_command
from redi.preparation.workers import in_parallel
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
    assert run(script) == (143, "", "interrupted\n")


def test_ctrl_c_of_a_terminal_reaches_no_worker():
    """Not even while it starts: it inherits that the signal is blocked. The parent does not keep it so."""
    script = """
import signal, test_workers
from redi.preparation.workers import in_parallel
print(*in_parallel(test_workers.blocks_sigint, [1, 2], processes=2), test_workers.blocks_sigint(0))
"""
    assert run(script) == (0, "True True False\n", "")

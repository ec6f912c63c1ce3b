"""Signals: whatever the command is at, it ends soon, with the status that says by which signal."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from redi.cli import uninterrupted

ROOT = Path(__file__).resolve().parent.parent
WAIT_FOR_EVER = "print('ready', flush=True); sys.stdin.read()"  # as a command does that reads an open pipe


def start(body: str) -> subprocess.Popen:
    """run_command over a function of these lines, in a process of its own."""
    lines = "\n    ".join(body.strip().splitlines())
    script = f"import os, signal, sys, time\nfrom redi.cli import *\ndef main():\n    {lines}\nrun_command(main)"
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}  # where it is set, nothing is left to flush at the end
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """(status, stdout, stderr), with its stdin left open."""
    try:
        process.wait(30)
    finally:
        process.kill()
    return process.returncode, process.stdout.read(), process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_unwinds_and_ends_with_its_status(number):
    process = start(f"try:\n    {WAIT_FOR_EVER}\nfinally:\n    print('tidied up')")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert end(process) == (128 + number, "tidied up\n", "interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_a_destructor_swallows_is_raised_again(number):
    """The interpreter drops an exception that is raised in __del__; the command would then wait for ever."""
    process = start(f"""
class Noisy:
    def __del__(self):
        os.kill(os.getpid(), {int(number)})
        time.sleep(0)
Noisy()
try:
    {WAIT_FOR_EVER}
finally:
    print('tidied up')
""")
    status, out, errors = end(process)
    assert (status, out) == (128 + number, "ready\ntidied up\n") and errors.endswith("\ninterrupted\n")
    assert "Exception ignored" in errors  # else the signal came elsewhere, and this shows nothing


ON_ITS_WAY = """
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(1)
pool.submit(time.sleep, 1000)
with pool:"""
AT_THE_END = """
import threading
threading.Thread(target=time.sleep, args=[1000]).start()
if True:"""


@pytest.mark.parametrize("lines", [ON_ITS_WAY, AT_THE_END], ids=["on its way", "at the end of the interpreter"])
def test_an_interrupt_waits_for_no_thread(lines):
    """Such as one that downloads."""
    process = start(f"{lines}\n    {WAIT_FOR_EVER}")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert end(process) == (130, "", "interrupted\n")


def test_a_second_signal_is_the_systems():
    """A handler in Python would wait for the end of a long product, which this loop in C stands for."""
    process = start(f"""
import itertools
try:
    {WAIT_FOR_EVER}
finally:
    print('long', flush=True)
    sum(itertools.repeat(1))
""")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "long\n"
    process.send_signal(signal.SIGINT)
    assert end(process) == (-signal.SIGINT, "", "")


def test_a_signal_waits_for_what_is_not_fit_to_be_broken_off():
    handled = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: handled.append(number))

    def function(words):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
        words.append("done")
        assert handled == []
        return words

    try:
        assert uninterrupted(function, []) == ["done"] and handled == [signal.SIGTERM]
        with pytest.raises(ZeroDivisionError):
            uninterrupted(lambda: os.kill(os.getpid(), signal.SIGTERM) or 1 / 0)
        assert handled == [signal.SIGTERM] * 2
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
        assert len(handled) == 3  # the handler is back
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("error", ["ValueError('no such thing')", "OSError('no such thing')"])
def test_an_error_is_one_sentence(error):
    assert end(start(f"raise {error}")) == (1, "", "error: no such thing\n")


@pytest.mark.parametrize("body, status", [("print('done')", 0), ("print('done')\nsys.exit(143)", 143),
                                          ("print('done')\nraise ValueError('no')", 1)])
def test_the_interpreter_is_not_shut_down(body, status):
    """A thread of Gloo's that needs it meanwhile aborts the process. What atexit has to do is done all the same."""
    process = start(f"""
import atexit
atexit.register(print, 'at exit')
class Late:
    def __del__(self, end=os._exit):
        end(99)
sys.late = Late()
{body}
""")
    assert end(process)[:2] == (status, "done\nat exit\n")


def test_a_closed_output_is_an_error():
    process = start("sys.stdin.read(1)\nprint('done')")
    process.stdout.close()
    process.stdin.write("\n"), process.stdin.flush()
    assert process.wait(30) == 1 and "Broken pipe" in process.stderr.read()

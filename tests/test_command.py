"""Signals, exit status and output of a command, in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WAIT = "print('ready'); sys.stdin.read()"  # as a command does that reads an open pipe
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def start(body: str, **options) -> subprocess.Popen:
    """run_command over a function with these lines."""
    lines = "\n    ".join(body.strip().splitlines())
    script = f"import os, signal, sys, time\nfrom redi.cli import *\ndef main():\n    {lines}\nrun_command(main)"
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    environment = {**os.environ, "PYTHONUNBUFFERED": "", **options.pop("env", {})}
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, text=True, env=environment, **options)


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """(status, stdout, stderr), with its stdin left open."""
    try:
        process.wait(30)
    finally:
        process.kill()
    return process.returncode, process.stdout.read(), process.stderr.read()


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupt_unwinds_and_ends_with_its_status(number):
    process = start(f"try:\n    {WAIT}\nfinally:\n    print('tidied up')")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert end(process) == (128 + number, "tidied up\n", "interrupted\n")


def test_an_ignored_signal_stays_ignored():
    """As under nohup."""
    process = start(WAIT, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.stdin.close()
    assert end(process) == (0, "", "")


IN_A_DESTRUCTOR = f"""
class Noisy:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
Noisy()
{WAIT}
"""
BEHIND_A_THREAD = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(1) as pool:
    pool.submit(time.sleep, 1000)
    print('ready')
    os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("lines", [IN_A_DESTRUCTOR, BEHIND_A_THREAD], ids=["in a destructor", "behind a thread"])
def test_a_second_signal_ends_what_the_first_did_not(lines):
    process = start(lines)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)  # within a second of the first: the same request
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert end(process)[:2] == (130, "")


def test_a_thread_at_work_does_not_keep_an_interrupted_process():
    process = start(f"import threading\nthreading.Thread(target=time.sleep, args=[1000]).start()\n{WAIT}")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert end(process) == (130, "", "interrupted\n")


def test_signals_are_left_to_the_system_around_a_wait_in_c():
    process = start("import itertools\nwith handle_signals(None):\n    print('ready'); sum(itertools.repeat(1))")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert end(process) == (-signal.SIGTERM, "", "")


@pytest.mark.parametrize("env", [{}, {"RANK": "0"}, {"RANK": "9", "LOCAL_RANK": "0"}, {"LOCAL_RANK": "3"}], ids=str)
@pytest.mark.parametrize("error", ["ValueError('no such thing')", "OSError('no such thing')"])
def test_an_error_is_one_sentence(error, env):
    assert end(start(f"raise {error}", env=env)) == (1, "", "error: no such thing\n")


def test_only_the_first_rank_of_a_machine_prints_an_error():
    assert end(start("raise ValueError('no')", env={"RANK": "1", "LOCAL_RANK": "1"})) == (1, "", "")


def test_an_unexpected_error_has_its_traceback():
    status, out, errors = end(start("1 / 0"))
    assert (status, out) == (1, "") and "Traceback" in errors and errors.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("body, status", [("print('done')", 0), ("print('done')\nsys.exit(143)", 143),
                                          ("print('done')\nraise ValueError('no')", 1), ("print('done')\n1 / 0", 1)])
def test_the_interpreter_is_not_shut_down(body, status):
    """A thread of Gloo's that needs it meanwhile aborts the process."""
    process = start(f"""
class Late:
    def __del__(self, end=os._exit):
        end(99)
sys.late = Late()
{body}
""")
    assert end(process)[:2] == (status, "done\n")


def test_output_is_seen_at_once(tmp_path):
    with open(tmp_path / "log", "w") as log:
        process = start("from tqdm import tqdm\nprint('one')\ntqdm.write('two')\nsys.stdin.read()", stdout=log)
    deadline = time.monotonic() + 30
    while (tmp_path / "log").read_text() != "one\ntwo\n":
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.kill(), process.wait()


SHOWS = """
from tqdm import tqdm
sys.stdin.read(1)
for i in tqdm(range(3), mininterval=0):
    print("x" * 10_000)
    tqdm.write("line")
print("warning", file=sys.stderr)
open(os.environ["END"], "w").close()
"""


@pytest.mark.parametrize("where", ["closed pipe", "full disk", "closed", "ASCII"])
def test_output_that_nobody_takes_ends_no_command(tmp_path, where):
    env = {"END": str(tmp_path / "end"), "PYTHONIOENCODING": "ascii" if where == "ASCII" else ""}
    body = SHOWS.replace('"x"', '"≥"' if where == "ASCII" else '"x"')
    if where == "full disk":
        with open("/dev/full", "w") as full:
            process = start(body, env=env, stdout=full, stderr=full)
    else:
        closed = {"preexec_fn": lambda: (os.close(1), os.close(2))} if where == "closed" else {}
        process = start(body, env=env, **closed)
        if where == "closed pipe":
            process.stdout.close(), process.stderr.close()
    process.stdin.write("\n"), process.stdin.flush()
    if where == "ASCII":
        assert "\\u2265" in process.communicate(timeout=30)[0]
    assert process.wait(30) == 0 and (tmp_path / "end").exists()

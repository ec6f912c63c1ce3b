"""What the commands have in common: flags, one sentence for an error, exit status, signals. Imports no torch."""

import argparse
import atexit
import ctypes
import math
import os
import signal
import sys
from collections.abc import Callable

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS_TO_UNWIND = 1
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def prepare_process() -> None:
    """Set what must be set before torch is imported. For the first lines of a command that imports it."""
    # oneDNN, and ideep between it and torch, cache 1,024 primitives each, one for every shape of a product. Packed
    # batches have a new number of tokens at every step, so without a bound memory grows from step to step.
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "16")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def end_with_parent() -> None:
    """On Linux, kill this process when its parent ends: the workers of a killed parent would go on for hours."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Parser(argparse.ArgumentParser):
    """Help with the defaults in it, the description as it is laid out, and a ValueError for a bad command line."""

    class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            without = action.default is None or isinstance(action.default, bool)
            return action.help if without else super()._get_help_string(action)

    def __init__(self, **options):
        super().__init__(**{"formatter_class": self._Formatter, "allow_abbrev": False, **options})

    def error(self, message: str):
        raise ValueError(f"{self.prog}: {message}")


def number(kind: type, words: str, low: float = 0, below: float = math.inf) -> Callable[[str], float]:
    """For a flag's `type`: an int or float with low <= value < below, which `words` describe."""

    def parse(text: str):
        try:
            value = kind(text)
            if low <= value < below:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")

    return parse


positive_int = number(int, "a whole number above 0", low=1)
count = number(int, "a whole number from 0 up")
positive = number(float, "a number above 0", low=math.ulp(0))
not_negative = number(float, "a number from 0 up")
share = number(float, "a share from 0 to 1", below=math.nextafter(1, 2))


class Interrupted(BaseException):
    """Raised in the main thread by a signal that `run_command` has taken over."""

    def __init__(self, number: int):
        self.number = number


def run_command(main: Callable[[], None], when_interrupted: str = "interrupted") -> None:
    """Call main(), and end the process: with status 0 or that of a SystemExit, with 1 after one sentence for a
    ValueError or OSError, or with 128 + its number for SIGINT and SIGTERM, which raise Interrupted in main unless
    main handles them itself.

    The interpreter is not shut down: a thread of Gloo's that frees the tensors of the last collective meanwhile aborts
    the process (pytorch issue 190489), and FSDP keeps these threads alive beyond destroy_process_group.
    """
    for number in SIGNALS:
        signal.signal(number, _raise_interrupted)
    # The ranks of a machine have the same to say, and the first of them says it. Another machine may lack a file.
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    status = 0
    try:
        try:
            main()
            sys.stdout.flush()
        except (ValueError, OSError) as error:
            if speaks:
                print(f"error: {error}", file=sys.stderr)
            status = 1
        except SystemExit as end:
            if not isinstance(end.code, int):
                raise  # a text, for the interpreter to print
            status = end.code
        finally:
            _leave_to_the_system()
    except Interrupted as interruption:
        _leave_to_the_system()
        # Without what atexit has to do, which would wait for threads and workers.
        _end(128 + interruption.number, when_interrupted if speaks else "")
    atexit._run_exitfuncs()
    _end(status)


def _end(status: int, words: str = "") -> None:
    try:
        if words:
            print(words, file=sys.stderr)
        sys.stdout.flush()
    finally:
        os._exit(status)


def _raise_interrupted(number: int, frame) -> None:
    """Raise Interrupted, and again every second until run_command has it.

    An exception can get lost: the interpreter drops one that is raised in a destructor or a callback. And it can be
    held up, by a `with` or `finally` on its way that waits: for downloads to end, or for a lock whose owner it was.
    """
    _leave_to_the_system()

    def interrupt(*_) -> None:
        raise Interrupted(number)

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_UNWIND, SECONDS_TO_UNWIND)
    interrupt()


def _leave_to_the_system() -> None:
    """From now on a signal ends the process at once: the system does not wait, as a handler does, for the end of a
    long product."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def uninterrupted(function: Callable, *arguments):
    """function(*arguments), which is not fit to be broken off: a signal meanwhile is handled when it has returned.
    For the main thread."""
    received = []
    handlers = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in SIGNALS}
    try:
        return function(*arguments)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)

"""Shared by the commands: flags, one-sentence errors, exit status, signals, the screen. Does not import torch."""

import argparse
import contextlib
import ctypes
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def prepare_process() -> None:
    """Set what must be set before torch is imported. Called in the first lines of a command that imports it."""
    # oneDNN, and ideep between it and torch, cache 1,024 primitives each, one for every shape of a product. Packed
    # batches have a new number of tokens at every step, so without a bound memory grows from step to step.
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "16")
    if "TORCHELASTIC_RUN_ID" in os.environ:  # else the workers of a torchrun killed with -9 would keep running
        end_with_parent()


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends. Linux only; elsewhere a no-op."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)


class Parser(argparse.ArgumentParser):
    """Shows defaults and the layout of the description in --help; a bad command line is a ValueError."""

    class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            without = action.default is None or isinstance(action.default, bool)
            return action.help if without else super()._get_help_string(action)

    def __init__(self, **options):
        super().__init__(**{"formatter_class": self._Formatter, "allow_abbrev": False, **options})

    def error(self, message: str):
        raise ValueError(f"{self.prog}: {message}")


def number(kind: type, words: str, low: float = 0, below: float = math.inf) -> Callable[[str], float]:
    """The `type` of a flag: an int or float with low <= value < below, described by `words` in the error message."""

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


def run_command(
    main: Callable[[], None], when_interrupted: str = "interrupted", at_end: Callable[[], None] = lambda: None
) -> None:
    """Call main() and, if it succeeds, at_end(), and end the process with its exit status.

    The status is 0, that of a SystemExit, 1 after a ValueError or OSError (printed as one sentence) or any other
    exception (with its traceback), or 128 + the number of a signal that interrupted main.

    The interpreter is not shut down: FSDP keeps threads of Gloo alive beyond destroy_process_group, and one of them
    that releases the tensors of the last collective meanwhile aborts the process (PyTorch issue 190489).
    """
    sys.stdout, sys.stderr = Screen(sys.stdout), Screen(sys.stderr)
    status, message = 1, ""
    try:
        with handle_signals(_interrupt):
            main()
            at_end()
        status = 0
    except (ValueError, OSError) as error:
        message = f"error: {error}"
    except SystemExit as end:
        status, message = (1, end.code) if isinstance(end.code, str) else (end.code or 0, "")
    except KeyboardInterrupt as interruption:
        status, message = 128 + interruption.args[0], when_interrupted
    except Exception:
        traceback.print_exc()
    # All ranks of a machine fail with the same sentence; the first of them prints it. Another machine may lack a file.
    if message and ("RANK" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"):
        print(message, file=sys.stderr)
    os._exit(status)


def _interrupt(number: int) -> None:
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def handle_signals(on_first: Callable[[int], None] | None) -> Iterator[None]:
    """Call on_first(number) for the first of SIGNALS that arrives in the block. One that arrives a second or more later
    ends the process; an earlier one is the same request again, which SLURM sends to torchrun and to its workers, and
    torchrun forwards. A signal that the process was started with ignored (nohup) stays ignored.

    Python runs a handler only between two operations of the main thread, and drops an exception that a handler raises
    in a destructor. None: a signal ends the process at once, for waits in C++, where no handler runs.
    """
    first = None

    def handle(number, frame):
        nonlocal first
        if first is None:
            first = time.monotonic()
            on_first(number)
        elif time.monotonic() - first >= 1:
            os._exit(128 + number)

    previous = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number, handler in previous.items() if handler is not signal.SIG_IGN]
    try:
        for number in handled:
            signal.signal(number, handle if on_first else signal.SIG_DFL)
        yield
    finally:
        for number in handled:
            signal.signal(number, previous[number])


class Screen:
    """Standard output or error of a command: flushed at every write, so that a log file is up to date; and silent
    where it cannot be written (a closed pipe or terminal, a full disk), which must not end a run."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None where the process was started without it
        self.stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
            self.stream.flush()
        return len(text)

    def flush(self) -> None:
        pass

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

"""pass@1 with its standard error, pass@k, and the JSONL log."""

import errno
import json
import math
import os
from pathlib import Path

import numpy as np

from redi.data import naming, read_jsonl, write_atomically


def pass_at_1(correct: np.ndarray) -> tuple[float, float | None]:
    """Mean of correct (n problems, k samples) bool, and the standard error of that mean.

    As in the paper (Appendix C.5): each of the k columns is one run over the benchmark with its own accuracy;
    SEM = their sample standard deviation (ddof 1) / √k. None for k = 1.
    """
    k = correct.shape[1]
    runs = correct.mean(axis=0)
    return float(runs.mean()), float(runs.std(ddof=1) / math.sqrt(k)) if k > 1 else None


def pass_at_k(correct: np.ndarray, k: int) -> float:
    """Probability that k of a problem's n samples, drawn without replacement, hold a correct one: the mean.

    1 - C(n - c, k) / C(n, k) for c correct of n (Chen et al. 2021, Eq. 1). correct: (problems, n), k <= n.
    """
    n = correct.shape[1]
    assert 1 <= k <= n
    return float(np.mean([1 - math.comb(n - c, k) / math.comb(n, k) for c in correct.sum(axis=1).tolist()]))


def json_line(row: dict) -> str:
    """One line of JSON in readable UTF-8. A lone surrogate, which UTF-8 cannot hold, stays a \\u escape."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def append_row(path: str | Path, row: dict) -> None:
    """Add one line to a JSONL file: the whole line, or (disk full: OSError naming it) nothing of it."""
    line = json_line(row).encode()
    with naming(path), open(path, "ab", buffering=0) as file:
        end = file.tell()
        if file.write(line) < len(line):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def drop_partial_line(path: str | Path) -> None:
    """Cut what a killed process left after the last line end of a JSONL file, if there is that file."""
    if not Path(path).exists():
        return
    with open(path, "rb+") as file:
        end = start = file.seek(0, os.SEEK_END)
        while start > 0:
            start = max(0, start - 65536)
            file.seek(start)
            newline = file.read(min(65536, end - start)).rfind(b"\n")
            if newline >= 0:
                start += newline + 1
                break
        if start < end:
            file.truncate(start)


class MetricsLog:
    """metrics.jsonl: one line a step, no gap and no repeat. For one process to write."""

    def __init__(self, path: Path, steps_done: int):
        """Keep the lines of the first steps_done steps; drop what an interrupted run logged after its
        checkpoint. Raises ValueError naming file and line where the steps do not rise."""
        self.path, self.waiting = path, []
        drop_partial_line(path)
        kept, last = [], 0
        for line, row in read_jsonl(path) if path.exists() else ():
            step = row.get("step")
            if type(step) is not int or step <= last:
                raise ValueError(f"{path}, line {line}: step {step!r} after step {last}; mend the file, or move it "
                                 "away to go on without its lines")
            last = step
            if step <= steps_done:
                kept.append(row)
        if len(kept) < steps_done:
            print(f"{path} lacks the lines of {steps_done - len(kept)} of the {steps_done} steps done")
        with write_atomically(path) as file:
            file.writelines(map(json_line, kept))

    def write(self, metrics: dict) -> None:
        """Append a line. One that cannot be written (a full disk) is said once, kept, and tried again with
        the next."""
        self.waiting.append(metrics)
        try:
            while self.waiting:
                append_row(self.path, self.waiting[0])
                self.waiting.pop(0)
        except OSError as error:
            if len(self.waiting) == 1:
                print(f"{self.path} cannot be written ({error}); its lines are kept and tried again at each step")

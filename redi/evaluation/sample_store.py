"""Evaluation's store of samples: appended as they finish, merged, never redone; and samples that were made elsewhere.

A store is a folder for one model on one benchmark. settings.json says all that its samples depend on besides their
problems; samples.jsonl has a line a sample. Rank 0 appends to samples.jsonl, rank N to samples.rank-N.jsonl. Rank 0
takes over the other files when all are done or, after an interruption, when the next run starts.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from redi import answer_checker
from redi.files import (
    append_row,
    drop_partial_line,
    error_context,
    file_digest,
    json_line,
    read_json,
    read_jsonl,
    write_atomically,
    write_json,
)
from redi.problems import Benchmark, judge

Key = tuple[str, int]  # id of the problem, number of the sample from 0
TYPES = {
    "id": (str,), "sample": (int,), "response": (str,), "finish_reason": (str, type(None)),
    "tokens": (int, type(None)), "answer": (str, type(None)), "correct": (bool,),
}  # fmt: skip


def scored(row: dict, benchmark: Benchmark) -> dict:
    """A sample with its verdict: `answer`, the content of the last box or None, and `correct`."""
    answer, correct = judge(row["response"], benchmark.answers[row["id"]])
    return {**row, "answer": answer, "correct": correct}


def checker_version() -> str:
    return f"{answer_checker.VERSION} ({file_digest(answer_checker.__file__)[:16]})"


def in_order(samples: dict[Key, dict], benchmark: Benchmark) -> dict[Key, dict]:
    """By the place of the problem in the benchmark's file, then by number."""
    place = {id: i for i, id in enumerate(benchmark.answers)}
    return dict(sorted(samples.items(), key=lambda item: (place[item[0][0]], item[0][1])))


class SampleStore:
    def __init__(self, folder: Path, settings: dict, benchmark: Benchmark):
        """`settings`: what a sample depends on. Samples of other settings never mix with these.

        Writes nothing. Raises ValueError where the folder holds samples of other settings.
        """
        self.folder, self.settings, self.benchmark = folder, settings, benchmark
        self._check_settings()

    def _check_settings(self) -> dict | None:
        """What settings.json says; None for a new folder."""
        path = self.folder / "settings.json"
        if not path.is_file():
            if any(self.folder.glob("samples*.jsonl")):
                raise ValueError(f"{self.folder}: holds samples but no settings.json; choose another --output")
            return None
        found = read_json(path)
        for key, value in self.settings.items():
            if found.get(key) != value:
                raise ValueError(f"{self.folder}: holds samples made with {key} {found.get(key)!r}, now asked for "
                                 f"{value!r}; choose another --output or remove that folder")
        return found

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder, keep other runs out of it, tidy up what a killed run has left, and write settings.json. For
        rank 0."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder):
            found, settings = self._check_settings(), {**self.settings, "checker": checker_version()}
            for leftover in self.folder.glob("*.partial-*"):
                leftover.unlink()
            if found != settings:
                write_json(self.folder / "settings.json", settings)
            yield

    def done(self) -> set[Key]:
        """Which samples need not be drawn any more. After a `merge`, for every rank."""
        return {key for key, _ in self._read(self._file(0))}

    def append(self, row: dict, rank: int) -> None:
        """Add a finished, scored sample: the whole line or (disk full: OSError) nothing of it."""
        append_row(self._file(rank), row)

    def merge(self, rescore: bool = False) -> dict[Key, dict]:
        """Bring all ranks' samples into samples.jsonl, in the order of the problems, and return them. For rank 0.

        rescore: give each its verdict anew (milliseconds, at most): the checker, or the file, may have changed.
        Killed at any moment it loses nothing: the other files go only after their rows are in place, and a row met
        twice counts once. Raises ValueError where two rows of one sample differ.
        """
        others = sorted(self.folder.glob("samples.rank-*.jsonl"))
        samples, rows_read, changed = {}, 0, False
        for path in [self._file(0), *others]:
            drop_partial_line(path)
            for key, row in self._read(path):
                rows_read += 1
                known = samples.setdefault(key, scored(row, self.benchmark) if rescore else row)
                changed |= known != row
                if known["response"] != row["response"]:
                    raise ValueError(f"{path}: sample {key[1]} of id {key[0]!r} is there twice, with two responses")
        ordered = in_order(samples, self.benchmark)
        if changed or others or list(ordered) != list(samples) or rows_read > len(samples):
            self.replace(ordered)
        for path in others:
            path.unlink()
        return ordered

    def replace(self, samples: dict[Key, dict]) -> None:
        """Let samples.jsonl hold these, or stay as it was."""
        with write_atomically(self._file(0)) as file:
            file.writelines(map(json_line, samples.values()))

    def _file(self, rank: int) -> Path:
        return self.folder / (f"samples.rank-{rank}.jsonl" if rank else "samples.jsonl")

    def _read(self, path: Path) -> Iterator[tuple[Key, dict]]:
        for line, row in read_jsonl(path) if path.exists() else ():
            with error_context(f"{path}, line {line}"):
                for key, types in TYPES.items():
                    if key not in row or type(row[key]) not in types:
                        raise ValueError(f"{key!r} is {str(row.get(key))[:80]!r}; the line is damaged")
                if row["id"] not in self.benchmark.answers:
                    raise ValueError(f"id {row['id'][:80]!r} is not among the problems")
            yield (row["id"], row["sample"]), row


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder. Raises ValueError when one is still there after some seconds (the processes of
    a killed torchrun need a moment to notice)."""
    handle, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + 10
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(f"{folder}: another evaluation is writing here") from None
                time.sleep(0.2)
            except OSError:  # a file system without locks: two runs at a time are up to the user
                break
        yield
    finally:
        os.close(handle)


def read_responses(path: str | Path, benchmarks: list[Benchmark]) -> list[dict[Key, dict]]:
    """Samples made elsewhere, for each of the benchmarks, not scored yet.

    A row holds `id` and `response` (a text, or a list of them), or `outputs` as vLLM writes them. What it does not
    say of `finish_reason` and `tokens` is None; `sample` counts up. Raises ValueError naming file and line.
    """
    owners = {}  # problem id -> index of its benchmark
    for i, benchmark in enumerate(benchmarks):
        for id in benchmark.answers:
            if owners.setdefault(id, i) != i:
                names = f"{benchmarks[owners[id]].name} and {benchmark.name}"
                raise ValueError(f"problem id {id!r} stands in both {names}; score them apart")
    samples = [{} for _ in benchmarks]
    for line, row in read_jsonl(path):
        id = str(row.get("id"))
        with error_context(f"{path}, line {line}"):
            if id not in owners:
                raise ValueError(f"id {row.get('id')!r} is not among the problems")
            found = samples[owners[id]]
            for output in _outputs(row):
                if output["sample"] is None:
                    output["sample"] = next(i for i in range(len(found) + 1) if (id, i) not in found)
                key = id, output["sample"]
                if key in found:
                    raise ValueError(f"sample {key[1]} of id {id!r} is there twice")
                found[key] = {"id": id, **output}
    return [in_order(found, benchmark) for found, benchmark in zip(samples, benchmarks)]


def _outputs(row: dict) -> Iterator[dict]:
    """The responses in one row."""
    responses = next((row[key] for key in ("response", "responses", "outputs") if key in row), None)
    for output in responses if isinstance(responses, list) else [row | {"text": responses}]:
        fields = output if isinstance(output, dict) else {"text": output}
        sample, text, reason = (fields.get(key) for key in ("sample", "text", "finish_reason"))
        token_ids = fields.get("token_ids")
        if not isinstance(text, str):
            raise ValueError("expected 'response' (a text, or a list of them) or vLLM's 'outputs'")
        if sample is not None and not (type(sample) is int and sample >= 0):
            raise ValueError(f"'sample' is {str(sample)[:80]!r}; expected a whole number from 0 up")
        tokens = len(token_ids) if isinstance(token_ids, list) else fields.get("tokens")
        yield {
            "sample": sample,
            "response": text,
            "finish_reason": reason if isinstance(reason, str) else None,
            "tokens": tokens if type(tokens) is int else None,
        }

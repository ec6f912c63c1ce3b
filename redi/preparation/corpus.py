"""Reading teacher traces: parquet or JSONL, local or from the hub, one row per problem; worker processes. No torch."""

import collections
import contextlib
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from redi.cli import SIGNALS, end_with_parent, handle_signals
from redi.evaluation.sample_store import sample_id, sample_outputs
from redi.files import error_context, file_digest, read_jsonl, resolve_directory
from redi.problems import Benchmark, gold_answers

# Of a parquet file, only these are read.
COLUMNS = (
    "id", "uuid", "unique_id", "problem", "question", "answer", "final_answer", "source", "problem_is_valid",
    "generations", "generation", "response", "finish_reason", "finish_reasons", "correctness", "correctness_llama",
    "correctness_math_verify",
)
# Names of splits in file names.
SPLIT = re.compile(r"(?<![a-z])(train|training|test|testing|validation|valid|val|dev|eval|evaluation)(?![a-z])")
CHUNK_ROWS, CHUNK_CHARACTERS = 16, 1 << 18  # a fraction of a second: an interrupted run finishes those in flight


def input_files(path_or_hub_id: str) -> dict[str, Path]:
    """The files of --input by name: a file, or what `training_files` selects from a directory or a dataset on the hub;
    prints which files of it are not read. Raises ValueError."""
    path = Path(path_or_hub_id)
    if path.exists() and not path.is_dir():
        if path.suffix not in (".parquet", ".jsonl"):
            raise ValueError(f"{path}: expected a .parquet or .jsonl file")
        return {str(path): path}
    files, others = find_files(path, training_files)
    if not files:
        raise ValueError(f"{path}: no .parquet or .jsonl file in it (found {', '.join(others[:5]) or 'no files'})")
    if others := [name for name in others if not name.endswith(".md")]:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        print(f"{path}: reads {', '.join(files)}; passes over {', '.join(others[:5])}{more}", file=sys.stderr)
    return files


def training_files(names: list[str]) -> list[str]:
    """Selects from the files of a dataset, by their names in it: parquet files, else JSONL files, of the default
    configuration (in data/) if there are several; of them the train split, else those that name no split, else all."""
    for folder, suffix in itertools.product(("data/", ""), (".parquet", ".jsonl")):
        found = [name for name in names if name.startswith(folder) and name.endswith(suffix)]
        splits = [SPLIT.findall(name.lower())[-1:] for name in found]
        train = [name for name, split in zip(found, splits) if split and split[0].startswith("train")]
        if found:
            return train or [name for name, split in zip(found, splits) if not split] or found
    return []


def find_files(
    path_or_hub_id: str | Path, select: Callable[[list[str]], list[str]]
) -> tuple[dict[str, Path], list[str]]:
    """Files of a directory, or of a dataset on the hub (others are not downloaded), by name: path_or_hub_id/path in it,
    sorted; and the paths of the others. `select` takes all paths and returns those wanted. Raises ValueError."""
    names, patterns = [], ["*.parquet", "*.jsonl"]
    if not Path(path_or_hub_id).exists():
        from huggingface_hub import HfApi  # takes 0.2 s to import: only where a hub id is given

        # Offline the cache may have the dataset; else resolve_directory raises.
        with contextlib.suppress(OSError, ValueError):
            names = sorted(file.rfilename for file in HfApi().dataset_info(str(path_or_hub_id)).siblings)
            patterns = select(names)
    parquet = [name for name in patterns if name.endswith(".parquet")]
    if names and parquet and importlib.util.find_spec("pyarrow") is None:  # before gigabytes are downloaded
        raise _lacks_pyarrow(f"{path_or_hub_id}/{parquet[0]}")
    directory = resolve_directory(path_or_hub_id, patterns, "dataset")
    local = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())
    selected = select(local)
    others = [name for name in names or local if name not in selected and not name.startswith(".")]
    return {str(Path(path_or_hub_id, name)): directory / name for name in selected}, others


def _lacks_pyarrow(name: str | Path) -> ValueError:
    return ValueError(f"{name}: reading parquet needs pyarrow (pip install pyarrow)")


def digests(files: dict[str, Path]) -> dict[str, str | None]:
    """SHA-256 of files by name; None for a pipe, which can be read only once."""
    return {name: file_digest(path) if path.is_file() else None for name, path in files.items()}


def count_rows(files: Iterable[Path]) -> int | None:
    """The number of rows where it is known beforehand (parquet). Opens every parquet file, so that a corrupt shard is
    found first. Raises ValueError naming it."""
    total = 0
    for file in files:
        if file.suffix == ".parquet":
            with _open_parquet(file) as parquet:
                total += parquet.metadata.num_rows
                if not parquet.metadata.num_rows:
                    raise ValueError(f"{file}: no rows")
    return total or None


def read_rows(files: Iterable[Path]) -> Iterator[tuple[str, dict]]:
    """(place, row) of every row; a place is "FILE, row N" or "FILE, line N". Raises ValueError naming it."""
    for file in files:
        rows = 0
        if file.suffix == ".parquet":
            for rows, row in enumerate(_read_parquet(file), start=1):
                yield f"{file}, row {rows}", row
        else:
            for rows, (number, row) in enumerate(read_jsonl(file), start=1):
                yield f"{file}, line {number}", row
        if not rows:
            raise ValueError(f"{file}: no rows")


def _open_parquet(file: Path):
    try:
        import pyarrow  # optional, and here alone
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise _lacks_pyarrow(file) from None
    try:
        return pyarrow.parquet.ParquetFile(file, pre_buffer=False)  # which would hold entire row groups in memory
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: truncated or corrupt parquet file ({_one_line(error)})") from None


def _read_parquet(file: Path) -> Iterator[dict]:
    """Rows with those of COLUMNS that the file has, a few at a time."""
    with _open_parquet(file) as parquet:
        import pyarrow

        found = parquet.schema_arrow.names
        columns = [name for name in found if name in COLUMNS]
        if not columns:
            raise ValueError(f"{file}: no known column (found {', '.join(found)})")
        try:
            for batch in parquet.iter_batches(batch_size=CHUNK_ROWS, columns=columns):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: corrupt, or text that is not UTF-8 ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def one_row_per_problem(rows: Iterable[tuple[str, dict]], path: Path) -> Iterator[tuple[str, dict]]:
    """Group rows of one generation each by problem and answer, in the order in which the problems first appear, with
    lists `generations` and `finish_reasons`. Rows with `generations` pass unchanged. The rows are stored in a file at
    `path`, not in memory.

    Raises ValueError naming the place of a row that lacks a column.
    """
    rows = iter(rows)
    first = next(rows)
    rows = itertools.chain([first], rows)
    column = next((name for name in ("generation", "response") if first[1].get(name) is not None), None)
    if first[1].get("generations") is not None or column is None:
        yield from rows
        return
    database = sqlite3.connect(path, isolation_level=None)
    try:
        database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
                               "CREATE TABLE rows (number INTEGER PRIMARY KEY, problem, place, row);")
        database.execute("BEGIN")
        for place, row in rows:
            with error_context(place):
                require(row, "problem", "answer", column)
                problem = digest(json.dumps([row["problem"], gold_answers(row["answer"])]))  # "4" and 4 are one
            row = json.dumps({name: value for name, value in row.items() if name in COLUMNS})
            database.execute("INSERT INTO rows (problem, place, row) VALUES (?, ?, ?)", (problem, place, row))
        database.execute("CREATE INDEX by_problem ON rows (problem, number)")
        database.execute("COMMIT")
        for problem, _ in database.execute("SELECT problem, MIN(number) FROM rows GROUP BY problem ORDER BY 2"):
            same = database.execute("SELECT place, row FROM rows WHERE problem = ? ORDER BY number", [problem])
            places, members = zip(*((place, json.loads(row)) for place, row in same))
            lists = {"generations": column, "finish_reasons": "finish_reason"}
            yield places[0], {**members[0], **{key: [row.get(name) for row in members] for key, name in lists.items()}}
    except sqlite3.Error as error:
        raise ValueError(f"{path}: {error}") from None
    finally:
        database.close()
        path.unlink(missing_ok=True)


def with_problems(rows: Iterable[tuple[str, dict]], benchmark: Benchmark) -> Iterator[tuple[str, dict]]:
    """Join samples as evaluate.py writes and scores them (id, response, finish_reason) with the problem and the gold
    answers of their id, one row for each generation. Raises ValueError naming the place of an invalid row."""
    for place, row in rows:
        with error_context(place):
            id = sample_id(row)
            if id not in benchmark.problems:
                raise ValueError(f"id {id!r} is not among the problems of {benchmark.name}")
            outputs = list(sample_outputs(row))
        problem = {"id": id, "problem": benchmark.problems[id], "answer": benchmark.answers[id]}
        for output in outputs:
            sample = {"response": output["response"], "finish_reason": output["finish_reason"]}
            yield place, {**problem, **sample, "source": row.get("source")}


def in_chunks(rows: Iterable[tuple[str, dict]]) -> Iterator[list[tuple[str, dict]]]:
    """Lists of rows, bounded in number and in text, so that memory depends on neither the corpus nor the lengths."""
    chunk, characters = [], 0
    for place, row in rows:
        generations = row.get("generations")
        chunk.append((place, row))
        if isinstance(generations, list):
            characters += sum(len(text) for text in generations if isinstance(text, str))
        if len(chunk) == CHUNK_ROWS or characters > CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def in_parallel(function: Callable, chunks: Iterable, processes: int) -> Iterator:
    """Yield function(chunk) for each chunk, in order, computed by worker processes. A single chunk, or one process,
    needs no worker. At most 2 * processes chunks are in flight. `function` must be picklable.

    Raises the exception of the first chunk that fails, and ValueError where a worker process dies.
    """
    chunks = iter(chunks)
    first = list(itertools.islice(chunks, processes))
    chunks = itertools.chain(first, chunks)
    if len(first) < 2:
        yield from map(function, chunks)
        return
    pending = collections.deque()
    with contextlib.ExitStack() as stack:
        with _signals_blocked():
            pool = ProcessPoolExecutor(len(first), multiprocessing.get_context("spawn"), initializer=_start_worker)
            stack.callback(_shut_down, pool)
        try:
            for chunk in chunks:
                if len(pending) == 2 * processes:
                    yield pending.popleft().result()
                with _signals_blocked():  # this may start a worker
                    pending.append(pool.submit(function, chunk))
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            for worker in multiprocessing.active_children():  # the pool sends SIGTERM, which they block
                worker.kill()
            raise ValueError("a worker process died (killed, or out of memory); nothing was written") from None


def _start_worker() -> None:
    end_with_parent()
    if not multiprocessing.parent_process().is_alive():  # it was killed while this process started
        os._exit(1)


def _shut_down(pool: ProcessPoolExecutor) -> None:
    """Wait for the chunks in flight. Interrupted, it would leave semaphores behind, which Python reports."""
    with _signals_blocked():
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Signals wait for the end of the block. A worker that starts in it inherits the signal mask: a signal that goes to
    all processes (Ctrl-C in a terminal, the end of a batch job) is the parent's to handle. The mask alone does not keep
    one from the parent, as a thread of a library, pyarrow's for one, may receive it."""
    received = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        with handle_signals(received.append):
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number in received:
            signal.raise_signal(number)


def require(row: dict, *names: str) -> None:
    """Raises ValueError where a column is missing."""
    for name in names:
        if name not in row:
            raise ValueError(f"no column '{name}' (found {', '.join(row) or 'none'})")


def row_id(row: dict) -> str:
    """The row's own id, else a digest of its problem."""
    own = next((row[name] for name in ("id", "uuid", "unique_id") if row.get(name) not in (None, "")), None)
    return str(own) if own is not None else digest(row["problem"])


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()

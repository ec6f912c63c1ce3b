"""Files in and out: JSONL, JSON objects, atomic writes, digests, cached arrays, hub downloads. Imports no torch."""

import ast
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

MAX_LINE_BYTES = 64 * 2**20
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, object) of each non-blank line.

    Raises ValueError naming file and line for invalid UTF-8, malformed JSON, anything but an object, and
    lines over 64 MiB (which are not read whole).
    """
    with open_to_read(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"{path}, line {number}: longer than {MAX_LINE_BYTES >> 20} MiB")
            if line.strip():
                with error_context(f"{path}, line {number}"):
                    row = _json_object(line)
                yield number, row


def read_json(path: str | Path) -> dict:
    """The object in a JSON file. Raises ValueError naming the file where it is absent, malformed, or no object."""
    with open_to_read(path) as file, error_context(str(path)):
        return _json_object(file.read())


def open_to_read(path: str | Path):
    """A binary file. Raises ValueError naming one that cannot be read."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _json_object(content: bytes) -> dict:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:  # not UTF-8, malformed, a number of thousands of digits
        raise ValueError(f"not valid JSON in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


def json_line(row: dict, errors: str = "backslashreplace") -> bytes:
    """One line of JSON in readable UTF-8. A lone surrogate, which UTF-8 cannot hold, stays a \\u escape;
    with errors="strict" it raises UnicodeEncodeError, a ValueError."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", errors)


def append_row(path: str | Path, row: dict) -> None:
    """Add one line to a JSONL file: the whole line, or (disk full: OSError naming it) nothing of it."""
    line = json_line(row)
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


@contextlib.contextmanager
def error_context(place: str):
    """Say where: the words of a ValueError raised in the block begin with the place ("FILE, line 3")."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


@contextlib.contextmanager
def naming(path: str | Path):
    """Put the path into an OSError that lacks it, as one of a write or fsync does."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: str | Path):
    """Yields the name to write under: the file takes its own name, whole, when the block ends well, or not at all."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def write_atomically(path: str | Path):
    """A binary file that appears under its name whole and on disk, when the block ends well, or not at all."""
    with replacing(path) as partial, naming(path), open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def new_directory(output: str | Path, overwrite: bool, names: Collection[str]) -> Iterator[Path]:
    """A hidden directory beside `output` that takes its name, whole and on disk, when the block ends well, and else
    is removed.

    names: the files that the block writes, which `overwrite` may replace. Raises ValueError where output holds
    something else, or another run is writing it.
    """
    output = Path(output).absolute()
    partial, replaced = (output.with_name(f".{output.name}.{state}") for state in ("partial", "replaced"))
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"another run is writing {output}") from None
    try:
        if replaced.exists() and not output.exists():  # a run was killed between its two renames
            replaced.rename(output)
        present = _replaceable_files(output, overwrite, names)
        for leftover in partial.iterdir():  # of a run that was killed
            leftover.unlink()
        with naming(output):
            yield partial
        for path in (*partial.iterdir(), partial):
            fsync(path)
        if present:
            shutil.rmtree(replaced, ignore_errors=True)
            output.rename(replaced)
        partial.rename(output)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        raise
    finally:
        os.close(lock)


def _replaceable_files(output: Path, overwrite: bool, names: Collection[str]) -> list[str]:
    """The files in output. Raises ValueError where they may not be replaced by those of these names."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: expected a directory, found a file")
    present = sorted(path.name for path in output.iterdir()) if output.exists() else []
    if present and not overwrite:
        raise ValueError(f"{output} already holds {present[0]}: choose another --output, or --overwrite it")
    if foreign := [name for name in present if name not in names]:
        raise ValueError(f"{output} holds {foreign[0]}, which is not this command's: choose another --output")
    return present


def write_json(path: str | Path, value: dict) -> None:
    with write_atomically(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def saving_safetensors(path: str | Path):
    """Around a call of safetensors' save_file: a full disk is an OSError, the file has the permissions that the
    umask gives (save_file's own are 0600, which another user's inference server cannot read) and is on disk."""
    path = Path(path)
    path.touch()
    permissions = path.stat().st_mode
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    path.chmod(permissions)
    fsync(path)


def fsync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises ValueError naming a file that cannot be read."""
    with open_to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """The first 16 hexadecimal digits of a text's SHA-256: enough to name a cache file by."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_digest(*sources: str | Path | ModuleType) -> str:
    """A digest of Python files, given as paths or imported modules: of their syntax trees without docstrings, so
    that comments, docstrings and layout do not count. For what is kept on disk, keyed by the code that made it."""
    texts = []
    for source in sources:
        path = Path(source.__file__ if isinstance(source, ModuleType) else source)
        with open_to_read(path) as file:
            tree = ast.parse(file.read(), str(path))
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                node.body[:1] = []
        texts.append(f"{path.name}\n{ast.unparse(tree)}")
    return text_digest("\n".join(texts))


def resolve_directory(path_or_hub_id: str | Path, patterns: list[str], repo_type: str = "model") -> Path:
    """A local directory as it is; otherwise a Hugging Face hub id, of which the files that match `patterns`
    (globs) are downloaded into the hub's cache.

    Raises ValueError when there is no such directory, and no such repository or no way to the hub.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path}: expected a directory, found a file")
    from huggingface_hub import snapshot_download  # takes 0.2 s to import: only where a hub id is given

    try:
        return Path(snapshot_download(str(path_or_hub_id), repo_type=repo_type, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # every error of huggingface_hub is one of the two
        reason = " ".join(str(error).split())
        raise ValueError(f"{path_or_hub_id}: no such directory, and the Hugging Face hub gave no {repo_type} "
                         f"of that name ({type(error).__name__}: {reason[:300]})") from None


def cache_path(data: Path, kind: str, fallback: Path, *depends_on) -> Path:
    """DATA.kind-DIGEST.safetensors beside the data, for other runs to use; in the directory `fallback` where
    that cannot be written. `depends_on`: everything that decides the content, as what str() can tell apart."""
    directory = data.parent
    if not os.access(directory, os.W_OK):
        fallback.mkdir(parents=True, exist_ok=True)
        directory = fallback
    return directory / f"{data.name}.{kind}-{text_digest(repr(depends_on))}.safetensors"


def save_arrays(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, with a checksum in it, that appears whole or not at all. Raises OSError."""
    metadata = metadata or {}
    with replacing(path) as partial, saving_safetensors(partial):
        save_file(arrays, partial, metadata={**metadata, "sha256": _checksum(arrays, metadata)})


def load_arrays(path: Path, mapped: tuple[str, ...] = ()) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, metadata) of save_arrays. Those named in `mapped` are memory-mapped, not read: all processes of a
    machine share their pages. Raises ValueError naming a file that is damaged or cannot be read."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
            arrays = {key: file.get_tensor(key) for key in file.keys() if key not in mapped}
        arrays |= {key: _memory_map(path, key) for key in mapped}
        if metadata.pop("sha256", None) != _checksum(arrays, metadata):
            raise ValueError("its checksum is another")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and it is made again") from None
    return arrays, metadata


def _memory_map(path: Path, key: str) -> np.ndarray:
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))[key]
    assert header["dtype"] == "I32"
    start, stop = header["data_offsets"]
    if start == stop:  # nothing can be mapped
        return np.empty(0, np.int32)
    return np.memmap(path, np.int32, "r", 8 + header_bytes + start, tuple(header["shape"]))


def _checksum(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for key, array in sorted(arrays.items()):
        digest.update(f"{key} {array.dtype} {array.shape}".encode() + b"\0")
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()

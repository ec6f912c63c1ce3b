"""JSONL, JSON, atomic writes, locks, digests, cached arrays, hub downloads. Does not import torch."""

import ast
import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import socket
import time
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

MAX_LINE_BYTES = 64 * 2**20
LOCK = ".lock"  # in a directory that one process at a time writes
_locks: dict[Path, int] = {}  # lock file -> the open file that holds the lock
# First bytes of a file that is not JSONL -> what it is, and what converts it.
OTHER_FORMATS = {
    b"[": ("a JSON array", "jq -c '.[]'"),
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"BZh": ("bzip2", "bunzip2"),
    b"PK\x03\x04": ("a zip archive", "unzip"),
    b"PAR1": ("parquet", "datasets.Dataset.from_parquet(FILE).to_json(FILE)"),
    b"\xff\xfe": ("UTF-16", "iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("UTF-16", "iconv -f UTF-16 -t UTF-8"),
    b"{\0": ("UTF-16", "iconv -f UTF-16LE -t UTF-8"),
    b"\0{": ("UTF-16", "iconv -f UTF-16BE -t UTF-8"),
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, object) of each non-blank line.

    Raises ValueError naming file and line for invalid UTF-8, malformed JSON, anything but an object, and
    lines over 64 MiB.
    """
    with open_to_read(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1 and (other := [OTHER_FORMATS[start] for start in OTHER_FORMATS if line.startswith(start)]):
                raise ValueError(f"{path}: expected JSONL, found {other[0][0]}; convert it with {other[0][1]}")
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"{path}, line {number}: longer than {MAX_LINE_BYTES >> 20} MiB")
            if line.strip():
                with error_context(f"{path}, line {number}"):
                    row = _json_object(line)
                yield number, row


def read_json(path: str | Path) -> dict:
    """The object in a JSON file. Raises ValueError naming a file that is absent, malformed, or not an object."""
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
    """Append one line to a JSONL file: all of it or, if the disk is full (OSError naming the file), nothing."""
    line = json_line(row)
    with naming(path), open(path, "ab", buffering=0) as file:
        end = file.tell()
        if file.write(line) < len(line):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def drop_partial_line(path: str | Path) -> None:
    """Truncate a JSONL file, if it exists, after its last line end: a killed process may have left part of a line."""
    if not Path(path).exists():
        return
    with open(path, "rb+") as file:
        if size := file.seek(0, os.SEEK_END):
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                end = content.rfind(b"\n") + 1
            if end < size:
                file.truncate(end)


@contextlib.contextmanager
def error_context(place: str):
    """Prefix the message of a ValueError raised in the block with the place ("FILE, line 3")."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


@contextlib.contextmanager
def naming(path: str | Path):
    """Add the path to an OSError without one, such as that of a write or fsync."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: str | Path):
    """Yields a temporary name to write to. The file is renamed to `path` when the block ends well, else removed."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def write_atomically(path: str | Path):
    """A binary file that appears under its name, complete and on disk, when the block ends well, or not at all."""
    with replacing(path) as partial, naming(path), open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def new_directory(output: str | Path, overwrite: bool, names: Collection[str]) -> Iterator[Path]:
    """A directory beside `output` to write into, renamed to `output` when the block ends well and removed otherwise.

    names: the files that the block writes, which `overwrite` may replace. Raises ValueError where output holds
    anything else.
    """
    output = Path(output).resolve()  # of a link, what it points to
    _check_replaceable(output, overwrite, names)
    for leftover in output.parent.glob(f"{output.name}.partial-*"):  # of a run that was killed
        remove(leftover)
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    make_directory(partial)
    try:
        with naming(output):
            yield partial
        for path in (*partial.iterdir(), partial):
            fsync(path)
        _check_replaceable(output, overwrite, names)
        replace_directory(partial, output)
    finally:
        remove(partial)


def _check_replaceable(output: Path, overwrite: bool, names: Collection[str]) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: expected a directory, found a file")
    present = sorted(path.name for path in output.iterdir()) if output.exists() else []
    if present and not overwrite:
        raise ValueError(f"{output} already holds {present[0]}: choose another --output, or --overwrite it")
    if foreign := [name for name in present if name not in names]:
        raise ValueError(f"{output} holds {foreign[0]}, which this command did not write: choose another --output")


def replace_directory(new: Path, path: Path) -> None:
    """Rename `new` to `path`. A directory of that name is moved aside first, and removed last."""
    old = path.with_name(f"{path.name}.replaced")
    remove(old)
    try:
        if os.path.lexists(path):
            path.rename(old)
        new.rename(path)
    except BaseException:
        if os.path.lexists(old) and not path.exists():
            old.rename(path)
        raise
    fsync(path.parent)
    remove(old)


def make_directory(path: Path) -> None:
    """Raises ValueError where a file, or a link to nothing, has that name."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to {os.readlink(path)}, which does not exist")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: expected a directory, found a file")
    path.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """Delete a directory with its content, a file, or a link (not what it points to), if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def lock_directory(directory: Path) -> str:
    """Keep other processes out of a directory until this one ends, when the kernel releases the lock. Returns the
    content of the lock file, which no other process has written. Calling again changes nothing.

    Raises ValueError naming process id and host of an owner that stays for ten seconds; the workers of a killed
    torchrun take a moment to end.
    """
    path = directory.absolute() / LOCK
    if path in _locks and path.exists():
        return path.read_text()
    handle, deadline = os.open(path, os.O_RDWR | os.O_CREAT, 0o644), time.monotonic() + 10
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(handle)
                raise ValueError(f"{directory} is in use by {path.read_text() or 'another process'}") from None
            time.sleep(0.2)
        except OSError:  # a file system without locks: two runs at a time are up to the user
            break
    _locks[path] = handle
    with naming(path):
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()} ({uuid.uuid4()})".encode(), 0)
    return path.read_text()


def write_json(path: str | Path, value: dict) -> None:
    with write_atomically(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def saving_safetensors(path: str | Path):
    """Around safetensors' save_file: a full disk is an OSError, and the file is on disk with the permissions of the
    umask (save_file's own are 0600, which another user's inference server cannot read)."""
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
    """A local directory, or the cached download of a Hugging Face hub id: of its files that match `patterns` (globs).

    Raises ValueError where there is no such directory, and no such repository or no connection to the hub.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path}: expected a directory, found a file")
    from huggingface_hub import snapshot_download  # imported here, as it takes 0.2 s

    try:
        return Path(snapshot_download(str(path_or_hub_id), repo_type=repo_type, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # every error of huggingface_hub is one of the two
        reason = " ".join(str(error).split())
        raise ValueError(f"{path_or_hub_id}: no such directory, and the Hugging Face hub gave no {repo_type} "
                         f"of that name ({type(error).__name__}: {reason[:300]})") from None


def cache_path(data: Path, kind: str, fallback: Path, *depends_on) -> Path:
    """DATA.kind-DIGEST.safetensors beside the data, to be shared by runs, or in the directory `fallback` if that is
    read-only. `depends_on`: everything that determines the content; compared by repr()."""
    directory = data.parent
    if not os.access(directory, os.W_OK):
        fallback.mkdir(parents=True, exist_ok=True)
        directory = fallback
    return directory / f"{data.name}.{kind}-{text_digest(repr(depends_on))}.safetensors"


def save_arrays(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Atomically write a safetensors file that includes a checksum. Raises OSError."""
    metadata = metadata or {}
    with replacing(path) as partial, saving_safetensors(partial):
        save_file(arrays, partial, metadata={**metadata, "sha256": _checksum(arrays, metadata)})


def load_arrays(path: Path, mapped: tuple[str, ...] = ()) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, metadata) of save_arrays. Arrays named in `mapped` are memory-mapped, so that the processes of a machine
    share their pages. Raises ValueError naming a file that is corrupt or cannot be read."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
            arrays = {key: file.get_tensor(key) for key in file.keys() if key not in mapped}
        arrays |= {key: _memory_map(path, key) for key in mapped}
        if metadata.pop("sha256", None) != _checksum(arrays, metadata):
            raise ValueError("checksum mismatch")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is corrupt ({error}): delete it, and it will be written again") from None
    return arrays, metadata


def _memory_map(path: Path, key: str) -> np.ndarray:
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))[key]
    assert header["dtype"] == "I32"
    start, stop = header["data_offsets"]
    if start == stop:  # mmap refuses empty arrays
        return np.empty(0, np.int32)
    return np.memmap(path, np.int32, "r", 8 + header_bytes + start, tuple(header["shape"]))


def _checksum(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for key, array in sorted(arrays.items()):
        digest.update(f"{key} {array.dtype} {array.shape}".encode() + b"\0")
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()

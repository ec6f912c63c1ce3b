"""Arrays that are computed once and kept on disk, under a name made of all that they depend on. No torch."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from redi.files import replacing, saving_safetensors, text_digest


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

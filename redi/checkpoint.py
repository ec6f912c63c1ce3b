"""Hugging Face model directories in and out, and training state that commits by one rename.

Nothing here is a pickle: weights and optimiser moments are safetensors, the rest is JSON. Sharded parameters
(FSDP) hold consecutive rows of dimension 0, so each rank reads and writes its own rows only.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from redi.distributed import gather, raise_together, rank, run_where, world_size
from redi.model import CausalLM, ModelConfig

SHARD_BYTES = 5 * 2**30
FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}
# Files beside the weights that a model directory needs to be usable elsewhere.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
    "vocab.json", "merges.txt", "added_tokens.json",
)


def load_config(directory: str | Path, **overrides) -> ModelConfig:
    """Read DIRECTORY/config.json; overrides (rope_theta, max_position_embeddings) replace its values.

    Raises ValueError naming the file and the key.
    """
    path = Path(directory) / "config.json"
    raw = _read_json(path)
    try:
        return ModelConfig.from_dict(raw, **overrides)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_pretrained(
    directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **overrides
) -> CausalLM:
    """A model directory as a whole model on one device, for inference or as a start. Overrides as in load_config.

    Raises ValueError naming the file and the tensor that is missing, unexpected, or of the wrong shape.
    """
    config = load_config(directory, **overrides)
    with torch.device("meta"):
        model = CausalLM(config).to(dtype)
    check_weights(model, directory)  # before any memory is taken
    model.to_empty(device=device)
    load_weights(model, directory)
    return model


def check_weights(model: CausalLM, directory: str | Path) -> None:
    """Compare names, shapes and dtypes in the weight files' headers with the model's parameters."""
    _weight_slices(model, Path(directory))


@torch.no_grad()
def load_weights(model: CausalLM, directory: str | Path) -> None:
    """Copy a directory's weights into the parameters, each rank its own rows, cast to the parameters' dtype."""
    weights = _weight_slices(model, Path(directory))
    for name, parameter in model.named_parameters():
        part, rows = local_rows(parameter)
        part.copy_(weights[name][rows.start : rows.stop])


def local_rows(parameter: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """This rank's part of a parameter, and which rows of the whole it is.

    FSDP2 shards dimension 0 as torch.chunk does: ceil(rows / ranks) rows each, the last ranks fewer or none.
    """
    part = local(parameter)
    if part is parameter:
        return part, slice(0, parameter.shape[0])
    mesh = parameter.device_mesh
    rows = chunk_rows(parameter.shape[0], mesh.get_local_rank(), mesh.size())
    assert rows.stop - rows.start == part.shape[0]
    return part, rows


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor: the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def chunk_rows(length: int, index: int, chunks: int) -> slice:
    size = -(-length // chunks)
    return slice(min(index * size, length), min((index + 1) * size, length))


def _weight_slices(model: CausalLM, directory: Path) -> dict:
    """Name -> lazily read safetensors slice, for exactly the parameters of the model."""
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if single.is_file():
        files = {single.name}
    elif index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index}: expected an object 'weight_map' from tensor names to file names")
        files = set(weight_map.values())
        for name in files:
            if Path(name).name != name or name in ("", "..") or not name.isprintable():
                raise ValueError(f"{index}: the file name {name!r} points outside the directory, or is none")
    else:
        raise ValueError(f"{directory} holds no weights (neither model.safetensors nor {index.name})")
    expected = dict(model.named_parameters())
    slices = {}
    for name in sorted(files):
        handle = _open_safetensors(directory / name)
        for key in handle.keys():
            if key.endswith("rotary_emb.inv_freq"):
                continue  # a buffer that old exporters wrote; computed from the config here
            if key == "lm_head.weight" and model.config.tie_word_embeddings:
                continue  # a copy of the embedding
            if key not in expected:
                raise ValueError(f"{directory / name}: unexpected tensor {key!r}, which the config has no place for")
            piece = handle.get_slice(key)
            shape, dtype = tuple(piece.get_shape()), piece.get_dtype()
            if shape != tuple(expected[key].shape):
                raise ValueError(
                    f"{directory / name}: {key!r} has shape {shape}, "
                    f"but config.json asks for {tuple(expected[key].shape)}"
                )
            if dtype not in FLOAT_DTYPES:
                raise ValueError(f"{directory / name}: {key!r} has dtype {dtype}; expected a float of 16 to 64 bits")
            slices[key] = piece
    missing = [name for name in expected if name not in slices]
    if missing:
        raise ValueError(f"{directory}: the weights lack {missing[0]!r} ({len(missing)} of {len(expected)} are missing)")
    return slices


@torch.no_grad()
def save_pretrained(
    model: CausalLM, directory: str | Path, tokenizer=None, dtype: torch.dtype | None = None
) -> None:
    """Write a directory that transformers, vLLM and load_pretrained read. All ranks call; rank 0 writes.

    Args:
        tokenizer: a redi.tokenizer.Tokenizer; its files are copied and its stop ids become the generation
            config's eos ids (vLLM takes stop ids from there).
        dtype: of the saved weights; None keeps the parameters'.
    Files above 5 GiB are split; whole tensors are gathered one at a time, so a rank holds one file's worth.
    Raises OSError on every rank where rank 0 cannot write.
    """
    directory = Path(directory)
    parameters = dict(model.named_parameters())
    dtype = dtype or next(iter(parameters.values())).dtype
    shards, size = [[]], 0
    for name, parameter in parameters.items():
        if size and size + parameter.numel() * dtype.itemsize > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += parameter.numel() * dtype.itemsize
    writer, failure, weight_map = rank() == 0, None, {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            full = parameters[name].full_tensor() if isinstance(parameters[name], DTensor) else parameters[name]
            if writer:
                tensors[name] = full.detach().to("cpu", dtype).contiguous()
            weight_map[name] = file
        if writer and failure is None:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                _save_safetensors(tensors, directory / file)
            except OSError as error:  # kept until the other ranks' gathers are served
                failure = error
    if writer and failure is None:
        try:
            for stale in directory.glob("model*.safetensors*"):  # of an earlier save with another number of files
                if stale.name not in weight_map.values():
                    stale.unlink()
            if len(shards) > 1:
                total = sum(p.numel() for p in parameters.values()) * dtype.itemsize
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                _write_json(directory / "model.safetensors.index.json", index)
            _write_json(directory / "config.json", model.config.to_dict(dtype))
            _write_json(directory / "generation_config.json", _copy_tokenizer(tokenizer, directory))
            _fsync(directory)
        except OSError as error:
            failure = error
    raise_together(failure)


def _copy_tokenizer(tokenizer, directory: Path) -> dict:
    """Copy the tokenizer's files; return the generation config that goes with them."""
    if tokenizer is None:
        return {}
    for name in TOKENIZER_FILES:
        source = tokenizer.directory / name
        if source.is_file() and source.parent.resolve() != directory.resolve():
            shutil.copyfile(source, directory / name)
            _fsync(directory / name)
    source = tokenizer.directory / "generation_config.json"
    return {**(_read_json(source) if source.is_file() else {}), "eos_token_id": list(tokenizer.stop_ids)}


# Training state. OUTPUT/step-000123/ is a model directory with a folder training_state/ in it:
# rank-00000-of-00002.safetensors (that rank's rows of every parameter and AdamW moment, its RNG state) and
# state.json (step, counters, file checksums). The step directory appears by one rename, after every byte of it
# is on disk; anything else is the leftover of an interrupted save.


def save_checkpoint(output: Path, model: CausalLM, optimizer, tokenizer, state: dict, dtype: torch.dtype) -> Path:
    """Write OUTPUT/step-NNNNNN for state["step"]. All ranks call. Returns the path.

    Raises OSError, on every rank alike, where any rank cannot write; no committed checkpoint is touched then.
    """
    def write(partial: Path) -> None:
        folder = partial / "training_state"
        path = folder / _rank_file(rank(), world_size())

        def write_rows() -> str:
            tensors = {"rng_state": torch.get_rng_state()}
            for name, parameter in model.named_parameters():
                tensors[f"model.{name}"] = local(parameter).detach().cpu().contiguous()
                for key in ("exp_avg", "exp_avg_sq"):
                    if parameter in optimizer.state:
                        tensors[f"{key}.{name}"] = local(optimizer.state[parameter][key]).cpu().contiguous()
            folder.mkdir(parents=True, exist_ok=True)
            _save_safetensors(tensors, path)
            return file_digest(path)

        digests = gather(run_where(True, write_rows))
        save_pretrained(model, partial, tokenizer, dtype)
        updates = [int(moments["step"].item()) for moments in optimizer.state.values()]
        whole_state = {
            **state,
            "updates": updates[0] if updates else 0,
            "world_size": world_size(),
            "sha256": {_rank_file(r, world_size()): digest for r, digest in enumerate(digests)},
        }
        whole_state["digest"] = _state_digest(whole_state)
        run_where(rank() == 0, lambda: _write_json(folder / "state.json", whole_state) or _fsync(folder))

    return _commit(output / step_name(state["step"]), write)


def save_final(output: Path, model: CausalLM, tokenizer, dtype: torch.dtype) -> Path:
    """Write the model directory OUTPUT/final. All ranks call. Raises OSError as save_checkpoint does."""
    return _commit(output / "final", lambda partial: save_pretrained(model, partial, tokenizer, dtype))


def _commit(path: Path, write) -> Path:
    """Let write(partial) fill a directory beside `path`; then rename it to `path`, once all of it is on disk."""
    partial = path.with_name(f"{path.name}.partial")
    writer = rank() == 0

    def begin():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def rename():
        _fsync(partial)
        if path.exists():
            shutil.rmtree(path)
        os.rename(partial, path)
        _fsync(path.parent)

    run_where(writer, begin)
    try:
        write(partial)
    except OSError as error:
        if writer:  # gives a full disk its space back
            shutil.rmtree(partial, ignore_errors=True)
        if error.errno and error.filename is None:  # of a write, which does not say what was written
            error.filename = str(path)
        raise
    run_where(writer, rename)
    return path


def load_checkpoint(path: Path, model: CausalLM, optimizer) -> dict:
    """Restore parameters, AdamW moments and RNG from a step directory, at any world size. Returns state.json.

    The optimiser's state is created where it is empty. Bitwise exact.
    """
    state = _read_json(path / "training_state" / "state.json")
    saved_ranks = state["world_size"]
    files = [_open_safetensors(path / "training_state" / _rank_file(r, saved_ranks)) for r in range(saved_ranks)]

    @torch.no_grad()
    def restore(target: torch.Tensor, key: str) -> None:
        """Fill this rank's rows from whichever saved ranks hold them."""
        part, rows = local_rows(target)
        for saved_rank, file in enumerate(files):
            saved = chunk_rows(target.shape[0], saved_rank, saved_ranks)
            start, stop = max(rows.start, saved.start), min(rows.stop, saved.stop)
            if start < stop:
                piece = file.get_slice(key)[start - saved.start : stop - saved.start]
                part[start - rows.start : stop - rows.start].copy_(piece)

    for name, parameter in model.named_parameters():
        restore(parameter, f"model.{name}")
        if state["updates"]:
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            for key, value in moments.items():
                restore(value, f"{key}.{name}")
            moments["step"] = torch.tensor(float(state["updates"]), device=parameter.device)
            optimizer.state[parameter] = moments
    torch.set_rng_state(files[min(rank(), saved_ranks - 1)].get_tensor("rng_state"))
    return state


def newest_checkpoint(output: Path) -> Path | None:
    """The newest step directory whose files are whole; None where there is none. All ranks get the same answer.

    A damaged one is named on the screen and passed over; a leftover of an interrupted save is no candidate.
    Raises ValueError where all of them are damaged: to begin anew is not for a resumption to decide.
    """
    found = checkpoints(output)
    for path in reversed(found):
        problem = _damage(path)
        problems = [p for p in gather(problem) if p]
        if not problems:
            return path
        if rank() == 0:
            print(f"{path} is damaged and passed over: {problems[0]}", flush=True)
    if found:
        raise ValueError(f"{output}: every checkpoint is damaged; --overwrite begins anew")
    return None


def step_name(step: int | None) -> str | None:
    return None if step is None else f"step-{step:06d}"


def checkpoints(output: Path) -> list[Path]:
    """Committed step directories, oldest first."""
    if not output.is_dir():
        return []
    return sorted(path for path in output.iterdir() if re.fullmatch(r"step-\d{6,}", path.name) and path.is_dir())


def remove_leftovers(output: Path) -> None:
    """Delete what an interrupted save left behind. For rank 0, before training."""
    for pattern in ("*.partial", "*.partial-[0-9]*"):
        for path in output.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint; each rank reads its share of them."""
    try:
        state = _read_json(path / "training_state" / "state.json")
        if state.get("digest") != _state_digest(state):
            return "state.json does not match its checksum"
        digests = sorted(state["sha256"].items())
        for name, digest in digests[rank() :: world_size()]:
            if file_digest(path / "training_state" / name) != digest:
                return f"{name} does not match its checksum"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _state_digest(state: dict) -> str:
    text = json.dumps({key: value for key, value in state.items() if key != "digest"})
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(directory: str | Path) -> str:
    """SHA-256 over config.json and the weight files of a model directory: which model this is."""
    directory = Path(directory)
    digest = hashlib.sha256()
    for path in [directory / "config.json", *sorted(directory.glob("model*.safetensors"))]:
        digest.update(file_digest(path).encode())
    return digest.hexdigest()


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file, with a checksum in it, that appears whole or not at all. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        _save_safetensors(tensors, partial, sha256=_tensors_digest(tensors))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Everything in a file of save_tensors. Raises ValueError naming the file where it is damaged."""
    file = _open_safetensors(path)
    tensors = {key: file.get_tensor(key) for key in file.keys()}
    if (file.metadata() or {}).get("sha256") != _tensors_digest(tensors):
        raise ValueError(f"{path} does not match its checksum; delete it, and it is made again")
    return tensors


def _tensors_digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _rank_file(index: int, ranks: int) -> str:
    return f"rank-{index:05d}-of-{ranks:05d}.safetensors"


def _open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _save_safetensors(tensors: dict, path: Path, **metadata: str) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt", **metadata})
    except SafetensorError as error:  # the library's way to report a full disk
        raise OSError(f"cannot write {path}: {error}") from error
    os.chmod(path, 0o644)  # written 0600, which another user's inference server cannot read
    _fsync(path)


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, malformed, a number of thousands of digits
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _write_json(path: Path, value: dict) -> None:
    with open(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Hugging Face model directories in and out: config.json in both spellings, weights, the tokenizer's files.

Sharded parameters (FSDP) hold consecutive rows of dimension 0, so each rank reads its own rows only.
"""

import hashlib
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from redi.distributed import full_tensor, local_tensor, raise_together, rank, shard
from redi.files import error_context, file_digest, fsync, read_json, saving_safetensors, write_json
from redi.hub.config import config_json, load_config
from redi.model import CausalLM, ModelConfig
from redi.tokenizer import TOKENIZER_FILES, Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of a computation
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja"]  # what is downloaded of a model on the hub
OLD_TOKENIZER_FILES = ("special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json")  # for other readers
SHARD_BYTES = 5 * 2**30
FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}


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


def load_sharded(
    directory: str | Path, config: ModelConfig, device: torch.device, dtype: torch.dtype,
    recompute: str = "nothing", keep_layers: int = 0, compile: bool = False,
) -> CausalLM:  # fmt: skip
    """A model directory for training, sharded over all ranks: fp32 master weights, computation in `dtype`.

    recompute, keep_layers: as in CausalLM; compile: torch.compile the layers. Raises ValueError as load_pretrained.
    """
    with torch.device("meta"):
        model = CausalLM(config, recompute, keep_layers)
    check_weights(model, directory)
    if compile:
        for layer in model.model.layers:
            layer.compile()
    shard(model, dtype)
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
        rows = local_rows(parameter)
        local_tensor(parameter).copy_(weights[name][rows.start : rows.stop])


def local_rows(parameter: torch.Tensor) -> slice:
    """Which rows of a parameter this rank holds."""
    if local_tensor(parameter) is parameter:
        return slice(0, parameter.shape[0])
    mesh = parameter.device_mesh
    rows = chunk_rows(parameter.shape[0], mesh.get_local_rank(), mesh.size())
    assert rows.stop - rows.start == local_tensor(parameter).shape[0]
    return rows


def chunk_rows(length: int, index: int, chunks: int) -> slice:
    """FSDP2 shards dimension 0 as torch.chunk does: ceil(rows / ranks) rows each, the last ranks fewer or none."""
    size = -(-length // chunks)
    return slice(min(index * size, length), min((index + 1) * size, length))


def _weight_slices(model: CausalLM, directory: Path) -> dict:
    """Name -> lazily read safetensors slice, for exactly the parameters of the model."""
    expected = dict(model.named_parameters())
    slices = {}
    for name in _weight_files(directory):
        with error_context(str(directory / name)):
            handle = open_safetensors(directory / name)
            for key in handle.keys():
                if key.endswith("rotary_emb.inv_freq"):
                    continue  # a buffer that old exporters wrote; computed from the config here
                if key == "lm_head.weight" and model.config.tie_word_embeddings:
                    continue  # a copy of the embedding
                if key not in expected:
                    raise ValueError(f"unexpected tensor {key!r}, which the config has no place for")
                slices[key] = handle.get_slice(key)
                shape, dtype = tuple(slices[key].get_shape()), slices[key].get_dtype()
                if shape != tuple(expected[key].shape):
                    wanted = tuple(expected[key].shape)
                    raise ValueError(f"{key!r} has shape {shape}, but config.json asks for {wanted}")
                if dtype not in FLOAT_DTYPES:
                    raise ValueError(f"{key!r} has dtype {dtype}; expected a float of 16 to 64 bits")
    missing = [name for name in expected if name not in slices]
    if missing:
        raise ValueError(f"{directory}: the weights lack {missing[0]!r} "
                         f"({len(missing)} of {len(expected)} are missing)")
    return slices


def _weight_files(directory: Path) -> list[str]:
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        return ["model.safetensors"]
    if not index.is_file():
        raise ValueError(f"{directory} holds no weights (neither model.safetensors nor {index.name})")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: expected an object 'weight_map' from tensor names to file names")
    files = sorted(set(weight_map.values()))
    for name in files:
        if Path(name).name != name or name in ("", "..") or not name.isprintable():
            raise ValueError(f"{index}: the file name {name!r} points outside the directory, or is none")
    return files


def open_safetensors(path: Path):
    """Raises ValueError where the file is absent or not whole."""
    try:
        return safe_open(path, framework="pt")
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ValueError(f"not a whole safetensors file: {error}") from error


@torch.no_grad()
def save_pretrained(
    model: CausalLM, directory: str | Path, tokenizer: Tokenizer | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write a directory that transformers, vLLM and load_pretrained read. All ranks call; rank 0 writes.

    Args:
        tokenizer: its files are copied and its stop ids become the generation config's eos ids (vLLM takes
            stop ids from there).
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
    failure, weight_map = None, {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        tensors = {}
        for name in names:
            full = full_tensor(parameters[name])  # a collective: also where nothing is to be written any more
            if rank() == 0:
                tensors[name] = full.detach().to("cpu", dtype).contiguous()
        if rank() == 0 and failure is None:
            failure = _failure_of(lambda: save_tensors(directory / file, tensors))
    if rank() == 0 and failure is None:
        failure = _failure_of(lambda: _finish_directory(directory, model, tokenizer, dtype, weight_map))
    raise_together(failure)


def _failure_of(write) -> OSError | None:
    """Kept, not raised, until the other ranks' gathers are served."""
    try:
        write()
    except OSError as error:
        return error


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with saving_safetensors(path):
        save_file(tensors, path, metadata={"format": "pt"})


def _finish_directory(directory: Path, model, tokenizer: Tokenizer | None, dtype, weight_map: dict[str, str]) -> None:
    """All that stands beside the weights."""
    for stale in directory.glob("model*.safetensors*"):  # of an earlier save with another number of files
        if stale.name not in weight_map.values():
            stale.unlink()
    if len(set(weight_map.values())) > 1:
        total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)
    write_json(directory / "config.json", config_json(model.config, dtype))
    generation_config = {}
    if tokenizer:
        for source in (tokenizer.directory / name for name in (*TOKENIZER_FILES, *OLD_TOKENIZER_FILES)):
            if source.is_file() and source.parent.resolve() != directory.resolve():
                shutil.copyfile(source, directory / source.name)
                fsync(directory / source.name)
        if (tokenizer.directory / "generation_config.json").is_file():
            generation_config = read_json(tokenizer.directory / "generation_config.json")
        generation_config["eos_token_id"] = list(tokenizer.stop_ids)
    write_json(directory / "generation_config.json", generation_config)
    fsync(directory)


def weights_digest(directory: str | Path) -> str:
    """SHA-256 over config.json and the weight files of a model directory: which model this is."""
    digest = hashlib.sha256()
    for path in [Path(directory) / "config.json", *sorted(Path(directory).glob("model*.safetensors"))]:
        digest.update(file_digest(path).encode())
    return digest.hexdigest()

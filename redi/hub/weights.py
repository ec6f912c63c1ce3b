"""Hugging Face model directories in and out: config.json in both spellings, weights, the tokenizer's files.

Sharded parameters (FSDP) hold consecutive rows of dimension 0, so each rank reads its own rows only.
"""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from redi.distributed import full_tensor, local_tensor, print_rank0, rank, run_on_ranks, shard
from redi.files import error_context, file_digest, fsync, read_json, saving_safetensors, write_atomically, write_json
from redi.hub.config import config_json, load_config
from redi.model import FAMILIES, CausalLM, ModelConfig
from redi.tokenizer import TOKENIZER_FILES, Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of a computation
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja"]  # what is downloaded of a model on the hub
OLD_TOKENIZER_FILES = ("special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json")  # for other readers
SHARD_BYTES = 5 * 2**30
FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}


def load_pretrained(directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
                    **overrides) -> CausalLM:
    """A model directory as an unsharded model on one device. Overrides as in load_config.

    Raises ValueError naming the file and the tensor that is missing, unexpected, or of the wrong shape.
    """
    config = _untie(load_config(directory, **overrides), directory)
    with torch.device("meta"):
        model = CausalLM(config).to(dtype)
    model.to_empty(device=device)
    load_weights(model, directory)
    return model


def load_sharded(directory: str | Path, config: ModelConfig, device: torch.device, dtype: torch.dtype,
                 recompute: str = "nothing", keep_layers: int = 0, compile: bool = False) -> CausalLM:
    """A model directory for training, sharded over all ranks: fp32 master weights, computation in `dtype`.

    recompute, keep_layers: as in CausalLM; compile: torch.compile the layers. Raises ValueError as load_pretrained.
    """
    config = _untie(config, directory)
    with torch.device("meta"):
        model = CausalLM(config, recompute, keep_layers)
    if compile:
        for layer in model.model.layers:
            layer.compile()
    shard(model, dtype)
    model.to_empty(device=device)
    load_weights(model, directory)
    return model


def _untie(config: ModelConfig, directory: str | Path) -> ModelConfig:
    """The config, untied if the files have a head that is not the embedding. Raises ValueError as check_weights."""
    weights = check_weights(config, directory)
    embedding, head = weights["model.embed_tokens.weight"], weights.get("lm_head.weight")
    blocks = [slice(start, start + 4096) for start in range(0, config.vocab_size, 4096)]
    if not config.tie_word_embeddings or head is None:
        return config
    if all(torch.equal(head[rows].float(), embedding[rows].float()) for rows in blocks):
        return config
    print_rank0(f"{directory}: lm_head.weight is not the embedding: loading it as an untied head, although config.json "
                "has tie_word_embeddings")
    return replace(config, tie_word_embeddings=False)


@torch.no_grad()
def load_weights(model: CausalLM, directory: str | Path) -> None:
    """Copy a directory's weights into the parameters, each rank its own rows, cast to the parameters' dtype."""
    weights = check_weights(model.config, directory)
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


def parameter_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of CausalLM's parameters, one at a time: a config may ask for any number of layers."""
    qkv_bias, qk_norm = FAMILIES[config.model_type]
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    layer = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
             "self_attn.q_proj.weight": (q_size, hidden), "self_attn.k_proj.weight": (kv_size, hidden),
             "self_attn.v_proj.weight": (kv_size, hidden), "self_attn.o_proj.weight": (hidden, q_size),
             "mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden),
             "mlp.down_proj.weight": (hidden, inner)}
    if qk_norm:
        layer |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    if qkv_bias:
        layer |= {f"self_attn.{name}_proj.bias": (size,) for name, size in zip("qkv", (q_size, kv_size, kv_size))}
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)
    for i in range(config.num_hidden_layers):
        yield from ((f"model.layers.{i}.{name}", shape) for name, shape in layer.items())


def check_weights(config: ModelConfig, directory: str | Path) -> dict:
    """Compare the config with names, shapes and dtypes in the headers of the weight files, before memory is allocated.

    Returns name -> lazily read safetensors slice: the parameters of the model and, if it is tied, a head that the files
    have all the same. Raises ValueError naming the file and the tensor.
    """
    directory, slices, files = Path(directory), {}, {}
    for file in _weight_files(directory):
        with error_context(str(directory / file)):
            handle = open_safetensors(directory / file)
            for name in handle.keys():
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # a buffer that old exporters wrote; computed from the config here
                if name in slices:
                    raise ValueError(f"{name!r} is also in {files[name]}")
                slices[name], files[name] = handle.get_slice(name), file
    if "lm_head.weight" in slices:
        config = replace(config, tie_word_embeddings=False)
    expected = set()
    for name, shape in parameter_shapes(config):
        if name not in slices:
            raise ValueError(f"{directory}: the weights lack {name!r}, which config.json asks for")
        expected.add(name)
        with error_context(str(directory / files[name])):
            found, dtype = tuple(slices[name].get_shape()), slices[name].get_dtype()
            if found != shape:
                raise ValueError(f"{name!r} has shape {found}, but config.json asks for {shape}")
            if dtype not in FLOAT_DTYPES:
                raise ValueError(f"{name!r} has dtype {dtype}; expected a float of 16 to 64 bits")
    for name in slices.keys() - expected:
        raise ValueError(f"{directory / files[name]}: unexpected tensor {name!r}, which config.json does not ask for")
    return slices


def _weight_files(directory: Path) -> list[str]:
    index, adapter = directory / "model.safetensors.index.json", directory / "adapter_config.json"
    if adapter.is_file():
        raise ValueError(f"{adapter}: adapters are not supported; merge it into its base model")
    if (directory / "model.safetensors").is_file():
        return ["model.safetensors"]
    if not index.is_file():
        raise ValueError(f"{directory} has no weights (neither model.safetensors nor {index.name})")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: expected an object 'weight_map' from tensor names to file names")
    files = sorted(set(weight_map.values()))
    for name in files:
        if Path(name).name != name or name in ("", "..") or not name.isprintable():
            raise ValueError(f"{index}: {name!r} is not the name of a file in the directory")
    return files


def open_safetensors(path: Path):
    """Raises ValueError where the file is absent, truncated or corrupt."""
    try:
        return safe_open(path, framework="pt")
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ValueError(f"truncated or corrupt safetensors file: {error}") from error


@torch.no_grad()
def save_pretrained(model: CausalLM, directory: str | Path, tokenizer: Tokenizer | None = None,
                    dtype: torch.dtype | None = None) -> None:
    """Write a directory that transformers, vLLM and load_pretrained read. All ranks call; rank 0 writes.

    Args:
        tokenizer: its files are copied and its stop ids become the generation config's eos ids (vLLM takes
            stop ids from there).
        dtype: of the saved weights; None keeps the parameters'.
    Files above 5 GiB are split. Full tensors are gathered one at a time, so a rank has at most one file in memory.
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
    weight_map = {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        tensors = {}
        for name in names:
            full = full_tensor(parameters[name])  # a collective
            if rank() == 0:
                tensors[name] = full.detach().to("cpu", dtype).contiguous()
        run_on_ranks(rank() == 0, lambda: save_tensors(directory / file, tensors))
    run_on_ranks(rank() == 0, lambda: _finish_directory(directory, model, tokenizer, dtype, weight_map))


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with saving_safetensors(path):
        save_file(tensors, path, metadata={"format": "pt"})


def _finish_directory(directory: Path, model, tokenizer: Tokenizer | None, dtype, weight_map: dict[str, str]) -> None:
    """Write everything besides the weights."""
    for stale in directory.glob("model*.safetensors*"):  # from an earlier save with a different number of files
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
        if tokenizer.chat_template and not tokenizer.has_own_template:
            with write_atomically(directory / "chat_template.jinja") as file:
                file.write(tokenizer.chat_template.encode())
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

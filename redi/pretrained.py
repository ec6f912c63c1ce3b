"""Hugging Face model directories in and out: config.json in both spellings, weights, the tokenizer's files.

Sharded parameters (FSDP) hold consecutive rows of dimension 0, so each rank reads its own rows only.
"""

import hashlib
import math
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from redi.distributed import local, raise_together, rank, whole
from redi.files import at, file_digest, fsync, read_json, saving_safetensors, write_json
from redi.model import FAMILIES, CausalLM, ModelConfig
from redi.tokenizer import TOKENIZER_FILES, Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of a computation
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja"]  # what is downloaded of a model on the hub
OLD_TOKENIZER_FILES = ("special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json")  # for other readers
SHARD_BYTES = 5 * 2**30
FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
# Far above any real decoder, far below what would exhaust memory before the weights are looked at.
SIZE_LIMITS = {
    "vocab_size": 2**22,
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "num_hidden_layers": 512,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 1024,
    "max_position_embeddings": 2**27,
}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def load_config(directory: str | Path, tokenizer: Tokenizer | None = None, **overrides) -> ModelConfig:
    """Read DIRECTORY/config.json; overrides (rope_theta, max_position_embeddings) that are not None replace its values.

    Raises ValueError naming the file and the key, and where the tokenizer cannot be the model's own.
    """
    path = Path(directory) / "config.json"
    with at(str(path)):
        config = parse_config(read_json(path), **{key: value for key, value in overrides.items() if value is not None})
    if tokenizer:
        _check_tokenizer(directory, config, tokenizer)
    return config


def _check_tokenizer(directory: str | Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Raise ValueError where the tokenizer has ids that the model has no place for, or is that of another model.

    What holds for models with their own: an eos id of config.json is an added token of the tokenizer, though not
    always the one that tokenizer_config.json names (Llama 3), and bos ids are not to be relied on (DeepSeek's
    distillations of Qwen have another in each file). Padding is a few per cent of the vocabulary (DeepSeek LLM: 2).
    """
    used, eos = tokenizer.vocab_size, config.raw.get("eos_token_id")
    eos_ids = [id for id in (eos if isinstance(eos, list) else [eos]) if type(id) is int]
    if used > config.vocab_size:
        raise ValueError(f"{directory}: the tokenizer has ids up to {used - 1}, but the model's vocabulary has "
                         f"{config.vocab_size} entries")
    if not eos_ids:  # made by hand, for an experiment
        return
    if not any(id in tokenizer.added_ids for id in eos_ids):
        word = tokenizer.decode(eos_ids[:1]) if 0 <= eos_ids[0] < used else ""
        raise ValueError(f"{directory}: expected a special token at {eos_ids[0]}, the eos_token_id of config.json, "
                         f"found {word!r} in tokenizer.json: it is the tokenizer of another model")
    if config.vocab_size - used > max(1024, config.vocab_size / 10):
        raise ValueError(f"{directory}: expected a tokenizer of about {config.vocab_size} ids, the size of the model's "
                         f"vocabulary, found one of {used}: it is the tokenizer of another model")


def parse_config(raw: dict, **overrides) -> ModelConfig:
    """The object in a config.json, in the spelling of transformers 4 or 5.

    Raises ValueError that names the key where something is missing, absurd, or not supported.
    """
    model_type = raw.get("model_type")
    if model_type not in list(FAMILIES):  # a list, since what stands in the file may not be hashable
        raise ValueError(f"model_type is {model_type!r}; supported are {', '.join(FAMILIES)}")
    for key, kind in (("rope_parameters", dict), ("rope_scaling", dict), ("layer_types", list)):
        if not isinstance(raw.get(key) or kind(), kind):
            raise ValueError(f"{key} is {raw[key]!r}, neither null nor a {kind.__name__}")
    _refuse_unsupported(raw)
    rope_theta, rope_scaling = _parse_rope(raw)
    sizes = {**raw, **overrides}
    if sizes.get("num_key_value_heads") is None:
        sizes["num_key_value_heads"] = raw.get("num_attention_heads")
    if sizes.get("head_dim") is None:
        _check_sizes(sizes, set(SIZE_LIMITS) - {"head_dim"})
        sizes["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
    _check_sizes(sizes, set(SIZE_LIMITS))
    if sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
        raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
    if sizes["head_dim"] % 2:
        raise ValueError(f"head_dim is {sizes['head_dim']}; rotary embeddings need an even number")
    numbers = {"rope_theta": overrides.get("rope_theta", rope_theta), "rms_norm_eps": raw.get("rms_norm_eps", 1e-6)}
    for key, value in numbers.items():
        if not _is_positive(value):
            raise ValueError(f"{key} is {value!r}; expected a positive number")
    return ModelConfig(
        model_type=model_type,
        rope_theta=float(numbers["rope_theta"]),
        rms_norm_eps=numbers["rms_norm_eps"],
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        rope_scaling=rope_scaling,
        raw=dict(raw),
        **{key: sizes[key] for key in SIZE_LIMITS},
    )


def _parse_rope(raw: dict) -> tuple[float, dict | None]:
    """(rope_theta, Llama 3's four numbers): under rope_parameters in transformers 5, in 4 as rope_theta and
    rope_scaling."""
    parameters, old_scaling = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    theta = raw.get("rope_theta")
    if theta is None:
        theta = parameters.get("rope_theta", old_scaling.get("rope_theta", 10000.0))
    elif "rope_theta" in parameters and parameters["rope_theta"] != theta:
        raise ValueError(f"rope_theta is {theta} but rope_parameters.rope_theta is {parameters['rope_theta']}; "
                         "the two spellings of one value must agree")
    scaling = parameters or old_scaling
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if rope_type != "llama3":
        raise ValueError(f"rope_type is {rope_type!r}; supported are 'default' and 'llama3'")
    for key in LLAMA3_ROPE:
        if not _is_positive(scaling.get(key)):
            raise ValueError(f"the llama3 rope scaling's {key} is {scaling.get(key)!r}; expected a positive number")
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError("the llama3 rope scaling's low_freq_factor must be below high_freq_factor")
    return theta, {key: scaling[key] for key in LLAMA3_ROPE}


def _is_positive(value) -> bool:
    return isinstance(value, (int, float)) and 0 < value < math.inf


def _refuse_unsupported(raw: dict) -> None:
    unsupported = {
        "use_sliding_window": raw.get("use_sliding_window"),
        "layer_types": any(kind != "full_attention" for kind in raw.get("layer_types") or []),
        "quantization_config": raw.get("quantization_config") is not None,
        "num_experts": raw.get("num_experts") or raw.get("num_local_experts"),
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": raw.get("attention_bias", False) and raw["model_type"] != "qwen2",
        "mlp_bias": raw.get("mlp_bias"),
        "partial_rotary_factor": raw.get("partial_rotary_factor", 1) != 1,
    }
    for key, found in unsupported.items():
        if found:
            raise ValueError(f"{key} is {raw.get(key)!r}, which is not supported")


def _check_sizes(sizes: dict, keys: set[str]) -> None:
    for key, limit in SIZE_LIMITS.items():
        value = sizes.get(key)
        if key in keys and not (type(value) is int and 0 < value <= limit):
            raise ValueError(f"{key} is {value!r}; expected a whole number from 1 to {limit}")


def config_json(config: ModelConfig, dtype: torch.dtype) -> dict:
    """config.json that transformers 4 and 5 and vLLM read alike: rope and dtype in both spellings.

    A reader of one generation that meets the other's spelling falls back to a rope_theta of 10000
    without a word.
    """
    rope = {"rope_type": "llama3", **config.rope_scaling} if config.rope_scaling else {"rope_type": "default"}
    return {
        **config.raw,
        **{key: getattr(config, key) for key in SIZE_LIMITS},
        "model_type": config.model_type,
        "architectures": [ARCHITECTURES[config.model_type]],
        "rope_theta": config.rope_theta,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rope_scaling": rope if config.rope_scaling else None,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


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
        rows = local_rows(parameter)
        local(parameter).copy_(weights[name][rows.start : rows.stop])


def local_rows(parameter: torch.Tensor) -> slice:
    """Which rows of a parameter this rank holds."""
    if local(parameter) is parameter:
        return slice(0, parameter.shape[0])
    mesh = parameter.device_mesh
    rows = chunk_rows(parameter.shape[0], mesh.get_local_rank(), mesh.size())
    assert rows.stop - rows.start == local(parameter).shape[0]
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
        with at(str(directory / name)):
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
            full = whole(parameters[name])  # a collective: also where nothing is to be written any more
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

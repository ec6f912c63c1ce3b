"""config.json in the spelling of transformers 4 or 5 -> ModelConfig, and back."""

import math
from pathlib import Path

import torch

from redi.files import error_context, read_json
from redi.model import FAMILIES, ModelConfig
from redi.tokenizer import Tokenizer

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
    with error_context(str(path)):
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

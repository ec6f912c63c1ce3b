"""config.json as transformers 4 or 5 writes it -> ModelConfig, and back."""

import math
from pathlib import Path

import torch

from redi.files import error_context, read_json
from redi.model import FAMILIES, ModelConfig
from redi.tokenizer import Tokenizer

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings")
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def load_config(directory: str | Path, tokenizer: Tokenizer | None = None, **overrides) -> ModelConfig:
    """Read DIRECTORY/config.json; overrides (rope_theta, max_position_embeddings) that are not None replace its values.

    Raises ValueError naming the file and the key, and where the tokenizer has ids beyond the model's vocabulary.
    """
    path = Path(directory) / "config.json"
    with error_context(str(path)):
        config = parse_config(read_json(path), **{key: value for key, value in overrides.items() if value is not None})
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{directory}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model's "
                         f"vocabulary has {config.vocab_size} entries")
    return config


def parse_config(raw: dict, **overrides) -> ModelConfig:
    """The object in a config.json. Raises ValueError naming a key that is missing, contradictory or not supported."""
    model_type = raw.get("model_type")
    if model_type not in list(FAMILIES):  # a list, since the value in the file may not be hashable
        raise ValueError(f"model_type is {model_type!r}; supported are {', '.join(FAMILIES)}")
    _refuse_unsupported(raw)
    rope_theta, rope_scaling = _parse_rope(raw)
    values = {"rms_norm_eps": 1e-6, **raw, "rope_theta": rope_theta, **overrides}
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values.get("num_attention_heads")
    if values.get("head_dim") is None:
        _require_positive(int, values, "hidden_size", "num_attention_heads")
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    _require_positive(int, values, *SIZES)
    _require_positive((int, float), values, "rope_theta", "rms_norm_eps")
    if values["num_attention_heads"] % values["num_key_value_heads"]:
        raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
    if values["head_dim"] % 2:
        raise ValueError(f"head_dim is {values['head_dim']}; rotary embeddings need an even number")
    return ModelConfig(model_type=model_type, rope_theta=float(values["rope_theta"]),
                       rms_norm_eps=values["rms_norm_eps"], tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
                       rope_scaling=rope_scaling, raw=dict(raw), **{key: values[key] for key in SIZES})


def _require_positive(kind, values: dict, *keys: str) -> None:
    for key in keys:
        value = values.get(key)
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ValueError(f"{key} is {value!r}; expected a positive {'integer' if kind is int else 'number'}")


def _refuse_unsupported(raw: dict) -> None:
    for key in ("tie_word_embeddings", "use_sliding_window", "attention_bias", "mlp_bias"):
        if raw.get(key) not in (None, True, False):
            raise ValueError(f"{key} is {raw[key]!r}; expected true or false")
    for key, kind in (("rope_parameters", dict), ("rope_scaling", dict), ("layer_types", list)):
        if not isinstance(raw.get(key) or kind(), kind):
            raise ValueError(f"{key} is {raw[key]!r}; expected {'an object' if kind is dict else 'a list'} or null")
    unsupported = {
        **{key: raw.get(key) for key in ("use_sliding_window", "num_experts", "num_local_experts", "mlp_bias")},
        "layer_types": any(kind != "full_attention" for kind in raw.get("layer_types") or []),
        "quantization_config": raw.get("quantization_config") is not None,
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": raw.get("attention_bias") and raw["model_type"] != "qwen2",
        "partial_rotary_factor": raw.get("partial_rotary_factor") not in (None, 1),
    }
    for key, found in unsupported.items():
        if found:
            raise ValueError(f"{key} is {raw[key]!r}, which is not supported")


def _parse_rope(raw: dict) -> tuple[float, dict | None]:
    """(rope_theta, the four numbers of Llama 3's scaling or None).

    transformers 5 writes rope_parameters, 4 writes rope_theta and rope_scaling. Where a file has both, rope_scaling
    applies, as in transformers. Raises ValueError where two keys give different values.
    """
    parameters, old = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    places = {"": raw, "rope_parameters.": parameters, "rope_scaling.": old}
    thetas = [(f"{place}rope_theta", values.get("rope_theta")) for place, values in places.items()]
    (first, theta), *others = [item for item in thetas if item[1] is not None] or [("default", 10000.0)]
    for key, value in others:
        if value != theta:
            raise ValueError(f"{first} is {theta} but {key} is {value}; they must agree")
    scaling, old_scaling = (_parse_scaling(key, raw) for key in ("rope_parameters", "rope_scaling"))
    if scaling and old and scaling != old_scaling:
        raise ValueError(f"rope_parameters is {parameters} but rope_scaling is {old}; they must agree")
    return theta, scaling or old_scaling


def _parse_scaling(key: str, raw: dict) -> dict | None:
    """The numbers of Llama 3's RoPE scaling under a key of config.json, None for RoPE without scaling."""
    rope = raw.get(key) or {}
    types = [rope[name] for name in ("rope_type", "type") if rope.get(name) is not None]
    nested = [name for name, value in rope.items() if isinstance(value, dict)]
    if nested or rope.get("partial_rotary_factor") not in (None, 1):
        name = nested[0] if nested else "partial_rotary_factor"
        raise ValueError(f"{key}.{name} is {rope[name]!r}, which is not supported")
    if any(name != types[0] or name not in ("default", "llama3") for name in types) or "factor" in rope and not types:
        found = " and ".join(map(repr, types)) or "missing"
        raise ValueError(f"{key}.rope_type is {found}; supported are 'default' and 'llama3'")
    if types[:1] != ["llama3"]:
        return None
    numbers = {name: rope.get(name) for name in LLAMA3_ROPE}
    with error_context(key):
        _require_positive((int, float), numbers, *LLAMA3_ROPE)
    if numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise ValueError(f"{key}.low_freq_factor must be below high_freq_factor")
    original = raw.get("original_max_position_embeddings")
    if original not in (None, numbers["original_max_position_embeddings"]):
        raise ValueError(f"original_max_position_embeddings is {original!r} but {key} has "
                         f"{numbers['original_max_position_embeddings']}; they must agree")
    return numbers


def config_json(config: ModelConfig, dtype: torch.dtype) -> dict:
    """config.json for transformers 4 and 5 and vLLM: RoPE and dtype in both spellings.

    A reader of one generation that finds only the other's spelling silently falls back to rope_theta 10000.
    """
    rope = {"rope_type": "llama3", **config.rope_scaling} if config.rope_scaling else {"rope_type": "default"}
    return {
        **config.raw,
        **{key: getattr(config, key) for key in SIZES},
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

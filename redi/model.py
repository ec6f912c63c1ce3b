"""The decoder: Qwen2 and its close relatives Qwen3 and Llama, over packed tokens.

Parameter names equal the keys of Hugging Face checkpoints, so that loading is a lookup. A tied head is the
embedding itself: no second parameter, no second key.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from redi.attention import packed_attention
from redi.losses import fp32_product, token_logps, uses_onednn

# attend(layer, q (T, H, D), k (T, K, D), v (T, K, D)) -> (T, H, D)
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# What the three families do differently: (bias on q, k and v; RMSNorm on each query and key head).
FAMILIES = {"qwen2": (True, False), "qwen3": (False, True), "llama": (False, False)}
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of a computation

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


@dataclass
class ModelConfig:
    """The shape of a decoder, as in config.json. `raw` keeps that file, so that saving loses none of its keys."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_scaling: dict | None = None
    raw: dict = field(default_factory=dict, repr=False)

    @classmethod
    def from_dict(cls, raw: dict, **overrides) -> "ModelConfig":
        """Read config.json in the spelling of transformers 4 or 5.

        Overrides (rope_theta, max_position_embeddings) replace what stands there. Raises ValueError that
        names the key where something is missing, absurd, or not supported.
        """
        model_type = raw.get("model_type")
        if model_type not in list(FAMILIES):  # a list, since what stands in the file may not be hashable
            raise ValueError(f"model_type is {model_type!r}; supported are {', '.join(FAMILIES)}")
        for key, kind in (("rope_parameters", dict), ("rope_scaling", dict), ("layer_types", list)):
            if not isinstance(raw.get(key) or kind(), kind):
                raise ValueError(f"{key} is {raw[key]!r}, neither null nor a {kind.__name__}")
        _refuse_unsupported(raw)
        parameters, rope_theta, rope_scaling = raw.get("rope_parameters") or {}, raw.get("rope_theta"), None
        old_scaling = raw.get("rope_scaling") or {}
        if rope_theta is None:
            rope_theta = parameters.get("rope_theta", old_scaling.get("rope_theta", 10000.0))
        elif "rope_theta" in parameters and parameters["rope_theta"] != rope_theta:
            raise ValueError(
                f"rope_theta is {rope_theta} but rope_parameters.rope_theta is {parameters['rope_theta']}; "
                "the two spellings of one value must agree"
            )
        scaling = parameters or old_scaling
        rope_type = scaling.get("rope_type", scaling.get("type", "default"))
        if rope_type == "llama3":
            keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            for key in keys:
                value = scaling.get(key)
                if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                    raise ValueError(f"the llama3 rope scaling's {key} is {value!r}; expected a positive number")
            rope_scaling = {key: scaling[key] for key in keys}
            if rope_scaling["low_freq_factor"] >= rope_scaling["high_freq_factor"]:
                raise ValueError("the llama3 rope scaling's low_freq_factor must be below high_freq_factor")
        elif rope_type != "default":
            raise ValueError(f"rope_type is {rope_type!r}; supported are 'default' and 'llama3'")
        sizes = dict(raw)
        if sizes.get("num_key_value_heads") is None:
            sizes["num_key_value_heads"] = raw.get("num_attention_heads")
        sizes.update(overrides)
        if sizes.get("head_dim") is None:
            _check_sizes(sizes, set(SIZE_LIMITS) - {"head_dim"})
            sizes["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
        _check_sizes(sizes, set(SIZE_LIMITS))
        if sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if sizes["head_dim"] % 2:
            raise ValueError(f"head_dim is {sizes['head_dim']}; rotary embeddings need an even number")
        rope_theta = overrides.get("rope_theta", rope_theta)
        for key, value in (("rope_theta", rope_theta), ("rms_norm_eps", raw.get("rms_norm_eps", 1e-6))):
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{key} is {value!r}; expected a positive number")
        return cls(
            model_type=model_type,
            rope_theta=float(rope_theta),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            rope_scaling=rope_scaling,
            raw=dict(raw),
            **{key: sizes[key] for key in SIZE_LIMITS},
        )

    def to_dict(self, dtype: torch.dtype) -> dict:
        """config.json that transformers 4 and 5 and vLLM read alike: rope and dtype in both spellings.

        A reader of one generation that meets the other's spelling falls back to a rope_theta of 10000
        without a word.
        """
        raw = dict(self.raw)
        rope = {"rope_type": "llama3", **self.rope_scaling} if self.rope_scaling else {"rope_type": "default"}
        raw.update({key: getattr(self, key) for key in SIZE_LIMITS})
        raw.update(
            model_type=self.model_type,
            architectures=[ARCHITECTURES[self.model_type]],
            rope_theta=self.rope_theta,
            rope_parameters={**rope, "rope_theta": self.rope_theta},
            rope_scaling=rope if self.rope_scaling else None,
            rms_norm_eps=self.rms_norm_eps,
            tie_word_embeddings=self.tie_word_embeddings,
            hidden_act="silu",
            dtype=str(dtype).removeprefix("torch."),
            torch_dtype=str(dtype).removeprefix("torch."),
        )
        return raw

    def matmul_parameters(self) -> tuple[int, int]:
        """Parameters in matrix products: (those of the layers, those of the head)."""
        width, heads, kv_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        attention = width * self.head_dim * (2 * heads + 2 * kv_heads)
        return (
            self.num_hidden_layers * (attention + 3 * width * self.intermediate_size),
            width * self.vocab_size,
        )


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


def rope_frequencies(config: ModelConfig, device=None) -> torch.Tensor:
    """Angular frequency of each pair of channels, (D/2,) fp32, in radians a position.

    Llama 3 stretches wavelengths that are long against the original context by `factor`, keeps the short
    ones, and blends between them.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return frequencies
    scaling = config.rope_scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling["factor"]


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channel pairs (i, i + D/2) of x (T, heads, D) by the angles behind cos and sin (T, 1, D/2), in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if uses_onednn(x, self.weight):
            return _OneDnnLinear.apply(x, self.weight, self.bias)
        return super().forward(x)


class _OneDnnLinear(torch.autograd.Function):
    """x (T, C) @ weight.T + bias. With the head's products in oneDNN too, a REDI step takes 6.3 instead of 8.3
    CPU seconds (25M parameters, 4,200 tokens, one Zen 5 core)."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return fp32_product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return fp32_product(grad, weight.t()), fp32_product(grad.t(), x.t()), grad_bias


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Both compute in fp32 and round once, whatever the dtype of x.
        if x.is_cuda:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """F.rms_norm, which on CUDA is one kernel but on a CPU a chain of operations that keeps two more tensors of
    x's size for backward: 13 % of what the layers keep (25M parameters)."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = x.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight.float()
        along = (grad * normed).mean(-1, keepdim=True)
        return grad.sub_(normed.mul_(along)).mul_(scale).to(x.dtype), grad_weight, None


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        qkv_bias, qk_norm = FAMILIES[config.model_type]
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size, bias=qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()

    def forward(self, x, cos, sin, attend: Attend):
        heads = (len(x), -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads))  # (T, H, D)
        k = self.k_norm(self.k_proj(x).view(heads))  # (T, K, D)
        v = self.v_proj(x).view(heads)
        out = attend(self.layer, apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)
        return self.o_proj(out.reshape(len(x), -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Backward computes silu(gate) again, which saves a quarter of what the MLP would keep:
    an eighth of a layer's activations."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend: Attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm: what stands under `model.` in a checkpoint."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class CausalLM(nn.Module):
    """A decoder with its output projection. Weights are fp32 and uninitialised until loaded or `init_weights`."""

    def __init__(self, config: ModelConfig, gradient_checkpointing: bool = False):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = gradient_checkpointing
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, C)."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def init_weights(self, seed: int, std: float = 0.02) -> None:
        """Fill matrices from N(0, std²), norms with 1, biases with 0, the same for every device."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    def hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Output of the final norm, (T, C).

        Args: input_ids, position_ids (T,) int64; attend: called once a layer, after RoPE. Training passes
        packed causal attention, decoding a function that also writes k and v to its cache.
        """
        # Angles in fp32: bf16 cannot tell consecutive positions above 256 apart.
        angles = position_ids[:, None, None].float() * rope_frequencies(self.config, position_ids.device)
        cos, sin = angles.cos(), angles.sin()  # (T, 1, D/2)
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, attend, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, attend)
        return self.model.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, C) -> (N, V) fp32, accumulated in fp32 also from bf16 weights."""
        if not hidden.is_cuda:
            return fp32_product(hidden.float(), self.head_weight.float())
        return fp32_product(hidden, self.head_weight)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        labels: torch.Tensor,
        label_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """log π(label) of each packed token, (T,) fp32.

        Labels come in, and log-probs go out, because FSDP gathers the head weight inside forward only.
        Args: as `redi.losses.token_logps` and `redi.attention.packed_attention` say.
        """
        attend = partial(_attend_packed, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        hidden = self.hidden(input_ids, position_ids, attend)
        # 128 MB of logits on a CPU. On CUDA each chunk costs one more pass over the fp32 gradient of the head.
        chunk_size = 2048 if hidden.is_cuda else max(64, 2**25 // self.config.vocab_size)
        return token_logps(hidden, self.head_weight, labels, chunk_size, label_positions)


def _attend_packed(layer, q, k, v, cu_seqlens, max_seqlen):
    return packed_attention(q, k, v, cu_seqlens, max_seqlen)

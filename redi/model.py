"""The decoder: Qwen2 and its close relatives Qwen3 and Llama, over packed tokens.

Parameter names equal the keys of Hugging Face checkpoints, so that loading is a lookup. A tied head is the
embedding itself: no second parameter, no second key.

T packed tokens, H query and K key/value heads of D channels, C hidden channels, V words.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from redi import kernels
from redi.attention import ATTENTION_OPS, packed_attention
from redi.losses import matmul_dtype, token_logps

# attention_fn(q (T, H, D), k (T, K, D), v (T, K, D)) -> (T, H, D): attention in one layer, after RoPE
AttentionFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# How the three families differ: (bias on q, k and v; RMSNorm on each query and key head).
FAMILIES = {"qwen2": (True, False), "qwen3": (False, True), "llama": (False, False)}


def _keep_attention(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE


# What a layer recomputes in backward -> options of `checkpoint`. The output of attention is as small as the layer's
# input, and the most expensive part to recompute for long sequences.
RECOMPUTE = {
    "all": {},
    "all-but-attention": {"context_fn": partial(create_selective_checkpoint_contexts, _keep_attention)},
    "nothing": None,
}


@dataclass
class ModelConfig:
    """The shape of a decoder, as in config.json (redi/hub/config.py)."""

    model_type: str  # a key of FAMILIES
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
    rope_scaling: dict | None = None  # Llama 3's four numbers
    raw: dict = field(default_factory=dict, repr=False)  # config.json as read, so that saving keeps all of its keys


def rope_frequencies(config: ModelConfig, device=None) -> torch.Tensor:
    """Angular frequency of each pair of channels, (D/2,) fp32, in radians a position.

    Llama 3 stretches wavelengths beyond the original context by `factor`, keeps short ones, and interpolates between.
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
    """Rotate channel pairs (i, i + D/2) of x (T, heads, D) by the angles of cos and sin (T, 1, D/2), in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        qkv_bias, qk_norm = FAMILIES[config.model_type]
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size, bias=qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()

    def forward(self, x, cos, sin, attention_fn: AttentionFn):
        heads = (len(x), -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads))  # (T, H, D)
        k = self.k_norm(self.k_proj(x).view(heads))  # (T, K, D)
        v = self.v_proj(x).view(heads)  # (T, K, D)
        out = attention_fn(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)  # (T, H, D)
        return self.o_proj(out.reshape(len(x), -1))  # (T, C)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attention_fn: AttentionFn):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attention_fn)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm: the keys under `model.` in a checkpoint."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class CausalLM(nn.Module):
    """A decoder with its output projection. Weights are fp32 and uninitialised until loaded or `init_weights`.

    recompute: what a layer recomputes in backward instead of storing it, a key of RECOMPUTE; keep_layers: number of
    final layers that store all activations.
    """

    def __init__(self, config: ModelConfig, recompute: str = "nothing", keep_layers: int = 0):
        super().__init__()
        self.config = config
        self.recompute, self.keep_layers = recompute, keep_layers
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, C)."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def init_weights(self, seed: int, std: float = 0.02) -> None:
        """Matrices from N(0, std²), norms 1, biases 0; the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    def hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor,
               attention_fns: list[AttentionFn]) -> torch.Tensor:
        """Output of the final norm, (T, C).

        Args: input_ids, position_ids (T,) int64; attention_fns: one per layer. Training passes packed causal
        attention for all layers, decoding passes functions that also write k and v to the layer's KV cache.
        """
        # Angles in fp32: bf16 cannot represent consecutive positions above 256.
        angles = position_ids[:, None, None].float() * rope_frequencies(self.config, position_ids.device)
        cos, sin = angles.cos(), angles.sin()  # (T, 1, D/2)
        x = self.model.embed_tokens(input_ids)  # (T, C)
        options, count = RECOMPUTE[self.recompute], len(self.model.layers) - self.keep_layers
        for i, (layer, attention_fn) in enumerate(zip(self.model.layers, attention_fns, strict=True)):
            if options is not None and i < count and torch.is_grad_enabled():
                arguments = x, cos, sin, attention_fn
                x = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False, **options)
            else:
                x = layer(x, cos, sin, attention_fn)
        return self.model.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, C) -> (N, V) fp32, accumulated in fp32 also from bf16 weights."""
        dtype = matmul_dtype(hidden)
        return kernels.fp32_product(hidden.to(dtype), self.head_weight.to(dtype))

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int,
                labels: torch.Tensor, label_positions: torch.Tensor | None = None) -> torch.Tensor:
        """log π(label) of each packed token, (T,) fp32.

        Log-probs are computed here because FSDP gathers the head weight inside forward only.
        Args: see `redi.losses.token_logps` and `redi.attention.packed_attention`.
        """
        attention_fn = partial(packed_attention, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        hidden = self.hidden(input_ids, position_ids, [attention_fn] * self.config.num_hidden_layers)
        return token_logps(hidden, self.head_weight, labels, positions=label_positions, product=kernels.fp32_product)

"""Attention and the decoder against naive versions."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from redi.attention import ATTENTION_OPS, cached_attention, packed_attention
from redi.losses import token_logps
from redi.model import CausalLM, ModelConfig, rope_frequencies
from redi.training.plan import forward_flops
from redi.hub.config import parse_config
from tests.tiny import QWEN2, randomize

VOCAB = 123
LLAMA3_SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 64}
FAMILIES = {
    "qwen2": {},
    "qwen2 untied": {"tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "head_dim": 14},
    "llama": {"model_type": "llama", "tie_word_embeddings": False, "rope_scaling": LLAMA3_SCALING},
    "llama without gqa": {"model_type": "llama", "num_key_value_heads": None},
}


def make_config(**changes) -> ModelConfig:
    return parse_config({**QWEN2, "vocab_size": VOCAB, **changes})


def make_model(seed=0, **changes) -> CausalLM:
    model = CausalLM(make_config(**changes))
    randomize(model, seed)
    return model


def packed_inputs(lengths=(11, 1, 17, 5), seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    labels = torch.randint(VOCAB, (total,), generator=generator)
    labels[::7] = -100
    return {
        "input_ids": torch.randint(VOCAB, (total,), generator=generator),
        "position_ids": torch.cat([torch.arange(n) for n in lengths]),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "max_seqlen": max(lengths),
        "labels": labels,
    }


def naive_attention(q, k, v):
    """(L, H, D), (L, K, D), (L, K, D) -> (L, H, D), written out for one sequence."""
    groups = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // groups].t() / math.sqrt(q.shape[2])
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        out[:, head] = scores.softmax(-1) @ v[:, head // groups]
    return out


def naive_hidden(model: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The decoder of one sequence, from its parameters by name and without the project's modules."""
    config, weights = model.config, dict(model.named_parameters())
    has = weights.__contains__

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[name]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].t() + (weights[f"{name}.bias"] if has(f"{name}.bias") else 0)

    def rotate(x):
        half = config.head_dim // 2
        out = torch.empty_like(x)
        for position in range(len(x)):
            for i in range(half):
                angle = position * naive_frequency(config, i)
                a, b = x[position, :, i], x[position, :, i + half]
                out[position, :, i] = a * math.cos(angle) - b * math.sin(angle)
                out[position, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = weights["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        y = norm(x, f"{layer}.input_layernorm.weight")
        q, k, v = (linear(y, f"{layer}.self_attn.{p}_proj").view(len(ids), -1, config.head_dim) for p in "qkv")
        if has(f"{layer}.self_attn.q_norm.weight"):
            q, k = norm(q, f"{layer}.self_attn.q_norm.weight"), norm(k, f"{layer}.self_attn.k_norm.weight")
        x = x + linear(naive_attention(rotate(q), rotate(k), v).flatten(1), f"{layer}.self_attn.o_proj")
        y = norm(x, f"{layer}.post_attention_layernorm.weight")
        gate = linear(y, f"{layer}.mlp.gate_proj")
        x = x + linear(gate * gate.sigmoid() * linear(y, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    return norm(x, "model.norm.weight")


def naive_frequency(config, i: int) -> float:
    """As in Meta's reference code for Llama 3.1: by cases of the wavelength."""
    frequency = config.rope_theta ** (-2 * i / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequency
    if wavelength < context / scaling["high_freq_factor"]:
        return frequency
    if wavelength > context / scaling["low_freq_factor"]:
        return frequency / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / scaling["factor"] + smooth * frequency


@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (6, 6), (6, 1)])
def test_packed_attention_and_its_gradients_equal_the_naive_version(heads, kv_heads):
    lengths, size = (11, 1, 17, 5), 8
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    shapes = [(sum(lengths), n, size) for n in (heads, kv_heads, kv_heads)]
    results = []
    for packed in (True, False):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)
        if packed:
            out = packed_attention(q, k, v, cu_seqlens, max(lengths))
        else:
            out = torch.cat([naive_attention(q[a:b], k[a:b], v[a:b]) for a, b in pairwise(cu_seqlens.tolist())])
        (out * torch.randn(out.shape, generator=generator)).sum().backward()
        results.append((out, q.grad, k.grad, v.grad))
    for ours, naive in zip(*results):
        torch.testing.assert_close(ours, naive, atol=2e-6, rtol=1e-5)


def test_cached_attention_equals_the_last_row_of_packed_attention():
    generator = torch.Generator().manual_seed(0)
    lengths, slots, size = [3, 9, 1], 12, 8
    keys, values = (torch.randn(3, slots, 2, size, generator=generator) for _ in range(2))
    q = torch.randn(3, 6, size, generator=generator)
    out = cached_attention(q, keys, values, torch.tensor(lengths))
    for i, n in enumerate(lengths):
        whole_q = torch.cat([torch.zeros(n - 1, 6, size), q[i : i + 1]])
        k, v = (x[i, :n] for x in (keys, values))
        torch.testing.assert_close(out[i], naive_attention(whole_q, k, v)[-1], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_equals_the_naive_version(family):
    model = make_model(**FAMILIES[family])
    inputs = packed_inputs()
    with torch.no_grad():
        logps = model(**inputs)
        for start, end in pairwise(inputs["cu_seqlens"].tolist()):
            hidden = naive_hidden(model, inputs["input_ids"][start:end])
            expected = token_logps(hidden, model.head_weight, inputs["labels"][start:end])
            torch.testing.assert_close(logps[start:end], expected, atol=2e-5, rtol=2e-5)


def test_packed_equals_one_by_one_in_values_and_gradients():
    model = make_model()
    inputs = packed_inputs()
    packed = model(**inputs)
    packed.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for start, end in pairwise(inputs["cu_seqlens"].tolist()):
        one = {key: inputs[key][start:end] for key in ("input_ids", "position_ids", "labels")}
        logps = model(**one, cu_seqlens=torch.tensor([0, end - start], dtype=torch.int32), max_seqlen=end - start)
        torch.testing.assert_close(logps, packed[start:end], atol=5e-6, rtol=0)
        logps.sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=2e-5, rtol=1e-5, msg=name)


class CountAttention(TorchDispatchMode):
    """How often each layer's attention is computed: one call a packed sequence."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.name() in ATTENTION_OPS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_what_is_computed_again_changes_no_bit(family):
    results, sequences, layers = [], 4, 3
    #       recompute, layers kept -> forward passes of the layers 0 to 2, attentions of a sequence
    modes = {("nothing", 0): ([1, 1, 1], 3), ("all", 0): ([2, 2, 2], 6), ("all-but-attention", 0): ([2, 2, 2], 3),
             ("all", 2): ([2, 1, 1], 4), ("all-but-attention", 1): ([2, 2, 1], 3), ("all", 3): ([1, 1, 1], 3)}
    for (recompute, kept), (passes, attentions) in modes.items():
        model = make_model(**FAMILIES[family])
        model.recompute, model.keep_layers = recompute, kept
        calls = [0] * layers
        for i, layer in enumerate(model.model.layers):
            layer.input_layernorm.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        with CountAttention() as count:
            logps = model(**packed_inputs())
            (logps**2).sum().backward()
        assert calls == passes and count.calls == attentions * sequences
        results.append([logps.detach(), *(p.grad for p in model.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_logits_are_fp32_also_from_bf16_weights():
    model = make_model().bfloat16()
    hidden = torch.randn(5, 48).bfloat16()
    logits = model.logits(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ model.head_weight.float().t())


def test_parameter_names_are_those_of_hugging_face_checkpoints():
    def names(**changes):
        return {name for name, _ in make_model(num_hidden_layers=1, **changes).named_parameters()}

    ends = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    modules = ["input_layernorm", "post_attention_layernorm", *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
               *(f"self_attn.{name}_proj" for name in "qkvo")]
    layer = {f"model.layers.0.{module}.weight" for module in modules}
    biases, norms = ({f"model.layers.0.self_attn.{name}" for name in group} for group in (
        ("q_proj.bias", "k_proj.bias", "v_proj.bias"), ("q_norm.weight", "k_norm.weight")))
    assert names(tie_word_embeddings=False) == ends | layer | biases
    assert names() == ends - {"lm_head.weight"} | layer | biases
    assert names(model_type="qwen3", tie_word_embeddings=False) == ends | layer | norms


def test_init_weights_is_the_same_for_the_same_seed():
    models = [CausalLM(make_config()) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2)):
        model.init_weights(seed)
    first, same, other = ([p for p in model.parameters()] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, same))
    assert not torch.equal(first[0], other[0])
    weights = dict(models[0].named_parameters())
    assert abs(weights["model.embed_tokens.weight"].std().item() - 0.02) < 1e-3
    assert (weights["model.norm.weight"] == 1).all() and (weights["model.layers.0.self_attn.q_proj.bias"] == 0).all()


@pytest.mark.parametrize("scaling", [None, LLAMA3_SCALING])
def test_rope_frequencies(scaling):
    config = make_config(model_type="llama", head_dim=64, rope_scaling=scaling, rope_theta=500000.0)
    expected = torch.tensor([naive_frequency(config, i) for i in range(32)])
    torch.testing.assert_close(rope_frequencies(config), expected, atol=0, rtol=2e-6)
    if scaling:  # all three cases occur
        ratio = rope_frequencies(config) / rope_frequencies(make_config(head_dim=64, rope_theta=500000.0))
        assert ratio[0] == 1 and ratio[-1] == 0.125 and ((ratio > 0.13) & (ratio < 0.99)).any()


def test_rope_tells_neighbours_apart_at_high_positions_in_bf16():
    model = make_model().bfloat16()
    ids, attended = torch.tensor([5, 5]), []

    def attend(q, k, v):
        attended.append(k)
        return torch.zeros_like(q)

    model.hidden(ids, torch.tensor([30000, 30001]), [attend] * model.config.num_hidden_layers)
    assert attended[0].dtype == torch.bfloat16 and (attended[0][0] - attended[0][1]).abs().max() > 0.1


def test_forward_flops_are_those_of_the_matrices_and_of_causal_attention():
    for changes in FAMILIES.values():
        model = make_model(**changes)
        config, lengths = model.config, torch.tensor([7.0, 300.0])
        linears = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear))
        pairs = lengths**2 / 2  # query and key, two products of 2 D FLOPs each
        attention = config.num_hidden_layers * config.num_attention_heads * pairs * 4 * config.head_dim
        torch.testing.assert_close(forward_flops(config, lengths), 2 * linears * lengths + attention)
        head = forward_flops(config, lengths, labels=11) - forward_flops(config, lengths)
        torch.testing.assert_close(head, torch.full((2,), 2.0 * 11 * model.head_weight.numel()))

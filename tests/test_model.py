"""Attention and the decoder against naive versions; what config.json may say, and what is refused by name."""

import json
import math
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from redi.attention import cached_attention, packed_attention
from redi.losses import token_logps
from redi.model import CausalLM, ModelConfig, apply_rope, rope_frequencies
from tests.tiny import QWEN2, randomize

VOCAB = 123
LLAMA3_SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "qwen2": {},
    "qwen2 untied": {"tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "head_dim": 14},
    "llama": {"model_type": "llama", "tie_word_embeddings": False, "rope_scaling": LLAMA3_SCALING},
    "llama without gqa": {"model_type": "llama", "num_key_value_heads": None},
}


def make_config(**changes) -> ModelConfig:
    return ModelConfig.from_dict({**QWEN2, "vocab_size": VOCAB, **changes})


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
    smooth = (context / wavelength - scaling["low_freq_factor"]) / (
        scaling["high_freq_factor"] - scaling["low_freq_factor"]
    )
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
    keys, values = (torch.randn(3, 2, slots, size, generator=generator) for _ in range(2))
    q = torch.randn(3, 6, size, generator=generator)
    out = cached_attention(q, keys, values, torch.tensor(lengths))
    for i, n in enumerate(lengths):
        whole_q = torch.cat([torch.zeros(n - 1, 6, size), q[i : i + 1]])
        k, v = (x[i, :, :n].transpose(0, 1) for x in (keys, values))
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


def test_a_sequence_does_not_see_its_neighbours():
    model = make_model()
    inputs = packed_inputs()
    before = model(**inputs)
    inputs["input_ids"][:11] = (inputs["input_ids"][:11] + 1) % VOCAB
    after = model(**inputs)
    assert torch.equal(before[11:], after[11:]) and not torch.equal(before[:11], after[:11])


def test_a_token_does_not_see_what_follows_it():
    model = make_model()
    inputs = packed_inputs((20,))
    before = model(**inputs)
    inputs["input_ids"][13] = (inputs["input_ids"][13] + 1) % VOCAB
    after = model(**inputs)
    torch.testing.assert_close(before[:13], after[:13], atol=1e-6, rtol=0)
    assert not torch.allclose(before[13:], after[13:], atol=1e-3)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_gradient_checkpointing_changes_nothing(family):
    results = []
    for checkpointing in (False, True):
        model = make_model(**FAMILIES[family])
        model.gradient_checkpointing = checkpointing
        calls = []
        model.model.layers[1].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
        logps = model(**packed_inputs())
        (logps**2).sum().backward()
        assert len(calls) == (2 if checkpointing else 1)
        results.append([logps.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_label_positions_given_or_found_are_the_same():
    model, inputs = make_model(), packed_inputs()
    positions = (inputs["labels"] != -100).nonzero().squeeze(1)
    assert torch.equal(model(**inputs), model(**inputs, label_positions=positions))


def test_logits_are_fp32_also_from_bf16_weights():
    model = make_model().bfloat16()
    hidden = torch.randn(5, 48).bfloat16()
    logits = model.logits(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ model.head_weight.float().t())


def test_parameter_names_are_those_of_hugging_face_checkpoints():
    names = dict(make_model(tie_word_embeddings=False).named_parameters())
    layer = {
        f"model.layers.0.{name}"
        for name in (
            "input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
            "mlp.down_proj.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
            "self_attn.o_proj.weight", "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias",
        )
    }
    assert {name for name in names if ".layers.0." in name} == layer
    assert {name for name in names if ".layers." not in name} == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
    }
    tied = dict(make_model().named_parameters())
    assert "lm_head.weight" not in tied
    qwen3 = dict(make_model(model_type="qwen3").named_parameters())
    assert "model.layers.0.self_attn.q_norm.weight" in qwen3 and "model.layers.0.self_attn.q_proj.bias" not in qwen3


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
    config = make_config()
    x = torch.ones(2, 1, config.head_dim, dtype=torch.bfloat16)
    angles = torch.tensor([[[30000.0]], [[30001.0]]]) * rope_frequencies(config)
    rotated = apply_rope(x, angles.cos(), angles.sin())
    assert rotated.dtype == torch.bfloat16
    model = make_model().bfloat16()
    ids, attended = torch.tensor([5, 5]), []

    def attend(layer, q, k, v):
        attended.append(k)
        return torch.zeros_like(q)

    model.hidden(ids, torch.tensor([30000, 30001]), attend)
    assert (attended[0][0] - attended[0][1]).abs().max() > 0.1


# config.json


def test_both_spellings_of_rope_give_the_same_config():
    plain = {key: value for key, value in QWEN2.items() if key != "rope_theta"} | {"vocab_size": VOCAB}
    old = ModelConfig.from_dict({**plain, "rope_theta": 300000.0})
    new = ModelConfig.from_dict({**plain, "rope_parameters": {"rope_type": "default", "rope_theta": 300000.0}})
    both = ModelConfig.from_dict({**plain, "rope_theta": 300000.0, "rope_scaling": None,
                                  "rope_parameters": {"rope_type": "default", "rope_theta": 300000.0}})
    assert replace(old, raw={}) == replace(new, raw={}) == replace(both, raw={}) and old.rope_theta == 300000.0
    scaled_old = ModelConfig.from_dict({**plain, "rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING})
    oldest = {("type" if key == "rope_type" else key): value for key, value in LLAMA3_SCALING.items()}
    scaled_oldest = ModelConfig.from_dict({**plain, "rope_theta": 5e5, "rope_scaling": oldest})
    scaled_new = ModelConfig.from_dict({**plain, "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 5e5}})
    assert replace(scaled_old, raw={}) == replace(scaled_oldest, raw={}) == replace(scaled_new, raw={})
    assert scaled_old.rope_theta == 5e5 and scaled_old.rope_scaling["factor"] == 8.0


def test_spellings_that_disagree_are_refused():
    with pytest.raises(ValueError, match="rope_theta is 10000.0 but rope_parameters.rope_theta is 300000.0"):
        make_config(rope_parameters={"rope_type": "default", "rope_theta": 300000.0})


def test_to_dict_reads_back_as_the_same_config_in_both_spellings():
    config = make_config(model_type="llama", rope_scaling=LLAMA3_SCALING, rope_theta=5e5, eos_token_id=[7, 8])
    raw = json.loads(json.dumps(config.to_dict(torch.bfloat16)))
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 5e5
    assert raw["rope_scaling"]["rope_type"] == raw["rope_parameters"]["rope_type"] == "llama3"
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16" and raw["architectures"] == ["LlamaForCausalLM"]
    assert raw["eos_token_id"] == [7, 8]  # keys we do not know survive
    for other_spelling in (("rope_theta", "rope_scaling"), ("rope_parameters",)):
        other = {key: value for key, value in raw.items() if key not in other_spelling}
        assert replace(ModelConfig.from_dict(other), raw={}) == replace(config, raw={})


def test_overrides_replace_the_values_in_the_file():
    raw = {**QWEN2, "vocab_size": VOCAB}
    config = ModelConfig.from_dict(raw, rope_theta=300000.0, max_position_embeddings=32768)
    assert config.rope_theta == 300000.0 and config.max_position_embeddings == 32768
    assert config.to_dict(torch.float32)["rope_parameters"]["rope_theta"] == 300000.0
    assert config.to_dict(torch.float32)["max_position_embeddings"] == 32768


def test_sizes_left_out_take_their_defaults():
    raw = {**QWEN2, "vocab_size": VOCAB}
    del raw["num_key_value_heads"], raw["rope_theta"], raw["rms_norm_eps"], raw["tie_word_embeddings"]
    config = ModelConfig.from_dict(raw)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (6, 8, 10000.0)
    assert config.rms_norm_eps == 1e-6 and not config.tie_word_embeddings


REFUSED = [
    ({"model_type": "mixtral"}, "model_type is 'mixtral'; supported are qwen2, qwen3, llama"),
    ({"model_type": None}, "model_type is None"),
    ({"model_type": ["qwen2"]}, "model_type is"),
    ({"use_sliding_window": True}, "use_sliding_window is True, which is not supported"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .*sliding_attention"),
    ({"layer_types": 3}, "layer_types"),
    ({"num_experts": 60}, "num_experts is 60"),
    ({"num_local_experts": 8}, "num_experts|num_local_experts"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .*gptq"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"model_type": "llama", "attention_bias": True}, "attention_bias is True"),
    ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is True"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type is 'linear'"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
    ({"rope_scaling": {**LLAMA3_SCALING, "factor": 0}}, "factor is 0; expected"),
    ({"rope_scaling": {**LLAMA3_SCALING, "low_freq_factor": 4.0}}, "low_freq_factor must be below"),
    ({"rope_theta": -1.0}, "rope_theta is -1.0; expected a positive number"),
    ({"rope_theta": math.nan}, "rope_theta is nan"),
    ({"rope_theta": "1e6"}, "rope_theta is '1e6'"),
    ({"rms_norm_eps": None}, "rms_norm_eps is None"),
    ({"hidden_size": 10**12}, "hidden_size is 1000000000000; expected a whole number from 1 to 65536"),
    ({"vocab_size": 10**15}, "vocab_size is"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"num_hidden_layers": -3}, "num_hidden_layers is -3"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"head_dim": 10**9}, "head_dim is 1000000000"),
    ({"head_dim": 7}, "head_dim is 7; rotary embeddings need an even number"),
    ({"intermediate_size": 1.5}, "intermediate_size is 1.5"),
    ({"intermediate_size": True}, "intermediate_size is True"),
    ({"vocab_size": "many"}, "vocab_size is 'many'"),
    ({"hidden_size": None}, "hidden_size is None"),
    ({"num_key_value_heads": 4}, "num_attention_heads must be a multiple of num_key_value_heads"),
    ({"max_position_embeddings": None}, "max_position_embeddings is None"),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=lambda x: str(x)[:60])
def test_what_is_not_supported_is_refused_by_name(changes, message):
    started = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        make_config(**changes)
    assert time.perf_counter() - started < 5  # and before any memory is taken


def test_switches_that_are_off_are_accepted():
    make_config(use_sliding_window=False, sliding_window=4096, max_window_layers=28, quantization_config=None,
                layer_types=["full_attention"] * 3, rope_scaling=None, hidden_act="silu", num_experts=None)


def test_matmul_parameters_are_those_of_the_matrices():
    for changes in FAMILIES.values():
        model = make_model(**changes)
        linears = [m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
        assert model.config.matmul_parameters() == (sum(linears), model.head_weight.numel())

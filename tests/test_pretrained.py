"""Model directories in and out: config.json in both spellings, weights, and what is refused by name."""

import json
import math
import os
import shutil
import stat
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from redi.hub import weights as pretrained
from redi.hub.config import config_json, load_config, parse_config
from redi.hub.weights import load_pretrained, save_pretrained, weights_digest
from redi.model import CausalLM
from redi.tokenizer import Tokenizer
from tests import tiny
from tests.test_model import LLAMA3_SCALING, VOCAB, make_config
from tests.tiny import QWEN2

SCALED = {"model_type": "llama", "rope_theta": 500000.0, "tie_word_embeddings": False, "rope_scaling": LLAMA3_SCALING}


@pytest.fixture
def directory(tmp_path):
    tiny.write_model(tmp_path / "model")
    return tmp_path / "model"


def same_weights(a, b) -> bool:
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read(path):
    return json.loads(path.read_text())


# config.json


def test_both_spellings_of_rope_give_the_same_config():
    plain = {key: value for key, value in QWEN2.items() if key != "rope_theta"} | {"vocab_size": VOCAB}
    old = parse_config({**plain, "rope_theta": 300000.0})
    new = parse_config({**plain, "rope_parameters": {"rope_type": "default", "rope_theta": 300000.0}})
    both = parse_config({**plain, "rope_theta": 300000.0, "rope_scaling": None,
                                  "rope_parameters": {"rope_type": "default", "rope_theta": 300000.0}})
    assert replace(old, raw={}) == replace(new, raw={}) == replace(both, raw={}) and old.rope_theta == 300000.0
    scaled_old = parse_config({**plain, "rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING})
    oldest = {("type" if key == "rope_type" else key): value for key, value in LLAMA3_SCALING.items()}
    scaled_oldest = parse_config({**plain, "rope_theta": 5e5, "rope_scaling": oldest})
    scaled_new = parse_config({**plain, "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 5e5}})
    assert replace(scaled_old, raw={}) == replace(scaled_oldest, raw={}) == replace(scaled_new, raw={})
    assert scaled_old.rope_theta == 5e5 and scaled_old.rope_scaling["factor"] == 8.0


def test_rope_scaling_beside_default_rope_parameters_applies_as_in_transformers():
    for parameters in (DEFAULT_ROPE, {"rope_type": "default"}, {}, None, LLAMA3_SCALING):
        config = make_config(model_type="llama", rope_parameters=parameters, rope_scaling=LLAMA3_SCALING)
        assert config.rope_scaling["factor"] == 8.0 and config.rope_theta == 10000.0
    for scaling in (None, {}):
        assert make_config(rope_parameters=LLAMA3_SCALING, rope_scaling=scaling).rope_scaling["factor"] == 8.0


def test_config_json_reads_back_as_the_same_config_in_both_spellings():
    config = make_config(model_type="llama", rope_scaling=LLAMA3_SCALING, rope_theta=5e5, eos_token_id=[7, 8])
    raw = json.loads(json.dumps(config_json(config, torch.bfloat16)))
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 5e5
    assert raw["rope_scaling"]["rope_type"] == raw["rope_parameters"]["rope_type"] == "llama3"
    assert raw["dtype"] == raw["torch_dtype"] == "bfloat16" and raw["architectures"] == ["LlamaForCausalLM"]
    assert raw["eos_token_id"] == [7, 8]  # keys we do not know survive
    for other_spelling in (("rope_theta", "rope_scaling"), ("rope_parameters",)):
        other = {key: value for key, value in raw.items() if key not in other_spelling}
        assert replace(parse_config(other), raw={}) == replace(config, raw={})


def test_sizes_left_out_take_their_defaults():
    raw = {**QWEN2, "vocab_size": VOCAB}
    del raw["num_key_value_heads"], raw["rope_theta"], raw["rms_norm_eps"], raw["tie_word_embeddings"]
    config = parse_config(raw)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (6, 8, 10000.0)
    assert config.rms_norm_eps == 1e-6 and not config.tie_word_embeddings


DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
REFUSED = [
    ({"model_type": "mixtral"}, "model_type is 'mixtral'; supported are qwen2, qwen3, llama"),
    ({"model_type": None}, "model_type is None"),
    ({"model_type": ["qwen2"]}, "model_type is"),
    ({"use_sliding_window": True}, "use_sliding_window is True, which is not supported"),
    ({"use_sliding_window": "false"}, "use_sliding_window is 'false'; expected true or false"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; expected true or false"),
    ({"tie_word_embeddings": [True]}, "tie_word_embeddings is"),
    ({"model_type": "llama", "mlp_bias": "no"}, "mlp_bias is 'no'"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .*sliding_attention"),
    ({"layer_types": 3}, "layer_types"),
    ({"num_experts": 60}, "num_experts is 60"),
    ({"num_local_experts": 8}, "num_experts|num_local_experts"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .*gptq"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"model_type": "llama", "attention_bias": True}, "attention_bias is True"),
    ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is True"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type is 'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling.rope_type is 'linear'"),
    ({"rope_scaling": {"factor": 4.0}}, "rope_scaling.rope_type is missing"),
    ({"rope_scaling": {"type": "linear", "rope_type": "default"}}, "rope_scaling.rope_type is 'default' and 'linear'"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_parameters": DEFAULT_ROPE, "rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type is 'dynamic'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "rope_scaling": {"rope_type": "default"}}, "'yarn'"),
    ({"rope_parameters": LLAMA3_SCALING, "rope_scaling": {"rope_type": "default"}}, "must agree"),
    ({"rope_parameters": LLAMA3_SCALING, "rope_scaling": {**LLAMA3_SCALING, "factor": 2.0}},
     "rope_parameters is .* but rope_scaling is .*must agree"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
     "rope_parameters.full_attention is .*not supported"),
    ({"rope_parameters": {"sliding_attention": DEFAULT_ROPE, "full_attention": DEFAULT_ROPE}},
     "rope_parameters.sliding_attention is"),
    ({"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
    ({"rope_parameters": {**DEFAULT_ROPE, "rope_theta": 3e5}}, "rope_theta is 10000.0 but rope_parameters.rope_theta"),
    ({"rope_scaling": {"rope_type": "default", "rope_theta": 3e5}}, "but rope_scaling.rope_theta is 300000.0"),
    ({"rope_scaling": LLAMA3_SCALING, "original_max_position_embeddings": 9}, "position_embeddings is 9 but"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: low_freq_factor is None"),
    ({"rope_scaling": {**LLAMA3_SCALING, "factor": 0}}, "factor is 0; expected"),
    ({"rope_scaling": {**LLAMA3_SCALING, "low_freq_factor": 4.0}}, "low_freq_factor must be below"),
    ({"rope_theta": -1.0}, "rope_theta is -1.0; expected a positive number"),
    ({"rope_theta": math.nan}, "rope_theta is nan"),
    ({"rope_theta": "1e6"}, "rope_theta is '1e6'"),
    ({"rms_norm_eps": None}, "rms_norm_eps is None"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"num_hidden_layers": -3}, "num_hidden_layers is -3"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
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
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_switches_that_are_off_are_accepted():
    make_config(use_sliding_window=False, sliding_window=4096, max_window_layers=28, quantization_config=None,
                layer_types=["full_attention"] * 3, rope_scaling=None, hidden_act="silu", num_experts=None,
                attention_bias=None, partial_rotary_factor=1.0)
    make_config(rope_parameters={**DEFAULT_ROPE, "factor": 1.0, "partial_rotary_factor": None})

# Directories


@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen3", "head_dim": 14}, SCALED])
def test_round_trip(tmp_path, changes):
    model = tiny.write_model(tmp_path / "first", **changes)
    loaded = load_pretrained(tmp_path / "first")
    assert same_weights(model, loaded)
    save_pretrained(loaded, tmp_path / "second", Tokenizer.from_pretrained(tmp_path / "first"))
    for name in os.listdir(tmp_path / "first"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    assert sorted(os.listdir(tmp_path / "first")) == sorted(os.listdir(tmp_path / "second"))


def test_files_of_a_saved_directory(directory):
    config, generation = read(directory / "config.json"), read(directory / "generation_config.json")
    assert config["model_type"] == "qwen2" and config["dtype"] == config["torch_dtype"] == "float32"
    tokenizer = Tokenizer.from_pretrained(directory)
    assert generation["eos_token_id"] == tokenizer.stop_ids == [2, 0]  # <|im_end|>, <|endoftext|>
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")  # tied: no second copy
    mode = stat.S_IMODE((directory / "model.safetensors").stat().st_mode)
    assert mode & 0o444 == 0o444, oct(mode)  # safetensors alone would write 0600


def test_generation_settings_of_the_start_survive(directory, tmp_path):
    (directory / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": 99, "top_p": 0.8}')
    save_pretrained(load_pretrained(directory), tmp_path / "out", Tokenizer.from_pretrained(directory))
    saved = read(tmp_path / "out" / "generation_config.json")
    assert saved["temperature"] == 0.7 and saved["top_p"] == 0.8 and 2 in saved["eos_token_id"]


def test_the_chat_template_in_use_is_saved_also_where_the_start_has_none(directory, tmp_path):
    (directory / "tokenizer_config.json").write_text("{}")
    start = Tokenizer.from_pretrained(directory)
    assert any("no chat template" in notice for notice in start.notices)
    save_pretrained(load_pretrained(directory), tmp_path / "out", start)
    saved = Tokenizer.from_pretrained(tmp_path / "out")
    assert saved.chat_template == start.chat_template and saved.stop_ids == start.stop_ids and not saved.notices
    save_pretrained(load_pretrained(directory), tmp_path / "again", saved)
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == start.chat_template


def test_chat_template_file_is_copied(directory, tmp_path):
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|im_end|>")
    save_pretrained(load_pretrained(directory), tmp_path / "out", Tokenizer.from_pretrained(directory))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}<|im_end|>"


def test_bf16_in_and_out(directory, tmp_path):
    model = load_pretrained(directory, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    save_pretrained(model, tmp_path / "a")
    save_pretrained(load_pretrained(directory), tmp_path / "b", dtype=torch.bfloat16)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert read(tmp_path / "b" / "config.json")["dtype"] == "bfloat16"
    again = load_pretrained(tmp_path / "b", dtype=torch.float32)
    assert all(torch.equal(a, b.float()) for a, b in zip(again.parameters(), model.parameters()))


def test_large_models_are_split_over_files(directory, tmp_path, monkeypatch):
    model = load_pretrained(directory)
    monkeypatch.setattr(pretrained, "SHARD_BYTES", 70_000)  # of 270 kB; less than the embedding
    save_pretrained(model, tmp_path / "sharded")
    files = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) >= 4 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = read(tmp_path / "sharded" / "model.safetensors.index.json")
    assert set(index["weight_map"]) == {name for name, _ in model.named_parameters()}
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in model.parameters())
    for name in files:
        tensors = load_file(tmp_path / "sharded" / name)
        assert {key for key, file in index["weight_map"].items() if file == name} == set(tensors)
        assert len(tensors) == 1 or sum(4 * t.numel() for t in tensors.values()) <= 70_000
    assert same_weights(model, load_pretrained(tmp_path / "sharded"))


def test_saving_again_leaves_no_weights_of_the_earlier_layout(directory, monkeypatch):
    """A single file left beside a new index, or shards beside a single file, would be loaded in its place."""
    tokenizer = Tokenizer.from_pretrained(directory)
    other = load_pretrained(directory)
    tiny.randomize(other, seed=5)
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "SHARD_BYTES", 70_000)
        save_pretrained(other, directory, tokenizer)
    assert same_weights(other, load_pretrained(directory))
    tiny.randomize(other, seed=6)
    save_pretrained(other, directory, tokenizer)
    assert same_weights(other, load_pretrained(directory))


def test_rope_and_context_overrides_are_loaded_and_saved(directory, tmp_path):
    model = load_pretrained(directory, rope_theta=300000.0, max_position_embeddings=32768)
    save_pretrained(model, tmp_path / "out")
    config = load_config(tmp_path / "out")
    assert config.rope_theta == 300000.0 and config.max_position_embeddings == 32768
    raw = read(tmp_path / "out" / "config.json")
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 300000.0


def test_a_copy_of_the_tied_head_and_old_buffers_in_a_file_are_passed_over(directory, capsys):
    expected = load_pretrained(directory)
    change(directory, **{"lm_head.weight": expected.model.embed_tokens.weight.detach().clone(),
              "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    loaded = load_pretrained(directory)
    assert same_weights(expected, loaded) and loaded.config.tie_word_embeddings and capsys.readouterr().out == ""


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("row", [0, -1])
def test_another_head_than_the_embedding_is_loaded_and_saved(directory, tmp_path, capsys, monkeypatch, row, shards):
    model = load_pretrained(directory)
    head = model.model.embed_tokens.weight.detach().clone()
    head[row, 0] += 1
    change(directory, **{"lm_head.weight": head.to(torch.float64)})
    if shards:
        monkeypatch.setattr(pretrained, "SHARD_BYTES", 70_000)
    loaded = load_pretrained(directory)
    notice, = capsys.readouterr().out.splitlines()
    assert "lm_head.weight" in notice and str(directory) in notice
    assert torch.equal(loaded.head_weight, head) and not loaded.config.tie_word_embeddings
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    save_pretrained(loaded, tmp_path / "saved")
    assert read(tmp_path / "saved" / "config.json")["tie_word_embeddings"] is False
    assert same_weights(loaded, load_pretrained(tmp_path / "saved")) and capsys.readouterr().out == ""


@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen3", "head_dim": 14}, SCALED])
def test_parameter_shapes_are_those_of_the_model(changes):
    config = make_config(**changes)
    shapes = {name: tuple(parameter.shape) for name, parameter in CausalLM(config).named_parameters()}
    assert dict(pretrained.parameter_shapes(config)) == shapes


def change(directory, **changed):
    """Rewrite the weight file with these tensors; None takes one out."""
    tensors = load_file(directory / "model.safetensors") | changed
    save_file({key: t for key, t in tensors.items() if t is not None}, directory / "model.safetensors")


def write_index(directory, value):
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    (directory / "model.safetensors.index.json").write_text(value if isinstance(value, str) else json.dumps(value))


def edit_config(directory, **changed):
    (directory / "config.json").write_text(json.dumps(read(directory / "config.json") | changed))


def resize(directory, fraction):
    path = directory / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * fraction))


DAMAGED = {
    "missing tensor": (lambda d: change(d, **{"model.norm.weight": None}), "the weights lack 'model.norm.weight'"),
    "extra tensor": (lambda d: change(d, **{"model.layers.3.mlp.up_proj.weight": torch.ones(2)}),
                     "model.safetensors: unexpected tensor 'model.layers.3.mlp.up_proj.weight'"),
    "wrong shape": (lambda d: change(d, **{"model.norm.weight": torch.ones(47)}),
                    r"'model.norm.weight' has shape \(47,\), but config.json asks for \(48,\)"),
    "transposed": (lambda d: change(d, **{"model.layers.0.mlp.up_proj.weight": torch.ones(48, 80)}),
                   r"\(48, 80\).*\(80, 48\)"),
    "integers": (lambda d: change(d, **{"model.norm.weight": torch.ones(48, dtype=torch.int8)}),
                 "'model.norm.weight' has dtype I8; expected a float"),
    "float8": (lambda d: change(d, **{"model.norm.weight": torch.ones(48).to(torch.float8_e4m3fn)}), "dtype F8_E4M3"),
    "cut off": (lambda d: resize(d, 0.7), "model.safetensors: truncated or corrupt"),
    "empty": (lambda d: resize(d, 0), "model.safetensors: truncated or corrupt"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model has no weights"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json cannot be read: No such file"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "config.json: expected a JSON object"),
    "config is cut off": (lambda d: (d / "config.json").write_text('{"model_type"'), "config.json: not valid JSON"),
    "config asks for more": (lambda d: edit_config(d, num_hidden_layers=4), "the weights lack 'model.layers.3"),
    "config asks for less": (lambda d: edit_config(d, num_hidden_layers=2), "unexpected tensor 'model.layers.2"),
    "index points up": (lambda d: write_index(d, {"weight_map": {"model.norm.weight": "../secret.safetensors"}}),
                        "index.json: '../secret.safetensors' is not the name of a file"),
    "index points away": (lambda d: write_index(d, {"weight_map": {"a": "/etc/passwd"}}), "'/etc/passwd' is not the"),
    "index points at ..": (lambda d: write_index(d, {"weight_map": {"a": ".."}}), "'..' is not the name"),
    "index names nothing": (lambda d: write_index(d, {"weight_map": {"a": ""}}), "'' is not the name"),
    "index names no file": (lambda d: write_index(d, {"weight_map": {"a": "b.safetensors"}}),
                            "b.safetensors: cannot be read: No such file"),
    "index without map": (lambda d: write_index(d, {"metadata": {}}), "expected an object 'weight_map'"),
    "index with numbers": (lambda d: write_index(d, {"weight_map": {"a": 3}}), "expected an object 'weight_map'"),
    "index is not JSON": (lambda d: write_index(d, "{"), "index.json: not valid JSON"),
    "index lists too little": (lambda d: write_index(d, {"weight_map": {}}), "the weights lack"),
    "a tensor in two files": (lambda d: shutil.copy(d / "model.safetensors", d / "b.safetensors") and write_index(
        d, {"weight_map": {"a": "b.safetensors", "b": "model-00001-of-00001.safetensors"}}),
        "model-00001-of-00001.safetensors: '.*' is also in b.safetensors"),
    "an adapter": (lambda d: (d / "adapter_config.json").write_text("{}"), "adapter_config.json: adapters are not"),
    "a tied head of another shape": (lambda d: change(d, **{"lm_head.weight": torch.ones(3, 48)}),
                                     r"'lm_head.weight' has shape"),
    "half a million wide": (lambda d: edit_config(d, hidden_size=2**19), "'model.embed_tokens.weight' has shape"),
    "a quadrillion words": (lambda d: edit_config(d, vocab_size=10**15), "'model.embed_tokens.weight' has shape"),
    "a billion layers": (lambda d: edit_config(d, num_hidden_layers=10**9), "the weights lack 'model.layers.3"),
    "heads of a trillion channels": (lambda d: edit_config(d, head_dim=10**12), "has shape"),
    "more than 64 bits": (lambda d: edit_config(d, intermediate_size=10**30), "has shape"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_directories_are_refused_by_name(directory, damage):
    apply, message = DAMAGED[damage]
    apply(directory)
    with pytest.raises((ValueError, OSError), match=message) as error:
        load_pretrained(directory)
    assert "\n" not in str(error.value) and str(directory) in str(error.value)


def test_weights_digest_is_that_of_weights_and_config(directory):
    before = weights_digest(directory)
    (directory / "generation_config.json").write_text("{}")
    assert weights_digest(directory) == before
    edit_config(directory, rope_theta=20000.0, rope_parameters=None)
    config_changed = weights_digest(directory)
    change(directory, **{"model.norm.weight": torch.ones(48) * 2})
    assert len({before, config_changed, weights_digest(directory)}) == 3

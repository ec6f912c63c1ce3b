"""Model directories in and out, what is refused in them, and training state that commits whole or not at all."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from redi import checkpoint
from redi.checkpoint import load_checkpoint, load_config, load_pretrained, save_checkpoint, save_pretrained
from redi.model import CausalLM, ModelConfig
from redi.tokenizer import Tokenizer
from tests import tiny

SCALED = {
    "model_type": "llama", "rope_theta": 500000.0, "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 64},
}


@pytest.fixture
def directory(tmp_path):
    tiny.write_model(tmp_path / "model")
    return tmp_path / "model"


def same_weights(a, b) -> bool:
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read(path):
    return json.loads(path.read_text())


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
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["model_type"] == "qwen2"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["dtype"] == config["torch_dtype"] == "float32"
    tokenizer = Tokenizer.from_pretrained(directory)
    assert generation["eos_token_id"] == tokenizer.stop_ids == [2, 0]  # <|im_end|>, <|endoftext|>
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")  # tied: no second copy
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (directory / name).is_file()
    mode = stat.S_IMODE((directory / "model.safetensors").stat().st_mode)
    assert mode & 0o444 == 0o444, oct(mode)  # safetensors alone would write 0600


def test_generation_settings_of_the_start_survive(directory, tmp_path):
    (directory / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": 99, "top_p": 0.8}')
    save_pretrained(load_pretrained(directory), tmp_path / "out", Tokenizer.from_pretrained(directory))
    saved = read(tmp_path / "out" / "generation_config.json")
    assert saved["temperature"] == 0.7 and saved["top_p"] == 0.8 and 2 in saved["eos_token_id"]


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
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 70_000)  # of 270 kB; less than the embedding
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
        patch.setattr(checkpoint, "SHARD_BYTES", 70_000)
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


def test_tied_head_and_old_buffers_in_a_file_are_passed_over(directory):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    expected = load_pretrained(directory)
    save_file(tensors, path)
    assert same_weights(expected, load_pretrained(directory))


def change(**changed):
    """A function that rewrites a directory's weight file with these tensors; None takes one out."""
    def apply(directory):
        tensors = load_file(directory / "model.safetensors") | changed
        save_file({key: t for key, t in tensors.items() if t is not None}, directory / "model.safetensors")

    return apply


def write_index(value):
    def apply(directory):
        (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
        text = value if isinstance(value, str) else json.dumps(value)
        (directory / "model.safetensors.index.json").write_text(text)

    return apply


def edit_config(**changed):
    def apply(directory):
        raw = read(directory / "config.json") | changed
        (directory / "config.json").write_text(json.dumps(raw))

    return apply


def resize(fraction):
    def apply(directory):
        path = directory / "model.safetensors"
        os.truncate(path, int(path.stat().st_size * fraction))

    return apply


NORM = {"model.norm.weight": None}
DAMAGED = {
    "missing tensor": (change(**NORM), "the weights lack 'model.norm.weight' .1 of 38"),
    "extra tensor": (change(**{"model.layers.3.mlp.up_proj.weight": torch.ones(2)}),
                     "model.safetensors: unexpected tensor 'model.layers.3.mlp.up_proj.weight'"),
    "wrong shape": (change(**{"model.norm.weight": torch.ones(47)}),
                    r"'model.norm.weight' has shape \(47,\), but config.json asks for \(48,\)"),
    "transposed": (change(**{"model.layers.0.mlp.up_proj.weight": torch.ones(48, 80)}), r"\(48, 80\).*\(80, 48\)"),
    "integers": (change(**{"model.norm.weight": torch.ones(48, dtype=torch.int8)}),
                 "'model.norm.weight' has dtype I8; expected a float"),
    "float8": (change(**{"model.norm.weight": torch.ones(48).to(torch.float8_e4m3fn)}), "dtype F8_E4M3"),
    "cut off": (resize(0.7), "model.safetensors is not a whole safetensors file"),
    "empty": (resize(0), "model.safetensors is not a whole safetensors file"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model holds no weights"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json does not exist"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "config.json: expected a JSON object"),
    "config is cut off": (lambda d: (d / "config.json").write_text('{"model_type"'), "config.json is not valid JSON"),
    "config is not text": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is not valid JSON"),
    "config nests deeply": (lambda d: (d / "config.json").write_text('{"a":' * 200_000), "config.json is not valid"),
    "config has a huge number": (lambda d: (d / "config.json").write_text('{"hidden_size": ' + "9" * 5000 + "}"),
                                 "config.json is not valid"),
    "config asks for more": (edit_config(num_hidden_layers=4), "the weights lack 'model.layers.3"),
    "config asks for less": (edit_config(num_hidden_layers=2), "unexpected tensor 'model.layers.2"),
    "index points up": (write_index({"weight_map": {"model.norm.weight": "../secret.safetensors"}}),
                        "index.json: the file name '../secret.safetensors' points outside the directory"),
    "index points away": (write_index({"weight_map": {"a": "/etc/passwd"}}), "'/etc/passwd' points outside"),
    "index points at ..": (write_index({"weight_map": {"a": ".."}}), "'..' points outside|is not a"),
    "index names nothing": (write_index({"weight_map": {"a": ""}}), "'' points outside|is not a"),
    "index names no file": (write_index({"weight_map": {"a": "b.safetensors"}}), "b.safetensors does not exist"),
    "index without map": (write_index({"metadata": {}}), "expected an object 'weight_map'"),
    "index with numbers": (write_index({"weight_map": {"a": 3}}), "expected an object 'weight_map'"),
    "index is not JSON": (write_index("{"), "index.json is not valid JSON"),
    "index lists too little": (write_index({"weight_map": {}}), "the weights lack"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_directories_are_refused_by_name(directory, damage):
    apply, message = DAMAGED[damage]
    apply(directory)
    with pytest.raises((ValueError, OSError), match=message) as error:
        load_pretrained(directory)
    assert "\n" not in str(error.value) and str(directory) in str(error.value)


def test_a_huge_model_without_its_weights_is_refused_before_memory_is_taken(directory):
    edit_config(vocab_size=2**22, hidden_size=2**16, intermediate_size=2**18, num_hidden_layers=512)(directory)
    with pytest.raises(ValueError, match="has shape"):
        load_pretrained(directory)


def test_weights_digest_is_that_of_weights_and_config(directory):
    before = checkpoint.weights_digest(directory)
    (directory / "generation_config.json").write_text("{}")
    assert checkpoint.weights_digest(directory) == before
    edit_config(rope_theta=20000.0, rope_parameters=None)(directory)
    config_changed = checkpoint.weights_digest(directory)
    change(**{"model.norm.weight": torch.ones(48) * 2})(directory)
    assert len({before, config_changed, checkpoint.weights_digest(directory)}) == 3


# Training state


def trained(seed=0, updates=2):
    """(model, AdamW) after a few updates with random gradients."""
    model = CausalLM(ModelConfig.from_dict({**tiny.QWEN2, "vocab_size": 101}))
    tiny.randomize(model, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return model, optimizer


def same_moments(a, b) -> bool:
    (model_a, optimizer_a), (model_b, optimizer_b) = a, b
    states = [
        [optimizer.state.get(p, {}) for p in model.parameters()]
        for model, optimizer in ((model_a, optimizer_a), (model_b, optimizer_b))
    ]
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(*states))


@pytest.mark.parametrize("updates", [0, 2])
def test_training_state_round_trip(tmp_path, updates):
    model, optimizer = trained(updates=updates)
    torch.manual_seed(7)
    path = save_checkpoint(tmp_path, model, optimizer, None, {"step": 12, "skipped": 3}, torch.float32)
    assert path == tmp_path / "step-000012" and os.listdir(tmp_path) == ["step-000012"]
    drawn = torch.rand(3)
    other, other_optimizer = trained(seed=1, updates=0)
    state = load_checkpoint(path, other, other_optimizer)
    assert state["step"] == 12 and state["skipped"] == 3
    assert same_weights(model, other) and same_moments((model, optimizer), (other, other_optimizer))
    assert torch.equal(torch.rand(3), drawn)
    for m, o in ((model, optimizer), (other, other_optimizer)):  # and goes on in the same way
        for parameter in m.parameters():
            parameter.grad = torch.ones_like(parameter)
        o.step()
    assert same_weights(model, other)
    assert same_weights(load_pretrained(path), trained(updates=updates)[0])  # a checkpoint is a model directory too


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    path = save_checkpoint(tmp_path, *trained(), None, {"step": 1}, torch.float32)
    files = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert files == {".safetensors", ".json"}


def test_newest_whole_checkpoint_is_found_and_damage_named(tmp_path, capsys):
    assert checkpoint.newest_checkpoint(tmp_path) is None
    assert checkpoint.newest_checkpoint(tmp_path / "absent") is None
    pair = trained()
    for step in (2, 10, 4):
        save_checkpoint(tmp_path, *pair, None, {"step": step}, torch.float32)
    for name in ("step-000099.partial", "step-7", "step-abcdef"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000098").write_text("a file")
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000002", "step-000004", "step-000010"]
    assert checkpoint.newest_checkpoint(tmp_path).name == "step-000010"
    assert capsys.readouterr().out == ""

    file = tmp_path / "step-000010" / "training_state" / "rank-00000-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert checkpoint.newest_checkpoint(tmp_path).name == "step-000004"
    assert "step-000010 is damaged and passed over: rank-00000-of-00001.safetensors does not match its checksum" in (
        capsys.readouterr().out
    )
    (tmp_path / "step-000004" / "training_state" / "rank-00000-of-00001.safetensors").unlink()
    assert checkpoint.newest_checkpoint(tmp_path).name == "step-000002"
    (tmp_path / "step-000002" / "training_state" / "state.json").unlink()
    with pytest.raises(ValueError, match="every checkpoint is damaged"):  # rather than begin anew, unasked
        checkpoint.newest_checkpoint(tmp_path)


@pytest.mark.parametrize("old, new", [('"step": 12', '"step": 13'), ('"skipped": 3', '"skipped": 2'),
                                      ('"updates": 2', '"updates": 3'), ('"world_size": 1', '"world_size": 2'),
                                      ("}", ""), ("{", "["), ('"sha256"', '"sha255"')])
def test_a_damaged_state_file_is_recognised(tmp_path, capsys, old, new):
    path = save_checkpoint(tmp_path, *trained(), None, {"step": 12, "skipped": 3}, torch.float32)
    file = path / "training_state" / "state.json"
    text = file.read_text()
    assert old in text and checkpoint.newest_checkpoint(tmp_path) == path
    file.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        checkpoint.newest_checkpoint(tmp_path)
    assert "step-000012 is damaged and passed over: " in capsys.readouterr().out


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    (tmp_path / "step-000004.partial" / "training_state").mkdir(parents=True)
    (tmp_path / "final.partial").mkdir()
    (tmp_path / "step-000002").mkdir()
    (tmp_path / "notes.txt").write_text("keep")
    checkpoint.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "step-000002"]


@pytest.mark.parametrize("call", range(1, 6))
def test_a_save_that_fails_leaves_the_earlier_checkpoints_as_they_were(tmp_path, monkeypatch, call):
    """The disk is full at the n-th file that is written."""
    pair = trained()
    save_checkpoint(tmp_path, *pair, None, {"step": 1}, torch.float32)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    calls = []

    def failing(write):
        def wrapped(*args, **options):
            calls.append(1)
            if len(calls) >= call:
                raise OSError(28, "No space left on device")
            return write(*args, **options)

        return wrapped

    monkeypatch.setattr(checkpoint, "save_file", failing(checkpoint.save_file))
    monkeypatch.setattr(checkpoint, "_write_json", failing(checkpoint._write_json))
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, *pair, None, {"step": 2}, torch.float32)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    assert save_checkpoint(tmp_path, *pair, None, {"step": 2}, torch.float32).is_dir()


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, *trained(seed=1), None, {"step": 3}, torch.float32)
    pair = trained(seed=2)
    path = save_checkpoint(tmp_path, *pair, None, {"step": 3}, torch.float32)
    assert same_weights(load_pretrained(path), pair[0])


def test_save_tensors_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    checkpoint.save_tensors({"a": torch.arange(3)}, tmp_path / "x.safetensors")
    assert checkpoint.load_tensors(tmp_path / "x.safetensors")["a"].tolist() == [0, 1, 2]
    monkeypatch.setattr(checkpoint.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        checkpoint.save_tensors({"a": torch.zeros(3)}, tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == ["x.safetensors"]
    assert checkpoint.load_tensors(tmp_path / "x.safetensors")["a"].tolist() == [0, 1, 2]

"""Training state that commits whole or not at all, and is found again exactly."""

import os

import pytest
import torch

from redi import files
from redi.training import checkpoint
from redi.hub import weights as pretrained
from redi.training.checkpoint import load_checkpoint, save_checkpoint
from redi.model import CausalLM
from redi.hub.config import parse_config
from redi.hub.weights import load_pretrained
from tests import tiny
from tests.test_pretrained import same_weights


def trained(seed=0, updates=2):
    """(model, AdamW) after a few updates with random gradients."""
    model = CausalLM(parse_config({**tiny.QWEN2, "vocab_size": 101}))
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
    for step in (2, 1_000_000, 4):  # seven digits
        save_checkpoint(tmp_path, *pair, None, {"step": step}, torch.float32)
    for name in ("step-000099.partial", "step-7", "step-abcdef"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000098").write_text("a file")
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-000002", "step-000004", "step-1000000"]
    assert checkpoint.newest_checkpoint(tmp_path).name == "step-1000000"
    assert capsys.readouterr().out == ""

    file = tmp_path / "step-1000000" / "training_state" / "rank-00000-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert checkpoint.newest_checkpoint(tmp_path).name == "step-000004"
    assert "step-1000000 is corrupt and skipped: rank-00000-of-00001.safetensors does not match its checksum" in (
        capsys.readouterr().out
    )
    (tmp_path / "step-000004" / "training_state" / "rank-00000-of-00001.safetensors").unlink()
    assert checkpoint.newest_checkpoint(tmp_path).name == "step-000002"
    (tmp_path / "step-000002" / "training_state" / "state.json").unlink()
    with pytest.raises(ValueError, match="every checkpoint is corrupt"):  # rather than begin anew, unasked
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
    with pytest.raises(ValueError, match="every checkpoint is corrupt"):
        checkpoint.newest_checkpoint(tmp_path)
    assert "step-000012 is corrupt and skipped: " in capsys.readouterr().out


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

    monkeypatch.setattr(pretrained, "save_file", failing(pretrained.save_file))
    for module in (checkpoint, pretrained):
        monkeypatch.setattr(module, "write_json", failing(files.write_json))
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


def test_what_was_moved_aside_is_restored_or_removed(tmp_path):
    """A process was killed between the two renames of replace_directory, or before the removal that follows them."""
    for name in ("best.replaced", "final.replaced", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    checkpoint.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["best.replaced", "final"]
    assert sorted(os.listdir(tmp_path)) == ["best", "final"]


def test_a_checkpoint_without_the_file_of_a_rank_is_not_committed(tmp_path, monkeypatch):
    """Another machine has written it to a file system of its own."""
    monkeypatch.setattr(checkpoint, "world_size", lambda: 2)
    monkeypatch.setattr(checkpoint, "all_gather_object", lambda value: [value, value])
    with pytest.raises(OSError, match="rank-00001-of-00002.safetensors is missing"):
        save_checkpoint(tmp_path, *trained(), None, {"step": 1}, torch.float32)
    assert os.listdir(tmp_path) == []

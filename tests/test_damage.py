"""Damage to files of a run that a later command reads is noticed, and told in one sentence that names the file."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import evaluate
from redi import data
from redi import files as cache
from redi.training import checkpoint
from redi.files import append_row, write_atomically
from redi.rows import TokenSettings
from redi.training.run import MetricsLog
from redi.tokenizer import Tokenizer
from tests import tiny
from tests.test_rows import write


def test_any_changed_byte_of_a_cached_array_is_noticed(tmp_path):
    path = tmp_path / "logps.safetensors"
    arrays = {"reference_logps": np.arange(6.0, dtype=np.float32).reshape(3, 2)}
    cache.save_arrays(path, arrays)
    whole, header = path.read_bytes(), 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            found, _ = cache.load_arrays(path)
        except ValueError as error:
            assert "logps.safetensors" in str(error)
        else:  # a letter of the header that nothing depends on
            assert at < header and found.keys() == arrays.keys()
            assert (found["reference_logps"] == arrays["reference_logps"]).all()
    save_file({"reference_logps": torch.zeros(3, 2)}, path)
    with pytest.raises(ValueError, match="logps.safetensors is corrupt .*delete it"):
        cache.load_arrays(path)


def test_any_changed_token_id_in_a_cache_is_noticed(tmp_path):
    tiny.write_tokenizer(tmp_path / "model")
    tiny.write_rows(tmp_path, examples=2)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "model")
    arguments = tmp_path / "pairs.jsonl", tokenizer, TokenSettings(True, 999, 999, 999), tmp_path
    first = data.load_dataset(*arguments)
    (file,) = tmp_path.glob("pairs.jsonl.tokens-*")
    ids = first.ids.tolist()  # read now: the file is mapped
    whole, start = file.read_bytes(), 8 + int.from_bytes(file.read_bytes()[:8], "little")
    for at in range(start, len(whole), 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=f"{file.name} is corrupt .*delete it"):
            data.load_dataset(*arguments)
    save_file({"lines": torch.zeros(2)}, file)
    for damaged in (file.read_bytes(), b"", b"\x10\0\0\0\0\0\0\0not a header....", whole[:-3]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{file.name} is corrupt .*delete it"):
            data.load_dataset(*arguments)
    file.write_bytes(whole)
    again = data.load_dataset(*arguments)
    assert again.digest == first.digest and again.ids.tolist() == ids


@pytest.mark.parametrize("steps, message", [
    ([1, 1], "line 2: step 1 after step 1"), ([1, 3, 2], "line 3: step 2 after step 3"),
    ([0, 0], "line 2: step 0 after step 0"), ([-1], "line 1: step -1 after"),
    ([1, None], "line 2: step None"), ([1, True], "line 2: step True"), (["1"], "line 1: step '1'"),
])  # fmt: skip
def test_a_log_whose_steps_do_not_rise_is_refused_and_kept(tmp_path, steps, message):
    path = write(tmp_path / "metrics.jsonl", *({"step": step} for step in steps))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"metrics.jsonl, {message}"):
        MetricsLog(path, 3)
    assert path.read_bytes() == before


def test_lines_that_a_log_lacks_are_told(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 4}\n{"step')
    MetricsLog(path, 3).write({"step": 4, "again": True})
    assert tiny.read_rows(path) == [{"step": 1}, {"step": 3}, {"step": 4, "again": True}]
    assert "metrics.jsonl lacks the lines of 1 of the 3 steps done" in capsys.readouterr().out


def test_leftovers_of_every_kind_are_removed_and_nothing_else(tmp_path):
    (tmp_path / "step-000002.partial").mkdir()
    for name in ("run.json.partial-123", "final.partial", "run.json", "notes.partial-draft"):
        (tmp_path / name).write_text("")
    checkpoint.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["notes.partial-draft", "run.json"]


# samples.jsonl


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    place = tmp_path_factory.mktemp("evaluated")
    tiny.write_model(place / "model", num_hidden_layers=1)
    problems = [{"id": f"p{i}", "problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(3)]
    write(place / "problems.jsonl", *problems)
    return place


def run_again(place):
    words = ["--model", place / "model", "--problems", place / "problems.jsonl", "--output", place / "out"]
    evaluate.main([*map(str, words), "--samples", "2", "--max-new-tokens", "5"])
    return next((place / "out").rglob("samples.jsonl"))


@pytest.mark.parametrize("changes, message", [
    ({"id": "p9"}, "line 2: id 'p9' is not among the problems"), ({"id": 3}, "line 2: 'id' is '3'"),
    ({"sample": "1"}, "line 2: 'sample' is '1'"), ({"sample": True}, "line 2: 'sample' is 'True'"),
    ({"response": None}, "line 2: 'response' is 'None'"), ({"correct": 1}, "line 2: 'correct' is '1'"),
    ({"tokens": 1.5}, "line 2: 'tokens' is '1.5'"), ({"finish_reason": []}, "line 2: 'finish_reason' is"),
    ({"sample": 0, "response": "other"}, "sample 0 of id 'p0' .*twice"),
])  # fmt: skip
def test_damaged_samples_are_named(evaluated, changes, message):
    path = run_again(evaluated)
    whole = path.read_bytes()
    lines = tiny.read_rows(path)
    lines[1].update(changes)
    write(path, *lines)
    before = path.read_bytes()
    try:
        with pytest.raises(ValueError, match=f"samples.jsonl.*{message}"):
            run_again(evaluated)
        assert path.read_bytes() == before
    finally:
        path.write_bytes(whole)


def test_a_score_in_the_file_is_not_believed(evaluated):
    path = run_again(evaluated)
    whole = path.read_bytes()
    better = whole.replace(b'"correct": false', b'"correct": true').replace(b'"answer": null', b'"answer": "1"')
    path.write_bytes(better)
    assert path.read_bytes() != whole
    assert run_again(evaluated).read_bytes() == whole
    assert json.loads((evaluated / "out" / "results.json").read_text())["results"][0]["pass@1"] == 0


# Messages


def test_a_full_disk_is_told_with_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        append_row("/dev/full", {"step": 1})
    with pytest.raises(OSError, match="No space left on device: '.*results.json'"):
        with write_atomically(tmp_path / "results.json") as file:
            with open("/dev/full", "w", buffering=1) as full:
                full.write("a line\n")
            file.write(b"{}")
    assert os.listdir(tmp_path) == []


def test_a_process_that_waits_for_a_dead_one_says_so(monkeypatch):
    def lost(group):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(evaluate.dist, "barrier", lost)
    with pytest.raises(ValueError, match="another process of this evaluation has ended"):
        evaluate.wait_for_all(None)


def test_odd_end_of_text_ids_are_passed_over(tmp_path):
    tiny.write_tokenizer(tmp_path)
    plain = Tokenizer.from_pretrained(tmp_path).stop_ids
    odd = {"eos_token_id": [-1, 2**80, True, 1.5, None, "2", 10**6]}
    (tmp_path / "generation_config.json").write_text(json.dumps(odd))
    assert Tokenizer.from_pretrained(tmp_path).stop_ids == plain

"""What a user may get wrong: one clear sentence, a non-zero exit, and nothing written or overwritten."""

import bz2
import gzip
import json
import lzma
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from redi import data
from redi import files as cache
from redi.files import read_jsonl
from redi.rows import TokenSettings, read_examples
from redi.tokenizer import CHATML_TEMPLATE, Tokenizer
from tests import tiny
from tests.test_pretrained import change, edit_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def place(tmp_path):
    tiny.write_model(tmp_path / "model")
    tiny.write_rows(tmp_path, examples=4)
    return tmp_path


def arguments(place, method="redi", **changes):
    """The command line; paths are below `place`, True is a flag without value."""
    data = Path("positives.jsonl" if method == "sft" else "pairs.jsonl")
    values = {"model": Path("model"), "data": data, "output": Path("out"), "batch-size": 4, "steps": 2, **changes}
    values = {key: place / value if isinstance(value, Path) else value for key, value in values.items()}
    pairs = [[f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)]) for key, value in values.items()]
    return [method] + [word for pair in pairs for word in pair]


def contents(place) -> dict:
    return {path.relative_to(place): path.read_bytes() for path in place.rglob("*")
            if path.is_file() and ".tokens-" not in path.name}


def refused(place, message, method="redi", **changes):
    """The command fails with the message, and leaves every file as it was and none beside them."""
    before = contents(place)
    with pytest.raises((ValueError, OSError), match=message) as error:
        train.main(arguments(place, method, **changes))
    assert "\n" not in str(error.value)
    assert contents(place) == before
    assert not (place / "out").exists() or os.listdir(place / "out") == []


# Rows


def row(**changes):
    full = {"prompt": [{"role": "user", "content": "1+2?"}], "chosen": [{"role": "assistant", "content": "3"}],
            "rejected": [{"role": "assistant", "content": "4"}], **changes}
    return {key: value for key, value in full.items() if value is not None}


def message(text, role="assistant"):
    return [{"role": role, "content": text}]


BAD_PAIRS = {
    "malformed": (b'{"prompt": ', "not valid JSON"),
    "trailing comma": (b'{"prompt": "a",}', "not valid JSON"),
    "two objects": (b"{} {}", "not valid JSON"),
    "not UTF-8": (b'{"prompt": "\xff\xfe"}', "not valid JSON"),
    "NUL bytes": (b"\0\0\0\0", "not valid JSON"),
    "nested deeply": (b'{"a":' * 100_000, "not valid JSON"),
    "a huge number": (b'{"prompt": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "a list": (b"[1, 2]", "expected a JSON object, found list"),
    "a string": (b'"text"', "expected a JSON object, found str"),
    "no chosen": (row(chosen=None), r"no key 'chosen' \(found prompt, rejected\)"),
    "no rejected": (row(rejected=None), "no key 'rejected'"),
    "one completion": ({"prompt": "a", "completion": "b"},
                       r"\(found completion, prompt\): a row of one completion, where a pair is expected"),
    "no prompt": (row(prompt=None), "no key 'prompt'"),
    "an empty object": ({}, r"no key 'chosen' \(found none\)"),
    "chosen equals rejected": (row(rejected=message("3")), "chosen and rejected are identical"),
    "strings without a common start": ({"chosen": "a", "rejected": "b"}, "no key 'prompt'.*no common start"),
    "an empty completion": (row(chosen=message("")), "a completion is empty"),
    "a blank completion": (row(rejected=message(" \n")), "a completion is empty"),
    "one is the start of the other": ({"chosen": "a b", "rejected": "a b c"}, "a completion is empty"),
    "only the prefill": (row(rejected=message("<think>\n")), None),
    "an empty prompt": (row(prompt="", chosen="a", rejected="b"), "the prompt or a completion has no tokens"),
    "no messages": (row(prompt=[]), "'prompt' must be a non-empty list"),
    "a number": (row(chosen=4), "'chosen' must be a non-empty list of messages or a string"),
    "null": (row(rejected=[None]), "'rejected' has a message without"),
    "a message without role": (row(chosen=[{"content": "3"}]), "without the strings 'role' and 'content'"),
    "content in parts": (row(chosen=[{"role": "assistant", "content": [{"type": "text", "text": "3"}]}]),
                         "without the strings 'role' and 'content'"),
    "no assistant": (row(chosen=message("3", "user")), "'chosen' must end with exactly one assistant message"),
    "two answers": (row(chosen=message("3") + message("4")), "exactly one assistant message"),
    "messages and strings": (row(chosen="3", rejected="4"), "'prompt' is a list of messages but"),
    "half a character": (row(chosen=message("\ud83d")), "not a string that UTF-8 can hold"),
}
BAD_POSITIVES = {
    "no completion": ({"prompt": "a"}, r"no key 'completion' \(found prompt\)"),
    "no prompt": ({"completion": "a"}, "no key 'prompt'"),
    "an empty completion": ({"prompt": "a", "completion": ""}, "a completion is empty"),
    "messages without answer": ({"messages": message("hello", "user") * 2}, "'messages' must end with exactly one"),
    "messages without prompt": ({"messages": message("hello")}, "'messages' has no prompt before the answer"),
    "messages are text": ({"messages": "hello"}, "'messages' must be a non-empty list"),
    "a pair": (row(), r"no key 'completion' \(found chosen, prompt, rejected\): a pair, where a row of one completion"),
    "a pair without prompt": (row(prompt=None), "no key 'completion' .*: a pair, where"),
}


@pytest.fixture(scope="module")
def tokenizer_place(tmp_path_factory):
    place = tmp_path_factory.mktemp("rows")
    tiny.write_tokenizer(place / "model")
    return place


def check_bad_row(place, bad, good, expected, pairs):
    bad = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    (place / "rows.jsonl").write_bytes(json.dumps(good).encode() + b"\n\n" + bad + b"\n" + json.dumps(good).encode())
    settings, tokenizer = TokenSettings(pairs, 999, 999, 999), Tokenizer.from_pretrained(place / "model")
    before = os.listdir(place)

    def load():
        data.load_dataset(place / "rows.jsonl", tokenizer, settings, place)

    if expected is None:
        load()
        for file in place.glob("rows.jsonl.tokens-*"):
            file.unlink()
    else:
        with pytest.raises(ValueError, match=f"rows.jsonl, line 3: .*{expected}") as error:
            load()
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert sorted(os.listdir(place)) == sorted(before)


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_bad_pairs_are_named_by_file_line_and_key(tokenizer_place, case):
    check_bad_row(tokenizer_place, BAD_PAIRS[case][0], row(), BAD_PAIRS[case][1], pairs=True)


@pytest.mark.parametrize("case", BAD_POSITIVES)
def test_bad_positives_are_named_by_file_line_and_key(tokenizer_place, case):
    good = {"prompt": "1+2=", "completion": "3"}
    check_bad_row(tokenizer_place, BAD_POSITIVES[case][0], good, BAD_POSITIVES[case][1], pairs=False)


OTHER_FORMATS = {
    "array": (b'[{"prompt": "a", "completion": "b"}]', "a JSON array.*jq"),
    "array over lines": (b'[\n  {"prompt": "a", "completion": "b"}\n]\n', "a JSON array"),
    "gzip": (gzip.compress(b'{"prompt": "a"}'), "gzip.*gunzip"),
    "bzip2": (bz2.compress(b'{"prompt": "a"}'), "bzip2"),
    "xz": (lzma.compress(b'{"prompt": "a"}'), "xz"),
    "zstd": (bytes.fromhex("28b52ffd04001900007b7d0a"), "zstd.*unzstd"),
    "parquet": (b"PAR1\x15\x04\n\x15PAR1", "parquet"),
    "zip": (b"PK\x03\x04\x14\0", "a zip archive"),
    "UTF-16": ('{"prompt": "a", "completion": "b"}\n'.encode("utf-16"), "UTF-16.*iconv"),
    "UTF-16, no mark": ('{"prompt": "a", "completion": "b"}\n'.encode("utf-16-le"), "UTF-16"),
    "UTF-16, big-endian": ('{"prompt": "a", "completion": "b"}\n'.encode("utf-16-be"), "UTF-16"),
}


@pytest.mark.parametrize("case", OTHER_FORMATS)
def test_a_file_that_is_not_jsonl_is_named_for_what_it_is(tmp_path, case):
    content, expected = OTHER_FORMATS[case]
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"rows.jsonl: .*{expected}") as error:
        list(read_jsonl(tmp_path / "rows.jsonl"))
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_of_utf_8_is_passed_over(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n')
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == [(1, {"prompt": "a"})]


def test_a_line_of_100_megabytes_is_refused_without_reading_it_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"prompt": "a", "completion": "b"}\n{"prompt": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'", "completion": "b"}\n')
    started = time.perf_counter()
    with pytest.raises(ValueError, match="rows.jsonl, line 2: longer than 64 MiB"):
        list(read_jsonl(path))
    assert time.perf_counter() - started < 30


def test_a_role_that_the_template_refuses_is_named_by_its_line(place):
    (place / "model" / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{{ m.role + m.content }}<|im_end|>{% endfor %}"
    )
    rows = [row(), row(prompt=message("1+2?", "tool"))]
    (place / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    refused(place, "pairs.jsonl, line 2: .*no tools here")


# Files and directories


def remove_end_of_text(place):
    path = place / "model" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "<|unused|>"))
    (place / "model" / "generation_config.json").unlink()


BAD_FILES = {  # what is wrong: (how it is brought about, the message, the flags that differ; paths are below `place`)
    "no data": (None, "absent.jsonl: no such", {"data": Path("absent.jsonl")}),
    "data is a directory": (None, "no such data file", {"data": Path(".")}),
    "no model": (lambda place: (place / "empty").mkdir(), "no tokenizer.json", {"model": Path("empty")}),
    "model is a file": (None, "expected a directory, found a file", {"model": Path("pairs.jsonl")}),
    "empty data": (lambda place: (place / "pairs.jsonl").write_text("\n"), r"pairs.jsonl: .* \(0 dropped", {}),
    "long responses": (None, r"\(4 dropped: longer than 800 prompt, 3 response or", {"max_response_tokens": 3}),
    "beyond the context": (None, r"\(4 dropped: .* or 10 tokens in all", {"max_position_embeddings": 10}),
    "held-out rows of one completion": (None, "positives.jsonl, line 1: no key 'chosen' .*: a row of one completion",
                                        {"eval_data": Path("positives.jsonl")}),
    "held-out pairs": (None, "pairs.jsonl, line 1: no key 'completion' .*: a pair",
                       {"method": "sft", "eval_data": Path("pairs.jsonl")}),
    "no weights": (lambda place: (place / "model" / "model.safetensors").unlink(), "model has no weights", {}),
    "other weights": (lambda place: change(place / "model", **{"model.norm.weight": torch.ones(7)}),
                      r"'model.norm.weight' .*\(7,\)", {}),
    "an unsupported model": (lambda place: edit_config(place / "model", model_type="qwen2_moe"),
                             "config.json: model_type is 'qwen2_moe'", {}),
    "too few words": (lambda place: edit_config(place / "model", vocab_size=9),
                      r"tokenizer has ids up to \d+, .* vocabulary has 9 entries", {}),
    # Refused before memory is allocated
    "absurdly wide": (lambda place: edit_config(place / "model", hidden_size=2**26, vocab_size=2**32),
                      "has shape .* but config.json asks for", {}),
    "absurdly deep": (lambda place: edit_config(place / "model", num_hidden_layers=10**9),
                      "the weights lack 'model.layers.3", {}),
    "no end of text": (remove_end_of_text, "no end-of-text token", {"append_end_of_text": True}),
    "output is a file": (None, "pairs.jsonl", {"output": Path("pairs.jsonl")}),
    "output is below a file": (None, "pairs.jsonl", {"output": Path("pairs.jsonl") / "below"}),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_and_directories(place, case):
    prepare, expected, changes = BAD_FILES[case]
    if prepare:
        prepare(place)
    refused(place, expected, **changes)


def test_held_out_rows_that_are_trained_on(place):
    """By the same path, by another one, as a copy, and as a copy that differs in what is not trained on."""
    (place / "linked.jsonl").symlink_to(place / "pairs.jsonl")
    (place / "copied.jsonl").write_bytes((place / "pairs.jsonl").read_bytes())
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    (place / "renamed.jsonl").write_text("".join(json.dumps(row | {"id": "other"}) + "\n\n" for row in rows))
    for name in ("pairs.jsonl", "linked.jsonl", "copied.jsonl", "renamed.jsonl"):
        refused(place, f"{name} has the rows of .*pairs.jsonl: --eval-data is for rows that are not trained on",
                eval_data=place / name)


def test_what_is_assumed_of_a_model_is_said_once_and_saved(place, capsys):
    """No chat template, and a head of its own although config.json ties it to the embedding."""
    (place / "model" / "tokenizer_config.json").write_text("{}")
    embedding = load_file(place / "model" / "model.safetensors")["model.embed_tokens.weight"]
    change(place / "model", **{"lm_head.weight": embedding * 1.1})
    train.main(arguments(place))
    lines = capsys.readouterr().out.splitlines()
    assert [sum(word in line for line in lines) for word in ("ChatML", "lm_head.weight")] == [1, 1]
    assert (place / "out" / "final" / "chat_template.jinja").read_text() == CHATML_TEMPLATE
    assert "lm_head.weight" in load_file(place / "out" / "final" / "model.safetensors")
    assert json.loads((place / "out" / "final" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_full_disk_while_tokenising(place, monkeypatch):
    from safetensors import SafetensorError

    def full(*args, **options):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    with pytest.raises(OSError, match="cannot write .*pairs.jsonl.tokens-.*No space left"):
        train.main(arguments(place))
    assert not (place / "out").exists()


# Settings

BAD_SETTINGS = {"batch_size": (0, -4, 2.5), "lr": (0, "nan", "inf", "fast"), "epochs": ("inf", 0), "steps": (0,),
                "seed": (-1,), "warmup": (1.5, "nan"), "alpha": (-0.1, "nan"), "weight_decay": (-1,),
                "max_grad_norm": (0,), "save_every": (-1,), "keep_checkpoints": (-1,), "max_skipped": (-1,),
                "log_every": (0,), "eval_every": (0,), "micro_batch_tokens": (0,), "max_tokens": (0,),
                "rope_theta": (-5,), "max_position_embeddings": (0,), "beta": (0, "nan"), "label_smoothing": (0.6, -1)}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD_SETTINGS.items() for value in values])
def test_settings_out_of_range(place, name, value):
    method = "dpo" if name in ("beta", "label_smoothing") else "redi"
    refused(place, f"--{name.replace('_', '-')}.*: '{value}' is not", method, **{name: value})


def test_settings_that_are_no_choice(place):
    refused(place, "--dtype: invalid choice: 'float16'", dtype="float16")
    refused(place, "--resume and --overwrite exclude each other", resume=True, overwrite=True)


@pytest.mark.parametrize("method, flag, owners", [
    ("redi", "--loss-on-prompt", "sft"), ("dpo", "--gamma=3", "simpo"), ("sft", "--alpha=1", "redi"),
    ("redi", "--beta=2", "dpo and simpo"), ("simpo", "--label-smoothing=0.1", "dpo"),
])  # fmt: skip
def test_flags_of_another_method_are_refused(place, method, flag, owners):
    before = contents(place)
    with pytest.raises(ValueError, match=f"^{method} has no flag {flag.partition('=')[0]}: .* {owners}$"):
        train.main([*arguments(place, method), flag])
    assert contents(place) == before


# As a command


def test_the_command_says_one_sentence_and_fails(place):
    (place / "pairs.jsonl").write_text('{"prompt": "a"}\n')
    before = contents(place)
    command = [sys.executable, str(ROOT / "train.py"), *arguments(place)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr == f"error: {place}/pairs.jsonl, line 1: no key 'chosen' (found prompt)\n"
    assert contents(place) == before


def test_an_unknown_method_or_flag_fails(place):
    for words, message in ((["grpo"], "argument METHOD: invalid choice: 'grpo'"),
                           ([*arguments(place), "--learning-rate", "1"], "^redi has no flag --learning-rate$")):
        with pytest.raises(ValueError, match=message):
            train.main(words)


def test_the_output_of_another_run_is_left_alone(place):
    train.main(arguments(place))
    (place / "out" / "notes.txt").write_text("mine")
    before = contents(place)
    for changes in ({}, {"lr": 1e-3}):
        with pytest.raises(ValueError, match="out .*another run .*--resume .*--overwrite"):
            train.main(arguments(place, **changes))
    with pytest.raises(ValueError, match="begun with --lr 1e-06, not 0.001. a resumed run"):
        train.main(arguments(place, lr=1e-3, resume=True))
    with pytest.raises(ValueError, match="begun with --method redi, not simpo"):
        train.main(arguments(place, "simpo", resume=True))
    # Asked to overwrite, but the input is bad: the old run stays.
    (place / "bad.jsonl").write_text("{")
    with pytest.raises(ValueError, match="bad.jsonl, line 1"):
        train.main(arguments(place, data=place / "bad.jsonl", overwrite=True))
    (place / "bad.jsonl").unlink()
    assert contents(place) == before


def test_a_run_does_not_overwrite_the_model_it_starts_from(place):
    train.main(arguments(place))
    before = contents(place)
    with pytest.raises(ValueError, match="out/final is part of the run that --overwrite would replace"):
        train.main(arguments(place, model=place / "out" / "final", overwrite=True))
    assert contents(place) == before


def test_damaged_records_of_a_run_are_named(place):
    train.main(arguments(place))
    (place / "out" / "final").rename(place / "kept")
    for text in ("{", "[]", '{"settings": 3}', "{}"):
        (place / "out" / "run.json").write_text(text)
        with pytest.raises(ValueError, match="run.json"):
            train.main(arguments(place, resume=True))
    assert math.isfinite(json.loads((place / "out" / "metrics.jsonl").read_text().splitlines()[0])["loss"])


def test_data_that_changed_since_the_run_began_is_refused(place):
    train.main(arguments(place, save_every=1))
    (place / "out" / "final").rename(place / "kept")
    tiny.write_rows(place, examples=5)
    with pytest.raises(ValueError, match="pairs.jsonl.* changed"):
        train.main(arguments(place, resume=True))


def test_read_examples_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        list(read_examples(tmp_path, pairs=True))

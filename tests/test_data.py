"""From JSONL rows to packed micro-batches: every accepted form, labels by hand, and who gets which rows."""

import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from redi import data
from redi.data import Dataset, epoch_order, load_dataset, pack, partition, step_rows
from redi.losses import sequence_logps
from redi.rows import TokenSettings
from redi.tokenizer import Tokenizer
from redi.training import dataset_logps
from tests import tiny
from tests.conftest import ROOT
from tests.test_rows import PAIR_FORMS, POSITIVES, assistant, user, write

SFT = TokenSettings(pairs=False, max_prompt=10**6, max_response=10**6, max_total=10**6)
PAIRS = TokenSettings(pairs=True, max_prompt=10**6, max_response=10**6, max_total=10**6)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(directory)
    return Tokenizer.from_pretrained(directory)


def load(path, tokenizer, settings):
    return load_dataset(path, tokenizer, settings, path.parent)


def caches(path) -> set:
    return set(path.parent.glob(f"{path.name}.tokens-*.safetensors"))


# Ids and labels


def toy_dataset(*rows, prompts, k=1) -> Dataset:
    offsets = np.cumsum([0, *map(len, rows)])
    ids = np.concatenate(rows).astype(np.int32)
    return Dataset(ids, offsets, np.array(prompts), np.arange(1, len(rows) // k + 1), 0, k, "")


def test_labels_are_shifted_once_by_hand():
    dataset = toy_dataset([1, 2, 3, 7, 8, 9], [4, 5, 6], prompts=[3, 1])
    batch = pack(dataset, [0, 1])
    assert batch.input_ids.tolist() == [1, 2, 3, 7, 8, 4, 5]  # the last id of each is only a label
    assert batch.labels.tolist() == [-100, -100, 7, 8, 9, 5, 6]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 5, 7] and batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 5 and batch.rows.tolist() == [0, 1] and batch.weight == 1
    assert batch.label_positions.tolist() == [2, 3, 4, 5, 6]
    assert dataset.input_lengths.tolist() == [[5], [2]] and dataset.label_counts.tolist() == [[3], [2]]


def test_all_chosen_stand_before_all_rejected():
    dataset = toy_dataset([1, 2, 3], [1, 4], [5, 6], [5, 7, 8, 9], prompts=[1, 1, 1, 1], k=2)
    batch = pack(dataset, [1, 0])
    assert batch.input_ids.tolist() == [5, 1, 2, 5, 7, 8, 1] and batch.cu_seqlens.tolist() == [0, 1, 3, 6, 7]
    assert batch.labels.tolist() == [6, 2, 3, 7, 8, 9, 4]
    assert dataset.label_counts.tolist() == [[2, 1], [1, 3]] and batch.rows.tolist() == [1, 0]


@pytest.mark.parametrize("loss_on_prompt", [False, True])
def test_lengths_are_the_counted_labels(loss_on_prompt):
    """|y| of the normaliser (label_counts) and of the loss (sequence_logps) are equal."""
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 50, generator.integers(2, 30)) for _ in range(20)]
    prompts = [int(generator.integers(1, len(row))) for row in rows]
    dataset = replace(toy_dataset(*rows, prompts=prompts, k=2), loss_on_prompt=loss_on_prompt)
    order = [3, 9, 0, 1]
    batch = pack(dataset, order)
    _, lengths = sequence_logps(torch.zeros(len(batch.labels)), batch.labels, batch.cu_seqlens)
    assert lengths.tolist() == [*dataset.label_counts[order, 0], *dataset.label_counts[order, 1]]
    assert batch.cu_seqlens.diff().tolist() == [*dataset.input_lengths[order, 0], *dataset.input_lengths[order, 1]]


def test_a_change_of_the_label_spans_moves_labels_and_their_count_alike(monkeypatch):
    """Say, leaving out the end token."""
    dataset = toy_dataset([1, 2, 3, 7, 8, 9], [4, 5, 6], prompts=[3, 1])
    spans = dataset.label_spans - [[0, 1]]
    monkeypatch.setattr(Dataset, "label_spans", spans)
    batch = pack(dataset, [0, 1])
    assert batch.labels.tolist() == [-100, -100, 7, 8, -100, 5, -100]
    assert dataset.label_counts.tolist() == [[2], [1]]


def test_an_empty_micro_batch_is_the_shortest_example_without_weight():
    dataset = toy_dataset([1, 2, 3], [4, 5], [6, 7, 8, 9], prompts=[1, 1, 1])
    batch = pack(dataset, [])
    assert batch.weight == 0 and batch.rows.tolist() == [1] and batch.input_ids.tolist() == [4]


def sequence_ids(dataset, i):
    return dataset.ids[dataset.offsets[i] : dataset.offsets[i + 1]].tolist()


def test_ids_of_a_conversation(tmp_path, tokenizer):
    text = "<think>\n1 + 2\n</think>\n3"
    path = write(tmp_path / "p.jsonl", {"prompt": [user("1+2?")], "completion": [assistant(text)]})
    dataset = load(path, tokenizer, SFT)
    prompt = tokenizer.encode("<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n")
    completion = tokenizer.encode("<think>\n") + tokenizer.encode("1 + 2\n</think>\n3") + [tokenizer.end_of_turn_id]
    assert sequence_ids(dataset, 0) == prompt + completion
    assert dataset.prompt_lengths.tolist() == [len(prompt)]
    assert dataset.label_counts.tolist() == [[len(completion)]]  # the end of turn counts, once
    batch = pack(dataset, [0])
    assert batch.labels[batch.labels != -100].tolist() == completion


def test_plain_strings_are_continued_without_a_template(tmp_path, tokenizer):
    dataset = load(write(tmp_path / "p.jsonl", {"prompt": "2+2=", "completion": "4"}), tokenizer, SFT)
    assert tokenizer.decode(sequence_ids(dataset, 0), skip_special_tokens=False) == "2+2=4<|im_end|>"


def test_loss_on_prompt_end_of_text_and_system_prompt(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", {"prompt": [user("1+2?")], "completion": [assistant("3")]})
    plain = load(path, tokenizer, SFT)
    whole = load(path, tokenizer, replace(SFT, loss_on_prompt=True))
    assert sequence_ids(plain, 0) == sequence_ids(whole, 0)
    assert whole.label_counts.tolist() == [[len(sequence_ids(whole, 0)) - 1]]
    assert whole.prompt_lengths.tolist() == plain.prompt_lengths.tolist()
    official = load(path, tokenizer, replace(SFT, append_end_of_text=True))
    tail = tokenizer.encode("\n") + [tokenizer.end_of_text_id]
    assert sequence_ids(official, 0) == sequence_ids(plain, 0) + tail
    assert official.label_counts[0, 0] == plain.label_counts[0, 0] + len(tail)
    system = load(path, tokenizer, replace(SFT, system_prompt="Add."))
    text = tokenizer.decode(sequence_ids(system, 0), skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user")


def test_long_examples_are_dropped_never_truncated(tmp_path, tokenizer):
    short, long = [user("1?")], [user("1" * 50 + "?")]
    texts = [(short, "1", "2"), (long, "1", "2"), (short, "1" * 50, "2"), (short, "1", "2" * 50)]
    path = write(tmp_path / "p.jsonl", *({"prompt": prompt, "chosen": [assistant(a)], "rejected": [assistant(b)]}
                                         for prompt, a, b in texts))
    everything = load(path, tokenizer, PAIRS)
    assert everything.dropped == 0 and len(everything) == 4
    prompt, response = int(everything.prompt_lengths[0]), int(everything.label_counts[0, 0])

    def kept(max_prompt=10**6, max_response=10**6, max_total=10**6):
        dataset = load(path, tokenizer, TokenSettings(True, max_prompt, max_response, max_total))
        for i in range(2 * len(dataset)):  # whole: each still ends with the end of turn
            assert sequence_ids(dataset, i)[-1] == tokenizer.end_of_turn_id
        assert dataset.dropped + len(dataset) == 4
        return dataset.lines.tolist()

    assert kept(max_prompt=prompt) == [1, 3, 4]
    assert kept(max_response=response) == [1, 2]
    assert kept(max_total=prompt + response) == [1]
    with pytest.raises(ValueError, match=r"p.jsonl: no example to train on \(4 dropped"):
        kept(max_total=prompt + response - 1)


def test_the_cache_is_used_again_and_depends_on_all_that_decides_the_ids(tmp_path, tokenizer, monkeypatch):
    row = {"prompt": [user("1+2?")], "completion": [assistant("3")]}
    path = write(tmp_path / "p.jsonl", row)
    first = load(path, tokenizer, SFT)
    tokenize, calls = data.encode_rows, []
    monkeypatch.setattr(data, "encode_rows", lambda *args: calls.append(args) or tokenize(*args))
    again = load(path, tokenizer, SFT)
    assert not calls and sequence_ids(first, 0) == sequence_ids(again, 0) and first.digest == again.digest

    for changes in ({"prefill": ""}, {"system_prompt": ""}, {"loss_on_prompt": True}):
        load(path, tokenizer, replace(SFT, **changes))
    other = tmp_path / "other"
    tiny.write_tokenizer(other, vocab_size=300)
    load(path, Tokenizer.from_pretrained(other), SFT)
    (other / "tokenizer.json").write_bytes((tokenizer.directory / "tokenizer.json").read_bytes())
    (other / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}<|im_end|>")
    load(path, Tokenizer.from_pretrained(other), SFT)
    (other / "tokenizer_config.json").write_text('{"eos_token": "<|im_start|>"}')
    load(path, Tokenizer.from_pretrained(other), SFT)
    write(path, row, row)
    load(path, tokenizer, SFT)
    assert len(calls) == 7 and len(caches(path)) == 8


def test_who_edits_what_reads_rows_gets_fresh_ids(tmp_path):
    """On a copy of the package: the same rows, before and after changes of its source, in processes of their own."""
    shutil.copytree(ROOT / "redi", tmp_path / "redi")
    tiny.write_tokenizer(tmp_path / "model")
    path = write(tmp_path / "p.jsonl", PAIR_FORMS["strings"][0])
    program = (
        "from pathlib import Path; from redi.data import load_dataset; from redi.rows import TokenSettings; "
        "from redi.tokenizer import Tokenizer; d = load_dataset(Path('p.jsonl'), Tokenizer.from_pretrained('model'), "
        "TokenSettings(True, 999, 999, 999), Path('.')); print(d.ids.tolist())"
    )

    def ids() -> str:
        run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert run.returncode == 0, run.stderr
        return run.stdout

    before = ids()
    assert ids() == before and len(caches(path)) == 1
    for file in ("data.py", "tokenizer.py", "rows.py"):
        with open(tmp_path / "redi" / file, "a") as source:
            source.write("# a comment\n")
    assert ids() == before and len(caches(path)) == 1
    for count, file in enumerate(["data.py", "tokenizer.py"], 2):
        with open(tmp_path / "redi" / file, "a") as source:
            source.write("CHANGED = True\n")
        assert ids() == before and len(caches(path)) == count
    source = tmp_path / "redi" / "rows.py"
    good, bad = '_field(row, "chosen")', '_field(row, "rejected")'
    text = source.read_text()
    swapped = text.replace(f"{good}, {bad}", f"{bad}, {good}")
    assert swapped != text
    source.write_text(swapped)
    assert ids() != before and len(caches(path)) == 4


def test_a_cache_is_readable_by_whom_the_umask_says(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", POSITIVES["conversational"][0])
    before = os.umask(0o027)
    try:
        load(path, tokenizer, SFT)
    finally:
        os.umask(before)
    (cache,) = caches(path)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o640


def test_ids_go_to_the_other_directory_where_the_data_may_not_be_written_beside(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "p.jsonl", POSITIVES["conversational"][0])
    monkeypatch.setattr(os, "access", lambda *_: False)
    load_dataset(path, tokenizer, SFT, tmp_path / "out")
    assert not caches(path) and len(list((tmp_path / "out").glob("p.jsonl.tokens-*.safetensors"))) == 1


def test_the_digest_is_of_the_ids_and_labels(tmp_path, tokenizer):
    rows = [{"prompt": [user(f"{i}?")], "completion": [assistant("3")]} for i in range(2)]
    on_prompt = replace(SFT, loss_on_prompt=True)
    digests = [load(write(tmp_path / f"{i}.jsonl", *order), tokenizer, settings).digest for i, (order, settings) in
               enumerate([(rows, SFT), (rows[::-1], SFT), (rows, on_prompt), (rows, SFT)])]
    assert len(set(digests)) == 3 and digests[0] == digests[3]


# Held-out rows


def answers(*pairs):
    return [{"prompt": [user(f"{a}?")], "completion": [assistant(str(b))]} for a, b in pairs]


@pytest.mark.parametrize("on_prompt", [False, True])
def test_rows_and_prompts_of_the_held_out_file_that_are_trained_on_are_counted(tmp_path, tokenizer, capsys, on_prompt):
    settings = replace(SFT, loss_on_prompt=on_prompt)

    def compare(rows, held_out):
        paths = write(tmp_path / "train.jsonl", *rows), write(tmp_path / "held_out.jsonl", *held_out)
        dataset_logps.compare_held_out(*(load(path, tokenizer, settings) for path in paths), *paths)
        return capsys.readouterr().out

    rows = answers((1, 1), (2, 2), (2, 3), (4, 4))
    assert compare(rows, answers((5, 5), (6, 6))) == ""
    line = compare(rows, answers((5, 5), (2, 9), (2, 3), (1, 1)))
    assert "of the 4 examples in" in line and "2 are also in" in line and "3 have a prompt" in line
    assert "held_out.jsonl" in line and "train.jsonl" in line
    assert "0 are also in" in compare(rows, answers((1, 9), (2, 9)))  # other answers to the same questions
    for held_out in (rows, rows[::-1], rows[:1], [row | {"id": "renamed"} for row in rows]):
        with pytest.raises(ValueError, match="held_out.jsonl has the rows of .*train.jsonl"):
            compare(rows, held_out)


def test_shared_pairs_are_those_of_two_equal_responses(tmp_path, tokenizer, capsys):
    pair = PAIR_FORMS["conversational"][0]
    paths = [write(tmp_path / "train.jsonl", pair),
             write(tmp_path / "held_out.jsonl", pair | {"rejected": [assistant("6")]})]
    dataset_logps.compare_held_out(*(load(path, tokenizer, PAIRS) for path in paths), *paths)
    assert "0 are also in" in (line := capsys.readouterr().out) and "1 have a prompt" in line
    with pytest.raises(ValueError, match="has the rows"):
        dataset_logps.compare_held_out(*[load(paths[0], tokenizer, PAIRS)] * 2, *paths)


# Which rank gets which rows


def test_epoch_order_is_a_pure_function_of_seed_and_epoch():
    first = epoch_order(100, seed=3, epoch=1)
    np.random.seed(0)
    assert (epoch_order(100, 3, 1) == first).all() and sorted(first) == list(range(100))
    assert (epoch_order(100, 3, 2) != first).any() and (epoch_order(100, 4, 1) != first).any()


@pytest.mark.parametrize("examples, batch_size", [(10, 4), (8, 4), (3, 7), (1, 1), (47, 10)])
def test_steps_cover_each_epoch_once_and_the_last_may_be_smaller(examples, batch_size):
    steps = -(-examples // batch_size)
    for epoch in range(3):
        parts = [step_rows(examples, batch_size, 5, epoch * steps + i) for i in range(steps)]
        assert all(e == epoch for e, _ in parts)
        rows = np.concatenate([rows for _, rows in parts])
        assert sorted(rows) == list(range(examples)) and (rows == epoch_order(examples, 5, epoch)).all()
        assert all(len(rows) == batch_size for _, rows in parts[:-1])
        assert len(parts[-1][1]) == examples - batch_size * (steps - 1)


@pytest.mark.parametrize("seed", range(40))
def test_partition_on_random_inputs(seed):
    generator = np.random.default_rng(seed)
    count, ranks = int(generator.integers(1, 60)), int(generator.integers(1, 9))
    rows = generator.permutation(1000)[:count]
    tokens = generator.lognormal(5, 1, count).astype(np.int64) + 2
    costs = tokens + tokens.astype(float) ** 2 / 500
    cap = int(tokens.max() * generator.uniform(0.7, 4))
    parts = partition(rows, tokens, costs, ranks, cap)
    weight, cost = dict(zip(rows, tokens)), dict(zip(rows, costs))
    assert all(len(micro) == ranks for micro in parts)  # the same number of micro-batches on every rank
    assert sorted(row for micro in parts for part in micro for row in part) == sorted(rows)  # each exactly once
    for part in (part for micro in parts for part in micro):
        assert sum(weight[row] for row in part) <= cap or len(part) == 1
    assert parts == partition(rows, tokens, costs, ranks, cap)
    at_least = -(-int(tokens.sum()) // (ranks * cap))
    assert len(parts) <= 2 * at_least + 1 + count // (2 * ranks)
    # Side by side run parts of like cost: no rank waits for longer than the costliest example.
    for micro in parts:
        loads = [sum(cost[row] for row in part) for part in micro]
        assert max(loads) - min(loads) <= max(costs) + 1e-9


def test_partition_balances_many_small_examples():
    generator = np.random.default_rng(0)
    tokens = generator.integers(50, 1000, 256)
    parts = partition(np.arange(256), tokens, tokens.astype(float), 8, 10_000)
    assert len(parts) == 2  # the fewest that the cap allows
    loads = [sum(tokens[row] for row in part) for micro in parts for part in micro]
    assert max(loads) < 1.02 * min(loads)

"""--loss-on-prompt, --append-end-of-text and a prefill without its newline: the labels and |y| they make."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from redi import data
from redi.hub.weights import load_pretrained
from redi.tokenizer import Tokenizer
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("official")
    tiny.write_model(path / "model")
    tiny.write_rows(path, examples=5)
    return path


def load(folder: Path, method: str, *flags: str) -> tuple[Tokenizer, data.Dataset]:
    """The data set that the command trains on."""
    file = "positives.jsonl" if method == "sft" else "pairs.jsonl"
    paths = "--model", str(folder / "model"), "--data", str(folder / file), "--output", str(folder / "out")
    args = train.parse_args([method, *paths, *flags])
    tokenizer = Tokenizer.from_pretrained(folder / "model")
    config = SimpleNamespace(max_position_embeddings=512)
    return tokenizer, train.load_data(args, args.data, tokenizer, config)


def inputs_and_labels(dataset: data.Dataset, sequence: int) -> tuple[list[int], list[int]]:
    """Of one sequence of a micro-batch that holds all examples in order."""
    micro = data.pack(dataset, list(range(len(dataset))))
    k = dataset.sequences_per_example
    packed = (sequence % k) * len(dataset) + sequence // k  # all chosen, then all rejected
    start, end = micro.cu_seqlens[packed : packed + 2].tolist()
    return micro.input_ids[start:end].tolist(), micro.labels[start:end].tolist()


def texts(folder: Path, method: str) -> list[tuple[list[dict], str]]:
    """(prompt, response) of every sequence."""
    file, keys = ("positives.jsonl", ["completion"]) if method == "sft" else ("pairs.jsonl", ["chosen", "rejected"])
    return [(row["prompt"], row[key][0]["content"]) for row in tiny.read_rows(folder / file) for key in keys]


@pytest.mark.parametrize("method", ["sft", "redi"])
@pytest.mark.parametrize("official_end", [False, True])
@pytest.mark.parametrize("loss_on_prompt", [False, True])
def test_labels_and_lengths(folder, method, official_end, loss_on_prompt):
    if loss_on_prompt and method != "sft":
        with pytest.raises(ValueError, match="--loss-on-prompt.*sft"):
            load(folder, method, "--loss-on-prompt")
        return
    flags = ["--append-end-of-text"] * official_end + ["--loss-on-prompt"] * loss_on_prompt
    tokenizer, dataset = load(folder, method, *flags)
    counts = dataset.label_counts.reshape(-1)
    for s, (prompt, response) in enumerate(texts(folder, method)):
        prompt_ids = tokenizer.encode_prompt(prompt)
        end = "<|im_end|>\n<|endoftext|>" if official_end else "<|im_end|>"
        completion = tiny.completion_ids(tokenizer, response) + tokenizer.encode(end)
        inputs, labels = inputs_and_labels(dataset, s)
        assert inputs == (prompt_ids + completion)[:-1]
        # The first token has nothing before it that could predict it.
        prompt_labels = prompt_ids[1:] if loss_on_prompt else [-100] * (len(prompt_ids) - 1)
        assert labels == prompt_labels + completion
        assert counts[s] == len(completion) + (len(prompt_ids) - 1 if loss_on_prompt else 0)


def test_forced_think_without_the_newline(folder):
    """The official evaluation prompt ends in `<think>`; with that prefill training goes on from there."""
    tokenizer, dataset = load(folder, "sft", "--prefill", "<think>")
    for s, (prompt, response) in enumerate(texts(folder, "sft")):
        evaluated = tokenizer.encode_prompt(prompt, prefill="<think>")
        inputs, labels = inputs_and_labels(dataset, s)
        assert tokenizer.decode(evaluated, skip_special_tokens=False).endswith("assistant\n<think>")
        assert inputs[: len(evaluated)] == evaluated
        sampled = tokenizer.encode(response.removeprefix("<think>")) + [tokenizer.end_of_turn_id]
        assert inputs[len(evaluated) :] + labels[-1:] == sampled


def naive_logps(folder: Path, ids: list[int], labels_from: int) -> torch.Tensor:
    """log π of ids[labels_from:], from all logits of one sequence."""
    logps = F.log_softmax(tiny.all_logits(load_pretrained(folder / "model"), torch.tensor(ids)), -1)
    return logps.gather(1, torch.tensor(ids[1:])[:, None])[labels_from - 1 :, 0]


@pytest.mark.parametrize("method", ["sft", "redi"])
def test_the_command_trains_on_them(folder, method):
    flags = ["--append-end-of-text"] + ["--loss-on-prompt"] * (method == "sft")
    file = "positives.jsonl" if method == "sft" else "pairs.jsonl"
    words = f"{method} --model model --data {file} --output out-{method} --batch-size 5 --steps 1".split()
    command = [sys.executable, str(ROOT / "train.py"), *words, *flags]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    metrics = json.loads((folder / f"out-{method}" / "metrics.jsonl").read_text())

    tokenizer = Tokenizer.from_pretrained(folder / "model")
    logps = []
    for prompt, response in texts(folder, method):
        prompt_ids = tokenizer.encode_prompt(prompt)
        ids = prompt_ids + tiny.completion_ids(tokenizer, response) + tokenizer.encode("<|im_end|>\n<|endoftext|>")
        logps.append(naive_logps(folder, ids, 1 if method == "sft" else len(prompt_ids)))
    means = torch.stack([values.mean() for values in logps])
    if method == "sft":
        expected = -torch.cat(logps).mean()
        assert metrics["chosen_logp"] == pytest.approx(means.mean().item(), abs=1e-4)
    else:
        chosen, rejected = means[0::2], means[1::2]
        expected = (-chosen + 0.8 * rejected).mean()
        assert metrics["rejected_logp"] == pytest.approx(rejected.mean().item(), abs=1e-4)
    assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-4)


def test_a_tokenizer_without_end_of_text_is_refused(folder, tmp_path):
    tiny.write_rows(tmp_path, examples=5)
    tiny.write_tokenizer(tmp_path / "model")
    text = (tmp_path / "model" / "tokenizer.json").read_text()
    (tmp_path / "model" / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|padding|>"))
    with pytest.raises(ValueError, match="has no end-of-text token to append"):
        load(tmp_path, "redi", "--append-end-of-text")

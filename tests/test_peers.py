"""The same numbers and texts as transformers and TRL, in both directions. Needs tests/requirements.txt."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

import train
from redi import data
from redi.evaluation.generation import Request, generate
from redi.losses import sequence_logps
from redi.model import CausalLM
from redi.hub.weights import load_pretrained, save_pretrained
from redi.problems import user_message
from redi.rows import read_examples
from redi.tokenizer import CHATML_TEMPLATE, Tokenizer
from tests import tiny
from tests.test_data import PAIRS, SFT, load
from tests.test_rows import assistant, user
from tests.test_tokenizer import QWEN_TEMPLATE, THINKING_TEMPLATE

PEERS = "needs the libraries of tests/requirements.txt"
transformers = pytest.importorskip("transformers", reason=PEERS)
datasets = pytest.importorskip("datasets", reason=PEERS)
trl_data = pytest.importorskip("trl.data_utils", reason=PEERS)
pytestmark = pytest.mark.peers

ROOT = Path(__file__).resolve().parent.parent
SIZES = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
             max_position_embeddings=256)
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS = {  # name: (config class, what differs from SIZES)
    "qwen2": ("Qwen2Config", {"rope_parameters": {"rope_type": "default", "rope_theta": 30000.0}}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "rms_norm_eps": 1e-5}),
}
CONVERSATIONS = [
    [user("What is 1 + 2?")],
    [{"role": "system", "content": "Answer in one word.  "}, user(" <|im_end|> \\boxed{½} 中\n")],
    [user("1 + 1?"), assistant("<think>\n1 + 1 = 2\n</think>\n2"), user("and once more?")],
    [user_message("Find $x$.", "open-r1")],
]


def save_with_transformers(directory: Path, name: str, tied: bool, template: str = CHATML_TEMPLATE):
    """A random model of theirs, every parameter away from its default, and a tokenizer, in `directory`."""
    class_name, changes = CONFIGS[name]
    tiny.write_tokenizer(directory, vocab_size=400)
    vocab_size = Tokenizer.from_pretrained(directory).vocab_size + 5
    config = getattr(transformers, class_name)(vocab_size=vocab_size, tie_word_embeddings=tied, **SIZES, **changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * 0.15 if parameter.ndim == 2 else 1 + 0.2 * noise)
    model.save_pretrained(directory)
    # Only now: beside a Qwen2 config, transformers 5 puts Qwen2's own way to split text into any tokenizer.
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return model.eval()


def our_logits(model: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    return tiny.all_logits(model, F.pad(ids, (0, 1)))  # which leaves out the last


@torch.no_grad()
def their_logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids[None]).logits[0]


def some_ids(vocab_size: int, length: int = 150, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_their_model_here_and_back(tmp_path, name, tied):
    theirs = save_with_transformers(tmp_path / "theirs", name, tied)
    ids = some_ids(theirs.config.vocab_size)
    expected = their_logits(theirs, ids)
    ours = load_pretrained(tmp_path / "theirs")
    assert expected.std() > 0.3  # not a comparison of zeros
    torch.testing.assert_close(our_logits(ours, ids), expected, rtol=0, atol=1e-4)

    save_pretrained(ours, tmp_path / "ours", Tokenizer.from_pretrained(tmp_path / "theirs"))
    back, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert type(back) is type(theirs)
    torch.testing.assert_close(their_logits(back.eval(), ids), expected, rtol=0, atol=0)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "theirs")
    assert back.generation_config.eos_token_id == tokenizer.stop_ids

    prompts = [some_ids(theirs.config.vocab_size, length, seed).tolist() for seed, length in enumerate((1, 7, 30))]
    requests = [Request(prompt, key=0, max_new_tokens=40) for prompt in prompts]
    for index, sampled, _ in generate(ours, requests, tokenizer.stop_ids, temperature=0):
        prompt = torch.tensor([prompts[index]])
        whole = back.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, pad_token_id=0
        )
        assert sampled == whole[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("name", list(CONFIGS))
def test_config_in_the_spelling_of_transformers_4(tmp_path, name):
    theirs = save_with_transformers(tmp_path, name, tied=False)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")  # what version 5 writes
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    path.write_text(json.dumps(config))
    ids = some_ids(theirs.config.vocab_size)
    torch.testing.assert_close(our_logits(load_pretrained(tmp_path), ids), their_logits(theirs, ids), rtol=0, atol=1e-4)


def test_bf16_directory_and_edited_context_as_the_paper_does(tmp_path):
    """rope_theta and max_position_embeddings replaced on loading are what transformers sees after saving."""
    theirs = save_with_transformers(tmp_path / "base", "qwen2", tied=True)
    ours = load_pretrained(tmp_path / "base", rope_theta=300000.0, max_position_embeddings=512)
    save_pretrained(ours, tmp_path / "edited", Tokenizer.from_pretrained(tmp_path / "base"), dtype=torch.bfloat16)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "edited", dtype="auto").eval()
    assert back.dtype == torch.bfloat16
    assert back.config.rope_parameters["rope_theta"] == 300000.0 and back.config.max_position_embeddings == 512
    ids = some_ids(theirs.config.vocab_size)
    again = our_logits(load_pretrained(tmp_path / "edited"), ids)
    torch.testing.assert_close(their_logits(back.float(), ids), again, rtol=0, atol=1e-4)
    assert (again - their_logits(theirs, ids)).abs().max() > 0.1


@pytest.mark.parametrize("as_file", [True, False], ids=["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("template", [CHATML_TEMPLATE, QWEN_TEMPLATE, THINKING_TEMPLATE],
                         ids=["chatml", "qwen", "thinking"])  # fmt: skip
@pytest.mark.parametrize("name", ["qwen2", "llama3"])
def test_chat_text_and_ids(tmp_path, name, template, as_file):
    """In a directory of theirs, and in the one that we save from it."""
    save_with_transformers(tmp_path / "theirs", name, tied=True, template=template)
    if not as_file:
        (tmp_path / "theirs" / "chat_template.jinja").unlink()
        path = tmp_path / "theirs" / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    tokenizer = Tokenizer.from_pretrained(tmp_path / "theirs")
    save_pretrained(load_pretrained(tmp_path / "theirs"), tmp_path / "ours", tokenizer)
    assert (tmp_path / "ours" / "chat_template.jinja").exists() == as_file
    ours = Tokenizer.from_pretrained(tmp_path / "ours")
    for directory in ("theirs", "ours"):
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / directory)
        for messages in CONVERSATIONS:
            text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            assert ours.render_prompt(messages) == text
            assert ours.encode_prompt(messages) == ids
            assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids) == text
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("file", ["positives.jsonl", "pairs.jsonl"])
def test_trl_reads_our_files(tmp_path, file):
    """Loaded by datasets, rendered by TRL: the text that we train on, and the newline that ends a turn."""
    tiny.write_model(tmp_path / "model")
    tiny.write_rows(tmp_path)
    ours = Tokenizer.from_pretrained(tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    pairs = file == "pairs.jsonl"
    dataset = load(tmp_path / file, ours, PAIRS if pairs else SFT)
    where = {"data_files": str(tmp_path / file), "cache_dir": str(tmp_path / "cache")}
    rows = datasets.load_dataset("json", split="train", **where)
    assert len(rows) == len(dataset) == 24
    for i, row in enumerate(rows):
        assert trl_data.is_conversational(row)
        assert trl_data.maybe_extract_prompt(row) == row
        texts = trl_data.apply_chat_template(row, theirs)
        for j, key in enumerate(["chosen", "rejected"] if pairs else ["completion"]):
            s = i * dataset.sequences_per_example + j
            ids = dataset.ids[dataset.offsets[s] : dataset.offsets[s + 1]].tolist()
            cut = dataset.prompt_lengths[s]
            assert ours.decode(ids[:cut], skip_special_tokens=False) == texts["prompt"]
            assert ours.decode(ids[cut:], skip_special_tokens=False) + "\n" == texts[key]


BLUE, GREEN = [assistant("blue")], [assistant("green")]
TURNS = [user("Sky?"), assistant("Where?"), user("Here.")]
PREFERENCES = [
    # Strings.
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    {"chosen": "The sky is blue.", "rejected": "The sky is blueish."},  # a common start within a word
    # Messages.
    {"prompt": [user("Sky?")], "chosen": BLUE, "rejected": GREEN},
    {"chosen": [user("Sky?"), *BLUE], "rejected": [user("Sky?"), *GREEN]},
    {"chosen": [*TURNS, *BLUE], "rejected": [*TURNS, *GREEN]},
    {"prompt": [{"role": "system", "content": "Be brief."}, user("Sky?")], "chosen": BLUE, "rejected": GREEN},
    {"prompt": TURNS, "chosen": BLUE, "rejected": GREEN},
    # An answer in several turns that begin alike, after a prompt of its own.
    {"prompt": TURNS[:1], "chosen": [*TURNS[1:], *BLUE], "rejected": [*TURNS[1:], *GREEN]},
    # The official code's: the question as a string, and again inside both conversations.
    {"prompt": "Sky?", "chosen": [user("Sky?"), *BLUE], "rejected": [user("Sky?"), *GREEN]},
    # The answers begin alike after an explicit prompt.
    {"prompt": "The sky is", "chosen": " light blue.", "rejected": " light green."},
]


@pytest.mark.parametrize("row", PREFERENCES, ids=range(len(PREFERENCES)))
def test_we_read_trls_preferences_as_trl_does(tmp_path, row):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    expected = trl_data.maybe_extract_prompt(row)
    if len(expected["chosen"]) > 1 and isinstance(expected["prompt"], list):
        # TRL trains on every turn of the answer; we, on the last one after the same conversation.
        shared = len(expected["chosen"]) - 1
        prompt = expected["prompt"] + expected["chosen"][:shared]
        expected = {"prompt": prompt, **{key: expected[key][shared:] for key in ("chosen", "rejected")}}
    [example] = read_examples(tmp_path / "rows.jsonl", pairs=True)
    assert example.prompt == expected["prompt"]
    for text, theirs in zip(example.completions, (expected["chosen"], expected["rejected"])):
        assert theirs == (text if isinstance(theirs, str) else [assistant(text)])


@pytest.mark.parametrize("row", [
    {"prompt": "The sky is", "completion": " blue."},
    {"prompt": TURNS[:1], "completion": BLUE},
    {"prompt": [{"role": "system", "content": "Brief."}, user("Sky?")], "completion": BLUE},
    {"messages": [user("Sky?"), *BLUE]},
    {"messages": [*TURNS, *BLUE]},
], ids=range(5))  # fmt: skip
def test_we_read_trls_sft_forms_as_trl_does(tmp_path, row):
    """The text trained on is the one that TRL renders, up to the newline behind the last turn."""
    tiny.write_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    ours = Tokenizer.from_pretrained(tmp_path)
    dataset = load(tmp_path / "rows.jsonl", ours, SFT)
    text = ours.decode(dataset.ids.tolist(), skip_special_tokens=False)
    if trl_data.is_conversational(row):
        rendered = trl_data.apply_chat_template(row, theirs)
        expected = rendered.get("text") or rendered["prompt"] + rendered["completion"]
        assert text + "\n" == expected
    else:  # TRL ends strings with the end of sequence
        assert text == row["prompt"] + row["completion"] + theirs.eos_token


def copied_step(directory: Path, monkeypatch):
    """redi_step of the README, beside a copy of losses.py, in a directory with nothing else of ours."""
    directory.mkdir()
    shutil.copy(ROOT / "redi" / "losses.py", directory)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = next(block for block in blocks if "def redi_step(" in block)
    (directory / "step.py").write_text(code)
    monkeypatch.syspath_prepend(str(directory))
    for name in ("losses", "step"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    step = importlib.import_module("step")
    assert Path(sys.modules["losses"].__file__).parent == directory
    return step.redi_step


@pytest.mark.parametrize("tied", [True, False])
def test_losses_copied_into_a_transformers_loop(tmp_path, tied, monkeypatch):
    """The README's dozen lines on a padded batch of 5 pairs: the loss and the gradients of our own step."""
    theirs = save_with_transformers(tmp_path / "model", "qwen2", tied)
    tiny.write_rows(tmp_path, examples=5)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "model")
    dataset = load(tmp_path / "pairs.jsonl", tokenizer, PAIRS)
    micro = data.pack(dataset, list(range(5)))

    ours = load_pretrained(tmp_path / "model")
    logps, lengths = sequence_logps(ours(*micro.model_inputs()), micro.labels, micro.cu_seqlens)
    loss = train.METHODS["redi"].losses(logps, lengths, None, progress=0.0, alpha=0.8).sum() / 5
    loss.backward()
    grad_norm = clip_grad_norm_(ours.parameters(), 1.0)

    # The chosen sequences, then the rejected ones, padded on the right.
    sequences = [2 * row + j for j in range(2) for row in range(5)]
    length = int((dataset.offsets[1:] - dataset.offsets[:-1]).max())
    input_ids = torch.zeros(10, length, dtype=torch.int64)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for i, s in enumerate(sequences):
        ids = torch.from_numpy(dataset.ids[dataset.offsets[s] : dataset.offsets[s + 1]].astype("int64"))
        prompt = dataset.prompt_lengths[s]
        input_ids[i, : len(ids)], labels[i, prompt : len(ids)] = ids, ids[prompt:]
        attention_mask[i, : len(ids)] = 1

    optimizer = mock.Mock()  # its zero_grad clears nothing: the gradients stay for the comparison
    value = copied_step(tmp_path / "copy", monkeypatch)(theirs, optimizer, input_ids, attention_mask, labels)
    optimizer.step.assert_called_once()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert value == pytest.approx(loss.item(), abs=1e-5)
    expected = {name: p.grad for name, p in ours.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)

    # And our own step as the command takes it.
    words = "redi --model model --data pairs.jsonl --output out --batch-size 5 --steps 1 --micro-batch-tokens 150"
    command = [sys.executable, str(ROOT / "train.py"), *words.split()]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    metrics = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    assert metrics["loss"] == pytest.approx(value, abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(grad_norm.item(), rel=1e-4)


def test_loss_on_prompt_is_what_the_official_collator_does(tmp_path):
    """Labels of a packed batch, before the shift by one that transformers makes inside its loss."""
    tiny.write_tokenizer(tmp_path)
    tiny.write_rows(tmp_path, examples=5)
    settings = replace(SFT, loss_on_prompt=True)
    dataset = load(tmp_path / "positives.jsonl", Tokenizer.from_pretrained(tmp_path), settings)
    sequences = [dataset.ids[start:end].tolist() for start, end in zip(dataset.offsets, dataset.offsets[1:])]
    theirs = transformers.DataCollatorWithFlattening()([{"input_ids": ids} for ids in sequences])
    # Theirs takes each sequence's last token as an input too, which predicts nothing.
    last = np.cumsum([len(ids) for ids in sequences]) - 1
    shifted = np.append(theirs["labels"][0, 1:], -100)
    assert (shifted[last] == -100).all()
    assert np.delete(shifted, last).tolist() == data.pack(dataset, list(range(5))).labels.tolist()

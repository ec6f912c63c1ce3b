"""Small real model directories for tests: a BPE tokenizer trained on a few texts, and a random decoder; a free port."""

import json
import socket
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from redi.attention import packed_attention
from redi.model import CausalLM
from redi.hub.config import parse_config
from redi.hub.weights import save_pretrained
from redi.tokenizer import CHATML_TEMPLATE, PREFILL, Tokenizer

TEXTS = ["What is 1 + 2? Let me think step by step: 1 + 2 = 3.\n</think>\nThe answer is \\boxed{3}.", "user assistant"]
QWEN2 = {"model_type": "qwen2", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
         "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512, "rope_theta": 10000.0,
         "rms_norm_eps": 1e-6, "tie_word_embeddings": True}


def write_tokenizer(directory: Path, texts=TEXTS, vocab_size: int = 400) -> None:
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML_TEMPLATE,
              "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_model(directory: Path, texts=TEXTS, vocab_size: int = 400, seed: int = 0, **changes) -> CausalLM:
    """A model directory with random weights. `changes` replace keys of QWEN2."""
    write_tokenizer(directory, texts, vocab_size)
    tokenizer = Tokenizer.from_pretrained(directory)
    model = CausalLM(parse_config({**QWEN2, "vocab_size": tokenizer.vocab_size, **changes}))
    randomize(model, seed)
    save_pretrained(model, directory, tokenizer)
    return model


@torch.no_grad()
def randomize(model: CausalLM, seed: int) -> None:
    """Every parameter random, biases and norms too, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.15
        parameter.copy_(noise if parameter.ndim == 2 else 1 + noise)


def write_rows(directory: Path, examples: int = 24, seed: int = 0) -> None:
    """positives.jsonl and pairs.jsonl with responses of uneven lengths."""
    generator = torch.Generator().manual_seed(seed)
    with open(directory / "positives.jsonl", "w") as positives, open(directory / "pairs.jsonl", "w") as pairs:
        for i in range(examples):
            a, b, n, m = torch.randint(1, 12, (4,), generator=generator).tolist()
            prompt = [{"role": "user", "content": f"What is {a} + {b}?"}]

            def answer(value, steps):
                text = "<think>\n" + "Let me think step by step. " * steps + f"\n</think>\n\\boxed{{{value}}}"
                return [{"role": "assistant", "content": text}]

            row = {"prompt": prompt, "id": f"row-{i}", "source": "test"}
            positives.write(json.dumps({**row, "completion": answer(a + b, n)}) + "\n")
            pairs.write(json.dumps({**row, "chosen": answer(a + b, n), "rejected": answer(a + b + 1, m)}) + "\n")


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def completion_ids(tokenizer: Tokenizer, text: str, prefill: str = PREFILL, prompt: str = "") -> list[int]:
    return tokenizer.encode_completions([text], prefill, [prompt])[0]


@torch.no_grad()
def all_logits(model: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    """(T, V) of one sequence: what `ids` (T,) but for the last predict."""
    inputs = ids[:-1]
    cu_seqlens = torch.tensor([0, len(inputs)], dtype=torch.int32)
    attend = partial(packed_attention, cu_seqlens=cu_seqlens, max_seqlen=len(inputs))
    attends = [attend] * model.config.num_hidden_layers
    return model.logits(model.hidden(inputs, torch.arange(len(inputs)), attends))


def free_port() -> int:
    """For torchrun's --master-port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

"""The embedded example: running sums, a teacher who is careful or in a hurry, and a model small enough for a laptop.

A problem is a sum such as `3+9-5+7-2+8`, whose running total stays between 0 and 20. The teacher keeps the total
term by term (`12-5=7`, hardly ever wrong), or takes two or three terms in one go (`12-5+7=14 in my head`, wrong
about four times in ten). Among its right answers are many that were lucky in a hurry, so a student who imitates right
answers alone picks up the habit. The wrong answers show what the habit costs: that is what stage 2 can learn from.
"""

import json
import random
import re
import tempfile
from pathlib import Path

import tokenizers

from redi.answer_checker import is_correct
from redi.checkpoint import save_pretrained
from redi.data import write_atomically
from redi.model import CausalLM, ModelConfig
from redi.tokenizer import CHATML_TEMPLATE, Tokenizer, user_message

TERMS = 6  # of a sum
HIGHEST_TOTAL = 20
TRAIN_PROBLEMS, TEST_PROBLEMS = 3000, 300
SOLUTIONS = 6  # teacher samples a training problem

ALWAYS_CAREFUL = 0.15  # share of solutions without any hurry
HURRY = 0.85  # elsewhere: the chance that a move takes two or three terms at once
WRONG = {1: 0.02, 2: 0.35, 3: 0.45}  # the chance that a move of so many terms goes wrong
IN_MY_HEAD = ", in my head"  # what the teacher writes behind a hurried move

MODEL = {
    "model_type": "qwen2",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,  # weights of a narrow model start larger: it learns twice as fast as from 0.02
}

MOVE = re.compile(r"^(-?\d+)((?:[+-]\d+)+)=(-?\d+)(?:, in my head)?$", re.MULTILINE)


def make_terms(rng: random.Random) -> list[int]:
    """One sum: TERMS terms of one digit, the first positive, every running total within 0 … HIGHEST_TOTAL."""
    terms = [rng.randint(1, 9)]
    while len(terms) < TERMS:
        term = rng.choice((-1, 1)) * rng.randint(1, 9)
        if 0 <= sum(terms) + term <= HIGHEST_TOTAL:
            terms.append(term)
    return terms


def sum_text(terms: list[int]) -> str:
    """[3, 9, -5] -> "3+9-5"."""
    return "".join(f"{term:+d}" for term in terms).removeprefix("+")


def teacher_solution(terms: list[int], rng: random.Random) -> str:
    """What the teacher writes: reasoning in <think>…</think>, then the answer in \\boxed{…}; right or wrong."""
    always_careful = rng.random() < ALWAYS_CAREFUL
    total, left = terms[0], terms[1:]
    lines = ["<think>"]
    while left:
        hurries = len(left) > 1 and not always_careful and rng.random() < HURRY
        count = min(rng.choice((2, 3)), len(left)) if hurries else 1
        taken, left = left[:count], left[count:]
        result = _slip(total, taken, rng) if rng.random() < WRONG[count] else total + sum(taken)
        lines.append(f"{sum_text([total, *taken])}={result}{IN_MY_HEAD if hurries else ''}")
        total = result
    return "\n".join([*lines, "</think>", f"\\boxed{{{total}}}"])


def _slip(total: int, taken: list[int], rng: random.Random) -> int:
    """A wrong result: a term with the wrong sign, a forgotten term, a lost or invented carry, or one off."""
    right, term = total + sum(taken), rng.choice(taken)
    slips = [right - 10, right + 10, right - 1, right + 1]
    if len(taken) > 1:
        slips += [right - 2 * term, right - term] * 2
    return rng.choice(slips)


def share_of_hurried_moves(responses: list[str]) -> float:
    """Of all moves written in these solutions (lines such as `12-5+7=14 in my head`), the share that takes several
    terms at once; nan where there is no move."""
    terms = [len(re.findall(r"[+-]\d+", taken)) for response in responses for _, taken, _ in MOVE.findall(response)]
    return sum(count > 1 for count in terms) / len(terms) if terms else float("nan")


def write_data(output: str | Path, seed: int) -> None:
    """Write the example's data into the directory `output`, all of it a function of `seed`:

    teacher.jsonl: {"id", "problem", "answer", "source", "generations"}, what `prepare_data.py traces` reads;
    positives.jsonl, pairs.jsonl: each problem's first right solution, and its first wrong one beside it, as the
        answer checker judges them: what that command makes of teacher.jsonl;
    problems.jsonl: {"id", "problem", "answer"}, held out: none of them is among the teacher's.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    sums: dict[str, list[int]] = {}  # text -> terms: no sum twice, so none is in training and test
    while len(sums) < TRAIN_PROBLEMS + TEST_PROBLEMS:
        terms = make_terms(rng)
        sums[sum_text(terms)] = terms
    texts = list(sums)
    test = [{"id": f"test-{i:04d}", "problem": text, "answer": str(sum(sums[text]))}
            for i, text in enumerate(texts[TRAIN_PROBLEMS:])]
    train, positives, pairs = [], [], []
    for i, text in enumerate(texts[:TRAIN_PROBLEMS]):
        named = {"id": f"train-{i:04d}", "source": "toy"}
        answer = str(sum(sums[text]))
        generations = [teacher_solution(sums[text], rng) for _ in range(SOLUTIONS)]
        train.append({**named, "problem": text, "answer": answer, "generations": generations})
        right = [solution for solution in generations if is_correct(solution, answer)]
        wrong = [solution for solution in generations if not is_correct(solution, answer)]
        prompt = [user_message(text)]
        if right:
            positives.append({"prompt": prompt, "completion": _assistant(right[0]), **named})
        if right and wrong:
            pairs.append({"prompt": prompt, "chosen": _assistant(right[0]), "rejected": _assistant(wrong[0]), **named})
    named_rows = {"teacher": train, "positives": positives, "pairs": pairs, "problems": test}
    for name, rows in named_rows.items():
        with write_atomically(output / f"{name}.jsonl") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def _assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def write_model(directory: str | Path, seed: int) -> None:
    """Write a model directory with the example's tokenizer and random weights drawn from `seed`."""
    with tempfile.TemporaryDirectory() as temporary:
        write_tokenizer(temporary)
        tokenizer = Tokenizer.from_pretrained(temporary)
        model = CausalLM(ModelConfig.from_dict({**MODEL, "vocab_size": tokenizer.vocab_size}))
        model.init_weights(seed, std=MODEL["initializer_range"])
        save_pretrained(model, directory, tokenizer)


def write_tokenizer(directory: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: one token a number, a sign or a word; ChatML turns."""
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|unknown|>"]
    words = ["system", "user", "assistant", "<think>", "</think>", "\\boxed{", "}", "\n", "+", "-", "="]
    words += re.findall(r"\W*\w+", IN_MY_HEAD)
    numbers = [str(number) for number in range(100)]
    vocabulary = {token: id for id, token in enumerate([*special, *words, *numbers])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    pattern = "|".join([re.escape(word) for word in words] + ["[1-9][0-9]", "[0-9]"])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()  # tokens side by side, no space between
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(Path(directory) / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
              "unk_token": "<|unknown|>", "chat_template": CHATML_TEMPLATE}
    (Path(directory) / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")

"""A page that shows, token by token, what training did to the log-probs of chosen and rejected responses.

    python -m redi.analysis.page --before out/sft/final --after out/redi/final --data pairs.jsonl --output page.html

The first --limit pairs within the length limits are scored under both models. The overview covers all of them;
--pairs of them are shown as text. The page is one self-contained file: any browser opens it, without a network.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path

import numpy as np

from redi import cli

cli.prepare_process()

import torch
from tqdm import tqdm

from redi.answer_checker import explain, extract_answer
from redi.attention import packed_attention
from redi.cli import Parser, positive_int, run_command
from redi.files import error_context, read_json, read_jsonl, resolve_directory, write_atomically
from redi.hub.config import load_config
from redi.hub.weights import DTYPES, MODEL_FILES, load_pretrained
from redi.losses import logit_rows
from redi.model import CausalLM
from redi.problems import read_benchmark
from redi.rows import TokenSettings, add_token_flags, encode, read_examples, token_settings
from redi.tokenizer import Tokenizer

TEMPLATE = Path(__file__).with_name("page.html")
ALTERNATIVES = 5  # likeliest tokens shown at each position
BINS, LARGEST = 41, 5.0  # of the histogram of Δ log π, whose first and last bins are centred on ∓LARGEST nats
POSITIONS = 20  # bins of the position profile
MOVERS, MIN_COUNT = 8, 5  # rows in a table of the most moved tokens; occurrences needed to be ranked by the average
READING = ("prefill", "system_prompt", "append_end_of_text", "max_prompt_tokens", "max_response_tokens", "max_tokens")


@dataclass
class Pair:
    id: str
    problem: str
    prompt: list[int]  # token ids
    responses: list[list[int]]  # token ids of chosen and rejected, each with its end of turn


@dataclass
class Scores:
    """A response of n tokens under one model. Log-probs in nats, computed in fp32."""

    logps: np.ndarray  # (n,) fp32, log π(token)
    ranks: np.ndarray  # (n,) int64, 1 is the likeliest token
    top_ids: np.ndarray  # (n, ALTERNATIVES) int64, likeliest first
    top_logps: np.ndarray  # (n, ALTERNATIVES) fp32


def read_pairs(path: Path, tokenizers: list[Tokenizer], settings: TokenSettings) -> Iterator[Pair]:
    """Pairs within the length limits. Raises ValueError naming the line for bad rows and if the tokenizers differ."""
    for example, (line, row) in zip(read_examples(path, pairs=True), read_jsonl(path)):
        with error_context(f"{path}, line {line}"):
            (prompt, *responses), *others = (encode([example], tokenizer, settings)[0] for tokenizer in tokenizers)
            if any(other != [prompt, *responses] for other in others):
                directories = " and ".join(str(tokenizer.directory) for tokenizer in tokenizers)
                raise ValueError(f"{directories} turn this pair into different token ids; expected two models with the "
                                 "same tokenizer and chat template")
        if settings.fit(prompt, *responses):
            problem = example.prompt if isinstance(example.prompt, str) else str(example.prompt[-1]["content"])
            yield Pair(str(row.get("id", f"line {line}")), problem, prompt, responses)


@torch.no_grad()
def score_response(model: CausalLM, prompt: list[int], response: list[int]) -> Scores:
    """The response's log-probs, ranks and likeliest alternatives; one chunk of logits is in memory at a time."""
    device, n = model.head_weight.device, len(prompt) + len(response) - 1
    ids = torch.tensor(prompt + response, device=device)
    cu_seqlens = torch.tensor([0, n], dtype=torch.int32, device=device)
    attend = partial(packed_attention, cu_seqlens=cu_seqlens, max_seqlen=n)
    hidden = model.hidden(ids[:-1], torch.arange(n, device=device), [attend] * model.config.num_hidden_layers)
    chunk = logit_rows(model.config.vocab_size, hidden.is_cuda)
    parts = []
    for states, labels in zip(hidden[len(prompt) - 1 :].split(chunk), ids[len(prompt) :].split(chunk)):
        log_probs = model.logits(states).log_softmax(-1)  # (chunk, V) fp32
        logps = log_probs.gather(1, labels[:, None])
        ranks = (log_probs > logps).sum(1) + 1
        top_logps, top_ids = log_probs.topk(ALTERNATIVES)
        parts.append([x.cpu().numpy() for x in (logps[:, 0], ranks, top_ids, top_logps)])
    return Scores(*map(np.concatenate, zip(*parts)))


def score_pairs(title: str, directory: Path, pairs: list[Pair], dtype: str) -> list[Scores]:
    """Scores of each pair's chosen and rejected response, in this order: (2 x pairs). Frees the model on return.
    Raises ValueError for log-probs that are not finite."""
    model = load_pretrained(directory, "cuda" if torch.cuda.is_available() else "cpu", DTYPES[dtype])
    bar = tqdm(pairs, f"log-probs {title}", unit="pair", disable=None)
    scores = [score_response(model, pair.prompt, response) for pair in bar for response in pair.responses]
    if not all(np.isfinite(each.logps).all() for each in scores):
        raise ValueError(f"{directory}: the model's log-probs are not finite")
    return scores


def overview(pairs: list[Pair], before: list[Scores], after: list[Scores], tokenizer: Tokenizer) -> dict:
    """Statistics of all scored pairs, as page.html draws them."""
    responses = [response for pair in pairs for response in pair.responses]
    lengths = np.array([len(response) for response in responses])
    owners = np.repeat(np.arange(len(responses)), lengths)  # of each token: the index of its response, odd for rejected
    positions = np.concatenate([np.arange(n) for n in lengths])
    ids, kinds = np.unique(np.concatenate(responses), return_inverse=True)
    old, new = (np.concatenate([scores.logps for scores in model]).astype(float) for model in (before, after))
    averages = np.stack([np.bincount(owners, logps) / lengths for logps in (old, new)], axis=1)
    deltas, edge = new - old, LARGEST * BINS / (BINS - 1)
    sides, sums, counts = [], [], []
    for side in range(2):
        mask = owners % 2 == side
        values, bins = deltas[mask], positions[mask] * POSITIONS // lengths[owners[mask]]
        profile = np.bincount(bins, values, POSITIONS), np.bincount(bins, minlength=POSITIONS)
        sides.append({
            "logps": averages[side::2].round(3).tolist(),
            "histogram": np.histogram(values.clip(-LARGEST, LARGEST), BINS, (-edge, edge))[0].tolist(),
            "profile": [round(total / n, 3) if n else None for total, n in zip(*profile)],
        })
        sums.append(np.bincount(kinds[mask], values, len(ids)))
        counts.append(np.bincount(kinds[mask], minlength=len(ids)))

    total, count = sum(sums), sum(counts)
    mean = np.where(count >= min(MIN_COUNT, count.max()), total / count, 0)
    order, places = np.abs(deltas).argsort(), np.empty(len(ids), dtype=int)
    places[kinds[order]] = order  # the last one written: where each kind of token moved most
    movers = []
    for kind in np.unique([np.argsort(sign * values)[:MOVERS] for values in (total, mean) for sign in (1, -1)]):
        response, t = responses[owners[places[kind]]], positions[places[kind]]
        context = response[max(t - 4, 0) : t], response[t : t + 1], response[t + 1 : t + 4]
        movers.append({"context": [tokenizer.decode(part, skip_special_tokens=False) for part in context],
                       "sums": [round(float(of_side[kind]), 3) for of_side in sums],
                       "counts": [int(of_side[kind]) for of_side in counts], "ranked": bool(mean[kind])})
    return {"sides": sides, "largest": LARGEST, "movers": movers, "rows": MOVERS}


def token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds. A character made of several tokens goes to the last of them, "" to the others."""
    texts, start, end = [], 0, 0  # ids[start:end] are the last ones that were given text
    for i in range(1, len(ids) + 1):
        known, text = tokenizer.decode(ids[start:end], False), tokenizer.decode(ids[start:i], False)
        if text.endswith("\ufffd") and i < len(ids):
            texts.append("")
        else:
            texts.append(text[len(known) :])
            start, end = end, i
    return texts


def judgement(response: str, golds: list[str] | None) -> dict:
    """The extracted answer and, given gold answers, the checker's verdict and its reason."""
    answer = extract_answer(response)
    if answer is None or golds is None:
        return {"answer": answer}
    reasons = [explain(answer, gold).splitlines()[-1] for gold in golds]
    reason = next((text for text in reasons if text.startswith("equal")), reasons[0])
    return {"answer": answer, "correct": reason.startswith("equal"), "reason": reason}


def shown_pair(pair: Pair, scores: Iterator[tuple[Scores, Scores]], tokenizer: Tokenizer, vocabulary, golds) -> dict:
    """A pair as page.html reads it: log-probs in 1/1000 nat, probabilities of the alternatives in 1/1000."""

    def index(texts) -> list[int]:
        return [vocabulary.setdefault(text, len(vocabulary)) for text in texts]

    word = cache(lambda id: tokenizer.decode([id], skip_special_tokens=False))
    sides = []
    for ids, models in zip(pair.responses, scores):
        sides.append({
            "tokens": index(token_texts(tokenizer, ids)),
            "special": [t for t, id in enumerate(ids) if not tokenizer.decode([id])],
            "logps": [np.rint(1000 * model.logps).astype(int).tolist() for model in models],
            "ranks": [model.ranks.tolist() for model in models],
            "alternatives": [index(map(word, model.top_ids.flatten().tolist())) for model in models],
            "probs": [np.rint(1000 * np.exp(model.top_logps)).astype(int).flatten().tolist() for model in models],
            "sums": [round(float(model.logps.sum(dtype=float)), 2) for model in models],
            **judgement(tokenizer.decode(ids), golds),
        })
    differing = (t for t, (chosen, rejected) in enumerate(zip(*pair.responses)) if chosen != rejected)
    fork = next(differing, min(map(len, pair.responses)))
    return {"id": pair.id, "problem": pair.problem, "golds": golds, "sides": sides, "fork": fork}


def write_page(args) -> None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    directories = [resolve_directory(model, MODEL_FILES) for model in (args.before, args.after)]
    tokenizers = [Tokenizer.from_pretrained(directory) for directory in directories]
    contexts = [load_config(*model).max_position_embeddings for model in zip(directories, tokenizers)]
    settings = token_settings(args, True, min(contexts))
    pairs = list(islice(read_pairs(args.data, tokenizers, settings), args.limit))
    if not pairs:
        raise ValueError(f"{args.data} holds no pair within {settings.max_prompt} tokens of prompt, "
                         f"{settings.max_response} of response and {settings.max_total} in all")
    golds = read_benchmark(args.problems).answers if args.problems else {}
    if args.problems and not any(pair.id in golds for pair in pairs):
        raise ValueError(f"{args.problems} has none of the pairs' ids in {args.data}, such as {pairs[0].id!r}")

    before, after = (score_pairs(*model, pairs, args.dtype) for model in zip(("before", "after"), directories))
    moved = [np.abs(new.logps - old.logps) for old, new in zip(before, after)]
    changes = np.array([np.concatenate(moved[i : i + 2]).mean() for i in range(0, len(moved), 2)])
    orders = {"largest": np.argsort(-changes), "first": np.arange(len(pairs)),
              "random": np.random.default_rng(0).permutation(len(pairs))}
    shown, vocabulary = [], {}  # vocabulary: text -> index, by which the arrays of a pair refer to it
    for i in sorted(orders[args.pick][: args.pairs], key=lambda i: -changes[i]):
        scores = zip(before[2 * i : 2 * i + 2], after[2 * i : 2 * i + 2])
        shown.append({"row": int(i), "change": round(float(changes[i]), 3),
                      **shown_pair(pairs[i], scores, tokenizers[1], vocabulary, golds.get(pairs[i].id))})
    content = {"before": args.before, "after": args.after, "data": str(args.data), "scored": len(pairs),
               "pick": args.pick, "overview": overview(pairs, before, after, tokenizers[1]), "pairs": shown,
               "vocabulary": list(vocabulary)}
    # With every < escaped, no text can end the script element that holds the JSON.
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    with write_atomically(args.output) as file:
        file.write(TEMPLATE.read_text("utf-8").replace("{{content}}", text).encode("utf-8", "backslashreplace"))
    print(f"wrote {args.output}")


def run_settings(model: str) -> dict:
    """How the run that wrote a model directory (RUN/final, RUN/step-000100) read its data: flag -> value or text."""
    record = Path(model).resolve().parent / "run.json"
    settings = read_json(record).get("settings", {}) if record.is_file() else {}
    values = {"None": None, "True": True, "False": False}
    return {name: values.get(settings[name], settings[name]) for name in READING if name in settings}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m redi.analysis.page", description=__doc__)
    add = parser.add_argument
    add("--before", required=True, help="model directory or hub id, such as the SFT model")
    add("--after", required=True, help="that of the model trained from it")
    add("--data", required=True, type=Path, help="pairs.jsonl")
    add("--output", required=True, type=Path, help="the page: .html")
    add("--problems", type=Path, help="JSONL with id and answer: adds the checker's verdicts")
    add("--pairs", type=positive_int, default=20, help="number of pairs shown as text")
    add("--pick", choices=["largest", "random", "first"], default="largest",
        help="which scored pairs are shown; largest: by mean |Δ log π| per token")
    add("--limit", type=positive_int, default=200, help="number of pairs to score, from the start of the file")
    add("--dtype", choices=list(DTYPES), default="bfloat16" if torch.cuda.is_available() else "float32",
        help="of the computation")
    reading = parser.add_argument_group("reading the data", "defaults: those of the run that wrote --after, if known")
    add_token_flags(reading.add_argument)
    parser.set_defaults(**run_settings(parser.parse_args(argv).after))
    write_page(parser.parse_args(argv))


if __name__ == "__main__":
    run_command(main)

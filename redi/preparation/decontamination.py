"""Removing training rows whose problem shares an n-gram of words with an evaluation problem. No torch."""

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from redi.files import error_context, json_line, read_jsonl

CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")


def decontaminate(inputs: list[Path], against: list[Path], ngram: int, examples: int, directory: Path) -> dict:
    """Copy JSONL files into a directory without the rows that share `ngram` consecutive words with a problem
    in `against`.

    Returns, per file, the rows read, kept and dropped, and those dropped by each benchmark; and the first few
    (`examples`) of each file and benchmark. Raises ValueError naming file and line.
    """
    benchmarks = ngrams_of_benchmarks(against, ngram)
    report = {"files": {}, "examples": []}
    for path in inputs:
        by_benchmark = {one.stem: 0 for one in against}
        counts = {"read": 0, "kept": 0, "dropped": 0, "dropped_by_benchmark": by_benchmark}
        with open(directory / path.name, "wb") as file:
            for number, row in tqdm(read_jsonl(path), unit=" rows", disable=None, desc=path.name):
                counts["read"] += 1
                with error_context(f"{path}, line {number}"):
                    problem = problem_text(row)
                    hits = {}  # benchmark -> (n-gram, id of the evaluation problem)
                    for words in word_ngrams(problem, ngram):
                        for benchmark, problem_id in benchmarks.get(words, {}).items():
                            hits.setdefault(benchmark, (words, problem_id))
                    if not hits:
                        file.write(json_line(row, errors="strict"))
                counts["dropped" if hits else "kept"] += 1
                for benchmark, (words, problem_id) in hits.items():
                    by_benchmark[benchmark] += 1
                    if by_benchmark[benchmark] <= examples:
                        report["examples"].append({"file": path.name, "line": number, "benchmark": benchmark,
                                                   "id": problem_id, "ngram": words, "problem": problem[:300]})
        if not counts["read"]:
            raise ValueError(f"{path}: no rows")
        report["files"][path.name] = counts
    return report


def ngrams_of_benchmarks(paths: list[Path], n: int) -> dict[str, dict[str, str]]:
    """n-gram -> {benchmark: id of the first problem that has it}. Raises ValueError naming file and line."""
    benchmarks = {}
    for path in paths:
        rows = 0
        for rows, (number, row) in enumerate(read_jsonl(path), start=1):
            problem = row.get("problem", row.get("question"))
            if not isinstance(problem, str):
                raise ValueError(f"{path}, line {number}: no text under 'problem' or 'question'")
            for words in word_ngrams(problem, n):
                benchmarks.setdefault(words, {}).setdefault(path.stem, str(row.get("id", f"line {number}")))
        if not rows:
            raise ValueError(f"{path}: no rows")
    return benchmarks


def word_ngrams(text: str, n: int) -> Iterator[str]:
    """Every n-gram of words, after Unicode normalisation, without case and punctuation; a text with fewer words is
    one n-gram. Chinese and Japanese have no blanks between words: each character counts as a word."""
    words = WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    for start in range(max(len(words) - n + 1, min(len(words), 1))):
        yield " ".join(words[start : start + n])


def problem_text(row: dict) -> str:
    """The problem in a training row: under `problem`, or the user's messages in `prompt` or `messages`. Raises
    ValueError where there is none."""
    value = next((row[key] for key in ("problem", "question", "prompt", "messages") if key in row), None)
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        value = "\n".join(str(message.get("content")) for message in value if message.get("role") == "user")
    if not (isinstance(value, str) and value.strip()):
        raise ValueError("no problem: expected text under 'problem', 'prompt' or 'messages' "
                         f"(found {', '.join(row) or 'an empty object'})")
    return value

"""Selection rule of the paper: which of a teacher's generations for a problem is y_w (chosen), and which are y_l.

y_w is the first correct generation; y_l is the first incorrect one, or others by the arguments of `select`.
"""

import itertools
import random
import re

from redi.answer_checker import MAX_CHARS, answers_match, extract_answer
from redi.evaluation.sample_store import finish_reason
from redi.preparation.corpus import require
from redi.problems import gold_answers

# Outcomes of a row, in the order of the tests. Every row counts as read and once more up to positives; a positive may
# give pairs, of which too_long and same_ids are not written to pairs.jsonl.
OUTCOMES = (
    "read", "invalid_problem", "excluded_source", "no_problem", "no_answer", "no_generations", "mismatched_verdicts",
    "no_correct", "positives", "pairs", "too_long", "same_ids", "pairs_written",
)

# Answers outside a box, where --read-unboxed asks for them: GSM8K's, at the end of a response, the last formula.
UNBOXED_ANSWERS = {
    "hash_answers": re.compile(r"####[ \t]*(\S.*)"),
    "sentence_answers": re.compile(r"\banswer(?: is|:)[ \t*:]*(\S.*?)[.\s*]*\Z", re.IGNORECASE),
    "formula_answers": re.compile(r"\$([^$\n]+)\$"),
}

# The checker's verdicts on generations; unboxed ones have no answer that was read (truncated, for instance).
GENERATIONS = ("correct_generations", "incorrect_generations", "unboxed_generations", *UNBOXED_ANSWERS)


class SkipRow(Exception):
    """Raised for a row that gives no training data, with its outcome."""


def openr1_verdicts(row: dict, verdict: str, exclude_sources: list[str]) -> list[bool]:
    """Which generations are correct by the verdicts in the row: of "math_verify", "llama", "both" (the paper) or
    "either".

    Layouts: OpenR1-Math-Raw (a struct `correctness`), OpenR1-Math-220k (`correctness_llama` and
    `correctness_math_verify`; all of its problems are valid, so there is no problem_is_valid), and the flattened
    OpenR1-Math-Raw without a Llama verdict. Raises SkipRow; and ValueError for a column that is missing or has
    another type.
    """
    require(row, "problem", "generations", "source")
    if "correctness" in row:
        verdicts = row["correctness"] if row["correctness"] is not None else {}
        if not isinstance(verdicts, dict):
            raise ValueError(f"'correctness' must be a struct of lists, found {type(verdicts).__name__}")
        names = {"llama": "llama_verification", "math_verify": "math_verify_reparsed_answer"}
    elif "correctness_llama" in row or "correctness_math_verify" in row:
        verdicts, names = row, {"llama": "correctness_llama", "math_verify": "correctness_math_verify"}
    else:
        raise ValueError(f"no verdicts: expected a column 'correctness', or 'correctness_llama' and "
                         f"'correctness_math_verify' (found {', '.join(row)}); rows without verdicts are for "
                         "`prepare_data.py traces`")
    wanted = list(names) if verdict in ("both", "either") else [verdict]
    if lacking := [name for name in wanted if verdicts and names[name] not in verdicts]:
        other = "math_verify" if lacking == ["llama"] else "llama"
        raise ValueError(f"no column '{names[lacking[0]]}': a generation is correct when Llama's and "
                         f"Math-Verify's verdicts are both true; --verdict {other} takes one verdict alone")
    if "problem_is_valid" in row or "correctness_llama" not in row:
        require(row, "problem_is_valid")
        valid = row["problem_is_valid"]
        if not (isinstance(valid, str) and valid.strip().lower() == "yes"):
            raise SkipRow("invalid_problem")
    _check(row, exclude_sources)
    lists = [verdicts.get(names[name]) for name in wanted]
    if verdict == "either":  # OpenR1-Math-220k lacks one of the two for many rows
        lists = [one for one in lists if one is not None]
    if not lists or any(not isinstance(one, list) or len(one) != len(row["generations"]) for one in lists):
        raise SkipRow("mismatched_verdicts")
    for value in itertools.chain(*lists):
        if not (value is None or isinstance(value, (bool, int, float))):
            raise ValueError(f"a verdict must be true, false or null, found {value!r}")
    agree = any if verdict == "either" else all
    return [agree(map(bool, of_one)) for of_one in zip(*lists)]  # None, not judged, counts as false


def own_verdicts(
    row: dict, exclude_sources: list[str], open_thought_counts: bool, read_unboxed: bool
) -> tuple[list[str | None], list[bool], list[str]]:
    """`final_answers` with, between the two, whether our answer checker finds each equal to a gold one.

    Raises SkipRow; and ValueError for a column that is missing or has another type, and an unreadable gold answer.
    """
    require(row, "problem", "answer", "generations")
    _check(row, exclude_sources)
    gold = gold_answers(row["answer"])
    if not gold:
        raise SkipRow("no_answer")
    answers, forms = final_answers(row, open_thought_counts, read_unboxed)
    correct = [answer is not None and any(answers_match(answer, one) for one in gold) for answer in answers]
    return answers, correct, forms


def final_answers(row: dict, open_thought_counts: bool, read_unboxed: bool) -> tuple[list[str | None], list[str]]:
    """The final answer of every generation (None: none that can be read, or the generation reached a limit), and the
    keys of UNBOXED_ANSWERS by which answers were read. Raises ValueError for invalid `finish_reasons`."""
    reasons = row.get("finish_reasons") or [row.get("finish_reason")] * len(row["generations"])
    if not isinstance(reasons, list) or len(reasons) != len(row["generations"]):
        found = str(reasons)[:80]
        raise ValueError(f"'finish_reasons' must be a list with one entry for each generation, found {found}")
    answers, forms = [], []
    for text, reason in zip(row["generations"], reasons):
        answer, form = None, None
        if text and finish_reason(reason) != "length":
            answer = extract_answer(text, open_thought_counts)
            if answer is None and read_unboxed:
                answer, form = _unboxed_answer(text)
        answers.append(answer)
        forms += [form] if form else []
    return answers, forms


def _unboxed_answer(text: str) -> tuple[str | None, str | None]:
    """An answer outside a box, not in a thought that never ends, and its key in UNBOXED_ANSWERS."""
    text = text.rpartition("</think>")[2][-MAX_CHARS:]  # the checker reads no longer answer
    for form, pattern in UNBOXED_ANSWERS.items():
        if "<think>" not in text and (found := pattern.findall(text)):
            return found[-1].strip(), form
    return None, None


def _check(row: dict, exclude_sources: list[str]) -> None:
    """Raises SkipRow where there is nothing to select from, and ValueError for values of another type."""
    if row.get("source") in exclude_sources:
        raise SkipRow("excluded_source")
    problem, generations = row["problem"], row["generations"]
    if not (problem is None or isinstance(problem, str)):
        raise ValueError(f"'problem' must be a string, found {type(problem).__name__}")
    if not (problem and problem.strip()):
        raise SkipRow("no_problem")
    if not (generations is None or isinstance(generations, list)):
        raise ValueError(f"'generations' must be a list of strings, found {type(generations).__name__}")
    if not generations:
        raise SkipRow("no_generations")
    for number, text in enumerate(generations):
        if not (text is None or isinstance(text, str)):
            raise ValueError(f"'generations'[{number}] must be a string, found {type(text).__name__}")


def select(
    generations: list[str | None], correct: list[bool], usable: list[bool], negatives: str, limit: int, seed: str
) -> tuple[str, list[str]]:
    """y_w, and up to `limit` responses y_l to pair it with.

    negatives: the "first" incorrect ones, the "shortest", the "longest" (in characters) or a "random" draw with this
    seed. A generation that is not usable, or has no text, is neither correct nor incorrect; one equal to y_w is no
    negative. Raises SkipRow where none is correct.
    """
    texts = [(text, verdict) for text, verdict, use in zip(generations, correct, usable) if use and text and
             text.strip()]  # fmt: skip
    chosen = next((text for text, verdict in texts if verdict), None)
    if chosen is None:
        raise SkipRow("no_correct")
    rejected = list(dict.fromkeys(text for text, verdict in texts if not verdict and text != chosen))
    if negatives == "shortest":
        rejected.sort(key=len)
    elif negatives == "longest":
        rejected.sort(key=len, reverse=True)
    elif negatives == "random":
        random.Random(seed).shuffle(rejected)
    return chosen, rejected[:limit]

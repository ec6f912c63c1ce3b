"""The paper's rule: which of a teacher's generations for a problem is y_w, to be imitated, and which are y_l.

y_w is the first correct generation; y_l is the first incorrect one, or others that `select` is asked for.
"""

import itertools
import random

from redi.answer_checker import extract_answer
from redi.preparation.corpus import require
from redi.problems import gold_answers, judge

# What becomes of a row, in the order in which it is asked. Every row is counted as read and once more up to
# positives; a positive may give pairs, of which too_long and same_ids are left out of pairs.jsonl.
OUTCOMES = (
    "read", "invalid_problem", "excluded_source", "no_problem", "no_answer", "no_generations", "mismatched_verdicts",
    "no_correct", "positives", "pairs", "too_long", "same_ids", "pairs_written",
)

# What the checker finds of a generation: incorrect and unboxed ones (cut off, say: no closed box) are not correct.
GENERATIONS = ("correct_generations", "incorrect_generations", "unboxed_generations")


class SkipRow(Exception):
    """Raised for a row that gives no training data, with the outcome that says why."""


def openr1_verdicts(row: dict, verdict: str, exclude_sources: list[str]) -> list[bool]:
    """Which generations are correct by the verdicts that the row carries: of "math_verify", "llama", "both" (the
    paper) or "either".

    Layouts: OpenR1-Math-Raw (a struct `correctness`), OpenR1-Math-220k (`correctness_llama` and
    `correctness_math_verify`; its problems were all found valid, so that it has no problem_is_valid), and the
    flattened OpenR1-Math-Raw without a Llama verdict. Raises SkipRow; and ValueError for a column that is missing or
    of another type.
    """
    require(row, "problem", "generations", "source")
    if "correctness" in row:
        verdicts = row["correctness"] if row["correctness"] is not None else {}
        if not isinstance(verdicts, dict):
            raise ValueError(f"'correctness' must be a struct of lists, found {type(verdicts).__name__}")
        names = {"llama": "llama_verification", "math_verify": "math_verify_reparsed_answer"}
        missing = [name for name in names.values() if verdicts and name not in verdicts]
    elif "correctness_llama" in row or "correctness_math_verify" in row:
        verdicts, names = row, {"llama": "correctness_llama", "math_verify": "correctness_math_verify"}
        missing = [name for name in names.values() if name not in row]
    else:
        raise ValueError(f"no verdicts: expected a column 'correctness', or 'correctness_llama' and "
                         f"'correctness_math_verify' (found {', '.join(row)}); rows without verdicts are for "
                         "`prepare_data.py traces`")
    wanted = list(names) if verdict in ("both", "either") else [verdict]
    if lacking := [name for name in wanted if names[name] in missing]:
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
    if verdict == "either":  # where one judge was not asked (OpenR1-Math-220k), the other decides
        lists = [one for one in lists if one is not None]
    if not lists or any(not isinstance(one, list) or len(one) != len(row["generations"]) for one in lists):
        raise SkipRow("mismatched_verdicts")
    for value in itertools.chain(*lists):
        if not (value is None or isinstance(value, (bool, int, float))):
            raise ValueError(f"a verdict must be true, false or null, found {value!r}")
    agree = any if verdict == "either" else all
    return [agree(map(bool, of_one)) for of_one in zip(*lists)]  # None, not judged, counts as false


def own_verdicts(row: dict, exclude_sources: list[str]) -> tuple[list[str | None], list[bool]]:
    """The final answer of every generation (None: no closed box), and whether our answer checker finds it equal to
    one of the gold ones. Raises SkipRow; and ValueError for a column that is missing or of another type."""
    require(row, "problem", "answer", "generations")
    _check(row, exclude_sources)
    gold = gold_answers(row["answer"])
    if not gold:
        raise SkipRow("no_answer")
    verdicts = [judge(text or "", gold) for text in row["generations"]]
    return [answer for answer, _ in verdicts], [correct for _, correct in verdicts]


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
    generations: list[str | None], correct: list[bool], negatives: str, truncated: str, limit: int, seed: str
) -> tuple[str, list[str]]:
    """y_w, and the responses y_l that it is paired with.

    negatives: which incorrect ones: the "first", "shortest", "longest" (in characters) or a "random" draw with this
    seed, up to `limit`; truncated: "drop" leaves out generations without a closed box. A generation without text is
    neither correct nor incorrect; one equal to y_w teaches nothing against it. Raises SkipRow where none is correct.
    """
    texts = [(text, verdict) for text, verdict in zip(generations, correct) if text and text.strip()]
    if truncated == "drop":
        texts = [(text, verdict) for text, verdict in texts if extract_answer(text) is not None]
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

"""A problem to solve: its text as the user's message, its gold answers, and files of problems (benchmarks)."""

import hashlib
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from redi.answer_checker import answers_match, extract_answer
from redi.files import error_context, read_jsonl

# The text around a problem in the user's message, in training data and in evaluation alike. "open-r1" is the
# evaluation template of open-r1 and lighteval (paper, Appendix C.5; MATH_QUERY_TEMPLATE in
# openr1/src/open_r1/evaluate.py of the official code), including both spaces after "clearly.".
PROMPT_TEMPLATES = {
    "none": "{problem}",
    "open-r1": (
        "Solve the following math problem efficiently and clearly.  The last line of your response should be "
        "of the following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' "
        "(without quotes) where ANSWER is just the final number or expression that solves the problem. Think "
        "step by step before answering.\n\n{problem}"
    ),
}

MATH = re.compile(r"(\$\$?)([^$]+)\1")
WORD = re.compile(r"[^\W\d_]{2,}")
NEARLY_NONE = 0.01  # share of correct responses under which a mistake in the data is likely
FORMULA = re.compile(r"[\d$\\^_*/%=+<>|~√∞π°]")


def user_message(problem: str, prompt_template: str = "none") -> dict:
    """The user's message for a problem. `prompt_template` is a key of PROMPT_TEMPLATES."""
    return {"role": "user", "content": PROMPT_TEMPLATES[prompt_template].replace("{problem}", problem)}


def assistant_message(response: str) -> dict:
    return {"role": "assistant", "content": response}


def gold_texts(value) -> list[str]:
    """The texts of a gold answer: a string or a number, or a list of acceptable ones; [] where there is none.

    Raises ValueError for anything else.
    """
    texts = []
    for answer in value if isinstance(value, list) else [value]:
        if isinstance(answer, float) and answer.is_integer():  # AMC's answers are floats in the file: 142.0
            answer = int(answer)
        not_finite = isinstance(answer, float) and not math.isfinite(answer)  # not JSON, but Python reads NaN
        if isinstance(answer, bool) or not_finite or not isinstance(answer, str | int | float | None):
            raise ValueError(f"'answer' must be a text, a number, or a list of them, found {answer!r}")
        texts.append("" if answer is None else str(answer).strip())
    return [text for text in texts if text]


def gold_answers(value) -> list[str]:
    """`gold_texts`, each reduced to its answer: the text after "####" (GSM8K), in the last box, or in one pair of $…$
    around all of it. Raises ValueError for a text without an answer: nothing would be equal to it."""
    answers = []
    for text in gold_texts(value):
        answer = text.rpartition("####")[2].strip()
        enclosed = MATH.fullmatch(answer)
        answer = extract_answer(answer) or (enclosed[2].strip() if enclosed else answer)
        words = max(len(WORD.findall(part)) for part in re.split("[,;]", answer))
        if not answer or words > 3 and not FORMULA.search(answer):
            raise ValueError(f"the gold answer {text[:80]!r} cannot be checked: expected a formula, a number, or at "
                             "most three words")
        answers.append(answer)
    return answers


def judge(response: str, gold: list[str], open_thought_counts: bool = False) -> tuple[str | None, bool]:
    """The final answer of a response (None: no closed box, or only in a thought that never ends), and whether the
    checker finds it equal to a gold one."""
    answer = extract_answer(response, open_thought_counts)
    return answer, answer is not None and any(answers_match(answer, one) for one in gold)


def opens_thought(text: str) -> bool:
    """Whether a text ends in a thought, or before one."""
    return text.rfind("<think>") > text.rfind("</think>")


def warn_if_none_correct(name: str, correct: int, judged: int) -> None:
    """Gold answers in a form that the checker does not read, or another prompt, can make all responses incorrect."""
    if correct < NEARLY_NONE * judged:
        print(f"warning: {name}: {correct} of {judged} responses are judged correct; compare the gold answers with the "
              "answers that were read", file=sys.stderr)


@dataclass
class Benchmark:
    name: str  # of the file, without its suffix
    problems: dict[str, str]  # by id, in the file's order; the first --limit
    answers: dict[str, list[str]]  # by id, for the entire file: any of them is correct
    digest: str  # of the file's ids and problems: what samples depend on, as their verdicts can be computed again


def read_benchmark(path: str | Path, limit: int | None = None) -> Benchmark:
    """Read problems: `problem` or `question`; `answer` or `final_answer` (a text, a number, or a list of
    acceptable ones), or a `solution` with a box; `id` or `unique_id`, or else NAME-0, NAME-1, ….

    Raises ValueError naming file and line.
    """
    name, problems, answers, lines = Path(path).stem, {}, {}, {}
    for line, row in read_jsonl(path):
        id, problem = _first_of(row, "id", "unique_id"), _first_of(row, "problem", "question")
        id = f"{name}-{len(lines)}" if id is None else str(id)
        with error_context(f"{path}, line {line}"):
            if not isinstance(problem, str) or not problem.strip():
                raise ValueError("expected a text under 'problem' or 'question'")
            if id in lines:
                raise ValueError(f"id {id!r} is already used in line {lines[id]}")
            lines[id], problems[id], answers[id] = line, problem, _answers(row)
    if not problems:
        raise ValueError(f"{path}: no problems")
    digest = hashlib.sha256(json.dumps(problems).encode()).hexdigest()
    return Benchmark(name, {id: problems[id] for id in list(problems)[:limit]}, answers, digest)


def _answers(row: dict) -> list[str]:
    found = _first_of(row, "answer", "final_answer")
    if found is None and isinstance(row.get("solution"), str):
        found = extract_answer(row["solution"])
    answers = gold_answers(found)
    if not answers or isinstance(found, list) and len(answers) < len(found):
        raise ValueError("expected an answer (a text, a number, or a list of them) under 'answer' or 'final_answer', "
                         f"or a 'solution' with a box; found {found!r}")
    return answers


def _first_of(row: dict, *keys: str):
    return next((row[key] for key in keys if row.get(key) is not None), None)

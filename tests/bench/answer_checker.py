"""Accuracy and throughput of redi/answer_checker.py and of Math-Verify on the same rows.

    python tests/bench/answer_checker.py ../shared/data/answers/labelled.jsonl     (needs math-verify 0.9.0)
    python tests/bench/answer_checker.py ../shared/data/answers/public.jsonl       (pairs aimed at weak spots)
    python tests/bench/answer_checker.py ../shared/data/answers/labelled.jsonl --fuzz 200000

Rows: "gold", "pred", "label", "kind", "pred_is_text" (true: pred is the end of a response with a box). Cold: the first
pass of a new process, including the import of sympy. Warm: the mean of --repeats passes after it. CPU seconds, one
core. Math-Verify is used as its documentation describes: gold and prediction in dollars, LaTeX and plain expressions,
boxes first, its default time limits; its imports, sympy included, come before its first pass.

--fuzz N judges N pairs of the seeded grammar in tests/test_answer_checker_fuzz.py, mutated with the golds of the rows
and the hostile answers beside them. It prints the slowest call, the largest growth of the process, exceptions, and
asymmetric verdicts.
"""

import argparse
import collections
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from redi import answer_checker  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="labelled.jsonl or public.jsonl")
    parser.add_argument("--repeats", type=int, default=1, help="warm passes over the rows (default: 1)")
    parser.add_argument("--fuzz", type=int, default=0, help="random pairs to judge instead (default: 0, none)")
    parser.add_argument("--seed", type=int, default=0, help="of the random pairs (default: 0)")
    args = parser.parse_args()
    rows = read(args.rows)
    if not args.fuzz:
        return compare(rows, args.repeats)
    hostile = args.rows.with_name("hostile.jsonl")
    texts = [row["gold"] for row in rows] + [row["pred"][:2000] for row in (read(hostile) if hostile.exists() else [])]
    fuzz(args.fuzz, args.seed, texts)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ours(row: dict) -> bool:
    check = answer_checker.is_correct if row["pred_is_text"] else answer_checker.answers_match
    return check(row["pred"], row["gold"])


def math_verify():
    """The same verdict by Math-Verify, as a function of a row."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def in_dollars(text: str) -> str:
        return f"${text.strip('$')}$"

    def judge(row: dict) -> bool:
        gold = parse(in_dollars(row["gold"]), extraction_config=targets)
        prediction = parse(row["pred"] if row["pred_is_text"] else in_dollars(row["pred"]))
        return bool(verify(gold, prediction))

    return judge


def timed_pass(judge, rows: list[dict]) -> tuple[list[bool], float]:
    """(verdicts, answers per CPU-second)."""
    start = time.process_time()
    verdicts = [judge(row) for row in rows]
    return verdicts, len(rows) / (time.process_time() - start)


def compare(rows: list[dict], repeats: int) -> None:
    start = time.process_time()
    answer_checker.engine()
    imported = time.process_time() - start
    totals = collections.Counter(row["kind"] for row in rows)
    warm, correct_by_kind = [], []
    checkers = {f"redi {answer_checker.VERSION}": lambda: ours, f"Math-Verify {version('math-verify')}": math_verify}
    for name, make in checkers.items():
        judge = make()
        verdicts, first = timed_pass(judge, rows)
        if judge is ours:
            cold = len(rows) / (len(rows) / first + imported)
            print(f"redi, cold: {cold:.0f} answers per CPU-second, including {imported:.2f} s for the import of sympy")
        warm.append(sum(timed_pass(judge, rows)[1] for _ in range(repeats)) / repeats)
        correct = [verdict == row["label"] for verdict, row in zip(verdicts, rows)]
        accepted = sum(verdict and not row["label"] for verdict, row in zip(verdicts, rows))
        print(f"{name:18} {sum(correct)} of {len(rows)} correct ({sum(correct) / len(rows):.1%}), {accepted} of "
              f"{sum(not row['label'] for row in rows)} wrong answers accepted, warm {warm[-1]:.0f} answers per "
              "CPU-second")
        correct_by_kind.append(collections.Counter(row["kind"] for row, right in zip(rows, correct) if right))
    print(f"{warm[0] / warm[1]:.0f} times the throughput")
    for kind, total in sorted(totals.items()):
        print(f"{kind:26} {total:4} rows: {correct_by_kind[0][kind]:4} and {correct_by_kind[1][kind]:4} correct")


def fuzz(count: int, seed: int, texts: list[str]) -> None:
    """Judge `count` random pairs in both directions; exceptions are counted."""
    from test_answer_checker_fuzz import cost, megabytes, random_pairs

    answer_checker.engine()
    slowest, largest, raised, asymmetric, equal = (0.0, None), (0.0, None), [], [], 0
    start, size = time.process_time(), megabytes()
    for pair in random_pairs(seed, count, texts):
        try:
            verdict, seconds, growth = cost(answer_checker.answers_match, *pair)
            reverse, reverse_seconds, reverse_growth = cost(answer_checker.answers_match, *reversed(pair))
        except Exception as error:  # any exception is a finding
            raised.append((pair, repr(error)))
            continue
        equal += verdict
        slowest = max(slowest, (max(seconds, reverse_seconds), pair), key=lambda found: found[0])
        largest = max(largest, (max(growth, reverse_growth), pair), key=lambda found: found[0])
        if verdict != reverse:
            asymmetric.append(pair)
    print(f"{count} pairs in both directions (seed {seed}): {time.process_time() - start:.0f} CPU seconds, {equal} "
          f"equal, {len(raised)} raised, {len(asymmetric)} asymmetric")
    print(f"slowest call: {slowest[0]:.3f} CPU seconds: {str(slowest[1])[:200]}")
    print(f"largest growth in one call: {largest[0]:.1f} MB; in all: {megabytes() - size:.1f} MB")
    for found in raised[:10] + asymmetric[:10]:
        print(str(found)[:500])


if __name__ == "__main__":
    main()

"""Accuracy, and answers per CPU-second, of redi/answer_checker.py and of Math-Verify on the same rows.

    python tests/bench/answer_checker.py ../shared/data/answers/labelled.jsonl     (needs math-verify 0.9.0)
    python tests/bench/answer_checker.py ../shared/data/answers/labelled.jsonl --fuzz 200000

Rows: "gold", "pred", "label", "pred_is_text" (true: pred is the end of a response with a box). Cold: the
first pass over the rows of a new process, the import of sympy in the time; the import alone is printed
beside it. Warm: the mean of --repeats passes after it. CPU seconds of the process, on one core.
Math-Verify is used as its documentation says: gold and prediction in dollars, LaTeX and plain
expressions, boxes first, its time limits; its imports (sympy too) come before its first pass.

--fuzz N judges N pairs of the seeded grammar in tests/test_answer_checker_fuzz.py, mutated with the
rows' golds and the hostile answers beside the rows, and prints the slowest call, the largest growth of
the process, what was raised, and the verdicts that are not symmetric.
"""
import argparse
import collections
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from redi import answer_checker  # noqa: E402


def ours(row):
    check = answer_checker.is_correct if row["pred_is_text"] else answer_checker.answers_match
    return check(row["pred"], row["gold"])


def math_verify():
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def judge(row):
        gold = parse("$%s$" % row["gold"].strip("$"), extraction_config=targets)
        text = row["pred"] if row["pred_is_text"] else "$%s$" % row["pred"].strip("$")
        return bool(verify(gold, parse(text, extraction_config=targets)))
    return judge


def timed_pass(judge, rows):
    """(verdicts, answers per CPU-second)."""
    start = time.process_time()
    verdicts = [judge(row) for row in rows]
    return verdicts, len(rows) / (time.process_time() - start)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def compare(rows, repeats):
    seconds_before = time.process_time()
    answer_checker.engine()
    imported = time.process_time() - seconds_before
    warm, right_by_kind = [], collections.defaultdict(list)
    for name, make in (("redi " + answer_checker.VERSION, lambda: ours),
                       ("Math-Verify " + version("math-verify"), math_verify)):
        judge = make()
        verdicts, first = timed_pass(judge, rows)
        if judge is ours:
            cold = len(rows) / (len(rows) / first + imported)
            print("redi, cold: %.0f answers per CPU-second, %.2f s of which the import of sympy" % (cold, imported))
        warm.append(sum(timed_pass(judge, rows)[1] for _ in range(repeats)) / repeats)
        right = [v == row["label"] for v, row in zip(verdicts, rows)]
        accepted = sum(v and not row["label"] for v, row in zip(verdicts, rows))
        print("%-18s %d of %d right (%.1f %%), %d of %d wrong answers accepted, warm %.0f answers per CPU-second"
              % (name, sum(right), len(rows), 100 * sum(right) / len(rows), accepted,
                 sum(not row["label"] for row in rows), warm[-1]))
        for kind in {row["kind"] for row in rows}:
            right_by_kind[kind].append(sum(r for r, row in zip(right, rows) if row["kind"] == kind))
    print("%.0f times as many answers per CPU-second" % (warm[0] / warm[1]))
    totals = collections.Counter(row["kind"] for row in rows)
    for kind in sorted(totals):
        print("%-26s %4d rows: %4d and %4d right" % (kind, totals[kind], *right_by_kind[kind]))


def fuzz(count, seed, texts):
    """Judge count pairs; nothing that is raised stops it."""
    from test_answer_checker_fuzz import cost, megabytes, random_pairs
    answer_checker.engine()
    slowest, largest, raised, asymmetric, equal = (0.0, None), (0.0, None), [], [], 0
    start, size = time.process_time(), megabytes()
    for pair in random_pairs(seed, count, texts):
        try:
            verdict, seconds, growth = cost(answer_checker.answers_match, *pair)
            backwards, seconds_back, growth_back = cost(answer_checker.answers_match, *reversed(pair))
        except Exception as error:  # whatever it is, it is what this looks for
            raised.append((pair, repr(error)))
            continue
        equal += verdict
        slowest = max(slowest, (max(seconds, seconds_back), pair), key=lambda found: found[0])
        largest = max(largest, (max(growth, growth_back), pair), key=lambda found: found[0])
        if verdict != backwards:
            asymmetric.append(pair)
    print("%d pairs both ways (seed %d): %.0f CPU seconds, %d equal, %d raised, %d not symmetric"
          % (count, seed, time.process_time() - start, equal, len(raised), len(asymmetric)))
    print("slowest call: %.3f CPU seconds: %.200r" % slowest)
    print("largest growth in one call: %.1f MB; in all: %.1f MB" % (largest[0], megabytes() - size))
    for found in raised[:10] + asymmetric[:10]:
        print("%.500r" % (found,))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="labelled.jsonl")
    parser.add_argument("--repeats", type=int, default=1, help="timed passes over the rows (default 1)")
    parser.add_argument("--fuzz", type=int, default=0, help="random pairs to judge instead (default 0: none)")
    parser.add_argument("--seed", type=int, default=0, help="of the random pairs (default 0)")
    args = parser.parse_args()
    rows = read(args.rows)
    if not args.fuzz:
        return compare(rows, args.repeats)
    hostile = args.rows.with_name("hostile.jsonl")
    texts = [row["gold"] for row in rows] + [row["pred"][:2000] for row in (read(hostile) if hostile.exists() else [])]
    fuzz(args.fuzz, args.seed, texts)


if __name__ == "__main__":
    main()

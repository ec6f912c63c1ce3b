"""Accuracy, and answers per CPU-second, of redi/answer_checker.py and of Math-Verify on the same rows.

    python tests/bench/answer_checker.py ../shared/data/answers/labelled.jsonl     (needs math-verify 0.9.0)

Rows: "gold", "pred", "label", "pred_is_text" (true: pred is the end of a response with a box). Each
checker runs once to warm up and then --repeats times; CPU seconds of the process, on one core. Math-
Verify is used as its documentation says: gold and prediction in dollars, LaTeX and plain expressions,
boxes first, its time limits.
"""
import argparse
import collections
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
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


def measure(judge, rows, repeats):
    verdicts = [judge(row) for row in rows]
    start = time.process_time()
    for _ in range(repeats):
        for row in rows:
            judge(row)
    return verdicts, len(rows) * repeats / (time.process_time() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", help="labelled.jsonl")
    parser.add_argument("--repeats", type=int, default=1, help="timed passes over the rows (default 1)")
    args = parser.parse_args()
    rows = [json.loads(line) for line in Path(args.rows).read_text(encoding="utf-8").splitlines()]
    speeds, right_by_kind = [], collections.defaultdict(list)
    for name, judge in (("redi " + answer_checker.VERSION, ours),
                        ("Math-Verify " + version("math-verify"), math_verify())):
        verdicts, speed = measure(judge, rows, args.repeats)
        speeds.append(speed)
        right = [v == row["label"] for v, row in zip(verdicts, rows)]
        accepted = sum(v and not row["label"] for v, row in zip(verdicts, rows))
        print("%-18s %d of %d right (%.1f %%), %d of %d wrong answers accepted, %.0f answers per CPU-second"
              % (name, sum(right), len(rows), 100 * sum(right) / len(rows), accepted,
                 sum(not row["label"] for row in rows), speed))
        for kind in {row["kind"] for row in rows}:
            right_by_kind[kind].append(sum(r for r, row in zip(right, rows) if row["kind"] == kind))
    print("%.0f times as many answers per CPU-second" % (speeds[0] / speeds[1]))
    totals = collections.Counter(row["kind"] for row in rows)
    for kind in sorted(totals):
        print("%-26s %4d rows: %4d and %4d right" % (kind, totals[kind], *right_by_kind[kind]))


if __name__ == "__main__":
    main()

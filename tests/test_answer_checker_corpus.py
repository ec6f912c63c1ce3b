"""The answer checker on labelled, hostile, benchmark and random answers."""
import ast
import collections
import itertools
import json
import random
import resource
import sys
import threading
import time
from pathlib import Path

import pytest

from redi import answer_checker
from redi.answer_checker import answers_match, explain, extract_answer, is_correct

SOURCE = Path(answer_checker.__file__)
STANDARD_IMPORTS = {"argparse", "decimal", "fractions", "functools", "itertools", "json", "math", "random",
                    "re", "sys", "unicodedata"}


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def judge(row):
    check = is_correct if row["pred_is_text"] else answers_match
    return check(row["pred"], row["gold"])


def test_labelled(shared_data):
    table, mistakes = collections.defaultdict(lambda: [0, 0]), []
    corpus = rows(shared_data / "answers" / "labelled.jsonl")
    for row in corpus:
        right = judge(row) == row["label"]
        table[row["kind"]][0] += right
        table[row["kind"]][1] += 1
        if not right:
            mistakes.append(row)
        if not row["pred_is_text"]:
            assert answers_match(row["gold"], row["pred"]) == judge(row), row
    for kind, (right, total) in sorted(table.items()):
        print("%-28s %3d of %3d" % (kind, right, total))
    print(*mistakes, sep="\n")
    assert len(corpus) - len(mistakes) >= 0.98 * len(corpus)
    assert sum(not row["label"] for row in mistakes) <= 2


def benchmark_golds(shared_data):
    for path in sorted((shared_data / "benchmarks").glob("*.jsonl")):
        answers = (row["answer"] for row in rows(path))
        yield path.stem, [a for answer in answers for a in ([answer] if isinstance(answer, str) else answer)]


AS_TEXT = {r"\text{Evelyn}", r"\text{east}", r"\text{even}", r"\text{ellipse}", r"\text{Navin}",  # words
           r"\text{(C)}", r"\text{(E)}", r"\text{(B)}",  # choices
           "$t(0,4]$"}  # a slip in the source: not a formula


def test_benchmark_golds_have_values(shared_data):
    count = 0
    for name, golds in benchmark_golds(shared_data):
        for gold in golds:
            nodes = answer_checker.Reading(gold).nodes
            assert (not nodes or nodes[0][0] == "text") == (gold in AS_TEXT), (name, gold, nodes)
            assert answers_match(gold, gold) and answers_match(" " + gold + " ", gold)
            count += 1
    assert count >= 1560


# Golds of one benchmark that are written differently and are equal: this is all of them, over all pairs.
EQUAL_GOLDS = {frozenset(pair) for pair in [
    ("-2,1", "1,-2"), (r"10,\!080", "10080"), ("15", r"15\mbox{ cm}^2"), (r"180^\circ", r"\pi"), ("5", "x=5"),
    ("30", r"30^\circ"), ("36", r"36^\circ"), ("90", r"90^\circ"), ("120", r"120^\circ"), ("36", r"\$36"),
    ("3.3e-10", r"3.3 \times 10^{-10}"),
    (r"36^\circ", r"\$36"), ("40", "40_9"), ("+2", "2"), (r"1 + i \sqrt{3}", r"1+\sqrt{3}i"),
    (r"1 + i\sqrt{3}", r"1+\sqrt{3}i"), ("1950", r"1950^\circ C"), (r"3.61 \times 10^{-10}", "3.61e-10"),
    (r"\frac{e^{t}} {3}+c e^{-2 t}", r"x = \frac{e^{t}}{3} + ce^{-2t}"),
    (r"\frac{e^{t}}{3}+ce^{-2t}", r"x = \frac{e^{t}}{3} + ce^{-2t}"), ("$1/3$", r"$\frac{1}{3}$"),
    (r"$44^{\circ}$", "44"), (r"$45^{\circ}$", "45"), (r"$4^{\circ}$", "4"), (r"$8 \%$", "8"),
    ("$f(n)=n$", "$f(z)=z$"), ("$f(x)=1$", "1"), ("$k=1$", "1"), ("$k=3$", "3"), ("2,3,4", "2,4,3")]}


def equal_golds(shared_data, pairs):
    found = set()
    for path in sorted((shared_data / "benchmarks").glob("*.jsonl")):
        golds = {}  # without spaces and dollars -> (a gold, its row)
        for row in rows(path):
            for gold in [row["answer"]] if isinstance(row["answer"], str) else row["answer"]:
                golds.setdefault(gold.translate(str.maketrans("", "", " ${}()")), (gold, row["id"]))
        for (gold, row), (other, other_row) in pairs(list(golds.values())):
            if gold != other and row != other_row and answers_match(gold, other):
                found.add(frozenset((gold, other)))
    return found


def test_sampled_golds_differ(shared_data):
    rng = random.Random(20250524)
    sampled = equal_golds(shared_data, lambda golds: ((g, h) for g in golds for h in rng.sample(golds, 12)))
    assert sampled <= EQUAL_GOLDS


@pytest.mark.slow
def test_all_golds_differ(shared_data):
    pairs = equal_golds(shared_data, lambda golds: itertools.combinations(golds, 2))
    assert pairs <= EQUAL_GOLDS and len(pairs) > 20


def test_hostile(shared_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = rows(shared_data / "answers" / "hostile.jsonl")
    verdicts = []
    for row in cases:
        start = time.process_time()
        verdicts.append(answers_match(row["pred"], row["gold"]))
        in_box = is_correct(r"\boxed{" + row["pred"] + "}", row["gold"])
        assert time.process_time() - start < 1, row["why"]
        assert row["expect"] is None or verdicts[-1] == row["expect"] == in_box, row["why"]
        assert answers_match(row["gold"], row["pred"]) == verdicts[-1]
    in_thread = []
    pairs = [(row["pred"], row["gold"]) for row in cases]
    thread = threading.Thread(target=lambda: in_thread.extend(answers_match(*pair) for pair in pairs))
    thread.start()
    thread.join()
    assert in_thread == verdicts
    assert list(tmp_path.iterdir()) == []


PIECES = r"""
    \frac \frac{ \sqrt \sqrt[ { } ( ) [ ] \{ \} | || ^ ^{ _ _{ + - * / = < > \le \ge \ne , ; : . ! !! %
    $ ' ^\circ \pm \mp \cup \cap \setminus \in \infty \pi e i x y n f( g(x) \sin \cos^2 \log_ \ln \log
    \arcsin \tan^{-1} \binom \lfloor \rfloor \left( \right) \left| \right| \text{ \text{and} \text{cm}
    and or \mathrm{ \mathbb{R} \cdot 1 2 10 0.5 \begin{pmatrix} \end{pmatrix} \begin{cases} \end{cases}
    & \\ 1e5 1e-9 1,000 12345678901234567890 9^9 10^{10} (-1)^ \overline{ \vec{ \boxed{ \boxed \sum \int
    ½ ² ₃ √ π ∞ ≤ ② α " ` ~ # \x \ \forall where if 5th million pm \pmod{ \equiv \approx \langle \rangle
    ⁻ ＋ é 字 ٣ __import__('os') \write18{ 1//0""".split()


def random_answer(rng, answers):
    kind = rng.random()
    if kind < 0.4:
        count = rng.randint(1, rng.choice([4, 12, 60]))
        return "".join(rng.choice(PIECES) + rng.choice(["", " "]) for _ in range(count))
    if kind < 0.5:
        return rng.choice(PIECES + answers) * rng.randint(1, 400)
    if kind < 0.6:
        top = rng.choice([127, 0x2FFF, 0x10FFFF])
        return "".join(chr(rng.randint(0, top)) for _ in range(rng.randint(1, 60)))
    if kind < 0.65:
        count = rng.randint(1, 30)
        return rng.choice(PIECES) * count + "1" + rng.choice(PIECES) * count
    text = rng.choice(answers)
    for _ in range(rng.randint(1, 4)):
        i = rng.randint(0, len(text))
        j, other = min(len(text), i + rng.randint(0, 6)), rng.choice(answers)
        change = rng.choice(["", rng.choice(PIECES), other, text[i:j] * rng.randint(2, 60)])
        text = text[:i] + change + text[j:]
    return text


ANSWERS = [
    r"\frac{3}{2}", r"(-\infty, 0) \cup [1, 2)", r"3 \pm 2\sqrt{2}", r"x \in [-2,7]", "y = 2x+3", "10,080",
    "5:8", r"12\text{ cm}^2", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\{1, 2\}", "(1,2),(3,4)",
    r"2 < x \le 4", r"\binom{2n}{n}", r"\lfloor \frac{n}{2} \rfloor", "f(x) = x^2 + 1", r"\text{(C)}",
    "4:30 pm", r"e^{2it}"]


def fuzz(seed, count, answers):
    """No exception, no call over 1 s of CPU, symmetric, the same verdict from a thread, under 200 MB."""
    rng = random.Random(seed)
    pairs, verdicts = [], []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        prediction = random_answer(rng, answers)
        gold = rng.choice([rng.choice(answers), random_answer(rng, answers), prediction])
        start = time.process_time()
        verdicts.append(answers_match(prediction, gold))
        assert time.process_time() - start < 1, (prediction, gold)
        if len(pairs) % 4 == 0:
            assert answers_match(gold, prediction) == verdicts[-1], (prediction, gold)
            is_correct(prediction, [gold])
            explain(prediction, gold)
        pairs.append((prediction, gold))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown / (1024 if sys.platform == "linux" else 1024**2) < 200
    in_thread = []
    thread = threading.Thread(target=lambda: in_thread.extend(answers_match(*pair) for pair in pairs))
    thread.start()
    thread.join()
    assert in_thread == verdicts


def test_random_strings():
    fuzz(0, 2000, ANSWERS)


@pytest.mark.slow
def test_20000_random_strings(shared_data):
    hostile = [row["pred"][:3000] for row in rows(shared_data / "answers" / "hostile.jsonl")]
    corpus = [row["gold"] for row in rows(shared_data / "answers" / "labelled.jsonl")]
    fuzz(1, 20_000, corpus + hostile)


def test_nothing_but_the_standard_library_and_no_execution():
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= STANDARD_IMPORTS
        elif isinstance(node, ast.ImportFrom):
            assert node.module in STANDARD_IMPORTS
        elif isinstance(node, ast.Name):
            assert node.id not in {"eval", "exec", "compile", "__import__", "globals"}
        assert not isinstance(node, ast.Assert)  # the checks must hold under python -O

"""The answer checker on labelled, hostile and benchmark answers, and the bounds of its file."""
import ast
import itertools
import json
import random
import threading
import time
from pathlib import Path

import pytest

from redi import answer_checker
from redi.answer_checker import answers_match, is_correct

SOURCE = Path(answer_checker.__file__)
STANDARD_IMPORTS = {"collections", "dataclasses", "fractions", "functools", "hashlib", "itertools", "json", "math",
                    "re", "sys", "unicodedata"}


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def judge(row):
    check = is_correct if row["pred_is_text"] else answers_match
    return check(row["pred"], row["gold"])


@pytest.mark.parametrize("name, mistakes", [("labelled", 1), ("public", 2)])
def test_labelled_answers(shared_data, name, mistakes):
    corpus = rows(shared_data / "answers" / (name + ".jsonl"))
    wrong = [row for row in corpus if judge(row) != row["label"]]
    assert len(wrong) <= mistakes and all(row["label"] for row in wrong), wrong  # no wrong answer is accepted
    for row in corpus:
        assert row["pred_is_text"] or answers_match(row["gold"], row["pred"]) == judge(row), row


def benchmark_golds(shared_data):
    for path in sorted((shared_data / "benchmarks").glob("*.jsonl")):
        answers = (row["answer"] for row in rows(path))
        yield path.stem, [a for answer in answers for a in ([answer] if isinstance(answer, str) else answer)]


AS_TEXT = {r"\text{Evelyn}", r"\text{east}", r"\text{even}", r"\text{ellipse}", r"\text{Navin}",  # words
           r"\text{(C)}", r"\text{(E)}", r"\text{(B)}",  # choices
           "$t(0,4]$"}  # a slip in the source: not a formula


def is_text(gold):
    """Is nothing but its words (or its letter, for a choice) compared?"""
    readings = [node for tokens in answer_checker.variants(gold)
                for node in answer_checker.attempt(answer_checker.meanings, tokens, answer_checker.Budget())[0]]
    return not readings or "text" in gold and all(node.is_Symbol for node in readings)


def test_benchmark_golds_have_values(shared_data):
    as_text, count = set(), 0
    for _, golds in benchmark_golds(shared_data):
        for gold in golds:
            assert answers_match(gold, gold) and answers_match(" " + gold + " ", gold)
            as_text |= {gold} if is_text(gold) else set()
            count += 1
    assert as_text == AS_TEXT and count >= 1560


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


def test_no_execution_and_no_other_imports():
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    at_the_top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert at_the_top <= STANDARD_IMPORTS
    forbidden = {"eval", "exec", "compile", "__import__", "globals", "sympify", "parse_expr", "parse_latex", "lambdify",
                 "nsimplify", "evalf", "simplify", "signal", "threading", "multiprocessing", "subprocess"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= STANDARD_IMPORTS | {"sympy", "mpmath"}
        elif isinstance(node, ast.ImportFrom):
            assert node.module == "fractions"
        elif isinstance(node, ast.Name):
            assert node.id not in forbidden
        elif isinstance(node, ast.Attribute):
            assert node.attr not in forbidden - {"compile"}  # re.compile
        assert not isinstance(node, ast.Assert)  # the checks must hold under python -O
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "sympy"]
    engine = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "engine")
    assert len(uses) == sum(isinstance(node, ast.Name) and node.id == "sympy" for node in ast.walk(engine)) > 0


def test_bounds_of_the_file():
    """The numbered parts stand in order, no line is too long, and every public function says what it raises."""
    source = SOURCE.read_text(encoding="utf-8")
    lines = source.splitlines()
    assert [line[2] for line in lines if line.startswith("# ") and line[3:5] == ". "] == list("123456789")
    assert len(lines) <= 1282 and max(map(len, lines)) <= 120
    public = ("extract_answer", "answers_match", "is_correct", "accuracy_reward", "explain")
    assert all("aises " in getattr(answer_checker, name).__doc__ for name in public)

import json
import re
from pathlib import Path

import pytest

from redi.problems import gold_answers, read_benchmark
from redi.evaluation.sample_store import scored


@pytest.fixture
def problems(tmp_path) -> Path:
    rows = [{"id": f"s{i}", "problem": f"{i}+{i}", "answer": str(2 * i)} for i in range(5)]
    return write(tmp_path / "sums.jsonl", rows)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_samples_of_rows_without_an_id_and_other_spellings(tmp_path):
    path = write(
        tmp_path / "mixed.jsonl",
        [
            {"problem": "a", "answer": "1"},
            {"question": "b", "final_answer": ["2", "two"]},
            {"problem": "c", "solution": r"so \boxed{\frac{3}{4}}.", "unique_id": "u"},
            {"problem": "d", "answer": 142.0, "id": 7},
            {"problem": "e", "answer": [5, 0.5]},
            {"problem": "f", "answer": None, "solution": r"\boxed{6}"},
        ],
    )
    benchmark = read_benchmark(path)
    assert benchmark.answers == {
        "mixed-0": ["1"], "mixed-1": ["2", "two"], "u": [r"\frac{3}{4}"], "7": ["142"], "mixed-4": ["5", "0.5"],
        "mixed-5": ["6"],
    }  # fmt: skip
    assert benchmark.problems["mixed-1"] == "b"
    assert list(read_benchmark(path, 2).problems) == ["mixed-0", "mixed-1"]


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("6*12=<<6*12=72>>72\n#### 72", ["72"]), ("$\\frac{1}{2}$", ["\\frac{1}{2}"]), ("$$x$$", ["x"]),
        ("hence $\\boxed{5}$ or so", ["5"]), ("$69$,$84$", ["$69$,$84$"]), ("$5", ["$5"]), (["$1$", 2], ["1", "2"]),
        ("$f(x)=ax+b$, where $b$ is an arbitrary integer", ["$f(x)=ax+b$, where $b$ is an arbitrary integer"]),
        ("a + b + c + d + e", ["a + b + c + d + e"]), ("red, green, blue, black", ["red, green, blue, black"]),
        ("no such integers", ["no such integers"]), ("there are 12 of these in all", ["there are 12 of these in all"]),
    ],
)  # fmt: skip
def test_gold_answers(answer, gold):
    assert gold_answers(answer) == gold


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"id": "s0", "problem": "p", "answer": "1"}', "line 6: id 's0' is already used in line 1"),
        ('{"id": "n", "problem": "p"}', "line 6: expected an answer"),
        ('{"id": "n", "problem": "p", "answer": " "}', "line 6: expected an answer"),
        ('{"id": "n", "problem": "p", "answer": []}', "line 6: expected an answer"),
        ('{"id": "n", "problem": "p", "answer": "the sum of all digits"}', "line 6: the gold answer 'the sum"),
        ('{"id": "n", "problem": "p", "answer": ["4", "as was said before this"]}', "line 6: the gold answer 'as was"),
        ('{"id": "n", "problem": "p", "answer": "so ####"}', "line 6: the gold answer 'so ####'"),
        ('{"id": "n", "problem": "p", "answer": NaN}', "line 6: 'answer' must be a text, a number, or a list of them"),
        ('{"id": "n", "problem": "p", "answer": {"value": 1}}', "line 6: 'answer' must be a text, a number"),
        ('{"id": "n", "problem": "p", "answer": ["1", null]}', "line 6: expected an answer"),
        ('{"id": "n", "problem": "p", "answer": true}', "line 6: 'answer' must be a text, a number, or a list of them"),
        ('{"id": "n", "problem": "p", "solution": "no box"}', "line 6: expected an answer"),
        ('{"id": "n", "answer": "1"}', "line 6: expected a text under 'problem' or 'question'"),
        ('{"id": "n", "problem": 3, "answer": "1"}', "line 6: expected a text"),
        ('{"id": "n", "problem', "line 6: not valid JSON"),
        ('["n"]', "line 6: expected a JSON object"),
    ],
)
def test_bad_problems_are_named(problems, line, message):
    problems.write_text(problems.read_text() + line + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{problems}, {message}")):
        read_benchmark(problems)


def test_the_papers_benchmarks_are_read_whole(shared_data):
    sizes = {"math500": 500, "aime24": 30, "amc23": 83, "minerva": 272, "olympiad_bench": 675}
    for name, size in sizes.items():
        benchmark = read_benchmark(shared_data / "benchmarks" / f"{name}.jsonl")
        assert len(benchmark.problems) == size and all(benchmark.answers.values())
    amc = read_benchmark(shared_data / "benchmarks" / "amc23.jsonl")
    assert scored({"id": "amc23-0", "response": r"\boxed{142}"}, amc)["correct"]

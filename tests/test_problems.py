import re

import pytest

from redi.evaluation.sample_store import scored
from redi.problems import gold_answers, read_benchmark
from tests.conftest import write_jsonl


def test_samples_of_rows_without_an_id_and_other_spellings(tmp_path):
    path = write_jsonl(tmp_path / "mixed.jsonl", [
        {"problem": "a", "answer": "1"}, {"question": "b", "final_answer": ["2", "two"]},
        {"problem": "c", "solution": r"so \boxed{\frac{3}{4}}.", "unique_id": "u"},
        {"problem": "d", "answer": 142.0, "id": 7}, {"problem": "e", "answer": [5, 0.5]},
        {"problem": "f", "answer": None, "solution": r"\boxed{6}"},
    ])  # fmt: skip
    benchmark = read_benchmark(path)
    assert benchmark.answers == {
        "mixed-0": ["1"], "mixed-1": ["2", "two"], "u": [r"\frac{3}{4}"], "7": ["142"], "mixed-4": ["5", "0.5"],
        "mixed-5": ["6"],
    }  # fmt: skip
    assert benchmark.problems["mixed-1"] == "b"
    assert list(read_benchmark(path, 2).problems) == ["mixed-0", "mixed-1"]


@pytest.mark.parametrize("answer, gold", [
    ("6*12=<<6*12=72>>72\n#### 72", ["72"]), ("$\\frac{1}{2}$", ["\\frac{1}{2}"]), ("$$x$$", ["x"]),
    ("hence $\\boxed{5}$ or so", ["5"]), (["$1$", 2], ["1", "2"]),
    *((same, [same]) for same in (
        "$69$,$84$", "$5", "$f(x)=ax+b$, where $b$ is an arbitrary integer", "a + b + c + d + e",
        "red, green, blue, black", "no such integers", "there are 12 of these in all")),
])  # fmt: skip
def test_gold_answers(answer, gold):
    assert gold_answers(answer) == gold


@pytest.mark.parametrize("line, message", [
    ('"id": "s0", "problem": "p", "answer": "1"}', "id 's0' is already used in line 1"),
    ('"problem": "p"}', "expected an answer"), ('"problem": "p", "answer": " "}', "expected an answer"),
    ('"problem": "p", "answer": []}', "expected an answer"), ('"problem": 3, "answer": "1"}', "expected a text"),
    ('"problem": "p", "answer": "the sum of all digits"}', "the gold answer 'the sum"),
    ('"problem": "p", "answer": ["4", "as was said before this"]}', "the gold answer 'as was"),
    ('"problem": "p", "answer": "so ####"}', "the gold answer 'so ####'"),
    ('"problem": "p", "answer": NaN}', "'answer' must be"), ('"problem": "p", "answer": true}', "'answer' must be"),
    ('"problem": "p", "answer": {"value": 1}}', "'answer' must be"), ('"answer": "1"}', "expected a text"),
    ('"problem": "p", "answer": ["1", null]}', "expected an answer"), ('"problem', "not valid JSON"),
    ('"problem": "p", "solution": "no box"}', "expected an answer"),
])  # fmt: skip
def test_bad_problems_are_named(tmp_path, line, message):
    path = write_jsonl(tmp_path / "sums.jsonl", [{"id": "s0", "problem": "1+1", "answer": "2"}])
    path.write_text(path.read_text() + "{" + line + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: {message}")):
        read_benchmark(path)


def test_the_papers_benchmarks_are_read_whole(shared_data):
    sizes = {"math500": 500, "aime24": 30, "amc23": 83, "minerva": 272, "olympiad_bench": 675}
    for name, size in sizes.items():
        benchmark = read_benchmark(shared_data / "benchmarks" / f"{name}.jsonl")
        assert len(benchmark.problems) == size and all(benchmark.answers.values())
    amc = read_benchmark(shared_data / "benchmarks" / "amc23.jsonl")
    assert scored({"id": "amc23-0", "response": r"\boxed{142}"}, amc)["correct"]

import collections
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_tokenizer import QWEN_TEMPLATE, THINK, THINKING_TEMPLATE, FakeHub, write_tokenizer
from test_tokenizer import hub  # noqa: F401

import prepare_data
from redi.preparation.corpus import in_chunks
from redi.problems import user_message
from redi.tokenizer import Tokenizer
from tests.conftest import ROOT, run_python
from tests.conftest import read_jsonl as read_rows
from tests.conftest import write_jsonl as write_rows

OPENR1_COUNTS = ["read", "invalid_problem", "excluded_source", "no_problem", "no_generations",
                 "mismatched_verdicts", "no_correct", "positives", "pairs", "too_long", "same_ids"]


def run_command(*arguments, **environment) -> subprocess.CompletedProcess:
    return run_python(ROOT / "prepare_data.py", *arguments, HF_HUB_OFFLINE="1", **environment)


def prepare(*arguments) -> Path:
    """The same without a process of its own, which costs seconds: the output directory."""
    prepare_data.main([*map(str, arguments)])
    return Path(arguments[arguments.index("--output") + 1])


def assert_refused(result, output: Path, *parts) -> None:
    """One sentence, a failure's exit status, and nothing left that could be taken for data."""
    assert result.returncode == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    for part in parts:
        assert str(part) in result.stderr
    assert not output.exists() and not list(output.parent.glob(f"{output.name}.partial*"))


def assert_raises(command, source: Path, *flags, parts) -> None:
    """assert_refused without a process of its own, for an input."""
    output = source.parent / "refused"
    with pytest.raises(ValueError) as error:
        prepare(command, "--output", output, "--input", source, *flags)
    for part in parts:
        assert str(part) in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(source.parent.glob("*refused*"))


def read_report(directory: Path) -> dict:
    """What a run has counted, without its settings and inputs (test_report_names_settings_and_inputs)."""
    report = json.loads((directory / "report.json").read_text())
    return {name: value for name, value in report.items() if name not in ("settings", "inputs")}


def solution(answer, words="so") -> str:
    return f"{THINK}{words}\n</think>\n\n\\boxed{{{answer}}}"


def openr1_row(**changes) -> dict:
    row = {"problem": "1 + 1?", "generations": [solution(3), solution(2), solution(4)], "source": "olympiads",
           "problem_is_valid": "Yes", "uuid": "u-1",
           "correctness": {"llama_verification": [False, True, True],
                           "math_verify_reparsed_answer": [False, True, False]}}
    return {**row, **changes}


def without(column: str) -> dict:
    return {name: value for name, value in openr1_row().items() if name != column}


def trace_row(**changes) -> dict:
    return {"id": "t-1", "problem": "1 + 1?", "answer": "2", "source": "own",
            "generations": [solution(3), solution("\\frac{4}{2}"), solution(2), THINK + "cut off"], **changes}


@pytest.mark.peers("pyarrow")
def test_openr1_counts_on_parquet_shards(tmp_path, shared_data):
    for processes in (1, 2):
        result = run_command("openr1", "--input", shared_data / "traces", "--processes", processes,
                             "--output", tmp_path / str(processes))
        assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "1" / "report.json").read_text())
    expected = json.loads((shared_data / "traces" / "expected_counts.json").read_text())
    assert {name: report[name] for name in expected} == expected and report["too_long"] == 0
    assert list(report)[:11] == OPENR1_COUNTS
    assert len(read_rows(tmp_path / "1" / "positives.jsonl")) == expected["positives"]
    assert len(read_rows(tmp_path / "1" / "pairs.jsonl")) == expected["pairs"]
    for name in ("positives.jsonl", "pairs.jsonl", "report.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_openr1_on_real_jsonl_rows_against_the_rule_written_out(tmp_path, shared_data):
    prepare("openr1", "--input", shared_data / "traces" / "traces.jsonl", "--output", tmp_path / "out")
    positives, pairs = [], []
    for row in read_rows(shared_data / "traces" / "traces.jsonl"):
        correctness = row["correctness"] or {}
        llama, math = correctness["llama_verification"], correctness["math_verify_reparsed_answer"]
        generations = row["generations"]
        if (row["problem_is_valid"].lower() != "yes" or row["source"] == "cn_k12" or not row["problem"]
                or not generations or not len(llama) == len(math) == len(generations)):
            continue
        good = [text for text, a, b in zip(generations, llama, math) if a and b]
        bad = [text for text, a, b in zip(generations, llama, math) if not (a and b)]
        positives += [(row["problem"], good[0])] if good else []
        pairs += [(row["problem"], good[0], bad[0])] if good and bad else []
    for name, columns, expected in (("positives.jsonl", ("prompt", "completion"), positives),
                                    ("pairs.jsonl", ("prompt", "chosen", "rejected"), pairs)):
        written = read_rows(tmp_path / "out" / name)
        assert [tuple(row[column][0]["content"] for column in columns) for row in written] == expected
    assert len(pairs) > 50 and pairs[0][1].startswith(THINK)


def test_openr1_outcome_of_every_kind_of_row(tmp_path):
    verdicts = openr1_row()["correctness"]
    same = [solution(2), solution(2), solution(2)]
    rows = [
        openr1_row(),
        openr1_row(problem_is_valid=" YES ", uuid=None), openr1_row(problem_is_valid="Incomplete"),
        openr1_row(problem_is_valid=None, source="cn_k12"), openr1_row(source="cn_k12", problem=None),
        openr1_row(problem=None, generations=None), openr1_row(problem=" "), openr1_row(generations=None),
        openr1_row(generations=[], correctness=None), openr1_row(correctness=None),
        openr1_row(correctness={**verdicts, "llama_verification": [True, True]}),
        openr1_row(correctness={**verdicts, "math_verify_reparsed_answer": None}),
        openr1_row(correctness={**verdicts, "llama_verification": [None, None, True]}),
        openr1_row(correctness={**verdicts, "llama_verification": [True, True, None]}),  # None is not correct
        openr1_row(correctness={name: [True] * 3 for name in verdicts}),  # a positive without a pair
        openr1_row(generations=same),  # a negative equal to the positive teaches nothing
        openr1_row(generations=["", solution(2), None]),  # no text is neither positive nor negative
    ]
    prepare("openr1", "--input", write_rows(tmp_path / "rows.jsonl", rows), "--output", tmp_path / "out")
    counts = dict(zip(OPENR1_COUNTS, (17, 2, 1, 2, 2, 3, 1, 6, 3, 0, 0)))
    assert read_report(tmp_path / "out") == {**counts, "pairs_written": 3}
    pairs = read_rows(tmp_path / "out" / "pairs.jsonl")
    assert pairs[0] == {"prompt": [{"role": "user", "content": "1 + 1?"}],
                        "chosen": [{"role": "assistant", "content": solution(2)}],
                        "rejected": [{"role": "assistant", "content": solution(3)}],
                        "id": "u-1", "source": "olympiads"}
    made_up = read_rows(tmp_path / "out" / "positives.jsonl")[1]["id"]
    assert made_up == pairs[1]["id"] and len(made_up) == 24


def test_pairs_over_the_limits_in_tokens_are_dropped(tmp_path):
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path / "tokenizer", QWEN_TEMPLATE))
    texts = [openr1_row()["problem"], solution(2), solution(3)]
    prompt = len(tokenizer.encode_prompt([{"role": "user", "content": texts[0]}]))
    completions = tokenizer.encode_completions(texts[1:], THINK, ["", ""])
    chosen, rejected = (len(ids) + 1 for ids in completions)  # + <|im_end|>
    rows = write_rows(tmp_path / "rows.jsonl", [
        openr1_row(), openr1_row(problem=texts[0] + "?"), openr1_row(generations=[texts[2] + "!", *texts[1:]]),
        openr1_row(generations=[texts[2], texts[1] + "!", texts[2]])])
    out = tmp_path / "out"
    report = read_report(prepare("openr1", "--input", rows, "--output", out, "--tokenizer", tokenizer.directory,
                                 "--max-prompt-tokens", prompt, "--max-response-tokens", max(chosen, rejected)))
    assert (report["positives"], report["pairs"], report["too_long"], report["pairs_written"]) == (4, 4, 3, 1)
    assert len(read_rows(out / "positives.jsonl")) == 4 and len(read_rows(out / "pairs.jsonl")) == 1


def test_pairs_that_differ_in_text_and_not_in_ids_are_left_out(tmp_path):
    """train.py refuses a file with such a pair. A tokenizer that normalises, as Qwen's, makes them."""
    directory = write_tokenizer(tmp_path / "tokenizer", QWEN_TEMPLATE)
    file = directory / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "normalizer": {"type": "NFC"}}))
    composed, decomposed = (solution(2, words) for words in ("caf\u00e9", "cafe\u0301"))
    rows = write_rows(tmp_path / "rows.jsonl", [
        openr1_row(generations=[decomposed, composed, solution(4)]), openr1_row()])
    flags = ("openr1", "--input", rows, "--pairs-per-problem", 2)
    report = read_report(prepare(*flags, "--output", tmp_path / "out", "--tokenizer", directory))
    assert (report["pairs"], report["too_long"], report["same_ids"], report["pairs_written"]) == (4, 0, 1, 3)
    pairs = read_rows(tmp_path / "out" / "pairs.jsonl")
    assert pairs[0]["rejected"][0]["content"] == solution(4) and len(pairs) == 3
    assert read_report(prepare(*flags, "--output", tmp_path / "texts"))["pairs_written"] == 4


def test_the_prefill_is_counted_as_training_counts_it(tmp_path):
    """The tokenizer merges ">" with a newline, and newlines with each other: encoded apart there are more tokens."""
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path / "tokenizer", QWEN_TEMPLATE))
    texts = [f"{THINK}\n</think>\\boxed{{{answer}}}" for answer in (2, 3)]
    apart, whole = (
        max(len(ids) + 1 for ids in tokenizer.encode_completions(texts, prefill, ["", ""])) for prefill in (THINK, ""))
    assert apart > whole
    path = write_rows(tmp_path / "rows.jsonl", [trace_row(generations=texts)])
    for limit, flags, pairs in ((apart, (), 1), (whole, (), 0), (whole, ("--prefill", ""), 1)):
        out = prepare("traces", "--input", path, "--output", tmp_path / f"{limit} {flags}", "--tokenizer",
                      tokenizer.directory, "--max-response-tokens", limit, *flags)
        assert read_report(out)["pairs_written"] == pairs


def test_openr1_220k_layout_and_single_verdicts(tmp_path):
    row = {"problem": "1 + 1?", "generations": [solution(3), solution(2)], "source": "amc_aime", "uuid": "u",
           "is_reasoning_complete": [True, True], "correctness_math_verify": [False, True]}
    rows = [{**row, "correctness_llama": None}, {**row, "correctness_llama": [False, True]},
            {**row, "correctness_math_verify": None, "correctness_llama": [True, False]}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for verdict, *counts in (("both", 2, 1), ("either", 0, 3), ("math_verify", 1, 2), ("llama", 1, 2)):
        report = read_report(prepare("openr1", "--input", path, "--output", tmp_path / verdict, "--verdict", verdict))
        assert [report["mismatched_verdicts"], report["pairs"]] == counts

    flattened = {**row, "problem_is_valid": "Yes"}
    path = write_rows(tmp_path / "flat.jsonl", [flattened])
    assert_raises("openr1", path, parts=[f"{path}, line 1", "no column 'correctness_llama'", "--verdict math_verify"])
    prepare("openr1", "--input", path, "--output", tmp_path / "flat", "--verdict", "math_verify")
    assert len(read_rows(tmp_path / "flat" / "pairs.jsonl")) == 1


def test_traces_get_verdicts_from_the_checker(tmp_path):
    rows = [trace_row(source=None), trace_row(id="t-2", answer=["7", 2]), trace_row(id="t-3", answer=9),
            trace_row(answer=None), trace_row(id=None, generations=[solution(2)]), trace_row(answer=2.0)]
    path = write_rows(tmp_path / "rows.jsonl", rows * 30)  # three chunks
    report = read_report(prepare("traces", "--input", path, "--output", tmp_path / "2", "--processes", 2))
    counts = {"read": 180, "no_answer": 30, "no_correct": 30, "positives": 120, "pairs": 90}
    assert {name: report[name] for name in counts} == counts
    pair = read_rows(tmp_path / "2" / "pairs.jsonl")[0]
    assert pair["chosen"][0]["content"] == solution("\\frac{4}{2}")
    assert pair["id"] == "t-1" and pair["source"] == "rows.jsonl"
    assert pair["rejected"][0]["content"] == solution(3)
    prepare("traces", "--input", path, "--output", tmp_path / "1", "--processes", 1)
    for file in (tmp_path / "1").iterdir():
        assert file.read_bytes() == (tmp_path / "2" / file.name).read_bytes()


def test_samples_are_joined_with_their_problems(tmp_path):
    """As evaluate.py writes them; what the limit cut off is neither a positive nor, with --truncated drop, a
    negative, box or not."""
    problems = write_rows(tmp_path / "train.jsonl", [
        {"id": "a", "problem": "What is 1+1?", "answer": ["2", "two"], "generations": ["of a teacher"]},
        {"id": "b", "problem": "What is 2+2?", "answer": 4}])  # fmt: skip
    responses = [("b", solution(4), "length"), ("a", solution(3), "stop"), ("b", solution(5), "length"),
                 ("a", solution("two"), "stop"), ("b", solution(6), None), ("b", solution("4.0"), "stop")]
    samples = [{"id": id, "sample": i, "response": text, "finish_reason": reason, "tokens": 9, "answer": "x",
                "correct": False} for i, (id, text, reason) in enumerate(responses)]  # fmt: skip
    joined = ("traces", "--input", write_rows(tmp_path / "samples.jsonl", samples), "--problems", problems)

    def pairs(*options):
        rows = read_rows(prepare(*joined, "--output", tmp_path / "-".join(["out", *options]), *options) / "pairs.jsonl")
        return [(row["id"], row["prompt"][0]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"])
                for row in rows]  # fmt: skip

    of_a = ("a", "What is 1+1?", solution("two"), solution(3))
    assert pairs("--truncated", "incorrect") == [("b", "What is 2+2?", solution("4.0"), solution(4)), of_a]
    assert pairs() == [("b", "What is 2+2?", solution("4.0"), solution(6)), of_a]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["problems"] == str(problems) and set(report["inputs"]) == {str(joined[2]), str(problems)}
    assert report["positives"] == 2 and report["correct_generations"] == 2 and report["unboxed_generations"] == 2


def test_samples_that_cannot_be_joined(tmp_path):
    problems = write_rows(tmp_path / "train.jsonl", [{"id": "a", "problem": "?", "answer": "1"}])
    for row, words in (({"id": "c", "response": "r"}, "'c' is not among"), ({"id": "a"}, "expected 'response'")):
        samples = write_rows(tmp_path / "samples.jsonl", [{"id": "a", "response": solution(1)}, row])
        assert_raises("traces", samples, "--problems", problems, parts=[f"{samples}, line 2: ", words])


def test_verdicts_of_every_generation(tmp_path):
    rows = [trace_row(), trace_row(id="none", answer=None), trace_row(id=None, generations=[None, solution(2), ""]),
            trace_row(id="no", answer=9)]
    report = read_report(prepare("traces", "--input", write_rows(tmp_path / "rows.jsonl", rows), "--output",
                                 tmp_path / "out", "--truncated", "drop"))
    verdicts = [tuple(row.values()) for row in read_rows(tmp_path / "out" / "verdicts.jsonl")]
    made_up = read_rows(tmp_path / "out" / "positives.jsonl")[1]["id"]
    three, half, two, none = ("3", False), ("\\frac{4}{2}", True), ("2", True), (None, False)
    expected = {"t-1": [three, half, two, none], made_up: [none, two, none],
                "no": [three, (half[0], False), (two[0], False), none]}
    assert verdicts == [(id, number, answer, correct, answer is None) for id, answers in expected.items()
                        for number, (answer, correct) in enumerate(answers)]
    row = read_rows(tmp_path / "out" / "verdicts.jsonl")[0]
    assert list(row) == ["id", "generation", "answer", "correct", "unboxed"]
    kinds = ("correct_generations", "incorrect_generations", "unboxed_generations")
    assert [report[kind] for kind in kinds] == [3, 4, 4]


def selected(tmp_path, rows, *flags) -> tuple[list[str], list[tuple[str, str]], dict]:
    """The positives, the pairs and the report of `traces`."""
    path = write_rows(tmp_path / "rows.jsonl", rows)
    out = prepare("traces", "--input", path, "--output", tmp_path / "out", "--overwrite", "--processes", 1, *flags)
    positives = [row["completion"][0]["content"] for row in read_rows(out / "positives.jsonl")]
    pairs = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in read_rows(out / "pairs.jsonl")]
    return positives, pairs, read_report(out)


@pytest.mark.parametrize("answer, right, wrong", [
    ("6*12=72\n#### 72", "72", "6"), ("so 1,200 in all #### 1,200", "1200", "1"), ("$\\frac{3}{4}$", "3/4", "3"),
    ("thus \\boxed{\\frac{1}{2}}.", "0.5", "2"), ("$$7$$", "7", "8"), (["#### 4", "four"], "four", "5"),
    ("#### $\\boxed{9}$", "9", "1"),
])  # fmt: skip
def test_gold_texts_are_reduced_to_their_answer(tmp_path, answer, right, wrong):
    row = trace_row(answer=answer, generations=[solution(wrong), solution(right)])
    assert selected(tmp_path, [row])[:2] == ([solution(right)], [(solution(right), solution(wrong))])


@pytest.mark.parametrize("answer", ["see the end of the text", "Nobody can ever know this", "####", float("nan"), {}])
def test_gold_texts_without_an_answer_are_refused_by_their_line(tmp_path, answer):
    rows = [trace_row(), trace_row(answer=answer)]
    single = [{"problem": "1 + 1?", "answer": row["answer"], "response": solution(2)} for row in rows]
    for form in (rows, single):
        path = write_rows(tmp_path / "rows.jsonl", form)
        assert_raises("traces", path, parts=[f"{path}, line 2: "])


@pytest.mark.parametrize("unread, form", [
    ("2+2 is\n#### 4", "hash_answers"), ("So the answer is 4.", "sentence_answers"),
    ("The final answer is: **4**.", "sentence_answers"), ("that is $2+2=4$, so $4$ is it", "formula_answers"),
])  # fmt: skip
def test_a_generation_without_a_readable_answer_is_no_negative_unless_asked_for(tmp_path, unread, form):
    boxed, wrong = solution(4), solution(5)
    rows = [trace_row(answer=4, generations=[unread, boxed, wrong])]
    assert selected(tmp_path, rows)[1] == [(boxed, wrong)]
    assert selected(tmp_path, rows, "--truncated", "incorrect")[1] == [(boxed, unread)]
    _, pairs, report = selected(tmp_path, rows, "--read-unboxed")
    assert pairs == [(unread, wrong)]
    kinds = ("hash_answers", "sentence_answers", "formula_answers", "unboxed_generations")
    assert {kind: report[kind] for kind in kinds} == {**dict.fromkeys(kinds, 0), form: 1}


@pytest.mark.parametrize("text", [
    THINK + "maybe \\boxed{2}? let me", solution(3) + THINK + "or \\boxed{2}", THINK + "#### 2", THINK + "so $2$",
])  # fmt: skip
def test_a_cut_off_thought_is_never_chosen(tmp_path, text):
    rows = [trace_row(generations=[text, solution(2), solution(7)])]
    for flags in ((), ("--read-unboxed",)):
        rejected = text if text.startswith(solution(3)) else solution(7)  # the first of two thoughts ends
        assert selected(tmp_path, rows, *flags)[:2] == ([solution(2)], [(solution(2), rejected)])
    chosen = selected(tmp_path, rows, "--open-thought-counts")[0]
    assert chosen == [text if "boxed{2}" in text else solution(2)]


@pytest.mark.parametrize("reason", ["length", "MAX_TOKENS", {"type": "length"}])
def test_a_generation_that_reached_a_limit_is_never_chosen(tmp_path, reason):
    generations = [solution(2, "cut"), solution(2), solution(7)]
    rows = [trace_row(generations=generations, finish_reasons=[reason, "stop", None])]
    rows.append(trace_row(problem="2?", generations=[solution(2)], finish_reason=reason))
    assert selected(tmp_path, rows)[:2] == ([solution(2)], [(solution(2), solution(7))])


@pytest.mark.parametrize("answers", [("4", 4), (4.0, "4"), ("4", [4]), ("#### 4", " 4 "), ("$4$", "4")])
def test_rows_of_one_problem_are_grouped_by_the_answer_they_mean(tmp_path, answers):
    rows = [{"problem": "2 + 2?", "answer": answer, "response": solution(value), "generations": None}
            for answer, value in zip(answers, (4, 5))]
    assert selected(tmp_path, rows)[1] == [(solution(4), solution(5))]


def test_a_warning_where_nearly_nothing_is_correct(tmp_path, capsys):
    folder = tmp_path / "rows"
    folder.mkdir()
    write_rows(folder / "a.jsonl", [trace_row()])
    bad = write_rows(folder / "b.jsonl", [trace_row(answer=8, generations=[solution(3)] * 150)])
    prepare("traces", "--input", folder, "--output", tmp_path / "out")
    [warning] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert str(bad) in warning and "0 of 150" in warning
    nearly = trace_row(answer=8, generations=[solution(8)] + [solution(3)] * 149)
    prepare("traces", "--input", write_rows(folder / "b.jsonl", [nearly]), "--output", tmp_path / "nearly")
    assert "1 of 150" in capsys.readouterr().err


@pytest.mark.parametrize("names, taken", [
    (["train-0.jsonl", "test-0.jsonl", "train-1.jsonl"], ["train-0.jsonl", "train-1.jsonl"]),
    (["data/validation.jsonl", "data/train.jsonl"], ["data/train.jsonl"]),
    (["train/0.jsonl", "dev/0.jsonl"], ["train/0.jsonl"]),
    (["rows.jsonl", "rows_test.jsonl", "eval.jsonl"], ["rows.jsonl"]),
    (["test-0.jsonl", "test-1.jsonl"], ["test-0.jsonl", "test-1.jsonl"]),
    (["latest.jsonl", "contest.jsonl"], ["contest.jsonl", "latest.jsonl"]),
    (["rows.jsonl", "more.csv", "old.jsonl.gz", "README.md", ".hidden"], ["rows.jsonl"]),
])  # fmt: skip
def test_the_train_split_is_taken_and_the_rest_is_named(tmp_path, capsys, names, taken):
    folder = tmp_path / "rows"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(folder / name, [openr1_row(uuid=name)])
    out = prepare("openr1", "--input", folder, "--output", tmp_path / "out")
    assert [row["id"] for row in read_rows(out / "positives.jsonl")] == taken
    passed_over = {*names} - {*taken, "README.md", ".hidden"}
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(str(folder))]
    assert len(said) == bool(passed_over)
    for line in said:
        reads, _, passes_over = line.partition("passes over")
        assert all(name in reads for name in taken) and all(name in passes_over for name in passed_over)


def test_report_names_settings_and_inputs(tmp_path):
    def digest(path):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()

    def report(command, *arguments):
        report = json.loads((prepare(command, *arguments, "--output", tmp_path / command) / "report.json").read_text())
        return report["settings"], report["inputs"]

    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    folder = tmp_path / "rows"
    folder.mkdir()
    files = [write_rows(folder / f"{name}.jsonl", [openr1_row(source=name)]) for name in "ab"]
    settings, inputs = report("openr1", "--input", folder, "--verdict", "either", "--tokenizer", tokenizer,
                              "--processes", 3)
    assert inputs == {str(path): digest(path) for path in (
        *files, tokenizer / "tokenizer.json", tokenizer / "tokenizer_config.json")}
    assert settings == {
        "command": "openr1", "input": str(folder), "verdict": "either", "exclude_sources": ["cn_k12"],
        "pairs_per_problem": 1, "negatives": "first", "truncated": "incorrect", "seed": 0, "prompt_template": "none",
        "open_thought_counts": False, "system_prompt": None, "tokenizer": str(tokenizer), "max_prompt_tokens": 800,
        "max_response_tokens": 19000, "prefill": "<think>\n"}

    traces = write_rows(tmp_path / "traces.jsonl", [trace_row()])
    settings, inputs = report("traces", "--input", traces, "--prefill", "Now:\\n")
    assert inputs == {str(traces): digest(traces)} and settings["prefill"] == "Now:\n" and "verdict" not in settings

    settings, inputs = report("decontaminate", "--input", traces, "--against", files[0], "--ngram", 7)
    assert settings == {"command": "decontaminate", "input": [str(traces)], "against": [str(files[0])], "ngram": 7,
                        "examples": 3}
    assert inputs == {str(path): digest(path) for path in (traces, files[0])}

    mirrored = tmp_path / "mirror" / "math-ai" / "amc23" / "test-0.jsonl"
    mirrored.parent.mkdir(parents=True)
    write_rows(mirrored, [{"question": f"{number}?", "answer": number} for number in range(40)])
    settings, inputs = report("benchmarks", "--mirror", tmp_path / "mirror", "--only", "amc23_40")
    assert settings == {"command": "benchmarks", "only": ["amc23_40"], "mirror": str(tmp_path / "mirror")}
    assert inputs == {str(mirrored): digest(mirrored)}


def test_rows_from_a_pipe_have_no_digest(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    command = 'printf "%s\n" "$0" > "$1"'
    writer = subprocess.Popen(["sh", "-c", command, json.dumps(trace_row()), tmp_path / "rows.jsonl"])
    out = prepare("traces", "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "out")
    assert writer.wait(30) == 0 and read_report(out)["pairs"] == 1
    assert json.loads((out / "report.json").read_text())["inputs"] == {str(tmp_path / "rows.jsonl"): None}


def test_traces_of_one_generation_a_row_are_grouped(tmp_path):
    rows, grouped = [], collections.defaultdict(list)
    generator = random.Random(0)
    for number in range(60):
        problem = f"{number % 7} + 1?"
        text = solution(number % 7 + generator.choice((1, 1, 2)), words=f"try {number}")
        rows.append({"problem": problem, "answer": str(number % 7 + 1), "response": text, "source": "own"})
        grouped[problem].append(text)
    prepare("traces", "--input", write_rows(tmp_path / "rows.jsonl", rows), "--output", tmp_path / "out")
    whole = [{"problem": p, "answer": str(int(p[0]) + 1), "generations": texts, "source": "own"}
             for p, texts in grouped.items()]
    prepare("traces", "--input", write_rows(tmp_path / "whole.jsonl", whole), "--output", tmp_path / "whole")
    assert len(list((tmp_path / "out").iterdir())) == 4
    for name in ("pairs.jsonl", "positives.jsonl", "verdicts.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert read_report(tmp_path / "out") == read_report(tmp_path / "whole")
    assert len(read_rows(tmp_path / "out" / "positives.jsonl")) == 7


def test_which_negatives_and_how_many(tmp_path):
    wrong = [solution(3, "mm"), solution(4, "m"), THINK + "cut off " * 9, solution(5, "mmmm")]
    generations = [wrong[0], solution(2), *wrong[1:], wrong[0]]
    path = write_rows(tmp_path / "rows.jsonl", [trace_row(generations=generations)])

    def rejected(*options):
        output = tmp_path / "-".join(["out", *map(str, options)])
        options = options if "drop" in options else ("--truncated", "incorrect", *options)
        prepare("traces", "--input", path, "--output", output, *options)
        pairs = read_rows(output / "pairs.jsonl")
        assert {pair["chosen"][0]["content"] for pair in pairs} == {solution(2)}
        assert len({pair["id"] for pair in pairs}) == len(pairs)
        return [wrong.index(pair["rejected"][0]["content"]) for pair in pairs]

    assert rejected() == [0]
    assert rejected("--pairs-per-problem", 9) == [0, 1, 2, 3]  # the repeated one once
    two = ("--pairs-per-problem", 2)
    assert rejected(*two, "--negatives", "shortest") == [1, 0]
    assert rejected(*two, "--negatives", "longest") == [2, 3]
    assert rejected(*two, "--negatives", "longest", "--truncated", "drop") == [3, 0]
    at_random = ("--pairs-per-problem", 4, "--negatives", "random", "--seed")
    draws = [rejected(*at_random, seed) for seed in (0, 1)]
    assert draws[0] != draws[1] and sorted(draws[0]) == sorted(draws[1]) == [0, 1, 2, 3]
    assert rejected(*at_random, 0, "--processes", 1) == draws[0]


@pytest.mark.parametrize("template", [None, QWEN_TEMPLATE, THINKING_TEMPLATE])
def test_prepared_training_text_begins_with_the_evaluation_prompt(tmp_path, template):
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path / "tokenizer", template))
    path = write_rows(tmp_path / "rows.jsonl", [trace_row()])
    prepare("traces", "--input", path, "--output", tmp_path / "out", "--prompt-template", "open-r1",
            "--system-prompt", "Be right.")
    row = read_rows(tmp_path / "out" / "positives.jsonl")[0]
    completion = row["completion"][0]["content"]
    [completion_ids] = tokenizer.encode_completions([completion], THINK, [tokenizer.render_prompt(row["prompt"])])
    training = tokenizer.encode_prompt(row["prompt"]) + completion_ids
    question = [user_message("1 + 1?", "open-r1")]
    evaluation = tokenizer.encode_prompt(question, system_prompt="Be right.", prefill=THINK)
    assert training == evaluation + tokenizer.encode(completion.removeprefix(THINK))


def test_decontaminate(tmp_path, capsys):
    words = "Let the positive integers n and m satisfy the equation below; find their sum."
    against = write_rows(tmp_path / "bench.jsonl", [
        {"id": "b-0", "problem": words, "answer": "1"},
        {"id": "b-1", "problem": "Compute $\\tan 225^\\circ$.", "answer": "1"}])
    other = write_rows(tmp_path / "other.jsonl", [{"question": "another one that has nothing in common"}])
    problems = ["Unrelated problem.",
                "LET the POSITIVE integers $n$ and $m$ satisfy\nthe EQUATION: x.",  # 10 words in a row
                "Let the positive integers n and m behave, then satisfy the equation below.",  # 7 words
                "compute tan 225 circ", "Compute tan 225 circ again"]
    rows = [{"prompt": [{"role": "system", "content": words}, {"role": "user", "content": problem}],
             "completion": [{"role": "assistant", "content": "ü " + words}]} for problem in problems]
    first = write_rows(tmp_path / "positives.jsonl", rows)
    second = write_rows(tmp_path / "problems.jsonl", [{"problem": problems[1]}, {"problem": problems[0]}])
    out = tmp_path / "out"
    prepare("decontaminate", "--input", first, second, "--output", out, "--against", against, other)
    assert read_rows(out / "positives.jsonl") == [rows[0], rows[2], rows[4]]
    assert read_rows(out / "problems.jsonl") == [{"problem": problems[0]}]
    report = json.loads((out / "report.json").read_text())
    assert report["files"]["positives.jsonl"] == {"read": 5, "kept": 3, "dropped": 2,
                                                  "dropped_by_benchmark": {"bench": 2, "other": 0}}
    assert report["examples"][0]["ngram"] == "let the positive integers n and m satisfy"
    printed = capsys.readouterr().out
    assert "3 of 5 rows kept, 2 dropped (bench 2, other 0)" in printed and "bench b-1" in printed
    prepare("decontaminate", "--input", first, "--against", against, "--output", tmp_path / "7", "--ngram", 7)
    assert len(read_rows(tmp_path / "7" / "positives.jsonl")) == 2
    signs = write_rows(tmp_path / "signs.jsonl", [{"problem": "+ - ?"}])
    prepare("decontaminate", "--input", signs, "--against", signs, "--output", tmp_path / "signs")
    assert len(read_rows(tmp_path / "signs" / "signs.jsonl")) == 1  # no words, nothing shared
    assert_raises("decontaminate", first, first, "--against", other, parts=["two files have the same name"])
    for bad, part in ((first, "line 1"), (write_rows(tmp_path / "e.jsonl", []), "no rows")):
        assert_raises("decontaminate", first, "--against", bad, parts=[bad, part])
    bad = write_rows(tmp_path / "b.jsonl", [rows[0], {"text": "x"}])
    assert_raises("decontaminate", bad, "--against", against, parts=[f"{bad}, line 2", "found text"])


@pytest.mark.parametrize("problem, copy", [
    ("已知正整数n满足下列方程，求所有可能的n的值之和。", "题目：已知正整数n满足下列方程的解是"),
    ("次の方程式を満たす正の整数の和を求めよ。", "つぎの方程式を満たす正の整数の和はいくつか"),
    ("求和", "求和"),
])  # fmt: skip
def test_decontaminate_texts_without_blanks(tmp_path, problem, copy):
    against = write_rows(tmp_path / "bench.jsonl", [{"id": "b", "problem": problem}])
    other = {"problem": "设函数f(x)在区间上连续，证明存在零点。"}
    rows = write_rows(tmp_path / "rows.jsonl", [{"problem": copy}, other])
    out = prepare("decontaminate", "--input", rows, "--against", against, "--output", tmp_path / "out")
    assert read_rows(out / "rows.jsonl") == [other]


def test_benchmarks_from_a_mirror_in_the_layout_of_the_hub(tmp_path, shared_data):
    for name, hub_id, split, size, problem, answer in prepare_data.BENCHMARKS:
        own = shared_data / "benchmarks" / f"{name.removesuffix('_40')}.jsonl"
        folder = tmp_path / "mirror" / hub_id / "data"
        folder.mkdir(parents=True)
        rows = [{problem: row["problem"], answer: [row["answer"]] if "olympiad" in name else row["answer"]}
                for row in read_rows(own)[:size]]
        write_rows(folder / f"{split}-00000-of-00001.jsonl", rows)
        write_rows(folder / "extra-00000-of-00001.jsonl", [{"x": 1}])
    out = tmp_path / "out"
    prepare("benchmarks", "--mirror", tmp_path / "mirror", "--output", out)
    assert len(read_rows(out / "amc23_40.jsonl")) == 40
    for name in ("math500", "aime24", "amc23", "minerva", "olympiad_bench"):
        expected = [{key: row[key] for key in ("id", "problem", "answer")}
                    for row in read_rows(shared_data / "benchmarks" / f"{name}.jsonl")]
        for row in expected:
            if isinstance(row["answer"], str):
                row["answer"] = row["answer"].strip()
        assert read_rows(out / f"{name}.jsonl") == expected

    short = tmp_path / "mirror" / "HuggingFaceH4" / "aime_2024" / "data" / "train-00000-of-00001.jsonl"
    short.write_text("".join(short.read_text().splitlines(True)[1:]))
    with pytest.raises(ValueError, match="aime_2024: 29 problems where aime24 has 30"):
        prepare("benchmarks", "--mirror", tmp_path / "mirror", "--output", tmp_path / "no", "--only", "aime24")


def test_benchmarks_without_a_network(tmp_path):
    result = run_command("benchmarks", "--output", tmp_path / "out", HF_HOME=str(tmp_path / "hf"))
    assert_refused(result, tmp_path / "out", "HuggingFaceH4/MATH-500: no such directory, and the Hugging")


@pytest.mark.peers("pyarrow")
def test_benchmarks_read_parquet_and_write_whole_numbers_as_such(tmp_path):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "mirror" / "AI-MO" / "aimo-validation-amc" / "data"
    folder.mkdir(parents=True)
    rows = [{"id": n, "problem": f"{n}?", "answer": n + 0.5 * (n == 3), "url": ""} for n in range(83)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    prepare("benchmarks", "--mirror", tmp_path / "mirror", "--output", tmp_path / "out", "--only", "amc23")
    answers = [row["answer"] for row in read_rows(tmp_path / "out" / "amc23.jsonl")]
    assert answers[1:5] == ["1", "2", "3.5", "4"]


@pytest.mark.parametrize("content, parts", [
    (b"", ["no rows"]), (b"\n\n", ["no rows"]),
    (json.dumps(trace_row()).encode() + b'\n{"problem": "\xff"}\n', ["line 2", "UTF-8"]),
    (b'{"problem": \n', ["line 1", "JSON"]),
    (b'{"question": "1?", "generations": [], "source": "s"}\n', ["line 1", "no column 'problem' (found"]),
    (json.dumps(trace_row(generations="text")).encode(), ["line 1", "'generations' must be a list"]),
    (json.dumps(trace_row(generations=["a", 1])).encode(), ["line 1", "'generations'[1] must be a string"]),
    (json.dumps(trace_row(problem=["a"])).encode(), ["line 1", "'problem' must be a string"]),
    (json.dumps(trace_row(generations=[solution(2, "\ud83d")])).encode(), ["line 1", "surrogates not allowed"]),
])
def test_bad_rows_are_named_and_leave_nothing(tmp_path, content, parts):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    for command in ("traces", "openr1"):
        if command == "openr1":
            verdicts = b'{"llama_verification": [true], "math_verify_reparsed_answer": [true]}'
            more = b'"problem_is_valid": "yes", "correctness": ' + verdicts + b', "answer"'
            path.write_bytes(content.replace(b'"answer"', more))
        assert_raises(command, path, parts=[path, *parts])


@pytest.mark.parametrize("row, parts", [
    (trace_row(finish_reasons=["stop"]), ["line 1: 'finish_reasons'"]),
    (openr1_row(correctness="yes"), ["'correctness' must be a struct", "found str"]),
    (openr1_row(correctness={"math_verify_reparsed_answer": [True] * 3}),
     ["no column 'llama_verification'", "--verdict math_verify"]),
    (openr1_row(correctness={"llama_verification": ["no"] * 3, "math_verify_reparsed_answer": [True] * 3}), ["'no'"]),
    (without("correctness"), ["no verdicts", "'correctness_llama'", "prepare_data.py traces"]),
    (without("problem_is_valid"), ["no column 'problem_is_valid'"]),
    (openr1_row(correctness=None), ["no positive in 2 rows", "mismatched_verdicts 2"]),
])
def test_rows_of_another_layout(tmp_path, row, parts):
    path = write_rows(tmp_path / "rows.jsonl", [row, row])
    assert_raises("traces" if "answer" in row else "openr1", path, parts=[path, *parts])


def test_inputs_that_are_not_there(tmp_path):
    out = tmp_path / "out"
    result = run_command("openr1", "--input", "nobody/nothing", "--output", out, HF_HOME=str(tmp_path / "hf"))
    assert_refused(result, out, "nobody/nothing: no such directory")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "rows.csv.gz").touch()
    assert_raises("openr1", tmp_path / "empty", parts=["no .parquet or .jsonl", "rows.csv.gz"])
    (tmp_path / "rows.csv").write_text("a,b")
    assert_raises("openr1", tmp_path / "rows.csv", parts=["expected a .parquet"])
    rows = write_rows(tmp_path / "rows.jsonl", [openr1_row()])
    assert_raises("openr1", rows, "--tokenizer", tmp_path / "empty", parts=["no tokenizer.json"])


@pytest.mark.peers("pyarrow")
def test_broken_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    def refused(path, *parts):
        assert_raises("openr1", path, parts=parts)

    table = pyarrow.Table.from_pylist([openr1_row()] * 300)
    for name, damage in (("truncated", lambda data: data[:len(data) // 2]),
                         ("empty", lambda data: b""), ("text", lambda data: b"problem,answer")):
        folder = tmp_path / name
        folder.mkdir()
        pyarrow.parquet.write_table(table, folder / "0.parquet")
        (folder / "1.parquet").write_bytes(damage((folder / "0.parquet").read_bytes()))
        refused(folder, folder / "1.parquet", "truncated or corrupt parquet file")
    data = (tmp_path / "truncated" / "0.parquet").read_bytes()
    (tmp_path / "damaged.parquet").write_bytes(data[:20] + bytes(400) + data[420:])
    refused(tmp_path / "damaged.parquet", "damaged.parquet: corrupt, or text that is not UTF-8")
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "none.parquet")
    refused(tmp_path / "none.parquet", "none.parquet: no rows")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "other.parquet")
    refused(tmp_path / "other.parquet", "other.parquet: no known column (found text)")
    names = ["question" if name == "problem" else name for name in table.column_names]
    pyarrow.parquet.write_table(table.rename_columns(names), tmp_path / "renamed.parquet")
    refused(tmp_path / "renamed.parquet", "renamed.parquet, row 1: no column 'problem'")
    offsets = pyarrow.py_buffer((0).to_bytes(4, "little") + (2).to_bytes(4, "little"))
    not_text = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, pyarrow.py_buffer(b"\xff.")])
    columns = {name: table.column(name).chunk(0).slice(0, 1) for name in table.column_names}
    pyarrow.parquet.write_table(pyarrow.table({**columns, "problem": not_text}), tmp_path / "latin.parquet")
    refused(tmp_path / "latin.parquet", "latin.parquet: corrupt, or text that is not UTF-8")


def test_pyarrow_is_asked_for_before_anything_is_downloaded(tmp_path, hub, monkeypatch):  # noqa: F811
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        (tmp_path / "rows.parquet").write_bytes(b"PAR1")
        assert_raises("openr1", tmp_path / "rows.parquet", parts=["rows.parquet: ", "pip install pyarrow"])
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys\nsys.modules['pyarrow'] = None\n")
    path = f"{tmp_path / 'site'}:{ROOT}"
    arguments = (ROOT / "prepare_data.py", "openr1", "--input", "org/tiny", "--output", tmp_path / "out")
    monkeypatch.setattr(FakeHub, "files", {"data/train-0.parquet": b"PAR1", "data/train-1.jsonl": b"{}"})
    monkeypatch.setattr(FakeHub, "listing", ["README.md", *FakeHub.files])
    assert_refused(hub(*arguments, PYTHONPATH=path), tmp_path / "out",
                   "org/tiny/data/train-0.parquet: reading parquet needs pyarrow (pip install pyarrow)")
    assert not [file for file in (tmp_path / "hf").rglob("*") if file.is_file()]
    monkeypatch.setattr(FakeHub, "files", {"data/train-0.jsonl": json.dumps(openr1_row()).encode()})
    # JSONL needs no pyarrow. Of several configurations the default one is taken, which lies in data/.
    monkeypatch.setattr(FakeHub, "listing", ["data/train-0.jsonl", "extended/train-0.jsonl", "README.md"])
    assert hub(*arguments, PYTHONPATH=path).returncode == 0
    assert len(read_rows(tmp_path / "out" / "pairs.jsonl")) == 1
    missing = hub(*arguments[:3], "org/missing", *arguments[4:], "--overwrite", PYTHONPATH=path)
    assert "org/missing: no such directory, and the Hugging Face hub gave no dataset" in missing.stderr


def test_no_process_loads_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is imported')")
    path = write_rows(tmp_path / "rows.jsonl", [trace_row()] * 130)
    result = run_command("traces", "--input", path, "--output", tmp_path / "out", "--processes", 2, "--tokenizer",
                         write_tokenizer(tmp_path / "tokenizer"), PYTHONPATH=str(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")


def test_an_older_output_outlives_what_breaks_off_its_replacement(tmp_path, monkeypatch):
    out, path = tmp_path / "out", write_rows(tmp_path / "rows.jsonl", [trace_row()])
    prepare("traces", "--input", path, "--output", out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    newer = write_rows(tmp_path / "more.jsonl", [trace_row(id="new")])
    rename = Path.rename

    def broken_off(self, target):
        if self.name.startswith("out.partial-"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", broken_off)
        with pytest.raises(KeyboardInterrupt):
            prepare("traces", "--input", newer, "--output", out, "--overwrite")
    assert before == {file.name: file.read_bytes() for file in out.iterdir()} and not list(tmp_path.glob("out.*"))


def test_existing_output_is_kept_unless_asked_for(tmp_path):
    out, first = tmp_path / "out", write_rows(tmp_path / "rows.jsonl", [trace_row()])
    second = write_rows(tmp_path / "more.jsonl", [trace_row(id="new")])
    out.mkdir()
    prepare("traces", "--input", first, "--output", out)  # an empty directory is as good as none
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert sorted(before) == ["pairs.jsonl", "positives.jsonl", "report.json", "verdicts.jsonl"]
    with pytest.raises(ValueError, match="already holds pairs.jsonl: .*--overwrite"):
        prepare("traces", "--input", second, "--output", out)
    with pytest.raises(ValueError, match="no column"):
        prepare("traces", "--input", write_rows(tmp_path / "bad.jsonl", [{}]), "--output", out, "--overwrite")
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}
    prepare("traces", "--input", second, "--output", out, "--overwrite")
    assert read_rows(out / "positives.jsonl")[0]["id"] == "new"
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds thesis.tex"):
        prepare("traces", "--input", first, "--output", out, "--overwrite")
    assert (out / "thesis.tex").exists() and not list(tmp_path.glob("out.*"))


def test_disk_full(tmp_path):
    """A limit on the size of files stands in for the full disk: both come as an OSError from a write."""
    path = write_rows(tmp_path / "rows.jsonl", [trace_row(problem=f"{n} " * 50) for n in range(500)])
    limited = "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); " \
              "runpy.run_path('prepare_data.py', run_name='__main__')"
    result = run_python("-c", limited, "traces", "--input", path, "--output", tmp_path / "out")
    assert_refused(result, tmp_path / "out", "File too large", tmp_path / "out")


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_leaves_no_output_and_no_process(tmp_path, stop):
    fifo, out = tmp_path / "rows.jsonl", tmp_path / "out"
    os.mkfifo(fifo)
    process = subprocess.Popen([sys.executable, ROOT / "prepare_data.py", "traces", "--input", fifo,
                                "--output", out, "--processes", "2"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    partial = tmp_path / f"out.partial-{process.pid}"
    while not partial.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    with open(fifo, "w") as file:  # never closed while the run lives: it waits for more rows
        for number in range(400):
            file.write(json.dumps(trace_row(id=str(number))) + "\n")
        file.flush()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(children.read_text().split()) < 3:  # two workers, one resource tracker
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        workers = children.read_text().split()
        process.send_signal(stop)
        process.wait(30)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[stop]
    assert not out.exists()
    assert partial.exists() == (stop == signal.SIGKILL)
    while any(Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
              for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    rows = write_rows(tmp_path / "again.jsonl", [trace_row()])
    prepare("traces", "--input", rows, "--output", out)
    assert len(read_rows(out / "positives.jsonl")) == 1 and not partial.exists()


def test_toy_writes_its_data(tmp_path):
    out = prepare("toy", "--output", tmp_path / "out", "--seed", 3)
    assert sorted(path.name for path in out.iterdir()) == [
        "pairs.jsonl", "positives.jsonl", "problems.jsonl", "report.json", "teacher.jsonl"]
    assert json.loads((out / "report.json").read_text()) == {"settings": {"command": "toy", "seed": 3}, "inputs": {}}


def test_chunks_are_bounded_in_rows_and_in_text():
    long, short = {"generations": ["x" * 100_000, None]}, {"generations": None}
    rows = [("place", long)] * 100 + [("place", short)] * 100
    sizes = [len(chunk) for chunk in in_chunks(iter(rows))]
    assert sum(sizes) == 200 and max(sizes) == 16 and sizes[0] == 3

"""The embedded example: its task and teacher, its tokenizer, and the run without arguments."""

import collections
import json
import math
import random
import re

import pytest

import prepare_data
from redi import toy
from redi.checkpoint import load_pretrained
from redi.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    directory = tmp_path_factory.mktemp("toy")
    toy.write_data(directory / "data", seed=3)
    toy.write_model(directory / "model", seed=3)
    return directory


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_tank_neither_overflows_nor_goes_below_empty():
    assert toy.pour(8, [3, -1]) == 10
    assert toy.pour(13, [9, -7]) == 8  # 15, then 8: what ran over is gone
    assert toy.pour(3, [-7, 2]) == 2
    assert toy.changes_text(8, [3, -1]) == "8+3-1"


def test_teacher_takes_every_change_once_and_errs_as_often_as_stated():
    rng = random.Random(1)
    moves = collections.Counter()
    for _ in range(3000):
        level, changes = rng.randint(0, 15), [rng.choice((-1, 1)) * rng.randint(1, 9) for _ in range(6)]
        lines = toy.teacher_solution(level, changes, rng).split("\n")
        assert lines[0] == "<think>"
        for line in lines[1:-2]:
            before, taken, after = toy.MOVE.fullmatch(line).groups()
            taken = [int(change) for change in re.findall("[+-][1-9]", taken)]
            assert int(before) == level and taken == changes[: len(taken)]
            assert line.endswith("in my head") == (len(taken) > 1)
            moves[len(taken), int(after) == toy.pour(level, taken)] += 1
            level, changes = int(after), changes[len(taken) :]
        assert not changes and 0 <= level <= 15
        assert lines[-2:] == ["</think>", f"\\boxed{{{level}}}"]
    for count, wrong in toy.WRONG.items():
        share = moves[count, False] / (moves[count, True] + moves[count, False])
        assert share == pytest.approx(wrong, abs=0.03)


def test_hurried_moves_are_counted_over_all_responses():
    careful = "<think>\n3+9 -> 12\n12-5 -> 7\n</think>\n\\boxed{7}"
    hurried = "<think>\n3+9-5 -> 7, in my head\n7+1 -> 8\n</think>\n\\boxed{8}"
    assert toy.share_of_hurried_moves([careful]) == 0
    assert toy.share_of_hurried_moves([careful, hurried]) == 0.25
    assert toy.share_of_hurried_moves(["4-9-1 -> 0, in my head"]) == 1
    assert math.isnan(toy.share_of_hurried_moves(["no move here", ""]))


def test_data_is_a_function_of_the_seed(example, tmp_path):
    toy.write_data(tmp_path / "again", seed=3)
    toy.write_data(tmp_path / "other", seed=4)
    for name in ("teacher", "positives", "pairs", "problems"):
        first, again, other = (d / f"{name}.jsonl" for d in (example / "data", tmp_path / "again", tmp_path / "other"))
        assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_no_test_problem_is_in_the_training_data(example):
    data = example / "data"
    test = {row["problem"] for row in rows(data / "problems.jsonl")}
    train = {row["problem"] for row in rows(data / "teacher.jsonl")}
    trained = {row["prompt"][0]["content"] for name in ("positives", "pairs") for row in rows(data / f"{name}.jsonl")}
    assert (len(train), len(test)) == (toy.TRAIN_PROBLEMS, toy.TEST_PROBLEMS)
    assert trained <= train and not train & test


def test_prepare_data_makes_the_same_pairs_of_the_teachers_rows(example, tmp_path):
    prepare_data.main(["traces", "--input", str(example / "data" / "teacher.jsonl"), "--output", str(tmp_path / "out")])
    for name in ("positives.jsonl", "pairs.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (example / "data" / name).read_bytes()


def test_wrong_solutions_are_hardly_shorter_than_right_ones(example):
    tokenizer = Tokenizer.from_pretrained(example / "model")
    pairs = rows(example / "data" / "pairs.jsonl")
    lengths = {key: sum(len(tokenizer.encode(row[key][0]["content"])) for row in pairs) for key in ("chosen", "rejected")}
    assert lengths["rejected"] == pytest.approx(lengths["chosen"], rel=0.06)


def test_tokenizer_knows_every_text_and_gives_it_back(example):
    tokenizer = Tokenizer.from_pretrained(example / "model")
    assert tokenizer.decode([tokenizer.end_of_turn_id, tokenizer.end_of_text_id], False) == "<|im_end|><|endoftext|>"
    unknown = tokenizer.encode("?")
    for row in rows(example / "data" / "pairs.jsonl"):
        prompt = tokenizer.encode_prompt(row["prompt"], prefill="<think>\n")
        text = f"<|im_start|>user\n{row['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n<think>\n"
        assert tokenizer.decode(prompt, skip_special_tokens=False) == text
        for solution in (row["chosen"][0]["content"], row["rejected"][0]["content"]):
            ids = tokenizer.encode_completion(solution)
            assert tokenizer.decode(ids) == solution
            assert not set(unknown) & set(prompt + ids)


def test_model_directory_loads_and_is_a_function_of_the_seed(example, tmp_path):
    model = load_pretrained(example / "model")
    assert model.config.vocab_size == Tokenizer.from_pretrained(example / "model").vocab_size
    toy.write_model(tmp_path / "again", seed=3)
    toy.write_model(tmp_path / "other", seed=4)
    weights = [(d / "model.safetensors").read_bytes() for d in (example / "model", tmp_path / "again", tmp_path / "other")]
    assert weights[0] == weights[1] != weights[2]

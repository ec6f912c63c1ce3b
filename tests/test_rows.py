"""A row in every form that is accepted, as prompt and completions."""

import json

import pytest

from redi.rows import TokenSettings, encode_rows, read_examples
from redi.tokenizer import Tokenizer
from tests import tiny


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


Q, A, B = [user("2+2?")], assistant("4"), assistant("5")
SYSTEM = {"role": "system", "content": "Add."}
POSITIVES = {
    "conversational": ({"prompt": Q, "completion": [A]}, Q, ("4",)),
    "strings": ({"prompt": "2+2=", "completion": "4"}, "2+2=", ("4",)),
    "string prompt, messages": ({"prompt": "2+2?", "completion": [A]}, Q, ("4",)),
    "messages": ({"messages": [SYSTEM, *Q, A]}, [SYSTEM, *Q], ("4",)),
    "several turns": ({"messages": [*Q, A, user("sure?"), B]}, [*Q, A, user("sure?")], ("5",)),
    "other columns": ({"id": 7, "source": None, "prompt": Q, "completion": [A]}, Q, ("4",)),
    "a correct answer of unpaired preferences": ({"prompt": Q, "completion": [A], "label": True}, Q, ("4",)),
    "keys that only describe": ({"prompt": Q, "completion": [A], "score": 0.1, "metadata": {"tools": 1}, "labels": [0],
                                 "system_prompt": "Add.", "margin": 2, "answer": "4"}, Q, ("4",)),
    "keys that are empty": ({"prompt": Q, "completion": [A], "tools": [], "images": [], "system": "",
                             "chat_template_kwargs": {}}, Q, ("4",)),
    "messages beside the same completion": ({"messages": [*Q, A], "prompt": "2+2?", "completion": [A]}, Q, ("4",)),
}
PAIR_FORMS = {
    "conversational": ({"prompt": Q, "chosen": [A], "rejected": [B]}, Q, ("4", "5")),
    "system message": ({"prompt": [SYSTEM, *Q], "chosen": [A], "rejected": [B]}, [SYSTEM, *Q], ("4", "5")),
    "strings": ({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, "2+2=", ("4", "5")),
    "implicit prompt": ({"chosen": [*Q, A], "rejected": [*Q, B]}, Q, ("4", "5")),
    "implicit strings": ({"chosen": "2+2 is 4", "rejected": "2+2 is five"}, "2+2 is", (" 4", " five")),
    "implicit strings, no space": ({"chosen": "ab", "rejected": "ac"}, "a", ("b", "c")),
    # The official code's rows: the prompt as a string, and again within the messages.
    "official": ({"prompt": "2+2?", "chosen": [*Q, A], "rejected": [*Q, B]}, Q, ("4", "5")),
    "prompt repeated": ({"prompt": Q, "chosen": [*Q, A], "rejected": [*Q, B]}, Q, ("4", "5")),
    "string prompt, messages": ({"prompt": "2+2?", "chosen": [A], "rejected": [B]}, Q, ("4", "5")),
    "several turns": ({"chosen": [*Q, A, user("sure?"), A], "rejected": [*Q, A, user("sure?"), B]},
                      [*Q, A, user("sure?")], ("4", "5")),
}


@pytest.mark.parametrize("pairs, form", [(False, form) for form in POSITIVES] + [(True, form) for form in PAIR_FORMS])
def test_forms_of_rows_and_null_keys_as_absent_keys(tmp_path, pairs, form):
    """Nulls as `datasets` writes them for rows of several kinds in one file."""
    row, prompt, completions = (PAIR_FORMS if pairs else POSITIVES)[form]
    nulls = dict.fromkeys(["prompt", "completion", "messages", "chosen", "rejected", "label", "tools", "images"])
    extra = {"tool_calls": None, "reasoning_content": None, "name": None}
    filled = {**nulls, **{
        key: [{**message, **extra} for message in value] if key in nulls and isinstance(value, list) else value
        for key, value in row.items()
    }}  # fmt: skip
    for line, example in enumerate(read_examples(write(tmp_path / "p.jsonl", row, filled), pairs), 1):
        assert (example.line, example.prompt, example.completions) == (line, prompt, completions)
    assert line == 2


def test_nulls_within_a_tool_call_are_absent_too(tmp_path):
    call = {"function": {"name": "f", "arguments": {"a": 1, "b": None}}}
    turns = [*Q, {**A, "tool_calls": [call]}, {"role": "tool", "content": "3"}, B]
    example, = read_examples(write(tmp_path / "p.jsonl", {"messages": turns}), pairs=False)
    assert example.prompt[1]["tool_calls"] == [{"function": {"name": "f", "arguments": {"a": 1}}}]


MORE_THAN_IS_TRAINED_ON = {
    "tools": ({"tools": [{"type": "function"}]}, "tools"),
    "tools as text": ({"tools": "[{}]"}, "tools"),
    "documents": ({"documents": [{"title": "a"}]}, "documents"),
    "settings of the template": ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
    "images": ({"images": ["a.png"]}, "images"),
    "a system message": ({"system": "Be brief."}, "system"),
    "a thought as a column": ({"reasoning_content": "2 and 2"}, "reasoning_content"),
    "token ids": ({"input_ids": [1, 2]}, "input_ids"),
    "a wrong answer": ({"label": False}, "label"),
    "a wrong answer as a number": ({"label": 0}, "label"),
    "a wrong answer as text": ({"label": "false"}, "label"),
    "a tool call": ({"completion": [{**A, "tool_calls": [{"function": {"name": "f"}}]}]}, "tool_calls"),
    "a function call": ({"completion": [{**A, "function_call": {"name": "f"}}]}, "function_call"),
    "a turn without weight": ({"completion": [{**A, "weight": 0}]}, "weight"),
    "two answers": ({"messages": [*Q, B]}, "messages' and 'completion"),
}


@pytest.mark.parametrize("case", MORE_THAN_IS_TRAINED_ON)
def test_a_row_that_says_more_than_is_trained_on_is_refused_by_key(tmp_path, case):
    changes, key = MORE_THAN_IS_TRAINED_ON[case]
    good = POSITIVES["conversational"][0]
    with pytest.raises(ValueError, match=f"p.jsonl, line 2: .*'{key}'"):
        list(read_examples(write(tmp_path / "p.jsonl", good, good | changes), pairs=False))


def test_pairs_that_say_more_are_refused_by_key(tmp_path):
    pair = PAIR_FORMS["conversational"][0]
    call = [{**B, "tool_calls": [{"function": {"name": "f"}}]}]
    for changes, key in (({"tools": [{}]}, "tools"), ({"rejected": call}, "'rejected': .*tool_calls"),
                         ({"audio": "a.wav"}, "audio")):
        with pytest.raises(ValueError, match=f"p.jsonl, line 1: .*{key}'"):
            list(read_examples(write(tmp_path / "p.jsonl", pair | changes), pairs=True))


@pytest.mark.parametrize("form", ["prompt and completion", "messages", "chosen", "rejected"])
def test_reasoning_beside_the_content_is_trained_on(tmp_path, form):
    tiny.write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    answer = {**A, "reasoning_content": "2 and 2"}
    row = {
        "prompt and completion": {"prompt": Q, "completion": [answer]},
        "messages": {"messages": [*Q, answer]},
        "chosen": {"chosen": [*Q, answer], "rejected": [*Q, A]},
        "rejected": {"prompt": Q, "chosen": [A], "rejected": [answer]},
    }[form]
    settings = TokenSettings("chosen" in row, 999, 999, 999)
    [(_, [prompt, *completions])] = encode_rows(write(tmp_path / "p.jsonl", row), tokenizer, settings)
    texts = [tokenizer.decode(ids) for ids in completions]
    thought = "<think>\n2 and 2\n</think>\n\n4"
    assert texts == {"chosen": [thought, "4"], "rejected": ["4", thought]}.get(form, [thought])
    prefilled = tokenizer.encode_prompt(Q, prefill="<think>\n")
    assert (prompt + max(completions, key=len))[: len(prefilled)] == prefilled


def test_reasoning_that_cannot_be_placed_is_named_by_its_line(tmp_path):
    tiny.write_tokenizer(tmp_path)
    rows = [{"prompt": Q, "completion": [{**A, "reasoning": text}]} for text in ("2 and 2", ["2", "and 2"])]
    with pytest.raises(ValueError, match="p.jsonl, line 2: .*'reasoning'"):
        list(encode_rows(write(tmp_path / "p.jsonl", *rows), Tokenizer.from_pretrained(tmp_path),
                         TokenSettings(False, 999, 999, 999)))


def test_blank_lines_count_as_lines(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\n" + json.dumps(POSITIVES["strings"][0]) + "\n\n  \n" + json.dumps(POSITIVES["messages"][0]))
    assert [example.line for example in read_examples(path, pairs=False)] == [2, 5]

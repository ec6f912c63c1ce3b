"""A row in every form that is accepted, as prompt and completions."""

import json

import pytest

from redi.rows import read_examples


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


@pytest.mark.parametrize("form", POSITIVES)
def test_forms_of_positives(tmp_path, form):
    row, prompt, completions = POSITIVES[form]
    example, = read_examples(write(tmp_path / "p.jsonl", row), pairs=False)
    assert (example.line, example.prompt, example.completions) == (1, prompt, completions)


@pytest.mark.parametrize("form", PAIR_FORMS)
def test_forms_of_pairs(tmp_path, form):
    row, prompt, completions = PAIR_FORMS[form]
    example, = read_examples(write(tmp_path / "p.jsonl", row), pairs=True)
    assert (example.line, example.prompt, example.completions) == (1, prompt, completions)


def test_blank_lines_count_as_lines(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\n" + json.dumps(POSITIVES["strings"][0]) + "\n\n  \n" + json.dumps(POSITIVES["messages"][0]))
    assert [example.line for example in read_examples(path, pairs=False)] == [2, 5]

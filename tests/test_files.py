import errno
import json
import os

import pytest

from redi import files
from redi.files import (
    append_row, code_digest, drop_partial_line, json_line, read_json, read_jsonl, write_atomically, write_json,
)


def test_read_jsonl_accepts_a_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": "\\u00e9\xc3\xa9"}\r\n')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (2, {"a": "éé"})]


def test_write_atomically_writes_all_or_nothing(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        with write_atomically(path) as file:
            file.write(b"new")
            raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]
    with write_atomically(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["x.txt"]


def test_a_json_object_comes_back_as_it_was(tmp_path):
    value = {"a": "é\n\u2028", "b": [1.5, None], "c": "x\ud800y"}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert "é" in text and text.endswith("}\n")


@pytest.mark.parametrize("content, message", [
    (b'{"a": 1', "not valid JSON in UTF-8"), (b"\xff{}", "not valid JSON in UTF-8"), (b"[" * 100_000, "not valid JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"), (b"[1]", "expected a JSON object, found list"),
    (b"3", "expected a JSON object, found int"), (None, "cannot be read: No such file"),
])  # fmt: skip
def test_what_is_no_json_object_is_named(tmp_path, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    for place, read in ((f"{path}", read_json), (f"{path}(, line 1)?", lambda path: list(read_jsonl(path)))):
        with pytest.raises(ValueError, match=f"^{place}:? ?({message}|expected JSONL, found a JSON array)") as raised:
            read(path)
        assert "\n" not in str(raised.value)


def test_rows_round_trip_and_a_lone_surrogate_is_escaped(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [{"a": "é\n\u2028", "b": 1.5}, {"a": "x\ud800y", "b": None}]
    for row in rows:
        append_row(path, row)
    assert [json.loads(line) for line in path.read_bytes().decode("utf-8").split("\n")[:-1]] == rows
    assert "é".encode() in json_line(rows[0]) and rb"\ud800" in json_line(rows[1])
    with pytest.raises(ValueError):
        json_line(rows[1], errors="strict")


@pytest.mark.parametrize("rest", ["", "{", '{"a": 3}', '{"a": "' + "x" * 200_000])
@pytest.mark.parametrize("lines", ["", '{"a": 1}\n', '{"a": 1}\n' + '{"a": 2}\n' * 20_000])
def test_a_partial_line_is_dropped_and_whole_ones_stay(tmp_path, lines, rest):
    path = tmp_path / "log.jsonl"
    path.write_text(lines + rest)
    drop_partial_line(path)
    assert path.read_text() == lines
    drop_partial_line(tmp_path / "absent.jsonl")
    assert not (tmp_path / "absent.jsonl").exists()


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path):
    resource = pytest.importorskip("resource", reason="file size limits need POSIX")
    import signal

    path = tmp_path / "log.jsonl"
    append_row(path, {"a": 1})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))  # writes stop short, as on a full disk
        with pytest.raises(OSError) as raised:
            append_row(path, {"a": "x" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert raised.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert path.read_bytes() == before


def test_a_code_digest_changes_with_the_code_and_not_with_words_about_it(tmp_path):
    path = tmp_path / "sampler.py"

    def digest(text: str) -> str:
        path.write_text(text)
        return code_digest(path)

    code = 'def f(x):\n    """Twice x."""\n    return 2 * x\n'
    assert digest(code) == digest('"""A file."""\n\n\ndef f(x):  # easy\n    return (2 * x)\n')
    assert digest(code) != digest(code.replace("2 *", "3 *"))
    assert digest(code) != digest(code.replace("return", 'name = "Twice x."\n    return'))
    assert code_digest(path, path) != code_digest(path)
    assert code_digest(files) == code_digest(files.__file__)
    with pytest.raises(ValueError, match="absent.py"):
        code_digest(tmp_path / "absent.py")

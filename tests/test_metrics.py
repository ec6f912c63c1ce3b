import errno
import itertools
import json

import numpy as np
import pytest

from redi.metrics import append_row, drop_partial_line, json_line, pass_at_1, pass_at_k


def test_pass_at_1_and_its_error_by_hand():
    # Columns (runs over the benchmark) are right in 2, 1 and 1 of 2: accuracies 1, 0.5, 0.5.
    correct = np.array([[True, True, False], [True, False, True]])
    mean, sem = pass_at_1(correct)
    assert mean == pytest.approx(2 / 3)
    # squared deviations 1/9, 1/36, 1/36: sum 1/6, sample variance 1/12, SEM sqrt(1/12) / sqrt(3) = 1/6
    assert sem == pytest.approx(1 / 6)
    assert pass_at_1(correct[:, :1]) == (1.0, None)


def test_pass_at_k_equals_trying_all_subsets():
    correct = np.random.default_rng(0).random((7, 6)) < [[0.1], [0.3], [0.5], [0.9], [0.0], [1.0], [0.2]]
    for k in range(1, 7):
        subsets = list(itertools.combinations(range(6), k))
        naive = np.mean([[row[list(subset)].any() for subset in subsets] for row in correct])
        assert pass_at_k(correct, k) == pytest.approx(naive)
    assert pass_at_k(correct, 1) == pytest.approx(pass_at_1(correct)[0])
    assert pass_at_k(correct, 6) == correct.any(axis=1).mean()


def test_pass_at_k_at_sizes_where_factorials_are_large():
    correct = np.zeros((1, 1000), dtype=bool)
    correct[0, 0] = True
    assert pass_at_k(correct, 250) == pytest.approx(0.25)


def test_rows_round_trip_and_a_lone_surrogate_is_escaped(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [{"a": "é\n\u2028", "b": 1.5}, {"a": "x\ud800y", "b": None}]
    for row in rows:
        append_row(path, row)
    assert [json.loads(line) for line in path.read_bytes().decode("utf-8").split("\n")[:-1]] == rows
    assert "é" in json_line(rows[0]) and "\\ud800" in json_line(rows[1])


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

"""Cached arrays: whole or not at all, and mapped where asked."""

import os

import numpy as np
import pytest

from redi import files
from redi.files import cache_path, load_arrays, save_arrays


def test_arrays_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_arrays(path, {"a": np.arange(3)}, {"kind": "test"})
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save_arrays(path, {"a": np.zeros(3)})
    assert os.listdir(tmp_path) == ["x.safetensors"]
    arrays, metadata = load_arrays(path)
    assert arrays["a"].tolist() == [0, 1, 2] and metadata == {"kind": "test"}


@pytest.mark.parametrize("values", [[[1, 2, 3], [4, 5, 6]], []])
def test_mapped_arrays_equal_read_ones(tmp_path, values):
    path, array = tmp_path / "x.safetensors", np.array(values, dtype=np.int32)
    save_arrays(path, {"ids": array, "other": np.arange(5.0)})
    read, mapped = load_arrays(path)[0], load_arrays(path, mapped=("ids",))[0]
    assert isinstance(mapped["ids"], np.memmap) == bool(values) and not isinstance(read["ids"], np.memmap)
    assert mapped["ids"].tolist() == read["ids"].tolist() == values
    assert mapped["other"].tolist() == read["other"].tolist()


def test_a_file_that_cannot_be_read_is_told_as_that(tmp_path):
    with pytest.raises(ValueError, match="absent.safetensors cannot be read: No such file"):
        load_arrays(tmp_path / "absent.safetensors")


def test_the_name_tells_apart_all_that_it_depends_on(tmp_path):
    names = {cache_path(tmp_path / "p.jsonl", "tokens", tmp_path, *depends_on).name
             for depends_on in ((1, "2"), ("1", "2"), ("12",), ("1, 2",), (None,), ())}
    assert len(names) == 6 and all(name.startswith("p.jsonl.tokens-") for name in names)

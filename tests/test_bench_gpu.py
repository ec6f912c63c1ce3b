"""The benchmark for GPUs runs at a tiny size on a CPU, so that whoever has a GPU for an hour does not debug it."""

import pytest

from tests.conftest import run_python


def bench(*flags: str):
    return run_python("tests/bench/gpu.py", *flags, timeout=None)


@pytest.mark.peers("transformers")
def test_a_dry_run_prints_ours_beside_what_one_would_write_with_transformers():
    done = bench("--dry-run", "--pairs", "2", "--steps", "2", "--parts", "backends", "redi", "sampling-64")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("are within") == 3
    assert "redi: " in done.stdout and "plain transformers: " in done.stdout and "times as fast" in done.stdout
    for who in ("ours", "generate"):
        assert done.stdout.count(f", {who}: ") == 4  # three lengths of prompts, and uneven ones
    assert "out of memory" not in done.stdout and "sft" not in done.stdout and "8 rows" not in done.stdout


def test_peers_are_left_out_and_weights_are_kept_where_asked(tmp_path):
    flags = "--dry-run", "--pairs", "2", "--steps", "2", "--peers", "simpo", "--model", str(tmp_path / "model")
    written = []
    for part in ("redi", "simpo"):
        done = bench(*flags, "--parts", part)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"{part}: " in done.stdout and "plain transformers" not in done.stdout
        written.append((tmp_path / "model" / "model.safetensors").stat().st_mtime_ns)
    assert written[0] == written[1]


def test_without_a_gpu_only_the_dry_run_is_taken():
    done = bench("--parts", "redi")
    assert done.returncode == 2 and "no GPU is visible to torch; --dry-run checks this script" in done.stderr

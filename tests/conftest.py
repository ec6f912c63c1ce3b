import json
import os
import signal
import subprocess
import sys
from pathlib import Path

# Before torch is imported, and for the commands that tests start: sums over another number of threads differ in their
# last bits, and small models only wait for their threads.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

ROOT = Path(__file__).resolve().parent.parent


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def run_python(*arguments, cwd=ROOT, timeout=300, **environment: str) -> subprocess.CompletedProcess:
    """python with these arguments, which finds this package from any directory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, timeout=timeout, env=environment,
                          capture_output=True, text=True)


def pytest_configure(config):
    """Leave GPUs to those who use them: tests, and the commands that they start, see none, but for pytest -m gpu.
    Signals have their usual effect in these commands, also where the tests run in the background, under nohup."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    wanted = config.getoption("markexpr")
    if "gpu" not in wanted or "not gpu" in wanted:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skip, before its fixtures are made, a test marked with libraries that are not installed."""
    for mark in item.iter_markers("peers"):
        for library in mark.args:
            pytest.importorskip(library, reason="needs the libraries of tests/requirements.txt")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real problems, traces and answers that stands beside a development checkout."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the development data (../shared/data) is not part of a user's checkout")
    return path

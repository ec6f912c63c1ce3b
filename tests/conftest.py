import os
from pathlib import Path

# Before torch is imported, and for the commands that tests start: sums over another number of threads differ in their
# last bits, and small models only wait for their threads.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    """Leave GPUs to those who use them: tests, and the commands that they start, see none, but for pytest -m gpu."""
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

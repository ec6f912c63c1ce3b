import os
from pathlib import Path

# Before torch is imported, and for the commands that tests start: sums over another number of threads differ in their
# last bits, and small models only wait for their threads.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real problems, traces and answers that stands beside a development checkout."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the development data (../shared/data) is not part of a user's checkout")
    return path

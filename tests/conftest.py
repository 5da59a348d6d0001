"""What test modules of several packages share."""

import os
from pathlib import Path

import pytest

# One thread per process, before torch is imported here or in a child: beside other processes more
# would only wait, and sums come out the same however tests are started.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of scikit-learn's digits by split and class, 112 pixels a side."""
    from dinotrain.data.digits import write_digits

    return write_digits(tmp_path_factory.mktemp("digits") / "digits")


@pytest.fixture(scope="session")
def digits_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of features of the digits, which whoever needs them first computes."""
    return tmp_path_factory.mktemp("digits-features")

"""Fixtures of the whole suite."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest

from implementations import all_implementations

IMPLEMENTATIONS = list(all_implementations())


def pytest_report_header():
    return "implementations: " + ", ".join(map(repr, IMPLEMENTATIONS))


def pytest_generate_tests(metafunc):
    """`implementation`: each implementation of attention, in turn; `implementation, dtype`: each in its dtypes."""
    if "implementation" in metafunc.fixturenames:
        if "dtype" in metafunc.fixturenames:
            pairs = [(i, dtype) for i in IMPLEMENTATIONS for dtype in i.dtypes]
            metafunc.parametrize("implementation, dtype", pairs, ids=lambda x: str(x))
        else:
            metafunc.parametrize("implementation", IMPLEMENTATIONS, ids=repr)


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(0)

"""Fixtures of the tests of what is read from models."""

import pytest


@pytest.fixture(scope="module")
def keras_hub():
    return pytest.importorskip("keras_hub")

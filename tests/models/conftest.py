"""Fixtures of the tests of whole models."""

import pytest


@pytest.fixture(scope="module")
def keras_hub():
    return pytest.importorskip("keras_hub")

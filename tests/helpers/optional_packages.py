"""Packages that a test may need, as fixtures: also a plugin of pytest, for processes without conftest.py."""

import pytest


@pytest.fixture(scope="session")
def keras_hub():
    return pytest.importorskip("keras_hub")

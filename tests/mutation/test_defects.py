"""That defects.py still means what it says; run.py plants them, which takes long."""

from pathlib import Path

import pytest

from mutation import defects

ROOT = Path(__file__).resolve().parents[2]
ALL = [*defects.KERNELS, *defects.PAIRS, *defects.TILES, *defects.PYTHON]


@pytest.mark.parametrize("name, path, text, other", ALL, ids=[name for name, *_ in ALL])
def test_its_text_is_there_once(name, path, text, other):
    assert (ROOT / path).read_text().count(text) == 1 and text != other


def test_there_are_enough():
    assert len({name for name, *_ in ALL}) == len(ALL) >= 30

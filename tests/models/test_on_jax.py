"""The tests of whole models on JAX, without TensorFlow; this process has the other backend."""

import os
import sys
from pathlib import Path

from children import QUICK_TO_COMPILE, run

TESTS = """
sys.modules["tensorflow"] = None
import pytest


class Conftest:  # for files without theirs, which need TensorFlow
    @pytest.fixture
    def keras_hub(self):
        return pytest.importorskip("keras_hub")


file, *chosen = sys.argv[1:]
options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-W", "ignore", "--durations=3"]
sys.exit(pytest.main([*options, *(f"{file}::{test}" for test in chosen)], [Conftest()]))
"""
SHARE = ("test_patched_process[Llama]",)
WHOLE = "test_converted_models_answer_as_stock_ones", "test_patched_process", "test_other_padding"
BACKEND = {"KERAS_BACKEND": "jax", "XLA_FLAGS": QUICK_TO_COMPILE, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_jax(keras_hub, pytestconfig):
    here = Path(__file__).parent
    chosen = WHOLE if pytestconfig.getoption("whole") else SHARE
    process = run(TESTS, str(here / "test_language_models.py"), *chosen, without=(), **BACKEND)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-2000:]
    assert " passed" in process.stdout

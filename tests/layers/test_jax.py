"""The layers on other backends of Keras than TensorFlow, which is that of this process."""

import os
import sys
from pathlib import Path

from children import QUICK_TO_COMPILE, run

FILE = Path(__file__).with_name("on_jax.py")
# Without conftest.py, which is for a process with TensorFlow.
TESTS = """
sys.modules["tensorflow"] = None
import pytest
import shares
options = ["-q", "--noconftest", "-p", "no:cacheprovider"]
sys.exit(pytest.main([sys.argv[1], *options], [shares] if sys.argv[2] == "share" else []))
"""
BACKEND = {"KERAS_BACKEND": "jax", "XLA_FLAGS": QUICK_TO_COMPILE, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_jax(pytestconfig):
    share = "all" if pytestconfig.getoption("whole") else "share"
    process = run(TESTS, str(FILE), share, without=(), **BACKEND)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-2000:]
    assert " passed" in process.stdout


def test_other_backends_are_refused():
    process = run("import attn_ops; attn_ops.layers", without=(), KERAS_BACKEND="numpy")
    assert process.returncode
    assert "attn_ops.layers needs Keras on the tensorflow or the jax backend, not on 'numpy'" in process.stderr

"""Attention in JAX on several devices, in processes of its own: eight logical devices of one, and two of one each."""

import os
import sys
from pathlib import Path

from children import run

FILE = Path(__file__).with_name("on_eight_devices.py")
# Without conftest.py, which is for a process with TensorFlow.
TESTS = """
sys.modules["tensorflow"] = None
import pytest
import shares
options = ["-q", "--noconftest", "-p", "no:cacheprovider"]
sys.exit(pytest.main([sys.argv[1], *options], [shares] if sys.argv[2] == "share" else []))
"""


def test_eight_devices(pytestconfig):
    share = "all" if pytestconfig.getoption("whole") else "share"
    process = run(
        TESTS,
        str(FILE),
        share,
        without=(),
        KERAS_BACKEND="jax",
        PYTHONPATH=os.pathsep.join(sys.path),
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
    assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-2000:]
    assert " passed" in process.stdout

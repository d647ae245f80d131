"""Attention in JAX on several devices, in processes of its own: eight logical devices of one, and two of one each."""

import os
import sys
from pathlib import Path

import processes
import pytest
from children import QUICK_TO_COMPILE, run

FILE = Path(__file__).with_name("on_eight_devices.py")
# Without conftest.py, which is for a process with TensorFlow.
TESTS = """
sys.modules["tensorflow"] = None
import pytest
import shares
options = ["-q", "--noconftest", "-p", "no:cacheprovider"]
sys.exit(pytest.main([sys.argv[1], *options], [shares] if sys.argv[2] == "share" else []))
"""


def _eight_devices(config):
    share = "all" if config.getoption("whole") else "share"
    process = run(
        TESTS,
        str(FILE),
        share,
        without=(),
        KERAS_BACKEND="jax",
        PYTHONPATH=os.pathsep.join(sys.path),
        XLA_FLAGS=f"--xla_force_host_platform_device_count=8 {QUICK_TO_COMPILE}",
    )
    assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-2000:]
    assert " passed" in process.stdout


def _two_processes(config):
    """`jax.distributed` on this machine, arrays exchanged by the processes' own collectives."""
    methods = ["head_parallel", "ring", "all_gather_kv"]

    def described(n, ports):
        return [f"127.0.0.1:{ports[0]}", str(n), *methods], {"XLA_FLAGS": ""}

    for output in processes.run_two(FILE.with_name("two_processes_jax.py"), described):
        assert all(f"{method} of 2 processes" in output for method in methods)


@pytest.mark.wide(2)
@pytest.mark.parametrize("check", [_two_processes, _eight_devices])
def test_jax(pytestconfig, check):
    check(pytestconfig)

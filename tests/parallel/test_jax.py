"""Attention in JAX on several devices, in processes of its own: eight logical devices of one, and two of one each."""

import os
import sys
from pathlib import Path

import processes
import pytest
from children import run

FILE = Path(__file__).with_name("on_eight_devices.py")
# Programs are small and run once: their compilation is what costs.
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)
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
        XLA_FLAGS=FLAGS,
    )
    assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-2000:]
    assert " passed" in process.stdout


@pytest.mark.wide(3)
@pytest.mark.parametrize("method", ["head_parallel", "ring", "all_gather_kv"])
def test_two_processes(method):
    """`jax.distributed` on this machine, the processes' arrays exchanged by its own collectives."""
    outputs = processes.run_two(
        FILE.with_name("two_processes_jax.py"), lambda n, ports: ([f"127.0.0.1:{ports[0]}", str(n), method], {"XLA_FLAGS": ""})
    )
    assert all(f"{method} of 2 processes" in output for output in outputs)

"""Attention in JAX on several devices, in processes of its own: eight logical devices of one, and two of one each."""

from pathlib import Path

import processes
import pytest
from children import pass_on_jax

FILE = Path(__file__).with_name("on_eight_devices.py")


def _eight_devices(config):
    share = [] if config.getoption("whole") else ["-p", "shares"]
    pass_on_jax(FILE, *share, flags="--xla_force_host_platform_device_count=8")


def _two_processes(config):
    """`jax.distributed` on this machine, arrays exchanged by the processes' own collectives."""
    methods = ["head_parallel", "ring", "all_gather_kv"] if config.getoption("whole") else ["ring"]

    def described(n, ports):
        return [f"127.0.0.1:{ports[0]}", str(n), *methods], {"XLA_FLAGS": ""}

    for output in processes.run_two(FILE.with_name("two_processes_jax.py"), described):
        assert all(f"{method} of 2 processes" in output for method in methods)


@pytest.mark.parametrize("check", [_two_processes, _eight_devices])
def test_jax(pytestconfig, check):
    check(pytestconfig)

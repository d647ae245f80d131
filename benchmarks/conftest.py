"""Options of `pytest benchmarks`, and how one peer on one workload is measured."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest, as pyproject.toml has it, leaves the path as it is

import memory  # noqa: E402
import peers  # noqa: E402
from workloads import WORKLOADS, default_names, make_inputs  # noqa: E402

_SECONDS = 1.0  # aimed at per measurement


def pytest_addoption(parser):
    group = parser.getgroup("attn_ops benchmarks")
    group.addoption("--quick", action="store_true", help="short workloads, few rounds, no memory measurement")
    group.addoption("--no-memory", action="store_true", help="do not measure memory (a fresh process per peer)")
    group.addoption("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of every peer")
    group.addoption("--peers", nargs="+", default=None, help=f"only these of {', '.join(peers.PEERS)}")
    group.addoption("--workloads", nargs="+", default=None, help=f"only these of {', '.join(WORKLOADS)}")


def pytest_configure(config):
    if not config.getoption("--collect-only"):
        peers.set_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc):
    """Test modules name their MODES and which workloads they take; peers that are not installed do not show."""
    config = metafunc.config
    cases = []
    modes = metafunc.module.MODES
    for mode in modes:
        for name in config.getoption("--workloads") or default_names(mode):
            workload = WORKLOADS[name].quick() if config.getoption("--quick") else WORKLOADS[name]
            if workload.is_decode != metafunc.module.DECODE or name not in default_names(mode):
                continue
            label = workload.name if len(modes) == 1 else f"{workload.name}-{mode}"
            for peer in peers.select(workload, mode, config.getoption("--peers")):
                cases.append(pytest.param(name, workload, mode, peer, id=f"{label}-{peer}"))
    metafunc.parametrize("name, workload, mode, peer", cases)


@pytest.fixture
def measure(benchmark, request):
    """measure(name, workload, mode, peer): checks the peer, times it, and fills `extra_info`."""
    quick = request.config.getoption("--quick")
    threads = request.config.getoption("--threads")

    def run(name, workload, mode, peer):
        error = peers.check(peer, workload.miniature(), mode)
        step = peer.prepare(workload, mode, make_inputs(workload))
        step()
        begin = time.perf_counter()
        step()
        rounds = int(_SECONDS / (time.perf_counter() - begin))
        benchmark.group = f"{workload}, {mode}, {threads} threads"
        benchmark.pedantic(step, rounds=3 if quick else min(max(rounds, 3), 200), warmup_rounds=1)
        seconds = benchmark.stats.stats.min
        benchmark.extra_info |= {
            "peer": peer.name,
            "workload": workload.name,
            "mode": mode,
            "threads": threads,
            "gflops_per_second": round(workload.flops(mode) / seconds / 1e9, 3),
            "error": error,
            "versions": peers.versions(),
        }
        if workload.is_decode:
            benchmark.extra_info["gigabytes_per_second"] = round(workload.key_value_bytes() / seconds / 1e9, 3)
        if not quick and not request.config.getoption("--no-memory"):
            growth = memory.measure(name, mode, peer.name, threads)
            benchmark.extra_info["memory_growth_mb"] = round(growth / 1e6, 1)

    return run


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["versions"] = peers.versions()

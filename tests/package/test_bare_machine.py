"""What must work on a machine with a GPU, PyTorch, NumPy, pytest and ml_dtypes, and without TensorFlow, Keras, JAX and
`attn_ops._core`: the tests and the benchmark of the CUDA kernels. cuda_host/bare/ makes such a machine of this one, and
the stand-in driver is its GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cuda_run
from bench_modules import bench_modules
from cuda_host import build

ROOT = Path(__file__).resolve().parents[2]
PREPARE = """
import pathlib, sys
from attn_ops.kernels import cuda
cuda.LIBRARY = pathlib.Path({library!r})
"""


def on_a_bare_machine(code, *more_path, **environment):
    path = [ROOT / "tests/cuda_host/bare", ROOT, *more_path]
    environment = {"PYTHONPATH": os.pathsep.join(map(str, path)), **environment}
    command = [sys.executable, "-c", PREPARE.format(library=str(cuda_run.library())) + code]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture
def standin():
    if cuda_run.library() is None:
        pytest.skip("no libattn_ops_cuda*.so here: build in this checkout")
    return {"ATTN_OPS_CUDA_DRIVER": str(build.library())}


def test_it_has_nothing():
    code = """
import importlib.util
for name in ("tensorflow", "keras", "jax", "rich", "matplotlib", "attn_ops._core"):
    assert importlib.util.find_spec(name) is None, name
from attn_ops import kernels
assert kernels.core() is None
"""
    done = on_a_bare_machine(code)
    assert done.returncode == 0, done.stderr


COLLECT = """
import pytest
class Files:
    def pytest_collection_finish(self, session):
        print(*{f"file: {item.nodeid.partition('::')[0]}" for item in session.items}, sep="\\n")
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-p", "no:cacheprovider"], [Files()]))
"""


def test_the_tests_of_the_kernels_are_collected():
    done = on_a_bare_machine(COLLECT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    lines = set(done.stdout.splitlines())
    kernels = [f"tests/cuda/test_{name}.py" for name in ("kernels", "numerics")]
    kernels += [f"tests/op/test_{name}.py" for name in ("features", "accuracy", "numerics", "shapes")]
    assert {f"file: {path}" for path in kernels} <= lines
    assert "left out: op/tensorflow/test_composite.py, for want of tensorflow" in lines


def test_the_tests_of_the_kernels_run(standin):
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/cuda/test_kernels.py", "-k", "test_groups"]
    done = on_a_bare_machine(f"import pytest\nsys.exit(pytest.main({options!r}))", **standin)
    assert done.returncode == 0 and "8 passed" in done.stdout, done.stdout[-3000:] + done.stderr


BENCH = """
from gpu import command, device, workloads
device._MATMUL, device._COPY_BYTES = 64, 1 << 16
sys.exit(command.main({options!r}))
"""


def test_the_benchmark_goes_through(standin, tmp_path):
    options = ["--quick", "--rounds", "1", "--sections", "decode", "backward", "--report", str(tmp_path)]
    done = on_a_bare_machine(BENCH.format(options=options), ROOT / "benchmarks", **standin)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no charts were drawn: matplotlib is not installed" in done.stdout
    lines = (tmp_path / "gpu_results.csv").read_text().splitlines()
    assert len(lines) > 4 and all("attn_ops_cuda" in line for line in lines[1:])
    assert "# attn_ops on a GPU: speed" in (tmp_path / "gpu_report.md").read_text()


def test_the_first_minutes_on_a_card(standin, tmp_path):
    """What benchmarks/gpu/first_run.py checks without PyTorch: every kind of call in one dtype and head dimension, some
    random calls, and few launches that must give the same bits; its other stages need a card."""
    code = f"""
from gpu import checks, soak
wrong = checks.kernels((64,), ("bfloat16",)), checks.fuzz(pathlib.Path({str(tmp_path)!r}), 2, 1)
wrong += soak.soak(512, 2, 2, 2),
sys.exit(repr(wrong) if any(wrong) else 0)
"""
    done = on_a_bare_machine(code, ROOT / "benchmarks", **standin)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "0 of 13 wrong" in done.stdout and "; 0 failed" in done.stdout
    assert done.stdout.count("2 replays of a graph, the same bits") == 3


def test_what_is_wrong_is_told(standin):
    """By the same checks, where gradients are off, and where a byte of each second result is another."""
    code = """
import itertools
from gpu import checks, soak
run, results, turn = checks.cuda_run.run, soak._Job.results, itertools.count()
def off(*arguments, **options):
    found = run(*arguments, **options)
    return {**found, "dk": found["dk"] * np.float32(1.1)}
import numpy as np
checks.cuda_run.run = off
soak._Job.results = lambda job: [bytes([next(turn) % 2]), *results(job)]
checks.kernels((64,), ("float32",), ("full", "few rows"))
print(soak.soak(512, 1, 1, 1), "times")
"""
    done = on_a_bare_machine(code, ROOT / "benchmarks", **standin)
    assert "2 of 2 wrong" in done.stdout and "6 times" in done.stdout, done.stdout + done.stderr[-3000:]


def test_a_call_of_the_first_minutes_is_short():
    """A machine is lent for ten minutes at a time, of which it takes one to start."""
    with bench_modules("gpu.first_run", "gpu.stages") as bench:
        assert all(sum(call.values()) <= 540 for call in bench.first_run.CALLS.values())
        assert all(callable(getattr(bench.stages, name)) for name in bench.first_run.STAGES)
        assert len(bench.first_run.STAGES) == sum(map(len, bench.first_run.CALLS.values()))


def test_a_stage_that_fails_is_counted_and_costs_no_other(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu/first_run.py"), "--out", str(tmp_path)]
    environment = {**os.environ, "ATTN_OPS_CUDA_DRIVER": "/nowhere/libcuda.so.1"}
    done = subprocess.run([*command, "facts", "facts"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.count("== facts: FAILED") == 2, done.stdout + done.stderr
    assert (tmp_path / "facts.log").read_text()
    done = subprocess.run([*command, "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and "no such stage: nonsense" in done.stderr


def test_the_command_starts(standin):
    """As users start it: `attn_ops_cuda` is found usable, so that what stops it is another option."""
    code = """
import runpy
sys.argv = ["attn_ops", "bench", "--device", "cuda", "--rounds", "0"]
runpy.run_module("attn_ops", run_name="__main__")
"""
    done = on_a_bare_machine(code, **standin)
    assert "--rounds (0) must be at least 1" in done.stderr, done.stderr

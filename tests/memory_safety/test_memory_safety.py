"""Nothing is read or written but what a call was given: kernels on arrays and workspaces between forbidden pages, malformed
calls of every binding, arrays of nothing, and threads that do not come. What may crash runs in a process of its own.
"""

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from attn_ops import kernels

from memory_safety import guarded

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
core = kernels.core()


def run(script, *arguments, environment=None):
    command = [sys.executable, "-X", "faulthandler", str(HERE / script), *map(str, arguments)]
    package = Path(kernels.__file__).parents[2]
    environment = {**(environment or os.environ), "PYTHONPATH": str(package), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def assert_done(finished):
    assert finished.returncode == 0 and finished.stdout.endswith("done\n"), finished.stdout[-1500:] + finished.stderr[-3000:]


@pytest.fixture(scope="module")
def guarded_environment(tmp_path_factory):
    return guarded.environment(tmp_path_factory.mktemp("guard"))


@pytest.mark.parametrize("isa", core.isas())
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_kernels_touch_their_own_memory_only(guarded_environment, dtype, isa):
    assert_done(run("calls.py", dtype, isa, 30, 1, environment=guarded_environment))


def test_a_workspace_too_short_is_noticed(guarded_environment):
    """That the guard works: a workspace that has 1 KiB less than was asked for ends the process."""
    assert run("calls.py", "float32", core.isas()[0], 30, 1, 1024, environment=guarded_environment).returncode == -11


@pytest.mark.parametrize(
    "script, kinds, every",
    [
        ("malformed.py", "core", 1),
        ("malformed_models.py", "tensorflow,op,graph,saved,caches,pages", 40),
        ("malformed.py", "xla", 20),
    ],
    ids=("core", "tensorflow", "xla"),
)
def test_malformed_calls(script, kinds, every, pytestconfig):
    """Of TensorFlow's and XLA's, one in so many, and all with --whole."""
    assert_done(run(script, kinds, 1 if pytestconfig.getoption("whole") else every))


def test_empty_arrays_of_any_extent(guarded_environment):
    assert_done(run("empty.py", "core", 2000, 0, environment=guarded_environment))


@pytest.mark.parametrize("binding", ["tensorflow", "jax"])
def test_empty_tensors_of_any_extent(binding):
    assert_done(run("empty.py", binding))


def test_threads(tmp_path):
    program = tmp_path / "threads"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize=vptr", f"-I{ROOT / 'csrc'}", HERE / "threads.cc"]
    subprocess.run([*command, "-o", program], check=True)
    finished = subprocess.run([program], capture_output=True, text=True, timeout=100)
    assert finished.returncode == 0 and finished.stdout == "done\n", finished.stderr


@pytest.mark.parametrize(
    "message, q, k, value_dim, options",
    [
        ("seqlen_q (2147483648) must be at most 2147483647", (1, 2**31, 1, 1), (1, 1, 1, 1), 1, {}),
        ("seqlen_k (2147483648) must be at most 2147483647", (1, 1, 1, 1), (1, 2**31, 1, 1), 1, {}),
        ("num_heads (2147483648) must be at most 2147483647", (1, 1, 2**31, 1), (1, 1, 1, 1), 1, {}),
        ("head_dim (16777217) must be at most 16777216", (1, 1, 1, 2**24 + 1), (1, 1, 1, 2**24 + 1), 1, {}),
        ("head_dim (144115188075855872) must be", (1, 1, 1, 2**57), (1, 1, 1, 2**57), 1, {}),
        ("value_dim (36028797018963968) must be", (1, 1, 1, 1), (1, 1, 1, 1), 2**55, {}),
        (
            "batch (4294967296) times num_heads (1) must be at most 4294967295 with dropout",
            (2**32, 1, 1, 1),
            (2**32, 1, 1, 1),
            1,
            {"dropout_rate": 0.5},
        ),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_limits(dtype, message, q, k, value_dim, options):
    """Of arrays of stride 0, which claim any size and take no memory."""
    arrays = [np.broadcast_to(np.zeros((), dtype), shape) for shape in (q, k, (*k[:3], value_dim))]
    with pytest.raises(ValueError) as raised:
        core.forward(*arrays, **options)
    assert message in str(raised.value)


def misaligned(x):
    """``x`` where its numbers may not lie."""
    memory = np.empty(x.nbytes + 1, np.uint8)
    result = np.ndarray(x.shape, x.dtype, buffer=memory.data, offset=1 - memory.ctypes.data % 2)
    result[...] = x
    assert x.dtype.itemsize == 1 or not result.flags.aligned
    return result


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_misaligned_arrays_are_copied(rng, dtype):
    q, k, v, d_out = (rng.normal(size=s).astype(dtype) for s in ((2, 9, 4, 8), (2, 40, 2, 8), (2, 40, 2, 5), (2, 9, 4, 5)))
    bias, lengths = rng.normal(size=(1, 1, 9, 40)).astype(dtype), np.array([40, 17])

    def results(place):
        options = {"bias": place(bias), "key_lengths": place(lengths)}
        out, *statistics = core.forward(place(q), place(k), place(v), **options)
        arrays = (q, k, v, out, statistics[-1], d_out)
        return out, *core.backward(*map(place, arrays), d_lse=place(statistics[0]), **options)

    for found, wanted in zip(results(misaligned), results(lambda x: x), strict=True):
        np.testing.assert_array_equal(found, wanted)

    def peak(place):
        arrays = [place(x) for x in (q, k, v)]
        tracemalloc.start()
        core.forward(*arrays)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(misaligned) - peak(lambda x: x) >= 0.9 * sum(x.nbytes for x in (q, k, v))

"""Many callers at once, calls over and over, and faults around calls: each in a process of its own, since it may take that with it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from attn_ops import kernels

HERE = Path(__file__).parent
PACKAGE = Path(kernels.__file__).parents[1]


def run(script, *arguments, **variables):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", **variables}
    command = [sys.executable, "-X", "faulthandler", HERE / script, *arguments]
    ended = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0 and ended.stdout.endswith("done\n"), ended.stdout[-1500:] + ended.stderr[-3000:]
    return ended.stdout


# Each starts TensorFlow, which takes seconds: by default one of them runs.
WITH_TENSORFLOW = {
    "threads of the op": (("threads.py", "op", "--seconds", "2"), "from 16 threads"),
    "threads of XLA": (("threads.py", "xla", "--seconds", "2"), "from 16 threads"),
    "first calls from threads": (("threads.py", "op", "--seconds", "1", "--fresh"), "from 16 threads"),
    "soak of the op": (("soak.py", "op", "--calls", "2000", "--warm-up", "500", "--most", "15"), "over 2000 calls"),
    "soak of XLA": (("soak.py", "xla", "--calls", "2000", "--warm-up", "500", "--most", "15"), "over 2000 calls"),
    "soak of errors": (("soak.py", "errors", "--calls", "2000", "--warm-up", "500", "--most", "15"), "over 2000 calls"),
    "no memory, eager": (("faults.py", "memory", "op"), "ResourceExhaustedError"),
    "no memory, graph": (("faults.py", "memory", "graph"), "ResourceExhaustedError"),
    "no memory, XLA": (("faults.py", "memory", "xla"), "ResourceExhaustedError"),
    "interrupted, eager": (("faults.py", "interrupt", "op"), "interrupted"),
    "interrupted, graph": (("faults.py", "interrupt", "graph"), "interrupted"),
    "interrupted, XLA": (("faults.py", "interrupt", "xla"), "interrupted"),
    "fork before use": (("faults.py", "fork", "op"), "done"),
    "workers of tf.data": (("faults.py", "workers"), "done"),
    "two versions": (("faults.py", "two_versions"), "done"),
}


@pytest.mark.wide(len(WITH_TENSORFLOW))
@pytest.mark.parametrize("name", WITH_TENSORFLOW)
def test_with_tensorflow(name, tmp_path):
    command, told = WITH_TENSORFLOW[name]
    more = []
    if name == "fork before use":
        more = [tmp_path / "result"]
    elif name == "two versions":
        shutil.copytree(PACKAGE, tmp_path / "attn_ops", ignore=shutil.ignore_patterns("__pycache__"))
        more = [tmp_path]
    assert told in run(*command, *more)


@pytest.mark.parametrize("fresh", [(), ("--fresh",)], ids=("used", "fresh"))
def test_sixteen_threads(fresh):
    assert "from 16 threads" in run("threads.py", "core", "--seconds", "0.5", *fresh)


def test_memory_is_flat():
    run("soak.py", "core", "--calls", "3000", "--warm-up", "500")


def test_a_soak_sees_what_leaks():
    """A cupful each time is a flood in the end."""
    code = (
        "import sys; sys.path[:0] = [sys.argv.pop(1)]; from load import calls, soak; kept = []\n"
        "soak.made = lambda what: {'leak': lambda: kept.append(bytearray(10000))}\nsoak.main()"
    )
    command = [sys.executable, "-c", code, HERE.parent, "core", "--calls", "2000", "--warm-up", "100"]
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1 and "memory grew by more than 5.0 MiB" in ended.stderr


def test_no_memory():
    assert "MemoryError" in run("faults.py", "memory", "core")


def test_interrupt():
    assert "interrupted" in run("faults.py", "interrupt", "core")


def test_fork_before_use(tmp_path):
    run("faults.py", "fork", "core", tmp_path / "result")


def test_other_numbers_of_threads_from_call_to_call():
    run("faults.py", "thread_counts")

"""Python in a process of its own, from the checkout that this process imports."""

import os
import subprocess
import sys

import attn_ops

# What TensorFlow and Keras import where it is installed, and do without: half of the time that a child takes to start.
_UNNEEDED = ("jax", "matplotlib", "scipy")
# Programs of tests are small and run once: their compilation is what costs.
_QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_TESTS_WITHOUT_TENSORFLOW = """
sys.modules["tensorflow"] = None
import pytest
sys.exit(pytest.main(["-q", "--noconftest", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""
# To be put before code that finds no framework.
WITHOUT_TENSORFLOW = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "keras"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import attn_ops
"""


def run(code, *arguments, without=_UNNEEDED, **environment):
    """`python -c code arguments`, with more variables of the environment; it finds no packages of the names `without`, and
    starts from the same random weights each time (see conftest.py)."""
    before = f"import random, sys; random.seed(0); sys.modules |= dict.fromkeys({without!r})\n"
    return _run("-c", before + code, *arguments, environment=environment)


def pass_on_jax(*arguments, flags=""):
    """Asserts that tests pass with JAX as Keras's backend and without TensorFlow (nor conftest.py, which is for processes
    with it): ``arguments`` of pytest, and more XLA_FLAGS."""
    environment = {"KERAS_BACKEND": "jax", "XLA_FLAGS": f"{_QUICK_TO_COMPILE} {flags}", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = run(_TESTS_WITHOUT_TENSORFLOW, *map(str, arguments), without=(), **environment)
    assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-2000:]
    assert " passed" in process.stdout


def command(*arguments, **environment):
    """`python -m attn_ops arguments`."""
    return _run("-m", "attn_ops", *arguments, environment=environment)


def _run(*arguments, environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=os.path.dirname(os.path.dirname(attn_ops.__file__)),
    )

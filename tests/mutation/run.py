#!/usr/bin/env python3
"""Plants one defect at a time (defects.py) in a copy of the checkout, runs the tests that should notice, and tells which did.

    python tests/mutation/run.py --kind python                  # minutes
    python tests/mutation/run.py --kind kernels --only causal   # each is a build of the kernels first: minutes, with -O1
    python tests/mutation/run.py                                # all

The exit status is 1 where one goes unnoticed. The copy and the build lie in build/mutation.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COPY = ROOT / "build" / "mutation"
sys.path.insert(0, str(HERE))

import defects  # noqa: E402

KERNEL_TESTS = [f"kernels/test_{name}.py" for name in ("core", "few_rows", "intervals", "philox")]
KERNEL_TESTS += ["fuzz/test_fuzz.py::test_kernels", "memory_safety/test_memory_safety.py::test_malformed_calls[core]"]
KERNEL_TESTS += ["load/test_determinism.py", "op/test_bad_input.py"]
PYTHON_TESTS = ["op/test_features.py", "op/test_masks.py", "kernels/test_philox.py", "op/tensorflow/test_composite.py"]
PYTHON_TESTS += ["op/tensorflow/test_int8_cache.py", "op/jax/test_int8_cache.py", "op/tensorflow/test_decode.py", "fuzz/test_fuzz.py"]


def copied():
    ignored = shutil.ignore_patterns("build", ".git", ".venv", "__pycache__", "docs")
    shutil.copytree(ROOT, COPY / "tree", ignore=ignored, dirs_exist_ok=True)
    return COPY / "tree"


def build(tree):
    """Whether it compiles: a defect that does not is told from one that tests notice."""
    options = {"Python_EXECUTABLE": sys.executable, "ATTN_OPS_CUDA": "OFF", "CMAKE_CXX_FLAGS_RELEASE": "-O1"}
    if shutil.which("ccache"):
        options["CMAKE_CXX_COMPILER_LAUNCHER"] = "ccache"
    made = [f"-D{name}={value}" for name, value in options.items()]
    commands = [
        ["cmake", f"-S{tree}", f"-B{COPY / 'build'}", "-GNinja", *made],
        ["cmake", "--build", COPY / "build"],
        ["cmake", "--install", COPY / "build", "--prefix", tree / "attn_ops"],
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return all(
        subprocess.run([str(part) for part in command], env={**os.environ, "PATH": path}, stdout=subprocess.DEVNULL).returncode == 0
        for command in commands
    )


def noticed(tree, tests):
    """The first test that fails, or None."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-x", "--no-header", *tests]
    ended = subprocess.run(command, cwd=tree / "tests", env=environment, capture_output=True, text=True)
    if ended.returncode == 0:
        return None
    lines = [line for line in ended.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0][:150] if lines else f"exit status {ended.returncode}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", default=["python", "kernels"], choices=["python", "kernels"])
    parser.add_argument("--only", help="defects whose name has this text")
    arguments = parser.parse_args()
    tree, unnoticed, count = copied(), [], 0
    for kind in arguments.kind:
        tests = KERNEL_TESTS if kind == "kernels" else PYTHON_TESTS
        for name, path, text, other in defects.KERNELS if kind == "kernels" else defects.PYTHON:
            if arguments.only and arguments.only not in name:
                continue
            whole = (ROOT / path).read_text()
            (tree / path).write_text(whole.replace(text, other))
            try:
                if kind == "kernels" and not build(tree):
                    sys.exit(f"{name}: does not compile")
                count += 1
                told = noticed(tree, tests)
            finally:
                (tree / path).write_text(whole)
            print(f"{name}: {told or 'NOT NOTICED'}", flush=True)
            unnoticed += [] if told else [name]
    print(f"{count - len(unnoticed)} of {count} defects were noticed")
    return 1 if unnoticed or count == 0 else 0


if __name__ == "__main__":
    sys.exit(main())

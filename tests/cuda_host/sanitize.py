"""Runs the tests of the CUDA kernels under compute-sanitizer, on a machine with a GPU and the CUDA toolkit.

    python tests/cuda_host/sanitize.py                       # memcheck, then racecheck
    python tests/cuda_host/sanitize.py memcheck -k strides   # one tool; the rest goes to pytest

It takes some minutes a tool and does not work under every virtualised GPU, so nothing depends on it: the stand-in
driver finds the same errors of memory and of barriers on a CPU.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
_TESTS = pathlib.Path(__file__).resolve().parents[1]
_FILES = [str(_TESTS / f"cuda/test_{name}.py") for name in ("kernels", "scores", "intervals")]


def main(arguments: list[str]) -> int:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        print("compute-sanitizer is not on the PATH; it is part of the CUDA toolkit", file=sys.stderr)
        return 2
    tools = [name for name in arguments if name in _TOOLS] or _TOOLS[:2]
    options = [name for name in arguments if name not in _TOOLS]
    status = 0
    for tool in tools:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
        command += [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *_FILES, *options]
        print(f"== {tool}", flush=True)
        status = subprocess.call(command, cwd=_TESTS.parent) or status
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

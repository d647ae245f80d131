#!/usr/bin/env python3
"""Tests the AVX-512 and AMX kernels on an x86-64 processor that has only AVX2, FMA and F16C: immintrin.h emulates by halves.

Builds `attn_ops._core` below build/avx512 with the emulation and beside it the instruction sets of any other build, and
runs there kernels/test_core.py and kernels/test_few_rows.py (all instruction sets) and a share of the fuzz with AVX-512 alone,
without and with BF16, and with AMX.
What follows -- goes to pytest instead of the two files.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "avx512"
PACKAGES = BUILD / "packages"
FILES = ("kernels/test_core.py", "kernels/test_few_rows.py")


def run(*command, **options):
    print("+", *command, flush=True)
    return subprocess.run([str(part) for part in command], check=True, **options)


def build(jobs: int):
    """The `_core` of a package of its own, so that nothing takes the emulation for what users get. Takes minutes."""
    options = {
        "Python_EXECUTABLE": sys.executable,
        "ATTN_OPS_CUDA": "OFF",
        "ATTN_OPS_EMULATE_AVX512": "ON",
    }
    run("cmake", f"-S{ROOT}", f"-B{BUILD}", *(f"-D{name}={value}" for name, value in options.items()))
    run("cmake", "--build", BUILD, "--target", "_core", "--parallel", jobs)
    sources = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "attn_ops", PACKAGES / "attn_ops", dirs_exist_ok=True, ignore=sources)
    (library,) = BUILD.glob("_core.*.so")
    return Path(shutil.copy2(library, PACKAGES / "attn_ops"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzz")
    parser.add_argument("--count", type=int, default=500, help="cases of the fuzz")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, relative to tests/")
    arguments = parser.parse_args()
    library = build(arguments.jobs)
    tests = ROOT / "tests"  # not from the checkout's root, where the package of this machine lies
    environment = dict(os.environ, PYTHONPATH=str(PACKAGES))
    imported = f"from attn_ops import kernels; assert kernels.core().__file__ == {str(library)!r}, kernels.core()"
    run(sys.executable, "-c", imported, cwd=tests, env=environment)
    run(
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        *(arguments.pytest or FILES),
        cwd=tests,
        env=environment,
    )
    fuzz = ("fuzz/run.py", "--isa", "avx512,avx512bf16,amxbf16", "--implementations", "core")
    run(sys.executable, *fuzz, "--seed", arguments.seed, "--count", arguments.count, cwd=tests, env=environment)


if __name__ == "__main__":
    main()

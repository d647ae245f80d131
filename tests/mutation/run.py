#!/usr/bin/env python3
"""Plants one defect at a time (defects.py) in a copy of the checkout, runs the tests that should notice, and tells which did.

    python tests/mutation/run.py --kind python                  # minutes
    python tests/mutation/run.py --kind kernels --only causal   # each is a build of the kernels first, with -O1
    python tests/mutation/run.py                                # all
    python tests/mutation/run.py --isa generic avx2             # kernels of these instruction sets

Kernels are built for one instruction set unless more are named: all are compiled from the same source, but for what only
products of pairs have (--kind pairs), which are looked at where this processor has those. The tests must pass before anything is
planted. The exit status is 1 where a defect goes unnoticed. The copy and the build lie in build/mutation.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COPY = ROOT / "build" / "mutation"
sys.path.insert(0, str(HERE))

import defects  # noqa: E402

KERNELS = ("core", "few_rows", "int8", "intervals", "masks", "bias_gradient", "pages", "philox", "schedule")
KERNEL_TESTS = [f"kernels/test_{name}.py" for name in KERNELS]
KERNEL_TESTS += ["fuzz/test_fuzz.py::test_kernels", "memory_safety/test_memory_safety.py::test_malformed_calls[core]"]
KERNEL_TESTS += ["load/test_determinism.py", "op/test_bad_input.py"]
PAIR_TESTS = ["kernels/test_bfloat16_products.py", "kernels/test_few_rows.py"]
PAIR_ISAS = ["avx512bf16", "avx512"]  # with the one beside
TILE_TESTS = ["kernels/test_bfloat16_products.py", "kernels/test_intervals.py", "kernels/test_masks.py"]
TILE_ISAS = ["amxbf16", "avx512"]
PYTHON_TESTS = ["op/test_features.py", "op/test_masks.py", "kernels/test_philox.py", "op/tensorflow/test_composite.py"]
PYTHON_TESTS += ["op/tensorflow/test_int8_cache.py", "op/jax/test_int8_cache.py", "op/tensorflow/test_decode.py", "fuzz/test_fuzz.py"]
KINDS = {
    "python": (PYTHON_TESTS, defects.PYTHON, []),
    "kernels": (KERNEL_TESTS, defects.KERNELS, []),
    "pairs": (PAIR_TESTS, defects.PAIRS, PAIR_ISAS),
    "tiles": (TILE_TESTS, defects.TILES, TILE_ISAS),
}


def copied(isas):
    """The checkout, with these instruction sets alone in the list that all else follows."""
    ignored = shutil.ignore_patterns("build", ".git", ".venv", "__pycache__", "docs")
    shutil.copytree(ROOT, COPY / "tree", ignore=ignored, dirs_exist_ok=True)
    listed = COPY / "tree" / "csrc" / "cpu" / "isas.inc"
    comment, *entries = re.split(r"^(?=ISA\()", (ROOT / "csrc" / "cpu" / "isas.inc").read_text(), flags=re.MULTILINE)
    kept = comment + "".join(entry for entry in entries if re.match(r"ISA\((\w+)", entry)[1] in isas)
    if listed.read_text() != kept:
        listed.write_text(kept)
    return COPY / "tree"


def build(tree, jobs):
    """Whether it compiles: a defect that does not is told from one that tests notice."""
    options = {"Python_EXECUTABLE": sys.executable, "ATTN_OPS_CUDA": "OFF", "CMAKE_CXX_FLAGS_RELEASE": "-O1"}
    if shutil.which("ccache"):
        options["CMAKE_CXX_COMPILER_LAUNCHER"] = "ccache"
    made = [f"-D{name}={value}" for name, value in options.items()]
    commands = [
        ["cmake", f"-S{tree}", f"-B{COPY / 'build'}", "-GNinja", *made],
        ["cmake", "--build", COPY / "build", "--parallel", jobs],
        ["cmake", "--install", COPY / "build", "--prefix", tree / "attn_ops"],
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return all(
        subprocess.run([str(part) for part in command], env={**os.environ, "PATH": path}, stdout=subprocess.DEVNULL).returncode == 0
        for command in commands
    )


def environment(tree):
    return {**os.environ, "PYTHONPATH": str(tree), "TF_CPP_MIN_LOG_LEVEL": "3"}


def usable(tree):
    """The instruction sets that were built and that this processor has."""
    command = [sys.executable, "-c", "from attn_ops import kernels; print(*kernels.core().isas())"]
    return subprocess.run(command, env=environment(tree), cwd=COPY, capture_output=True, text=True, check=True).stdout.split()


def noticed(tree, tests):
    """The first test that fails, or None."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-x", "--no-header", *tests]
    ended = subprocess.run(command, cwd=tree / "tests", env=environment(tree), capture_output=True, text=True)
    if ended.returncode == 0:
        return None
    lines = [line for line in ended.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0][:150] if lines else f"exit status {ended.returncode}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", default=[*KINDS], choices=[*KINDS])
    parser.add_argument("--only", nargs="+", default=[""], help="defects whose name has one of these texts")
    parser.add_argument("--isa", nargs="+", default=["generic"], help="instruction sets that are built (csrc/cpu/isas.inc)")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    arguments = parser.parse_args()
    unnoticed, count, built = [], 0, None
    for kind in arguments.kind:
        tests, planted, isas = KINDS[kind]
        if (wanted := {*arguments.isa, *isas}) != built:
            tree, built = copied(wanted), wanted
            if not build(tree, arguments.jobs):
                sys.exit("without a defect: does not compile")
        if not set(isas).issubset(usable(tree)):
            print(f"{kind}: left out, this processor lacks one of {', '.join(isas)}")
            continue
        if told := noticed(tree, tests):
            sys.exit(f"without a defect: {told}")
        for name, path, text, other in planted:
            if not any(only in name for only in arguments.only):
                continue
            start = time.monotonic()
            whole = (ROOT / path).read_text()
            (tree / path).write_text(whole.replace(text, other))
            try:
                if path.startswith("csrc/") and not build(tree, arguments.jobs):
                    sys.exit(f"{name}: does not compile")
                count += 1
                told = noticed(tree, tests)
            finally:
                (tree / path).write_text(whole)
            print(f"{name}: {told or 'NOT NOTICED'} ({time.monotonic() - start:.0f} s)", flush=True)
            unnoticed += [] if told else [name]
    print(f"{count - len(unnoticed)} of {count} defects were noticed")
    return 1 if unnoticed or count == 0 else 0


if __name__ == "__main__":
    sys.exit(main())

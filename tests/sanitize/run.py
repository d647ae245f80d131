#!/usr/bin/env python3
"""Builds with sanitizers (CMakePresets.json) and runs the kernels, the operators and the custom calls of XLA under them.

    python tests/sanitize/run.py                                        # all of both: an hour or more on two cores
    python tests/sanitize/run.py --preset asan-ubsan --suites core      # some of it
    python tests/sanitize/run.py --preset tsan --suites core op xla

Takes gcc. The first build of a preset takes ten minutes on two cores. Reports are kept in build/<preset>/reports, those of the
frameworks left out by their frames (reports.py), and the exit status is 1 where one is ours or a suite fails. Not looked for
are leaks, which Python's own would hide: tests/load/soak.py measures memory.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import builds  # noqa: E402
import reports  # noqa: E402

TESTS = HERE.parent
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "-q", "-s", "-x")  # -s: pytest hides what a test that passes prints
KERNELS = [f"kernels/test_{name}.py" for name in ("core", "few_rows", "int8", "pages", "bias_gradient")]
# Flat memory: AddressSanitizer keeps what is freed.
FLAT = ("--deselect=op/test_bad_input.py::test_memory_is_flat_over_errors",)
FLAT += ("--deselect=op/tensorflow/test_raw_op.py::test_errors_keep_no_more_memory_than_those_of_tensorflow",)
FLAT += ("-k", "not flat and not memory and not a_fork")


def suites(preset, seconds):
    """What runs, by name, as arguments of Python."""
    threads = {name: ["load/threads.py", name, "--seconds", seconds] for name in ("core", "op", "xla")}
    if preset == "tsan":  # what has no second thread has no race
        return {name: [command] for name, command in threads.items()}
    fuzz = ["fuzz/run.py", "--implementations", "core", "--seconds", seconds]
    return {
        "core": [[*PYTEST, *KERNELS, *FLAT], fuzz, ["memory_safety/malformed.py", "core"], threads["core"]],
        "op": [
            [*PYTEST, "op/tensorflow/test_raw_op.py", "op/test_bad_input.py", "op/tensorflow/test_append.py", *FLAT],
            ["memory_safety/malformed.py", "tensorflow"],
            threads["op"],
        ],
        "xla": [
            [*PYTEST, "op/tensorflow/test_xla.py", "op/jax/test_attention.py", "op/jax/test_decode.py", *FLAT],
            ["memory_safety/malformed.py", "xla"],
            threads["xla"],
        ],
    }


def environment(preset, packages, logs):
    """Python is no sanitized program, so the sanitizer is loaded before it."""

    def library(name):
        path = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        return os.path.realpath(path)

    options = f"log_path={logs}/log:print_stacktrace=1:halt_on_error=0:detect_leaks=0:allocator_may_return_null=1"
    names = ["libtsan.so"] if preset == "tsan" else ["libasan.so", "libubsan.so"]
    return {
        **os.environ,
        "PYTHONPATH": str(packages),
        "LD_PRELOAD": " ".join(map(library, names)),
        "ASAN_OPTIONS": options + ":detect_odr_violation=0",
        "UBSAN_OPTIONS": options,
        "TSAN_OPTIONS": options + ":report_signal_unsafe=0:exitcode=0",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONMALLOC": "malloc",  # so that Python's objects have redzones too
    }


def run(preset, chosen, seconds, jobs):
    """Whether all was clean."""
    packages = builds.install(preset, jobs)
    logs = builds.ROOT / "build" / preset / "reports"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    clean = True
    for name, commands in suites(preset, seconds).items():
        if name not in chosen:
            continue
        for command in commands:
            print("+", preset, name, *command, flush=True)
            # From tests: in the root lies the package of this machine.
            ended = subprocess.run([sys.executable, *map(str, command)], cwd=TESTS, env=environment(preset, packages, logs))
            clean = clean and ended.returncode == 0
            print(f"{preset} {name}: {'ended' if ended.returncode == 0 else 'FAILED'} ({ended.returncode})", flush=True)
    ours, others = reports.found(logs)
    for report in ours:
        print(report)
    print(f"{preset}: {len(ours)} reports are ours, {others} are of others (kept in {logs})")
    return clean and not ours


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["asan-ubsan", "tsan"], choices=["asan-ubsan", "tsan"])
    parser.add_argument("--suites", nargs="+", default=["core", "op", "xla"], choices=["core", "op", "xla"])
    parser.add_argument("--seconds", type=float, default=60, help="of the fuzz, and of the threads")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    arguments = parser.parse_args()
    return 0 if all([run(preset, arguments.suites, arguments.seconds, arguments.jobs) for preset in arguments.preset]) else 1


if __name__ == "__main__":
    sys.exit(main())

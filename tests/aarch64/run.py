#!/usr/bin/env python3
"""Cross-compiles attn_ops for 64-bit Arm and runs the kernel tests there, under the user emulation of QEMU.

For Debian and Ubuntu on another processor. Needed, and installed with apt-get by root: g++-aarch64-linux-gnu and
qemu-user. Everything else goes into build/aarch64: a Python for Arm from the machine's own Debian mirror, its packages,
the build and an installation of attn_ops. What is there is not fetched again.

Runs what needs no TensorFlow: kernels/test_core.py (with ATTN_OPS_ISA=neon, then generic), test_few_rows.py,
test_bfloat16_products.py, the tests of the compiled files, and the attention tests of the implementations core-neon,
core-neonbf16 and core-generic. What follows -- goes to pytest instead.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "aarch64"  # test_compiled_files.py looks for objects below build/
TOOLS = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user", "dpkg": "dpkg"}
SYSTEM_PACKAGES = ("python3-minimal", "libpython3-dev", "libstdc++6")
PYTHON_PACKAGES = ("ml_dtypes", "numpy", "pybind11", "pyelftools", "pytest")
FILES = ("kernels/test_core.py", "kernels/test_few_rows.py", "kernels/test_bfloat16_products.py")
FILES += ("package/test_compiled_files.py", "op/test_features.py", "op/test_shapes.py", "op/test_accuracy.py")
# There is no TensorFlow. Not "fork": QEMU 7.2 aborts where the child of a threaded process starts a thread. Not
# "a_build": that test would run this machine's cmake from there. "the_rules_see": that one needs a compiler there.
CHOICE = "(test_core or test_few_rows or test_bfloat16 or test_compiled_files or core-neon or core-generic)"
CHOICE += " and not after_a_fork and not test_a_build and not test_the_rules_see"


def run(*command, **options):
    print("+", *command, flush=True)
    return subprocess.run([str(part) for part in command], check=True, **options)


def require_tools():
    missing = sorted({package for tool, package in TOOLS.items() if not shutil.which(tool)})
    if missing and os.geteuid() != 0:
        sys.exit(f"missing: apt-get install --no-install-recommends {' '.join(missing)}")
    if missing:
        run("apt-get", "install", "--yes", "--no-install-recommends", *missing)


def make_system(system: Path, state: Path):
    """Unpacks Debian's Python for Arm. apt gets a state of its own, so this machine's packages stay what they are."""
    if (system / "complete").exists():
        return
    for directory in ("lists/partial", "archives/partial"):
        (state / directory).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::State::lists": state / "lists",
        "Dir::Cache": state,
    }
    options = [f"-o{name}={value}" for name, value in settings.items()]
    run("apt-get", *options, "update")
    run("apt-get", *options, "install", "--yes", "--download-only", "--no-install-recommends", *SYSTEM_PACKAGES)
    for package in sorted((state / "archives").glob("*.deb")):
        run("dpkg", "--extract", package, system)
    (system / "complete").touch()


def make_environment(environment: Path, system: Path) -> Path:
    """A virtual environment whose `python` runs Arm's Python in QEMU, also where a test starts sys.executable.

    The name given with -0 is what Python takes itself for, and beside it lies pyvenv.cfg.
    """
    python = environment / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    (environment / "pyvenv.cfg").write_text(f"home = {system}/usr/bin\n")
    python.write_text(f'#!/bin/sh\nexec qemu-aarch64 -0 "{python}" -L "{system}" "{system}/usr/bin/python3" "$@"\n')
    python.chmod(0o755)
    question = "import sys, sysconfig; print('%d.%d' % sys.version_info[:2], sysconfig.get_path('purelib'))"
    version, packages = run(python, "-c", question, stdout=subprocess.PIPE, text=True).stdout.split()
    if not (environment / "complete").exists():
        platforms = [f"--platform={name}_aarch64" for name in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", f"--target={packages}"]
        run(*pip, *platforms, f"--python-version={version}", "--only-binary=:all:", *PYTHON_PACKAGES)
        (environment / "complete").touch()
    return python


def install(python: Path, build: Path, system: Path):
    """Builds with the Python that will load the result, and puts the package beside that one's packages."""
    question = "import sysconfig; print(sysconfig.get_path('include'))"
    headers = run(python, "-c", question, stdout=subprocess.PIPE, text=True).stdout.strip()
    options = {
        "ATTN_OPS_CUDA": "OFF",
        "Python_INCLUDE_DIR": headers,
        "CMAKE_TOOLCHAIN_FILE": HERE / "toolchain.cmake",
        "CMAKE_CXX_FLAGS": f"-idirafter {system}/usr/include",  # Debian's Python.h includes from there
        "Python_EXECUTABLE": python,
    }
    run("cmake", f"-S{ROOT}", f"-B{build}", *(f"-D{name}={value}" for name, value in options.items()))
    run("cmake", "--build", build)
    (packages,) = python.parents[1].glob("lib/python*/site-packages")
    sources = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "attn_ops", packages / "attn_ops", dirs_exist_ok=True, ignore=sources)
    run("cmake", "--install", build, "--prefix", packages / "attn_ops")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=BUILD, help="keep what is downloaded elsewhere")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, relative to tests/")
    arguments = parser.parse_args()
    cache = arguments.cache.resolve()
    require_tools()
    make_system(cache / "system", cache / "apt")
    python = make_environment(cache / "environment", cache / "system")
    install(python, BUILD / "cmake", cache / "system")
    for isa, files in (("neon", FILES), ("generic", FILES[:1])):
        chosen = arguments.pytest or [*files, "-k", CHOICE]
        environment = dict(os.environ, ATTN_OPS_ISA=isa)
        # Not from the checkout's root, where the package of this machine lies.
        run(python, "-m", "pytest", "-p", "no:cacheprovider", *chosen, cwd=ROOT / "tests", env=environment)


if __name__ == "__main__":
    main()

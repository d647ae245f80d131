"""Builds of the CMake presets, each installed as a package of its own below build/<preset>/packages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command, **options):
    print("+", *command, flush=True)
    return subprocess.run([str(part) for part in command], check=True, **options)


def configure(preset, **variables):
    """The build folder of the preset, with these variables of CMake."""
    launcher = {"CMAKE_CXX_COMPILER_LAUNCHER": "ccache"} if shutil.which("ccache") else {}
    variables = {"Python_EXECUTABLE": sys.executable, **launcher, **variables}
    # cmake, ninja and pybind11 of the environment that runs this, which need not be the activated one.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["PATH"] = path
    run("cmake", "--preset", preset, *(f"-D{name}={value}" for name, value in variables.items()), cwd=ROOT)
    return ROOT / "build" / preset


def install(preset, jobs):
    """The folder to put on Python's path. Nothing of it lies where users' packages do."""
    build = configure(preset)
    run("cmake", "--build", build, "--parallel", jobs)
    packages = build / "packages"
    sources = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "attn_ops", packages / "attn_ops", dirs_exist_ok=True, ignore=sources)
    run("cmake", "--install", build, "--prefix", packages / "attn_ops")
    return packages

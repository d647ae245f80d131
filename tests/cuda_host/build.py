#!/usr/bin/env python3
"""Builds the stand-in for libcuda.so.1: the driver's functions, the fibres, and kernels compiled for this processor.

    library()         csrc/cuda/kernels.cu, as build/cuda_host/libcuda.so.1
    layer_library()   layer_kernels.cu, with which the layer itself is tested

Both return the path, and compile only what has changed. Any number of processes may ask at the same time.
"""

import fcntl
import hashlib
import os
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_host"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-g1"]
HEADERS = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.cuh"), *HERE.glob("*.h")]
# Of those beside, what kernels and the driver include.
HEADERS += [ROOT / "csrc/cuda" / name for name in ("args.h", "config.h", "hopper/args.h")]
KERNEL_FLAGS = [
    "-O2",
    "-ffp-contract=off",  # product() of host_layer.h must stay one
    "-fsanitize=alignment",  # a GPU takes no number from an address that is not a multiple of its size
    "-fsanitize-undefined-trap-on-error",
    "-Wno-unknown-pragmas",  # unroll
    f'-DATTN_OPS_HOST_LAYER="{HERE / "host_layer.h"}"',
    *["-x", "c++"],
]


def native_flags():
    """-march=native, and what it means here (as text): a build directory may be used by more than one machine."""
    command = [CXX, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    found = subprocess.run(command, capture_output=True, text=True)
    return (["-march=native"], found.stdout) if found.returncode == 0 else ([], CXX)


def compile_objects(directory, sources):
    """{source: flags} -> objects; all that are needed at the same time."""
    native, machine = native_flags()
    common = "".join(f"{path} {path.read_text()}" for path in sorted(HEADERS)) + machine
    objects, running = [], []
    for source, flags in sources.items():
        command = [CXX, *FLAGS, *native, *flags, "-c", str(source)]
        key = hashlib.sha256((common + source.read_text() + " ".join(command)).encode()).hexdigest()[:16]
        target = directory / f"{source.stem}-{key}.o"
        objects.append(target)
        if not target.exists():
            part = target.with_suffix(".part")
            running.append((subprocess.Popen([*command, "-o", str(part)]), part, target))
    failed = [target.stem for process, part, target in running if process.wait() or part.replace(target) is None]
    if failed:
        raise RuntimeError(f"{CXX} failed: {', '.join(failed)}")
    return objects


def build(kernels: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runtime = {HERE / name: ["-O3"] for name in ("fibres.cc", "standin_driver.cc")}
        objects = compile_objects(target.parent, {kernels: KERNEL_FLAGS, **runtime})
        made_of = target.parent / "objects"
        names = "\n".join(path.name for path in objects)
        if not target.exists() or not made_of.exists() or made_of.read_text() != names:
            part = target.with_suffix(".part")
            # Bsymbolic: two of these may be loaded at once. Soname: dlopen("libcuda.so.1") finds what is loaded.
            options = ["-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", f"-Wl,-soname,{target.name}", "-pthread"]
            subprocess.run([CXX, *options, *map(str, objects), "-o", str(part)], check=True)
            part.replace(target)
            made_of.write_text(names)
            for old in set(target.parent.glob("*.o")) - set(objects):
                old.unlink()
    return target


def library() -> Path:
    return build(ROOT / "csrc" / "cuda" / "kernels.cu", BUILD / "libcuda.so.1")


def layer_library() -> Path:
    return build(HERE / "layer_kernels.cu", BUILD / "layer" / "liblayer_kernels.so")


if __name__ == "__main__":
    print(library())

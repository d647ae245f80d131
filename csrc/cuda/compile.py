#!/usr/bin/env python3
"""Compiles the CUDA kernels for one architecture into an image that the driver loads.

    compile.py sm_90a kernels.cu -o sm_90a.image            nvcc (CUDA 12.8 or newer): a compressed fat binary
    compile.py compute_80 ...                               PTX, which the driver compiles for devices still to come
    compile.py compute_80 kernels.cu -o compute_80.ptx      as text, which may be the source of what comes of it: most
    compile.py sm_90a compute_80.ptx -o sm_90a.image        of the time goes into it (--ptx says which one it is)
    compile.py sm_90a kernels.cu -o sm_90a.image --nvrtc    NVRTC: a cubin; of CUDA 12, for drivers from 525 on
    compile.py sm_90a kernels.cu --report                   the registers of each kernel
    compile.py --native                                     the architectures that a build for this machine needs

Fails where a kernel keeps anything in local memory (spilled registers, a stack frame): that may be many times slower,
and nothing else would tell. `--spills BYTES` lets pass, and lists, kernels whose threads spill at most so much: a
release is not to wait for a few registers of a compiler that cannot be changed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

OPTIONS = ["-std=c++17"]


class CompileError(RuntimeError):
    """The compiler refused, or its code is not acceptable."""


@dataclass
class Kernel:
    """What ptxas says about one kernel."""

    name: str
    registers: int = 0
    stack: int = 0
    stores: int = 0
    loads: int = 0

    def is_in_local_memory(self) -> bool:
        return bool(self.stack or self.stores or self.loads)

    def local_memory(self) -> str:
        return f"  {self.name}: {self.stack} bytes of stack, {self.stores} bytes spilled, {self.loads} read back"

    def only_spills(self, most: int) -> bool:
        """Whether all of that is spilled registers, at most so many bytes; an array that is indexed is not."""
        return self.stores > 0 and max(self.stack, self.stores, self.loads) <= most


def kernels_in(log: str) -> list[Kernel]:
    """The kernels (and functions that were not inlined) that ptxas -v reports on, by name."""
    found: dict[str, Kernel] = {}
    kernel = None
    for line in log.splitlines():
        if name := re.search(r"Compiling entry function '(\w+)'|Function properties for (\w+)", line):
            text = name.group(1) or name.group(2)
            kernel = found.setdefault(text, Kernel(text))
        elif kernel and (
            frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        ):
            kernel.stack, kernel.stores, kernel.loads = map(int, frame.groups())
        elif kernel and (used := re.search(r"Used (\d+) registers", line)):
            kernel.registers = int(used.group(1))
    return sorted(found.values(), key=lambda kernel: kernel.name)


def check(log: str, architecture: str, spills: int = 0) -> list[Kernel]:
    """The kernels of a log.

    Raises:
        CompileError: one of them is in local memory, beyond so many bytes of ``spills``, or waits for each of its
            wgmma.
    """
    kernels = kernels_in(log)
    if architecture.startswith("sm_") and not kernels:
        raise CompileError("ptxas reported on no kernel, so nothing is known of their registers")
    in_memory = [k for k in kernels if k.is_in_local_memory()]
    problems = [k.local_memory() for k in in_memory if not k.only_spills(spills)]
    problems += [f"  {line.strip()}" for line in log.splitlines() if "wgmma" in line and "serialized" in line]
    if problems:
        raise CompileError("\n".join([f"kernels for {architecture} that would be slow:", *problems]))
    if in_memory:
        lines = [f"kernels for {architecture} that spill:", *(k.local_memory() for k in in_memory)]
        print("\n".join(lines), file=sys.stderr)
    return kernels


def report(kernels: list[Kernel]) -> str:
    width = max((len(k.name) for k in kernels), default=0)
    ordered = sorted(kernels, key=lambda k: (-k.registers, k.name))
    return "\n".join(f"{k.name:{width}} {k.registers:4d} registers" for k in ordered)


# --- nvcc -----------------------------------------------------------------------------------------------------------


def packages(relative: str) -> list[Path]:
    """`relative` in the directories that Python packages are in, where it exists. An isolated build hides the
    environment it was started from, so that is asked for by itself."""
    import sysconfig

    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    found = [path for place in dict.fromkeys(places) if place for path in Path(place).glob(relative)]
    return list(dict.fromkeys(found))


def is_usable(nvcc: Path) -> bool:
    """Whether it is new enough to know every architecture."""
    found = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+)\.(\d+)", found.stdout)
    return release is not None and tuple(map(int, release.groups())) >= (12, 8)


def find_nvcc() -> Path | None:
    """$CUDACXX, else that of the PATH, of the toolkit's usual place, or of the package nvidia-cuda-nvcc."""
    candidates = ["nvcc", "/usr/local/cuda/bin/nvcc", *packages("nvidia/cu13/bin/nvcc")]
    if named := os.environ.get("CUDACXX"):
        candidates = [named]
    found = [Path(path) for path in map(shutil.which, candidates) if path]
    return next(filter(is_usable, found), None)


def ptx_of(architecture: str, source: Path | None = None) -> str:
    """The PTX it is made from. The kernels use nothing newer than compute_80, except those in hopper/; but from
    compute_100 on nvcc has another front end, whose code is shorter by a tenth."""
    if source is not None and source.parent.name == "hopper":
        return architecture.replace("sm_", "compute_")
    return "compute_100" if int(re.sub(r"\D", "", architecture)) >= 100 else "compute_80"


# By the major version of its compute capability, what a card runs (images.cc).
CODE = {8: "sm_80", 9: "sm_90a", 10: "sm_100", 12: "sm_120"}


def native() -> list[str]:
    """What the cards here run, if there are any, and for all others Ampere's code, which most run and which takes the
    least time to compile, and PTX."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout if shutil.which(query[0]) else ""
    majors = {8, *(int(major) for major in re.findall(r"^\s*(\d+)\.\d+\s*$", found, re.MULTILINE))}
    return [*(code for major, code in CODE.items() if major in majors), "compute_80"]


def run_nvcc(nvcc: Path, source: Path, architecture: str, target: Path) -> str:
    kind = {".ptx": ["-ptx"], ".cubin": ["-cubin"]}.get(target.suffix, ["-fatbin", "--compress-mode=size"])
    command = [
        *[str(nvcc), *OPTIONS, "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v"],
        *["-gencode", f"arch={ptx_of(architecture, source)},code={architecture}", *kind, str(source), "-o", str(target)],
    ]
    found = subprocess.run(command, capture_output=True, text=True)
    log = found.stdout + found.stderr
    if found.returncode:
        raise CompileError(f"{' '.join(command)} failed:\n{log}")
    return log


# --- NVRTC ----------------------------------------------------------------------------------------------------------

# What the kernels include of the host's headers. NVRTC knows these types by itself.
STUBS = {
    "cstdint": """
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long uintptr_t;
#define INT32_MAX 2147483647
#define UINT32_MAX 4294967295u
""",
    "cstddef": "",
}


def find_nvrtc() -> Path | None:
    """The package nvidia-cuda-nvrtc-cu12, whose images need an older driver than those of the newest toolkit."""
    found = packages("nvidia/cuda_nvrtc/lib/libnvrtc.so.12")
    return found[0] if found else None


def run_nvrtc(library: Path, source: Path, architecture: str, target: Path) -> str:
    import ctypes

    nvrtc = ctypes.CDLL(str(library))
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(name, *arguments):
        code = getattr(nvrtc, name)(*arguments)
        if code:
            raise CompileError(f"{name}: {nvrtc.nvrtcGetErrorString(code).decode()}")

    def result(name):
        size = ctypes.c_size_t()
        call(f"nvrtcGet{name}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        call(f"nvrtcGet{name}", program, buffer)
        return buffer.raw

    program = ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(STUBS))(*(text.encode() for text in STUBS.values()))
    names = (ctypes.c_char_p * len(STUBS))(*(name.encode() for name in STUBS))
    created = (source.read_bytes(), str(source).encode(), len(STUBS), texts, names)
    call("nvrtcCreateProgram", ctypes.byref(program), *created)
    options = [
        *[*OPTIONS, f"--gpu-architecture={architecture}", "--device-as-default-execution-space"],
        *["--ptxas-options=-v", f"-I{source.parent}", f"-I{source.parent.parent}"],
    ]
    try:
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = nvrtc.nvrtcCompileProgram(program, len(options), array)
        log = result("ProgramLog").rstrip(b"\0").decode()
        if failed:
            raise CompileError(f"NVRTC with {' '.join(options)} failed:\n{log}")
        target.write_bytes(result("CUBIN" if architecture.startswith("sm_") else "PTX"))
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return log


# --------------------------------------------------------------------------------------------------------------------


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", nargs="?", help="sm_80, sm_90a, ..., or compute_80 for PTX")
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--nvrtc", nargs="?", const="", metavar="PATH", help="compile with NVRTC (this library)")
    parser.add_argument("--nvcc", type=Path, metavar="PATH", help="compile with this nvcc")
    parser.add_argument("--spills", type=int, default=0, metavar="BYTES", help="what a thread may spill (0)")
    parser.add_argument("--report", action="store_true", help="list the registers of each kernel")
    parser.add_argument("--ptx", action="store_true", help="print which PTX it is made from, and nothing else")
    parser.add_argument("--native", action="store_true", help="print the architectures for this machine, and nothing else")
    parser.add_argument("--find", action="store_true", help="print where the compiler is, and nothing else")
    chosen = parser.parse_args(arguments)
    if chosen.nvrtc is None:
        run, compiler = run_nvcc, chosen.nvcc or find_nvcc()
    else:
        run, compiler = run_nvrtc, Path(chosen.nvrtc) if chosen.nvrtc else find_nvrtc()
    if chosen.native:
        print(";".join(native()), end="")
        return 0
    if chosen.ptx:
        print(ptx_of(chosen.architecture), end="")
        return 0
    if chosen.find:
        print(compiler or "", end="")
        return 0
    if chosen.source is None:
        parser.error("what is to be compiled, and for which architecture?")
    try:
        if compiler is None:
            raise CompileError(f"no {'nvcc' if chosen.nvrtc is None else 'NVRTC'} was found")
        with tempfile.TemporaryDirectory(dir=chosen.output.parent if chosen.output else None) as directory:
            image = Path(directory) / (chosen.output.name if chosen.output else "image")
            log = run(compiler, chosen.source.resolve(), chosen.architecture, image)
            kernels = check(log, chosen.architecture, chosen.spills)
            if chosen.output:
                image.replace(chosen.output)
    except CompileError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 1
    if chosen.report:
        print(report(kernels))
    return 0


if __name__ == "__main__":
    sys.exit(main())

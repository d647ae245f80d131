"""The PTX of single kernels, by the compiler that makes the images of the library, kept between runs."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

from .program import Program, parse

ROOT = Path(__file__).resolve().parents[3]
CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda_host" / "ptx"
LAYER = ROOT / "tests" / "cuda_host" / "layer_kernels.cu"
HOPPER = "attn_ops_hopper_"  # kernels of csrc/cuda/hopper
FOLDERS = [ROOT / "csrc", CUDA, CUDA / "hopper"]
SOURCES = [path for suffix in ("h", "cuh", "cu") for folder in FOLDERS for path in folder.glob(f"*.{suffix}")]
SOURCES += [CUDA / "compile.py", LAYER]


@cache
def missing_reason() -> str | None:
    """Why nothing can be compiled; None when it can."""
    return None if _nvcc() else "no nvcc (12.8 or newer) was found by csrc/cuda/compile.py"


@cache
def _nvcc() -> str:
    found = subprocess.run(
        [sys.executable, str(CUDA / "compile.py"), "--find"], capture_output=True, text=True, check=True
    )
    return found.stdout


@cache
def version() -> str:
    """Of nvcc, as its own words."""
    return subprocess.run([_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout


@cache
def _sources() -> str:
    return version() + "".join(f"{path.name} {path.read_text()}" for path in sorted(SOURCES))


def instance(kernel: str) -> str:
    """The macro of kernels.cu that makes it: attn_ops_dq_bf16_64_plain is DQ_PLAIN(bf16, BF16, 64), and
    attn_ops_hopper_dq_bf16_64 DQ(bf16, BF16, 64) of hopper/."""
    if single := re.fullmatch(r"attn_ops_(delta|dsinks|dtable_sum)_f32", kernel):
        return single[1].upper()
    role, math, dim, plain = re.fullmatch(r"attn_ops_(?:hopper_)?(\w+?)_([a-z]+\d+)_(\d+)(_plain)?", kernel).groups()
    return f"{role.upper()}{(plain or '').upper()}({math}, {math.upper()}, {dim})"


def compiled(kernels: tuple[str, ...], architecture: str | None = None) -> Path:
    """These kernels alone as one file: PTX (compute_*) or code (sm_*); without an architecture, the PTX that their
    images are made from."""
    folder, default = ("hopper", "compute_90a") if kernels[0].startswith(HOPPER) else ("", "compute_80")
    architecture = architecture or default
    if kernels[0].startswith("layer_"):
        source = f'#include "{LAYER}"\n'
    else:
        wanted = " ".join(map(instance, kernels))
        source = f'#define ATTN_OPS_KERNELS {wanted}\n#include "{CUDA / folder / "kernels.cu"}"\n'
    key = hashlib.sha256((_sources() + source).encode()).hexdigest()[:16]
    suffix = "ptx" if architecture.startswith("compute") else "cubin"
    name = kernels[0] if len(kernels) == 1 else f"{len(kernels)}_kernels"
    target = BUILD / folder / f"{name}-{architecture}-{key}.{suffix}"  # compile.py looks at the folder
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(f"{name}-{architecture}-*"):
            if key not in old.name:
                old.unlink(missing_ok=True)
        # Under names of its own until it is whole: other processes and threads may want it too.
        own = target.with_stem(f"{target.stem}-{os.getpid()}-{threading.get_ident()}")
        listing = own.with_suffix(".cu")
        listing.write_text(source)
        command = [sys.executable, str(CUDA / "compile.py"), architecture, str(listing), "-o", str(own)]
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode:
            raise RuntimeError(found.stdout + found.stderr)
        os.replace(own, target)
    return target


@cache
def text(kernel: str) -> str:
    """The PTX of a kernel of kernels.cu, or of all of layer_kernels.cu."""
    return compiled(("layer_kernels" if kernel.startswith("layer_") else kernel,)).read_text()


@cache
def program(kernel: str) -> Program:
    return parse(text(kernel), kernel)

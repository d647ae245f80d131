"""Versions, what is loaded, and why not when something is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform

ENVIRONMENT = {
    "ATTN_OPS_DISABLE": "anything but 0: never use the fused op",
    "ATTN_OPS_ISA": "name of the instruction set the CPU kernels use, instead of the best one",
    "ATTN_OPS_DISABLE_XLA_FFI": "anything but 0: functions that XLA compiles get the composite",
    "ATTN_OPS_ALLOW_TF32": "anything but 0: on GPUs float32 is multiplied in TF32, as by attn_ops.set_allow_tf32(True)",
    "ATTN_OPS_DISABLE_TF_POOL": "if set: the op runs on threads of its own, not on TensorFlow's",
}


def info() -> dict:
    """Versions, what is loaded, and why not when something is missing."""
    from attn_ops import __version__, kernels

    versions = {"attn_ops": __version__, "python": platform.python_version()}
    for package, distributions in {
        "numpy": ("numpy",),
        "tensorflow": ("tensorflow", "tensorflow-cpu", "tf-nightly", "tf-nightly-cpu"),
        "keras": ("keras",),
        "jax": ("jax",),
    }.items():
        versions[package] = next((v for v in map(_version, distributions) if v), "not installed")
    core = kernels.core()
    return {
        "versions": versions,
        "cpu kernels": {
            "built and usable": core.isas(),
            "default": kernels.unknown_isa_reason() or core.default_isa(),
        }
        if core
        else kernels.core_unavailable_reason(),
        "cuda kernels": kernels.cuda_unavailable_reason() or "usable on device 0",
        "tensorflow op": kernels.unavailable_reason() or "available",
        "tensorflow xla": kernels.unavailable_reason() or kernels.xla_unavailable_reason() or "available",
        "environment": {name: os.environ.get(name, "not set") for name in ENVIRONMENT},
    }


def _version(distribution):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None

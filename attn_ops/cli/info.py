"""Versions, what is loaded, and why not when something is missing."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform

import click

from attn_ops.cli import frameworks

ENVIRONMENT = {
    "ATTN_OPS_DISABLE": "anything but 0: never use the fused op",
    "ATTN_OPS_ISA": "name of the instruction set the CPU kernels use, instead of the best one",
    "ATTN_OPS_DISABLE_XLA_FFI": "anything but 0: functions that XLA compiles get the composite",
    "ATTN_OPS_ALLOW_TF32": "anything but 0: on GPUs float32 is multiplied in TF32, as by attn_ops.set_allow_tf32(True)",
    "ATTN_OPS_ALLOW_BFLOAT16": "anything but 0: float32 and float16 are multiplied in bfloat16 where the CPU can",
    "ATTN_OPS_DISABLE_TF_POOL": "if set: the op runs on threads of its own, not on TensorFlow's",
}


@click.command("info")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(as_json):
    """Versions, kernels, and what is missing and why."""
    return show(as_json)


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
        "machine": machine(),
        "cpu kernels": {
            "built and usable": core.isas(),
            "default": kernels.unknown_isa_reason() or core.default_isa(),
        }
        if core
        else kernels.core_unavailable_reason(),
        "cuda kernels": kernels.cuda_unavailable_reason() or "usable on device 0",
        "tensorflow op": kernels.unavailable_reason() or "available",
        "tensorflow xla": kernels.unavailable_reason() or kernels.xla_unavailable_reason() or "available",
        "jax": _jax(),
        "environment": {name: os.environ.get(name, "not set") for name in ENVIRONMENT},
    }


def _jax() -> str:
    from attn_ops import requirements

    if not requirements.installed("jax"):
        return requirements.missing("attn_ops.jax", "jax")
    from attn_ops.jax import forms

    return forms.unavailable_reason() or "available"


def show(as_json: bool) -> int:
    """Prints it, as text or JSON."""
    with contextlib.suppress(frameworks.Missing):
        frameworks.tensorflow()  # here, where its notes stay out, and not where the library is loaded
    found = info()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return 0
    for section, content in found.items():
        if not isinstance(content, dict):
            click.echo(f"{section}: {content}")
            continue
        click.echo(f"{section}:")
        for name, value in content.items():
            note = f"  ({ENVIRONMENT[name]})" if name in ENVIRONMENT else ""
            click.echo(f"  {name}: {', '.join(value) if isinstance(value, list) else value}{note}")
    return 0


def machine() -> str:
    """The processor's name, which hypervisors shorten, so family and model too, and what our kernels use of it."""
    from attn_ops import kernels

    facts = {}
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/cpuinfo").read_text()
        facts = dict(tuple(map(str.strip, line.split(":", 1))) for line in text.splitlines() if ":" in line)
    name = facts.get("model name", platform.machine())
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    core = kernels.core()
    return f"{name}, {os.cpu_count()} CPUs" + (f", kernels for {core.default_isa()}" if core else "")


def _version(distribution):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None

"""The maintainers' report: part of the source repository, not of the package, and run from a checkout."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import click

EPILOG = """\b
In a checkout also, each with --help:
  --report DIR      every peer that is installed, all sections, speed targets
  --device cuda     the CUDA kernels against every peer on this GPU (needs PyTorch)"""

_SUITE = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
_ASKING = ("--report", "--device")
_MISSING = 2


def asked_for(arguments) -> bool:
    """Whether these arguments of `bench` are for the report."""
    return any(argument.partition("=")[0] in _ASKING for argument in arguments)


def report(arguments) -> int:
    """Runs the report with these arguments, and returns its exit status."""
    if not _SUITE.is_dir():
        click.echo(
            f"the report is part of the source repository, not of the package: there is no {_SUITE}; run this from a "
            "checkout with an editable install",
            err=True,
        )
        return _MISSING
    device, rest = _split(arguments)
    # A process of its own: the modules of the suite have names that are only theirs to use.
    path = os.pathsep.join(filter(None, (str(_SUITE), str(_SUITE.parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "gpu" if device == "cuda" else "report", *rest]
    return subprocess.call(command, env={**os.environ, "PYTHONPATH": path})


def _split(arguments):
    """The value of --device, and the other arguments."""
    for argument, after in zip(arguments, (*arguments[1:], None)):
        if argument == "--report=" or (argument, after) == ("--report", ""):
            raise click.UsageError("--report must name a directory, got ''")
    device, rest, given = "cpu", [], iter(arguments)
    for argument in given:
        name, _, value = argument.partition("=")
        if name == "--device":
            device = value or next(given, "")
        else:
            rest.append(argument)
    if device not in ("cpu", "cuda"):
        raise click.UsageError(f"--device must be cpu or cuda, got {device!r}")
    return device, rest

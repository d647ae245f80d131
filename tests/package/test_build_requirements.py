"""What a build needs: no TensorFlow, since third_party has the headers, all of them and no others."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "third_party" / "tensorflow" / "include"
INCLUDE = re.compile(r'^ *# *include ["<](?P<path>[\w/.]+\.h)[">]', re.MULTILINE)


def carried():
    return {path.relative_to(HEADERS).as_posix() for path in HEADERS.rglob("*") if path.is_file()}


def needed():
    """Of TensorFlow, by the includes of our sources and of what they include."""
    found, sources = set(), [*ROOT.glob("csrc/bindings/*.h"), *ROOT.glob("csrc/bindings/*.cc")]
    for source in sources:  # which grows
        for path in INCLUDE.findall(source.read_text()):
            if path.partition("/")[0] in ("tensorflow", "tsl", "xla") and path not in found:
                found.add(path)
                sources.append(HEADERS / path)
    return found


def test_headers_are_those_that_are_included():
    assert needed() == carried() and len(carried()) == 18


def test_headers_come_with_their_licence():
    assert "Apache License" in (HEADERS.parent / "LICENSE").read_text()
    assert all("Licensed under the Apache License, Version 2.0" in (HEADERS / path).read_text() for path in carried())


def test_a_build_requires_no_framework():
    tomllib = pytest.importorskip("tomllib")
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {re.split(r"[=<>]", text)[0] for text in requires} == {"setuptools", "cmake", "ninja", "pybind11"}

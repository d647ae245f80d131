"""What type checkers learn of the package: its stubs are current, mypy and pyright, where they are installed, take what programs
do and refuse what Python does, and stubtest finds in the stubs what there is."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import attn_ops
import pytest

import package.stub

PACKAGE = Path(attn_ops.__file__).parent
USE = Path(__file__).with_name("typed_use.py")
WRONG = {number for number, line in enumerate(USE.read_text().splitlines(), 1) if line.endswith("# wrong")}
# Of an installed package nothing is checked but what it says of itself, and Keras says nothing.
MYPY = """
[mypy]
strict = True
follow_imports = silent
[mypy-attn_ops.*]
ignore_errors = True
[mypy-jax.*,keras.*,ml_dtypes.*,tensorflow.*]
follow_imports = skip
ignore_missing_imports = True
"""


@pytest.mark.parametrize("module", package.stub.MODULES)
def test_the_stub_is_current(module):
    assert package.stub.path(module).read_text() == package.stub.stub(module), "python tests/package/stub.py"
    assert (PACKAGE / "py.typed").exists()


def run(tmp_path, *command):
    (tmp_path / "mypy.ini").write_text(MYPY)
    paths = {"MYPYPATH": str(PACKAGE.parent), "MYPY_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", *map(str, command)]
    return subprocess.run(command, cwd=tmp_path, env={**os.environ, **paths}, capture_output=True, text=True)


def test_mypy(tmp_path):
    pytest.importorskip("mypy")
    done = run(tmp_path, "mypy", "--config-file", "mypy.ini", USE)
    assert {int(n) for n in re.findall(r"typed_use.py:(\d+): error", done.stdout)} == WRONG, done.stdout + done.stderr
    assert len(re.findall(": error", done.stdout)) == len(WRONG), done.stdout


def test_pyright(tmp_path):
    pytest.importorskip("pyright")
    (tmp_path / "use.py").write_text(USE.read_text())
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"include": ["use.py"], "extraPaths": [str(PACKAGE.parent)]}))
    done = run(tmp_path, "pyright", "--outputjson", "--pythonpath", sys.executable, "--project", tmp_path)
    found = [x for x in json.loads(done.stdout)["generalDiagnostics"] if x["severity"] == "error"]
    assert {x["range"]["start"]["line"] + 1 for x in found} == WRONG, found


def test_stubtest(tmp_path, pytestconfig):
    """It looks at all modules: what it finds in those without a stub is no promise."""
    pytest.importorskip("mypy")
    if not pytestconfig.getoption("whole"):
        pytest.skip("half a minute, for what the stubs are made of: --whole")
    done = run(tmp_path, "mypy.stubtest", "attn_ops", "--mypy-config-file", "mypy.ini", "--concise")
    modules = map(importlib.import_module, map(package.stub.full, package.stub.MODULES))
    names = [f"{module.__name__}.{name}" for module in modules for name in ("__all__", *module.__all__)]
    of_stubs = re.compile(rf"(?:{'|'.join(map(re.escape, names))})(?:\.\w+)? ")
    # "top_left" is of a class of its own, which tells whether it was said; methods that layers share with Keras's are Keras's.
    ours = re.compile(r"default value of '(top_left|bottom_right)'|(layers\.\w+\.\w+|\.__\w+__) is not present in stub")
    found = [line for line in done.stdout.splitlines() if of_stubs.match(line) and not ours.search(line)]
    assert "attn_ops.scaled_dot_product_attention is" in done.stdout and found == [], done.stderr[-2000:]

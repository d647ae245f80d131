"""The documentation builds without a warning, where Sphinx is installed: `pip install ".[docs]"`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("sphinx")
pytest.importorskip("myst_parser")
pytest.importorskip("furo")


def test_it_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "doctrees")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    built = tmp_path / "html"
    done = subprocess.run([*command, "docs", str(built)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = (built / "llms.txt").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        if not name.startswith(("_build", "figures/")):
            text = (built / name).read_text()
            assert f"({name})" in listed and "{literalinclude}" not in text and "{include}" not in text, name
    assert "scaled_dot_product_attention(query, key, value, *, bias=None" in (built / "reference" / "op.md").read_text()

"""What type checkers learn of the package: its stub is current, and where mypy is installed, refuses what Python does."""

import subprocess
import sys
from pathlib import Path

import attn_ops
import pytest

import package.stub

PACKAGE = Path(attn_ops.__file__).parent
USE = """
import attn_ops
from attn_ops import masks

def right(q: object) -> None:
    out, lse = attn_ops.scaled_dot_product_attention(q, q, q, is_causal=True, mask=masks.causal(), return_lse=True)
    support: attn_ops.Support = attn_ops.can_use_fused(q, q, q)
    cache = attn_ops.KVCache.create(1, 8, 2, 4)
    attn_ops.decode_attention(q, cache, q, q, rotary=True)
    attn_ops.convert(q)
    attn_ops.layers.MultiHeadAttention(2, 4)

def wrong(q: object) -> None:
    attn_ops.scaled_dot_product_attention(q, q, q, dropout_p=0.1)  # Unexpected keyword argument "dropout_p"
    attn_ops.scaled_dot_product_attention(q, q, q, dropout_rate="a")  # expected "float"
    attn_ops.flash(q, q, q)  # has no attribute "flash"
"""
OTHERS = "[mypy-jax.*,keras.*,ml_dtypes.*,numpy.*,tensorflow.*]\nfollow_imports = skip\nignore_missing_imports = True\n"


def test_the_stub_is_current():
    written = (PACKAGE / "__init__.pyi").read_text()
    assert written == package.stub.stub(), "python tests/package/stub.py > attn_ops/__init__.pyi"
    assert (PACKAGE / "py.typed").exists()


def test_mypy(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text(USE)
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nfollow_imports = silent\n{OTHERS}")
    environment = {"MYPYPATH": str(PACKAGE.parent), "PATH": "", "MYPY_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "mypy", "use.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    expected = {number: line.split("# ")[1] for number, line in enumerate(USE.splitlines(), 1) if "# " in line}
    errors = dict(line.split(": error: ") for line in done.stdout.splitlines() if ": error: " in line)
    assert set(errors) == {f"use.py:{number}" for number in expected}, done.stdout + done.stderr
    for number, said in expected.items():
        assert said in errors[f"use.py:{number}"]

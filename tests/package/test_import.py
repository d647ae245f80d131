"""What `import attn_ops` loads and shows, with and without frameworks, and what it says about what is missing."""

import importlib
import re
from pathlib import Path

import pytest

import attn_ops
from children import WITHOUT_TENSORFLOW, run


def test_import_without_tensorflow():
    code = """
import numpy as np
assert "scaled_dot_product_attention" in dir(attn_ops)
x = np.ones((1, 2, 3, 4), np.float32)
assert attn_ops.reference.attention(x, x, x)[0].shape == x.shape
assert attn_ops.masks.causal().materialize(2, 2).shape == (1, 1, 2, 2)
from attn_ops import _core
assert _core.forward(x, x, x)[0].shape == x.shape
for name in ("scaled_dot_product_attention", "attention_weights", "explain", "can_use_fused", "layers", "patch"):
    try:
        getattr(attn_ops, name)
    except ImportError as error:
        assert f"attn_ops.{name} needs TensorFlow" in str(error) and "pip install tensorflow keras" in str(error)
    else:
        raise SystemExit(f"{name} came without TensorFlow")
assert "tensorflow" not in sys.modules
"""
    result = run(WITHOUT_TENSORFLOW + code)
    assert result.returncode == 0, result.stderr


def test_import_does_not_load_tensorflow():
    result = run("import attn_ops, sys; assert attn_ops.__version__ and 'tensorflow' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_dir_is_what_is_public():
    assert dir(attn_ops) == sorted(attn_ops.__all__)


def test_the_kernels_for_numpy_are_an_attribute():
    result = run("import attn_ops; print(attn_ops._core.isas())")
    assert result.returncode == 0 and "generic" in result.stdout, result.stderr
    without = "import sys, attn_ops; sys.modules['attn_ops._core'] = None; attn_ops._core"
    result = run(without)
    assert "ImportError: attn_ops._core cannot be imported" in result.stderr
    assert "in a checkout, pip install ." in result.stderr


def test_messages_name_commands_that_work():
    """This package is in no index: what to install is a framework, or a checkout."""
    package = Path(attn_ops.__file__).parent
    named = [
        (path.name, command)
        for path in package.rglob("*.py")
        for command in re.findall(r"pip install ([^\n`;]*)", path.read_text())
    ]
    assert named
    assert not [(name, command) for name, command in named if "attn_ops" in command or "attn-ops" in command]


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'flash'"):
        attn_ops.flash  # noqa: B018


@pytest.mark.parametrize("name", attn_ops.__all__)
def test_public_names_load(name):
    assert getattr(attn_ops, name) is not None
    assert name in dir(attn_ops)


@pytest.mark.parametrize("package", ["jax", "jax.parallel", "layers", "models", "models.adapters", "visualize"])
def test_names_that_load_on_first_use(package):
    """No module of the package has one of its names: imported, it would take the place of what the name stands for."""
    of = importlib.import_module(f"attn_ops.{package}")
    modules = {path.stem for path in Path(of.__file__).parent.iterdir() if path.suffix in ("", ".py")}
    assert dir(of) == sorted(of.__all__) == sorted(of._HOMES)
    assert all(of._HOMES[name] == f".{name}" for name in of.__all__ if name in modules)
    assert all(getattr(of, name) is not None for name in of.__all__)
    with pytest.raises(AttributeError, match=rf"^module 'attn_ops\.{package}' has no attribute 'flash'$"):
        of.flash  # noqa: B018

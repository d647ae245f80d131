"""Fused attention for TensorFlow, Keras and JAX.

The names below load on first use, so that ``import attn_ops`` is quick and works without TensorFlow: ``masks``,
``reference`` (NumPy) and ``_core`` (the kernels on NumPy arrays) never need it, ``jax`` needs JAX instead, and
``layers`` whatever the backend of Keras is. A name whose framework is missing raises an ImportError that says what to
install.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_MODULES = ("integration", "jax", "layers", "masks", "reference", "visualize")
_ATTRIBUTES = {
    "scaled_dot_product_attention": "functional",
    "attention_weights": "functional",
    "explain": "support",
    "can_use_fused": "support",
    "Explanation": "support",
    "Support": "support",
    "allow_tf32": "precision",
    "set_allow_tf32": "precision",
    "patch": "integration",
    "unpatch": "integration",
    "patched": "integration",
    "convert": "integration",
    "revert": "integration",
    "export": "saved_models",
    "load_library": "saved_models",
}

__all__ = ["__version__", *_MODULES, *_ATTRIBUTES]


def _load(module: str, wanted: str):
    try:
        return importlib.import_module(f"{__name__}.{module}")
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing in ("tensorflow", "keras"):
            raise ImportError(
                f"attn_ops.{wanted} needs TensorFlow 2.16 or newer, and {missing} is not installed: "
                'pip install "attn_ops[tf]"'
            ) from error
        if missing in ("jax", "jaxlib"):
            raise ImportError(
                f'attn_ops.{wanted} needs JAX 0.5 or newer, and {missing} is not installed: pip install "attn_ops[jax]"'
            ) from error
        framework = missing.partition(".")[0]
        if framework in ("tensorflow", "keras", "jax", "jaxlib"):
            raise ImportError(
                f"attn_ops.{wanted} needs the module {missing}, which the installed {framework} lacks: it is incomplete, "
                "or of a version that attn_ops does not know"
            ) from error
        raise


def __getattr__(name: str):
    if name in _MODULES:
        return _load(name, name)
    if name in _ATTRIBUTES:
        value = globals()[name] = getattr(_load(_ATTRIBUTES[name], name), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})

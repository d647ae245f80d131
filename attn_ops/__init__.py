"""Fused attention for TensorFlow, Keras and JAX.

The names below load on first use, so that ``import attn_ops`` is quick and works without TensorFlow: ``masks``,
``reference`` (NumPy) and ``_core`` (the kernels on NumPy arrays) never need it, ``jax`` needs JAX instead, and
``layers`` whatever the backend of Keras is. A name whose framework is missing raises an ImportError that says what to
install.
"""

from __future__ import annotations

import importlib

from attn_ops.models import registration as _registration

__version__ = "0.1.0"

_MODULES = ("integration", "jax", "layers", "masks", "models", "reference", "visualize")
_ATTRIBUTES = {
    "scaled_dot_product_attention": "tensorflow.attention",
    "attention_weights": "tensorflow.attention",
    "varlen_attention": "tensorflow.varlen",
    "ragged_attention": "tensorflow.varlen",
    "merge_attention": "tensorflow.merge",
    "rotary_embedding": "tensorflow.rotary",
    "KVCache": "generation.cache",
    "decode_attention": "tensorflow.decode",
    "PagedKVCache": "generation.page_pool",
    "paged_attention": "tensorflow.paged",
    "alibi_slopes": "call.position_bias",
    "T5RelativeBias": "call.position_bias",
    "explain": "tensorflow.explanation",
    "can_use_fused": "tensorflow.explanation",
    "Explanation": "call.explanation",
    "Support": "call.explanation",
    "allow_tf32": "call.precision",
    "set_allow_tf32": "call.precision",
    "patch": "models.patched",
    "unpatch": "models.patched",
    "patched": "models.patched",
    "convert": "models.convert",
    "revert": "models.convert",
    "export": "tensorflow.export",
    "all_gather_kv": "tensorflow.parallel",
    "load_library": "tensorflow.load",
}

_ON_JAX = (  # those of the names that `jax` has too
    "attention_weights",
    "decode_attention",
    "explain",
    "merge_attention",
    "paged_attention",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "varlen_attention",
)

__all__ = ["__version__", *_MODULES, *_ATTRIBUTES]


def _load(module: str, wanted: str):
    try:
        return importlib.import_module(f"{__name__}.{module}")
    except ModuleNotFoundError as error:
        from attn_ops import requirements

        package = error.name or ""
        if (wanted, module, package) == ("explain", "tensorflow.explanation", "tensorflow") and requirements.installed("jax"):
            return _load("jax.explanation", wanted)  # of calls on JAX, and of models of a Keras on JAX
        reason = requirements.reason(f"attn_ops.{wanted}", error)
        if reason is None:
            raise
        on_jax = f"; on JAX it is attn_ops.jax.{wanted}" if package == "tensorflow" and wanted in _ON_JAX else ""
        raise ImportError(reason + on_jax) from error


def __getattr__(name: str):
    if name in _MODULES:
        return _load(name, name)
    if name in _ATTRIBUTES:
        value = globals()[name] = getattr(_load(_ATTRIBUTES[name], name), name)
        return value
    if name == "_core":
        from attn_ops import kernels

        core = kernels.core()
        if core is None:
            raise ImportError(kernels.core_unavailable_reason())
        return core
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)


_registration.register()

"""The function behind `keras.ops.dot_product_attention` replaced, so that the stock layers that call it run ours."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import threading

import keras
import tensorflow as tf

import attn_ops
from attn_ops.layers.axes import dims
from attn_ops.layers.empty_rows import empty_rows, with_means
from attn_ops.masks.mask import combined

_HOOK = "keras.src.backend.tensorflow.nn"
_NAME = "dot_product_attention"
# What the replacement understands. Newer arguments of Keras would be dropped silently: then it does not patch.
_KNOWN = (
    "query",
    "key",
    "value",
    "bias",
    "mask",
    "scale",
    "is_causal",
    "flash_attention",
    "attn_logits_soft_cap",
)
# Masked scores are -2.4e38 in Keras. A bias below this may leave a visible one behind them.
_BELOW_MASKED = -1e38
_lock = threading.Lock()


def patch():
    """Replaces the function behind `keras.ops.dot_product_attention` (Keras's TensorFlow backend), in this process.

    Stock `MultiHeadAttention` and `GroupQueryAttention` without dropout, KerasHub's `CachedMultiHeadAttention` and
    direct calls reach it, in the functions that are traced or run eagerly while it is in place. A call runs fused where
    the fused op can, otherwise in the composite; `flash_attention=True` runs fused or raises ValueError with the
    reasons. Keras's own function still serves `flash_attention=False`, a soft cap, and everything that
    :func:`attn_ops.scaled_dot_product_attention` does not take. Queries that see no key give the mean of all values, as
    there: a stock model may read them as keys later. Beside a mask, a bias with values below `-1e38` (`finfo.min`,
    `-inf`) is left to Keras as well, when it runs: there such a key counts less than a masked one. Patching twice is
    patching once.

    Raises:
        RuntimeError: This Keras has no such function, calls it in another way, or does not use TensorFlow; the message
            says what was found. :func:`attn_ops.convert` does not depend on it.
    """
    with _lock:
        if not _is_patched():
            module = _hook()
            setattr(module, _NAME, _replacement(getattr(module, _NAME)))


def unpatch():
    """Undoes :func:`patch`; nothing where it is not in place.

    Functions traced meanwhile keep what they were traced with. A function that somebody else put in place after
    :func:`patch` stays.
    """
    with _lock:
        if _is_patched():
            module = sys.modules[_HOOK]
            setattr(module, _NAME, getattr(module, _NAME).original)


@contextlib.contextmanager
def patched():
    """:func:`patch` for the duration of a `with` block; leaves alone a patch that was in place before."""
    before = _is_patched()
    patch()
    try:
        yield
    finally:
        if not before:
            unpatch()


def _hook():
    """The module whose function :func:`patch` replaces, or RuntimeError."""
    found = f"keras {keras.__version__} on {keras.config.backend()}"
    try:
        module = importlib.import_module(_HOOK)
        parameters = tuple(inspect.signature(getattr(module, _NAME)).parameters)
        used = importlib.import_module("keras.src.ops.nn").backend.nn
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise RuntimeError(f"attn_ops.patch: cannot replace {_HOOK}.{_NAME} ({found}): {error}") from error
    if used is not module:
        raise RuntimeError(f"attn_ops.patch: keras.ops does not use {_HOOK} ({found})")
    if parameters != _KNOWN[: len(parameters)]:
        raise RuntimeError(
            f"attn_ops.patch: {_HOOK}.{_NAME} takes {parameters}, of which only {_KNOWN} are understood ({found})"
        )
    return module


def _is_patched():
    function = getattr(sys.modules.get(_HOOK), _NAME, None)
    return getattr(function, "__module__", None) == __name__


def _replacement(original):
    def dot_product_attention(
        query,
        key,
        value,
        bias=None,
        mask=None,
        scale=None,
        is_causal=False,
        flash_attention=None,
        attn_logits_soft_cap=None,
    ):
        query, key, value = (tf.convert_to_tensor(x) for x in (query, key, value))
        soft_cap = {} if attn_logits_soft_cap is None else {"attn_logits_soft_cap": attn_logits_soft_cap}
        if flash_attention is False or soft_cap or not _is_taken(query, key, value, bias, mask):
            return original(query, key, value, bias, mask, scale, is_causal, flash_attention, **soft_cap)
        bias, mask = _rank_4(bias), _rank_4(mask)

        def here():
            out = attn_ops.scaled_dot_product_attention(
                query,
                key,
                value,
                bias=bias,
                mask=mask,
                scale=scale,
                is_causal=is_causal,
                causal_alignment="top_left",  # said, so that nobody is warned of it: Keras's answer is wanted
                implementation="fused" if flash_attention else None,
            )
            if mask is None or value.shape[1] == 0:
                return out
            visible = combined(mask, is_causal=is_causal)
            return with_means(out, value, empty_rows(visible, dims(query)[1], dims(key)[1]))

        if bias is None or (mask is None and not is_causal) or flash_attention:
            return here()

        def in_keras():
            return original(query, key, value, bias, mask, scale, is_causal, flash_attention)

        return tf.cond(tf.reduce_min(tf.cast(bias, tf.float32)) < _BELOW_MASKED, in_keras, here)

    dot_product_attention.original = original
    return dot_product_attention


def _is_taken(query, key, value, bias, mask):
    """Whether scaled_dot_product_attention means the same by these arguments; the rest is left to Keras, errors too."""
    if any(x.shape.rank != 4 or not x.dtype.is_floating for x in (query, key, value)):
        return False
    if mask is not None and (tf.as_dtype(mask.dtype) != tf.bool or not 1 < len(mask.shape) <= 4):
        return False
    return bias is None or 1 < len(bias.shape) <= 4


def _rank_4(x):
    """A mask or bias of Keras's, which broadcasts from the right like arrays, with all four axes."""
    if x is None:
        return None
    x = tf.convert_to_tensor(x)
    return x[(None,) * (4 - len(x.shape))]

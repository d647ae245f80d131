"""Models for serving: which operations an export holds, and what their loaders need.

The default is the composite, which loads anywhere; `place.exporting` recognises the trace.
"""

from __future__ import annotations

import contextvars
import functools
import sys
import warnings

import tensorflow as tf

from attn_ops import kernels
from attn_ops.tensorflow import place

_OPS = ("composite", "fused")
_wanted = contextvars.ContextVar("attn_ops.export.wanted", default=None)
_HINT = "attn_ops_library_is_missing__import_attn_ops_and_call_attn_ops_load_library__or_tf_load_library"


def export(model, path, *, ops="composite", **kwargs):
    """`model.export(path, **kwargs)` with the attention of your choice; also `tf.saved_model.save`.

    Args:
        model: A Keras model; or another `tf.Module`, such as one with the step of a decoder, which is saved by
            `tf.saved_model.save`. Functions of it that were traced before have chosen already.
        path: Where to.
        ops: "composite", which `model.export` gives too: TensorFlow's own operations, which load everywhere; or
            "fused": the op of this library, wherever it can run here. To load that, a Python process calls
            `attn_ops.load_library` first, any other TF_LoadLibrary with the library's path.
        **kwargs: Of `model.export`: ``format``, ``input_signature``, ``verbose``; or of `tf.saved_model.save`:
            ``signatures``, ``options``.

    Raises:
        TypeError: ``model`` is neither a Keras model nor a `tf.Module`.
        ValueError: another ``ops``; "fused" in a format other than TensorFlow's, or without the library (says why);
            a forced choice in the model (``flash_attention=True``, ``implementation="fused"``) that ``ops`` forbids;
            `model.export` and `tf.saved_model.save` keep such a choice.
    """
    keras = sys.modules.get("keras")  # without it there can be no model
    if keras is not None and isinstance(model, keras.Model):
        save = model.export
    elif isinstance(model, tf.Module):
        save = functools.partial(tf.saved_model.save, model)
    else:
        raise TypeError(f"attn_ops.export: model must be a Keras model or a tf.Module, got {type(model).__name__}")
    if ops not in _OPS:
        raise ValueError(f"attn_ops.export: ops must be one of {', '.join(map(repr, _OPS))}, got {ops!r}")
    if ops == "fused":
        wanted_format = kwargs.get("format", "tf_saved_model")
        if wanted_format != "tf_saved_model":
            raise ValueError(
                "attn_ops.export: ops='fused' is for format 'tf_saved_model', the only one that can hold the op, "
                f"got format {wanted_format!r}"
            )
        missing = kernels.unavailable_reason()
        if missing is not None:
            raise ValueError(f"attn_ops.export: ops='fused' needs the library, and {missing}")
    token = _wanted.set(ops)
    try:
        save(path, **kwargs)
    finally:
        _wanted.reset(token)


def reasons_against_fused(forced: bool) -> list[str]:
    """Why the export that is being traced, if one is, is not to hold the fused op.

    A ``forced`` choice stands, unless `export` was told otherwise, or the format has no place for it.
    """
    wanted = _wanted.get()
    if wanted == "fused" or not place.exporting():
        return []
    if place.converting():
        reason = "the call is traced for a format other than TensorFlow's, which has no operators of this library"
        if forced and place.forgets_errors():
            warnings.warn(f"attn_ops: implementation 'fused' cannot run: {reason}", stacklevel=2)
        return [reason]
    if forced and wanted is None:
        return []
    return [
        "the call is traced for an export, which is to load without this library: "
        'attn_ops.export(model, path, ops="fused") keeps the op'
    ]


def leave_hint() -> None:
    """Where an export is traced, puts the operator into the graph whose name tells what the loader needs.

    Called before a fused op is made: an unknown operator's name is all that TensorFlow's loaders print.
    """
    if place.exporting():
        getattr(kernels.library(), _HINT)()

"""Whole Keras models: the attention as one of their operations, their files, and the conversion of existing ones.

:func:`attn_ops.convert`, :func:`attn_ops.revert`, :func:`attn_ops.patched` and `attn_ops.explain(model)` are the doors.
:func:`register` makes them know a class of attention of your own; :func:`from_tf_keras` and
:func:`from_tensorflow_addons` make layers of old ones.
"""

from __future__ import annotations

import importlib

from attn_ops.models.seams import register

__all__ = ["from_tensorflow_addons", "from_tf_keras", "register"]


def __getattr__(name):
    if name in ("from_tensorflow_addons", "from_tf_keras"):  # which import Keras
        return getattr(importlib.import_module("attn_ops.models.legacy"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

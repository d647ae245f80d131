"""Whole Keras models: the attention as one of their operations, their files, and the conversion of existing ones.

:func:`attn_ops.convert`, :func:`attn_ops.revert`, :func:`attn_ops.patched` and `attn_ops.explain(model)` are the doors.
:func:`register` makes them know a class of attention of your own; :func:`from_tf_keras` and
:func:`from_tensorflow_addons` make layers of old ones.
"""

from __future__ import annotations

from attn_ops import lazy

_HOMES = {
    "from_tensorflow_addons": ".legacy",
    "from_tf_keras": ".legacy",
    "register": ".seams",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = lazy.attach(__name__, _HOMES)

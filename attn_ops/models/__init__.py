"""Whole Keras models: the attention as one of their operations, their files, and the conversion of existing ones.

:func:`attn_ops.convert`, :func:`attn_ops.revert`, :func:`attn_ops.patched` and `attn_ops.explain(model)` are the doors;
:func:`register` makes them know a class of attention of your own.
"""

from attn_ops.models.seams import register

__all__ = ["register"]

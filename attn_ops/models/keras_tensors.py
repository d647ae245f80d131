"""Whether a call is about tensors of a Keras model that is being made."""

from __future__ import annotations

import sys

from attn_ops.call.position_bias import T5RelativeBias


def any_among(*arguments) -> bool:
    """Whether one of the ``arguments``, or of those in a list or table among them, stands for a tensor of a Keras model."""
    keras = sys.modules.get("keras")  # without it there can be none
    if keras is None:
        return False
    kind = getattr(keras, "KerasTensor", ())
    for x in arguments:
        if isinstance(x, T5RelativeBias):
            x = x.table
        if isinstance(x, kind) or (isinstance(x, (list, tuple)) and any(isinstance(y, kind) for y in x)):
            return True
    return False

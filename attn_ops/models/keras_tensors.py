"""Whether a call is about tensors of a Keras model that is being made."""

from __future__ import annotations

import sys


def any_among(*arguments) -> bool:
    """Whether one of the ``arguments``, or of those in a dictionary or a list among them, is a KerasTensor."""
    keras = sys.modules.get("keras")  # without it there can be none
    return keras is not None and _any(arguments, getattr(keras, "KerasTensor", ()))


def _any(values, kind):
    for x in values:
        if isinstance(x, kind):
            return True
        if isinstance(x, dict):
            x = x.values()
        elif not isinstance(x, (list, tuple)):
            continue
        if _any(x, kind):
            return True
    return False

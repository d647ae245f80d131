"""Whether a call is about tensors of a Keras model that is being made."""

from __future__ import annotations

import importlib
import sys

from attn_ops.call.position_bias import T5RelativeBias


def any_among(*arguments) -> bool:
    """Whether one of the ``arguments``, or of those in a list or table among them, stands for a tensor of a Keras model."""
    kind = getattr(sys.modules.get("keras"), "KerasTensor", ())  # without the package there can be none
    return any(isinstance(x, kind) for x in _leaves(arguments))


def operations(*arguments):
    """The module with the attention functions on KerasTensors of the Keras, 3 or 2, that has some among the ``arguments``, or
    None."""
    if any_among(*arguments):
        return importlib.import_module("attn_ops.models.operation")
    return of_keras_2(*arguments)


def of_keras_2(*arguments):
    """The module with functions on KerasTensors of Keras 2 that has some among the ``arguments``, or None."""
    any_of_it = "tf_keras" in sys.modules and any(map(is_of_keras_2, _leaves(arguments)))
    return importlib.import_module("attn_ops.models.keras_2") if any_of_it else None


def storage(x) -> str:
    """"dense", "sparse" or "ragged", of a KerasTensor. (Keras 2 has other classes for the last two, older Keras 3 no ragged ones.)"""
    return next((kind for kind in ("sparse", "ragged") if getattr(x, kind, False)), "dense")


def is_of_keras_2(x):
    return type(x).__name__.endswith("KerasTensor") and type(x).__module__.startswith("tf_keras.")


def _leaves(arguments):
    for x in arguments:
        x = x.table if isinstance(x, T5RelativeBias) else x
        yield from x if isinstance(x, (list, tuple)) else (x,)

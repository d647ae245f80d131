"""The attention layers of a model, and which seams they have."""

from __future__ import annotations

import typing

import keras

from attn_ops.layers.base import FlashAttention
from attn_ops.models import seams
from attn_ops.models.adapters import table

_STOCK = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention, keras.layers.Attention)


class State(typing.NamedTuple):
    """What is known about a layer that has to do with attention.

    Attributes:
        attends: whether it is an attention itself, and does not only make masks for one.
        seams: the seams of its class.
        reason: why nothing of ours can stand in for it, or None.
    """

    attends: bool
    seams: tuple = ()
    reason: str | None = None


def layers(model) -> list:
    """The model and all layers in it, each once."""
    return list(model._flatten_layers())


def state(layer) -> State | None:
    """What is known about this layer, None where it has nothing to do with attention."""
    kind = type(layer)
    if isinstance(layer, FlashAttention) or kind in _STOCK:
        return State(True)
    of_class = seams_of(kind)
    if of_class:
        reason = next(filter(None, (seam.reason_against(kind) for seam in of_class)), None)
        return State(any(seam.attends for seam in of_class), of_class, reason)
    if isinstance(layer, _STOCK):
        return State(True, (), f"a subclass of {_stock_base(kind).__name__}")
    if "Attention" in kind.__name__ and not any(state(inner) for inner in layer._flatten_layers(include_self=False)):
        return State(True, (), f"attn_ops does not know {kind.__name__}: attn_ops.models.register")
    return None


def seams_of(kind) -> tuple:
    """The seams of a class of layers: those of the first class it is derived from that has some."""
    for cls in kind.__mro__:
        own = seams.registered.get(cls, ())
        known = table.BY_CLASS.get((cls.__module__, cls.__qualname__), ())
        taken = {seam.method for seam in own}
        of_class = (*own, *(seam for seam in known if seam.method not in taken))
        if of_class:
            return of_class
    return ()


def _stock_base(kind):
    return next(cls for cls in kind.__mro__ if cls in _STOCK)

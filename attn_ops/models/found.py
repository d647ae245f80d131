"""The attention layers of a model, and which seams they have."""

from __future__ import annotations

import typing

import keras

from attn_ops.layers.base import FlashAttention, replaced_in
from attn_ops.models import seams
from attn_ops.models.adapters import BY_CLASS

# Keras's, and KerasHub's for text generation.
_TRACED = ("train_function", "test_function", "predict_function", "generate_function")
# What stands for a step of the computation in some layer of STOCK.
_STEPS = (
    "_compute_attention",
    "_compute_attention_mask",
    "_compute_causal_mask",
    "_compute_sliding_window_mask",
    "_masked_softmax",
    "_calculate_scores",
    "_calculate_score_mask",
    "_apply_scores",
)
STOCK = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention, keras.layers.Attention)


class State(typing.NamedTuple):
    """What is known about a layer that has to do with attention.

    Attributes:
        attends: whether it is an attention itself, and does not only make masks for one.
        seams: the seams of its class that fit.
        reason: why nothing of ours can stand in for it, or None.
    """

    attends: bool
    seams: tuple = ()
    reason: str | None = None


def layers(name, model) -> list:
    """The model and all layers in it, each once; TypeError in the name of ``attn_ops.name`` where it is none."""
    if not isinstance(model, keras.layers.Layer):
        of_keras_2 = any(cls.__module__.partition(".")[0] == "tf_keras" for cls in type(model).__mro__)
        hint = " of Keras 2, of which attn_ops.models.from_tf_keras takes single layers" if of_keras_2 else ""
        raise TypeError(f"attn_ops.{name}: model must be a Keras layer or model, got {type(model).__name__}{hint}")
    return list(model._flatten_layers())


def paths(model) -> dict:
    """The names on the way to each layer, by its identity: "encoder/attention"."""
    by_identity = {}

    def visit(layer, prefix):
        if id(layer) in by_identity:
            return
        path = by_identity[id(layer)] = f"{prefix}/{layer.name}" if prefix else layer.name
        for inner in layer._layers:
            visit(inner, path)

    for layer in model._layers:
        visit(layer, "")
    by_identity.setdefault(id(model), model.name)
    return by_identity


def drop_traced_functions(layers):
    """Has the models among these layers trace again what they have traced."""
    for model in (layer for layer in layers if isinstance(layer, keras.Model)):
        for name in _TRACED:
            if getattr(model, name, None) is not None:
                setattr(model, name, None)


def state(layer) -> State | None:
    """What is known about this layer, None where it has nothing to do with attention."""
    kind = type(layer)
    if isinstance(layer, FlashAttention):
        return State(True)
    if kind in STOCK:
        return State(True, (), _reason_in(layer, replaced_in(layer, *_STEPS)))
    of_class = seams_of(kind)
    if of_class:
        reasons = {seam: seam.reason_against(kind) or _reason_in(layer, seam.replaced_in(layer)) for seam in of_class}
        reason = next((reason for seam, reason in reasons.items() if reason and seam.needed), None)
        fitting = tuple(seam for seam, reason in reasons.items() if not reason)
        return State(any(seam.attends for seam in of_class), fitting, reason)
    if isinstance(layer, keras.layers.AdditiveAttention):
        return State(True, (), "its scores are no dot products")
    if isinstance(layer, STOCK):
        return State(True, (), f"a subclass of {_stock_base(kind).__name__}")
    if _is_named_attention(kind) and not any(state(inner) for inner in layer._flatten_layers(include_self=False)):
        return State(True, (), f"attn_ops does not know {kind.__name__}")
    return None


def _reason_in(layer, replaced):
    return f"{replaced} of {layer.name} itself was replaced" if replaced else None


def _is_named_attention(kind):
    """Whether a class without seams calls itself an attention, and not the mask, the bias or the deformation of one."""
    name = kind.__name__
    return "Attention" in name and not any(other in name for other in ("Mask", "Deformable", "Bias", "Embedding"))


def seams_of(kind) -> tuple:
    """The seams of a class of layers and of those it is derived from, for each method the nearest one."""
    by_method = {}
    for cls in kind.__mro__:
        known = BY_CLASS.get((cls.__module__, cls.__qualname__), ())
        for seam in (*seams.registered.get(cls, ()), *known):
            by_method.setdefault(seam.method, seam)
    return tuple(by_method.values())


def _stock_base(kind):
    return next(cls for cls in kind.__mro__ if cls in STOCK)

"""The stock attention layers of a model turned into those of :mod:`attn_ops.layers`, which fuse more (dropout, scores,
windows, grouped heads), and back."""

from __future__ import annotations

import keras

from attn_ops.layers.attention import Attention
from attn_ops.layers.base import DropIn
from attn_ops.layers.grouped_query_attention import GroupedQueryAttention
from attn_ops.layers.multi_head_attention import MultiHeadAttention

_PAIRS = (
    (keras.layers.MultiHeadAttention, MultiHeadAttention),
    (keras.layers.GroupQueryAttention, GroupedQueryAttention),
    (keras.layers.Attention, Attention),
)


def convert(model):
    """Turns every stock attention layer in `model` into its :mod:`attn_ops.layers` counterpart, in place.

    Layers are found wherever Keras tracks them: in functional, sequential and subclassed models, in custom layers,
    wrappers and nested models. They stay the same objects with the same weights, names and connections; so optimizers,
    callbacks and shared layers keep working. Only exactly the stock classes are converted, not subclasses of them. The
    model's traced functions are dropped, to be traced again.

    The layers get `as_in_keras=True`: the model's answers stay those of the stock layers wherever a mask hides what no
    model should read, and where Keras forgets it. Set `layer.as_in_keras = False` for what our layers do instead.

    A converted model saves layers of attn_ops, which need attn_ops to be loaded (weights files do not): :func:`revert`
    it before saving for others.

    Args:
        model: A Keras layer or model, built or not.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a Keras layer.
    """
    return _change_classes("convert", model, dict(_PAIRS))


def revert(model):
    """Turns the layers of :mod:`attn_ops.layers` that have a stock counterpart in `model` into that, in place.

    The reverse of :func:`convert`, also for models that were made with our layers. A layer with
    `flash_attention=True`, which stock layers refuse on TensorFlow, becomes one with `None`. One with options that stock
    layers do not have (`sinks`, `position_bias`, …) is a ValueError, and nothing is changed.

    Args:
        model: A Keras layer or model.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a Keras layer.
        ValueError: A layer computes what its stock counterpart cannot.
    """
    return _change_classes("revert", model, {ours: stock for stock, ours in _PAIRS})


def _change_classes(name, model, classes):
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"attn_ops.{name}: model must be a Keras layer or model, got {type(model).__name__}")
    changed = False
    all_layers = list(model._flatten_layers())
    for layer in all_layers:
        beyond = layer.beyond_stock() if type(layer) in classes and isinstance(layer, DropIn) else None
        if beyond:
            raise ValueError(
                f"attn_ops.{name}: {layer.name} is a {type(layer).__name__} with {', '.join(beyond)}, which "
                f"keras.layers.{classes[type(layer)].__name__} does not have"
            )
    for layer in all_layers:
        target = classes.get(type(layer))
        if target is None:
            continue
        if getattr(layer, "flash_attention", None):
            layer.flash_attention = layer._flash_attention = None
        # Keras stores no attribute that equals the class's own, and the stock classes have no such defaults.
        vars(layer).setdefault("_flash_attention", None)
        vars(layer)["as_in_keras"] = issubclass(target, DropIn)
        layer.__class__ = target
        changed = True
    if changed:
        for layer in all_layers:
            if isinstance(layer, keras.Model):
                layer.train_function = layer.test_function = layer.predict_function = None
    return model

"""The attention in the layers of a model turned into ours, and back: stock layers become those of :mod:`attn_ops.layers`,
which fuse more (dropout, scores, windows, grouped heads); other classes get the adapters of their seams."""

from __future__ import annotations

import contextlib
import inspect
import logging

from attn_ops.layers import Attention, GroupedQueryAttention, MultiHeadAttention
from attn_ops.layers.base import DropIn
from attn_ops.models import found, seams

_PAIRS = dict(zip(found.STOCK, (MultiHeadAttention, GroupedQueryAttention, Attention)))
_STOCK = {ours: stock for stock, ours in _PAIRS.items()}
_logger = logging.getLogger("attn_ops")


def convert(model):
    """Makes every attention in `model` that is known run in :func:`attn_ops.scaled_dot_product_attention`, in place.

    Known are the attention layers of Keras and their subclasses, the classes of KerasHub (the table is in the
    documentation), and what was given to :func:`attn_ops.models.register`. Layers are found wherever Keras tracks them: in
    functional, sequential and subclassed models, in custom layers, wrappers and nested models. They stay the same objects
    with the same weights, names and connections; so optimizers, callbacks and shared layers keep working. The model's
    traced functions, KerasHub's `generate_function` among them, are dropped, to be traced again. What has become of each
    layer is logged ("attn_ops", at level INFO, or WARNING where some are left), and :func:`attn_ops.explain` tells it.

    Exactly the stock classes become layers of attn_ops with `as_in_keras=True`: the model's answers stay those of the
    stock layers wherever a mask hides what no model should read, and where Keras forgets it. Set `layer.as_in_keras =
    False` for what our layers do instead. Such a model saves layers of attn_ops, which need attn_ops to be loaded (weights
    files do not): :func:`revert` it before saving for others.

    Other classes keep their class, and are saved as before; a method of theirs is replaced in these layers alone. Where
    the installed release of a class is not the one that is known, or a subclass overrides what would be replaced, the
    layer is left alone.

    Args:
        model: A Keras layer or model, built or not.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a Keras layer.
    """
    layers = found.layers("convert", model)
    changed, attentions, left = False, 0, []
    for layer in layers:
        state = found.state(layer)
        changed |= _take_over(layer, state)
        if state is not None and state.attends:
            attentions += 1
            left += [f"{layer.name} ({state.reason})"] if state.reason else []
    if changed:
        found.drop_traced_functions(layers)
    text = f"attn_ops.convert: {attentions - len(left)} of {attentions} attention layers of {model.name} fused"
    _logger.log(logging.WARNING if left else logging.INFO, "%s%s", text, "; left: " + "; ".join(left) if left else "")
    return model


def revert(model):
    """Undoes :func:`convert`, and turns the layers of :mod:`attn_ops.layers` that have a stock counterpart into that.

    Works in place, also for models that were made with our layers. A layer with `flash_attention=True`, which stock layers
    refuse on TensorFlow, becomes one with `None`. One with options that stock layers do not have (`sinks`,
    `position_bias`, …) is a ValueError, and nothing is changed.

    Args:
        model: A Keras layer or model.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a Keras layer.
        ValueError: A layer computes what its stock counterpart cannot.
    """
    layers = found.layers("revert", model)
    ours = [layer for layer in layers if type(layer) in _STOCK]
    for layer in ours:
        beyond = layer.beyond_stock()
        if beyond:
            raise ValueError(
                f"attn_ops.revert: {layer.name} is a {type(layer).__name__} with {', '.join(beyond)}, which "
                f"keras.layers.{_STOCK[type(layer)].__name__} does not have"
            )
    for layer in ours:
        _change_class(layer, _STOCK[type(layer)])
    adapted = [seams.uninstall(layer) for layer in layers]
    if ours or any(adapted):
        found.drop_traced_functions(layers)
    return model


@contextlib.contextmanager
def borrowed(layers):
    """Has the attention in these layers run in ours for the duration of a `with` block, and leaves no trace of it: what
    :func:`convert` changes is put back as it was, and functions that are traced stay traced."""
    before = []
    try:
        for layer in layers:
            kind, own = type(layer), {name: vars(layer)[name] for name in _CHANGED if name in vars(layer)}
            methods = {seam.method for seam in seams.installed(layer)}
            before.append((layer, kind, own, methods))
            _take_over(layer, found.state(layer))
        yield
    finally:
        for layer, kind, own, methods in reversed(before):
            for method in {seam.method for seam in seams.installed(layer)} - methods:
                del vars(layer)[method]
            if type(layer) is not kind:
                _become(layer, kind)
                for name in _CHANGED:
                    vars(layer).pop(name, None)
                vars(layer).update(own)


def _take_over(layer, state) -> bool:
    """Has the attention of one layer run in ours, if it is known; whether that has changed the layer."""
    if state is None or state.reason is not None:
        return False
    if type(layer) in _PAIRS:
        _change_class(layer, _PAIRS[type(layer)])
        return True
    if not state.seams or seams.installed(layer):
        return False
    for seam in state.seams:
        seams.install(seam, layer)
    return True


_CHANGED = ("flash_attention", "_flash_attention", "as_in_keras")  # by _change_class, beside the class


def _change_class(layer, target):
    if getattr(layer, "flash_attention", None):
        layer.flash_attention = layer._flash_attention = None
    # Keras stores no attribute that equals the class's own, and the stock classes have no such defaults.
    vars(layer).setdefault("_flash_attention", None)
    vars(layer)["as_in_keras"] = issubclass(target, DropIn)
    _become(layer, target)


def _become(layer, kind):
    """Makes ``layer`` one of this class, also for Keras, which binds arguments by the signature that `call` had at first."""
    layer.__class__ = kind
    for name, kept in vars(layer).items():
        if isinstance(kept, inspect.Signature):
            vars(layer)[name] = inspect.signature(layer.call)

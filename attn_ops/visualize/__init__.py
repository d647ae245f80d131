"""Reading attention: the weights of a trained model, pictures of weights and masks, and a viewer for browsers.

:func:`attention` runs a Keras model and keeps the weights of its attention layers; :func:`viewer` makes one HTML file of
them, or a widget in notebooks; the plots need matplotlib. All load when they are first used.
"""

from __future__ import annotations

import importlib

from attn_ops import requirements

_ATTRIBUTES = {
    "attention": "record",
    "ModelAttention": "recorded",
    "LayerAttention": "recorded",
    "viewer": "page",
    "Viewer": "page",
    "plot_attention_weights": "plots",
    "plot_attention_over_text": "over_text",
    "plot_heads": "heads",
    "plot_mask": "plots",
}

__all__ = [*_ATTRIBUTES]


def __getattr__(name: str):
    if name not in _ATTRIBUTES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"{__name__}.{_ATTRIBUTES[name]}"), name)
    except ModuleNotFoundError as error:
        reason = requirements.reason(f"{__name__}.{name}", error)
        if reason is None:
            raise
        raise ImportError(reason) from error
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)

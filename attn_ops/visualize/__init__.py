"""Reading attention: the weights of a trained model, pictures of weights and masks, and a viewer for browsers.

:func:`attention` runs a Keras model and keeps the weights of its attention layers; :func:`viewer` makes one HTML file of
them, or a widget in notebooks; the plots need matplotlib. All load when they are first used.
"""

from __future__ import annotations

from attn_ops import lazy

_HOMES = {
    "attention": ".record",
    "ModelAttention": ".recorded",
    "LayerAttention": ".recorded",
    "viewer": ".page",
    "Viewer": ".page",
    "plot_attention_weights": ".plots",
    "plot_attention_over_text": ".over_text",
    "plot_heads": ".heads",
    "plot_mask": ".plots",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = lazy.attach(__name__, _HOMES)

"""rotary_embedding of KerasTensors: the layer, as which models save it."""

from __future__ import annotations

from attn_ops import layers


def rotary_embedding(x, positions, settings, layout):
    """The symbolic result for these settings (call/rotary.py)."""
    axis = 2 if layout == "BHSD" and len(x.shape) == 4 else 1
    options = settings.config()
    layer = layers.RotaryEmbedding(max_wavelength=options.pop("base", 10000.0), sequence_axis=axis, **options)
    return layer(x, positions=positions)

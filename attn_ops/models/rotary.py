"""rotary_embedding of arrays, and of KerasTensors: those get the layer, as which models save it."""

from __future__ import annotations

import attn_ops
from attn_ops.call import rotary
from attn_ops.models import keras_tensors


def embedding(xp, x, positions, settings, layout):
    """The function of the framework ``xp`` for these settings (call/rotary.py)."""
    if keras_tensors.any_among(x, positions):
        axis = 2 if layout == "BHSD" and len(x.shape) == 4 else 1
        options = settings.config()
        layer = attn_ops.layers.RotaryEmbedding(
            max_wavelength=options.pop("base", 10000.0), sequence_axis=axis, **options
        )
        return layer(x, positions=positions)
    name = "rotary_embedding"
    x, axis = rotary.checked_input(xp, name, x, layout)
    return rotary.rotate(xp, name, x, settings, axis, positions=positions)

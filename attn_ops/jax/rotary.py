"""rotary_embedding for JAX."""

from __future__ import annotations

import functools

from attn_ops.call import rotary
from attn_ops.jax import xp
from attn_ops.models import keras_tensors

rotate = functools.partial(rotary.rotate, xp)


def rotary_embedding(
    x, positions=None, *, base=10000.0, rotary_dim=None, interleaved=False, scaling=None, layout="BSHD"
):
    """`attn_ops.rotary_embedding` on JAX arrays: the same arguments, results and errors. Works under every
    transformation of JAX."""
    name = "rotary_embedding"
    settings = rotary.Rotary.of(name, base, rotary_dim, interleaved, scaling)
    if keras_tensors.any_among(x, positions):
        from attn_ops.models import rotary as of_models

        return of_models.rotary_embedding(x, positions, settings, layout)
    x, axis = rotary.checked_input(xp, name, x, layout)
    return rotate(name, x, settings, axis, positions=positions)

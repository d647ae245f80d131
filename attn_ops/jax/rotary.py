"""rotary_embedding for JAX."""

from __future__ import annotations

import functools

from attn_ops.call import rotary
from attn_ops.jax import place, xp
from attn_ops.models.rotary import embedding

rotate = functools.partial(rotary.rotate, xp)


@place.any_ranks
def rotary_embedding(
    x, positions=None, *, base=10000.0, rotary_dim=None, interleaved=False, scaling=None, layout="BSHD"
):
    """`attn_ops.rotary_embedding` on JAX arrays: the same arguments, results and errors. Works under every
    transformation of JAX."""
    settings = rotary.Rotary.of("rotary_embedding", base, rotary_dim, interleaved, scaling)
    return embedding(xp, x, positions, settings, layout)

"""merge_attention for JAX."""

from __future__ import annotations

from attn_ops.call import merge
from attn_ops.jax import xp


def merge_attention(outs, lses, *, layout="BSHD"):
    """`attn_ops.merge_attention` on JAX arrays: the same arguments, results and errors. Works under every
    transformation of JAX."""
    return merge.merge(xp, "merge_attention", outs, lses, layout)

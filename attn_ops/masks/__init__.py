"""Mask objects: who sees whom, without a dense [seqlen_q, seqlen_k] array where none is needed.

    from attn_ops import masks
    mask = masks.causal() & masks.packed(cu_seqlens) & masks.window(left=255)
    print(mask.show(64))

A `Mask` is, like in the kernels (csrc/mask.h), one interval of keys per query row (causal, window, lengths, prefix, chunked,
packed, any other), and within it ids to compare, blocks that are visible or not, and any number of boolean arrays that
are never combined into one (padding, user masks). Arrays may be NumPy, TensorFlow or JAX; this package needs TensorFlow
or JAX only when it is given their arrays.
"""

from attn_ops.masks.checks import not_boolean, tells_visible
from attn_ops.masks.constructors import (
    block_sparse,
    causal,
    chunked,
    intervals,
    key_padding,
    packed,
    padding,
    prefix,
    query_padding,
    segments,
    window,
)
from attn_ops.masks.functions import from_function
from attn_ops.masks.key_range import interval
from attn_ops.masks.mask import ALIGNMENTS, Mask, Parts, boolean, combined

__all__ = [
    "ALIGNMENTS", "Mask", "Parts", "block_sparse", "boolean", "causal", "chunked", "combined", "from_function", "interval",
    "intervals", "key_padding", "not_boolean", "packed", "padding", "prefix", "query_padding", "segments", "tells_visible",
    "window",
]  # fmt: skip

"""Rows that see no key, and what Keras gives them: the mean of all values."""

from __future__ import annotations

import functools

from keras import ops

from attn_ops.layers.axes import dims, one_per_query_head

_FAR = 2**30  # beyond every key, and positions stay within 32 bits


def empty_rows(mask, seqlen_q, seqlen_k):
    """Which rows an :class:`attn_ops.masks.Mask` leaves without a key, as bool `[batch | 1, num_heads | 1, seqlen_q | 1,
    1]`.

    What Keras's arguments make of masks (top left, without lengths and structured parts) needs the memory of its own
    arrays: only what is dense in rows and keys together is combined with the rest. Others become dense.
    """
    lengths = mask.query_lengths is not None or mask.key_lengths is not None
    if mask.structured or mask.bottom_right or lengths:
        visible = ops.convert_to_tensor(mask.materialize(seqlen_q, seqlen_k))
        return ops.logical_not(ops.any(visible, -1, keepdims=True))
    by_row, by_key, by_both = [], [], []
    for part in mask.tensors():
        extents = part.shape
        (by_row if extents[3] == 1 else by_key if extents[2] == 1 else by_both).append(part)
    left, right = (min(end, _FAR) for end in (mask.window_left, mask.window_right))
    if by_both:
        visible = _all(by_both + by_key)
        rows, keys = _positions(seqlen_q)[:, None], _positions(seqlen_k)
        if right >= 0:
            visible = ops.logical_and(visible, keys - rows <= right)
        if left >= 0:
            visible = ops.logical_and(visible, rows - keys <= left)
        seen = ops.any(visible, -1, keepdims=True)
    else:
        keys = _all(by_key) if by_key else ops.ones([1, 1, 1, seqlen_k], "bool")
        if left < 0 and right < 0:
            seen = ops.any(keys, -1, keepdims=True)
        else:
            # How many of the keys before each position are visible: the difference of two is that of an interval.
            before = ops.pad(ops.cumsum(ops.cast(keys, "int32"), -1), [[0, 0], [0, 0], [0, 0], [1, 0]])
            rows = _positions(seqlen_q)
            end = ops.clip(rows + right + 1, 0, seqlen_k) if right >= 0 else ops.zeros_like(rows) + seqlen_k
            start = ops.clip(rows - left, 0, seqlen_k) if left >= 0 else ops.zeros_like(rows)
            count = ops.take(before, end, -1) - ops.take(before, start, -1)
            seen = ops.swapaxes(count > 0, -1, -2)
    return ops.logical_not(_all([seen, *by_row]))


def with_means(out, value, empty):
    """`out` `[batch, seqlen_q, num_heads, value_dim]`, and in the rows where `empty` the mean over the keys of `value`
    `[batch, seqlen_k, num_kv_heads, value_dim]`, as Keras's softmax of equal scores gives it."""
    dtype = "float64" if out.dtype == "float64" else "float32"
    seqlen_k = dims(value)[1]
    count = ops.maximum(ops.cast(seqlen_k, dtype), 1.0)
    mean = ops.cast(ops.sum(ops.cast(value, dtype), 1, keepdims=True) / count, out.dtype)
    return ops.where(ops.swapaxes(empty, 1, 2), one_per_query_head(mean, out.shape[2]), out)


def _positions(count):
    return ops.arange(count, dtype="int32")  # Keras's own choice has 16 bits where its `floatx` has


def _all(parts):
    return functools.reduce(ops.logical_and, parts)

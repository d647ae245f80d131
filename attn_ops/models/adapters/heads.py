"""What adapters share that take over a whole layer: heads split and joined, and the attention between."""

from __future__ import annotations

import keras
from keras import ops

from attn_ops.layers.attend import attend, dropout_seed
from attn_ops.layers.axes import dims
from attn_ops.layers.empty_rows import empty_rows, with_means
from attn_ops.masks.mask import boolean


def split(x, num_heads):
    """`[…, features]` as `[…, num_heads, features / num_heads]`."""
    return ops.reshape(x, (*ops.shape(x)[:-1], num_heads, x.shape[-1] // num_heads))


def join(x):
    """`[…, num_heads, head_dim]` as `[…, features]`."""
    return ops.reshape(x, (*ops.shape(x)[:-2], x.shape[-2] * x.shape[-1]))


def ungrouped(query, key, value, groups):
    """Keys and values with one head for ``groups`` query heads, where they were repeated for each query head."""
    if groups > 1 and key.shape[2] == query.shape[2]:
        return key[:, :, ::groups], value[:, :, ::groups]
    return key, value


def rank_4(x, axis=0):
    """A mask or bias with the axes that it lacks of `[batch, num_heads, seqlen_q, seqlen_k]`, put in at ``axis``."""
    for _ in range(4 - len(x.shape)):
        x = ops.expand_dims(x, axis)
    return x


def visible(mask, axis=0):
    """A mask as `keras.layers.Softmax` reads it, which shows what is above a half, as one of ours; or None."""
    if mask is None:
        return None
    mask = ops.convert_to_tensor(mask)
    if keras.backend.standardize_dtype(mask.dtype) != "bool":
        mask = ops.greater(mask, ops.cast(0.5, mask.dtype))
    return boolean(rank_4(mask, axis))


def attention(query, key, value, *, scale, dropout=None, training=None, scores=None, means=False, **more):
    """Attention of `[batch, seqlen, heads, dim]` tensors, and the weights or None.

    Args:
        query, key, value, scale, more: as for :func:`attn_ops.layers.attend.attend`.
        dropout: None or the layer of dropout on the weights.
        scores: None, "undropped" or "dropped", for the weights.
        means: whether rows to which the mask leaves no key get the mean of the values, as a softmax of equal scores
            gives it.
    """
    rate = 0.0 if dropout is None else dropout.rate
    mask = more.pop("mask", None)
    out, weights = attend(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        implementation=None,
        dropout_rate=rate,
        dropout_seed=dropout_seed(dropout, rate, training),
        scores=scores,
        **{what: x for what, x in more.items() if x is not None},
    )
    if means and mask is not None:
        out = with_means(out, value, empty_rows(mask, dims(query)[1], dims(key)[1]))
    return out, weights


def as_keras_op(query, key, value, *, mask=None, bias=None, scale=None):
    """What `keras.ops.dot_product_attention` gives: rows to which a mask leaves no key have the mean of the values."""
    return attention(
        query,
        key,
        value,
        scale=scale,
        mask=None if mask is None else boolean(rank_4(ops.cast(mask, "bool"))),
        bias=None if bias is None else rank_4(bias),
        means=True,
    )[0]

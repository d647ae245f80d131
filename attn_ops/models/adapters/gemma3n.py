"""Gemma 3n's text attention: heads before positions, a window laid into the mask beforehand."""

from __future__ import annotations

from keras import ops

from attn_ops.layers.empty_rows import with_means
from attn_ops.masks.mask import boolean
from attn_ops.models.adapters import heads, structure


def attention(layer, stock, query, key, value, attention_mask, training=False):
    """`_compute_attention` of `[batch, heads, seqlen, dim]` tensors.

    Returns the output `[batch, seqlen, heads, dim]`, and None in place of the weights, which nothing in KerasHub reads.
    """
    query, key, value = (ops.transpose(tensor, (0, 2, 1, 3)) for tensor in (query, key, value))
    known = structure.of(attention_mask)
    options = {}
    if known is not None:
        options = known.options()
    elif attention_mask is not None:
        attention_mask = ops.cast(attention_mask[:, :, : key.shape[1]], "bool")
        options = {"mask": boolean(attention_mask[:, None])}
    out, _ = heads.attention(query, key, value, scale=1.0, dropout=layer.dropout, training=training, **options)
    if options and (known is None or known.padding is not None):
        empty = ops.logical_not(ops.any(ops.cast(attention_mask, "bool"), -1))
        out = with_means(out, value, empty[:, None, :, None])
    return out, None


def sliding_window(layer, stock, attention_mask, cache_update_index=0):
    """`_mask_sliding_window`, which keeps what its mask is made of: a window before each row in a causal mask."""
    known = structure.of(attention_mask)
    dense = stock(attention_mask, cache_update_index)
    return dense if known is None else structure.keep(dense, known._replace(size=layer.sliding_window))

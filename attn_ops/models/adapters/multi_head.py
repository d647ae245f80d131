"""Subclasses of `keras.layers.MultiHeadAttention` with a `call` of their own, such as KerasHub's with a cache."""

from __future__ import annotations

import keras
from keras import ops

from attn_ops.layers.axes import AttentionAxes, dims
from attn_ops.layers.common import attend, combine, dropout_seed, keras_mask
from attn_ops.layers.empty_rows import empty_rows, with_means
from attn_ops.models.adapters import structure


def attention(
    layer,
    stock,
    query,
    key,
    value,
    attention_mask=None,
    training=None,
    return_attention_scores=False,
    use_causal_mask=False,
):
    """`_compute_attention` of `[batch, seqlen, num_heads, dim]` tensors; returns the output and the scores or None."""

    def in_keras():
        options = {"return_attention_scores": True} if return_attention_scores else {}
        options |= {"use_causal_mask": True} if use_causal_mask else {}
        return stock(query, key, value, attention_mask, training, **options)

    is_float = attention_mask is not None and "float" in keras.backend.standardize_dtype(attention_mask.dtype)
    if len(query.shape) != 4 or is_float or layer._flash_attention:
        return in_keras()
    wants_scores = return_attention_scores or getattr(layer, "_return_attention_scores", False)
    axes = AttentionAxes(layer._attention_axes, 2)
    known = structure.of(attention_mask)
    if known is not None:
        mask, offset = known.mask(), structure.query_offset(known.offset)
    else:
        mask, offset = keras_mask(axes, query, key, attention_mask=attention_mask), None
    if use_causal_mask:
        mask = combine([mask, keras_mask(axes, query, key, is_causal=True)])
    out, scores = attend(
        query,
        key,
        value,
        mask=mask,
        scale=layer._inverse_sqrt_key_dim,
        implementation=None,
        dropout_rate=layer._dropout,
        dropout_seed=dropout_seed(layer._dropout_layer, layer._dropout, training),
        scores="undropped" if wants_scores else None,
        **({} if offset is None else {"query_offset": offset}),
    )
    # Beside its softmax layer, Keras gives rows without a key the mean of the values. Causal rows see a key unless padding
    # hides it.
    if layer._dropout > 0 or wants_scores or mask is None or known is not None and known.padding is None:
        return out, scores
    if offset is None:
        empty = empty_rows(mask, dims(query)[1], dims(key)[1])
    else:
        empty = ops.logical_not(ops.any(ops.cast(attention_mask, "bool"), -1))[:, None, :, None]
    return with_means(out, value, empty), scores

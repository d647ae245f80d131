"""The multi-head layers of Keras: subclasses with a `call` of their own, such as KerasHub's with a cache, and stock layers
in a patched process."""

from __future__ import annotations

import functools

import keras
from keras import ops

from attn_ops.layers.axes import AttentionAxes, dims
from attn_ops.layers.base import EMPTY_SCORES_ARE_UNIFORM
from attn_ops.layers.empty_rows import empty_rows, with_means
from attn_ops.layers.keras_mask import combine, keras_mask
from attn_ops.models.adapters import heads, structure

_AXES = AttentionAxes([1], 2)


def multi_head(
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
    """`MultiHeadAttention._compute_attention` of `[batch, seqlen, num_heads, dim]` tensors: the output, and the scores or
    None."""
    more = {"return_attention_scores": True} if return_attention_scores else {}
    more |= {"use_causal_mask": True} if use_causal_mask else {}
    return _attention(
        layer,
        functools.partial(stock, query, key, value, attention_mask, training, **more),
        *(query, key, value, attention_mask, training, use_causal_mask),
        wants_scores=return_attention_scores or getattr(layer, "_return_attention_scores", False),
        scale=layer._inverse_sqrt_key_dim,
        rate=layer._dropout,
    )


def grouped(layer, stock, query, key, value, attention_mask=None, training=None, use_causal_mask=False):
    """`GroupQueryAttention._compute_attention`, whose keys and values are repeated for each query head."""
    more = {"use_causal_mask": True} if use_causal_mask else {}
    return _attention(
        layer,
        functools.partial(stock, query, key, value, attention_mask, training, **more),
        query,
        *heads.ungrouped(query, key, value, layer.num_repeats),
        *(attention_mask, training, use_causal_mask),
        wants_scores=layer._return_attention_scores,
        scale=layer._inverse_sqrt_head_dim,
        rate=layer.dropout,
    )


def _attention(
    layer, in_keras, query, key, value, attention_mask, training, use_causal_mask, *, wants_scores, scale, rate
):
    in_softmax = rate > 0 or wants_scores  # in Keras: beside its op
    is_float = attention_mask is not None and "float" in keras.backend.standardize_dtype(attention_mask.dtype)
    if len(query.shape) != 4 or is_float or layer._flash_attention is not None:
        return in_keras()
    if in_softmax and attention_mask is not None and EMPTY_SCORES_ARE_UNIFORM:
        return in_keras()
    known = structure.of(attention_mask)
    options = {"mask": keras_mask(_AXES, query, key, attention_mask=attention_mask)} if known is None else known.options()
    mask = options.pop("mask")
    if use_causal_mask:
        mask = combine([mask, keras_mask(_AXES, query, key, is_causal=True)])
    out, scores = heads.attention(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        dropout=layer._dropout_layer if rate else None,
        training=training,
        scores="undropped" if wants_scores else None,
        **options,
    )
    scores = None if scores is None else ops.cast(scores, layer.compute_dtype)
    # The op of Keras gives rows without a key the mean of the values. Causal rows see one unless padding hides it.
    if in_softmax or mask is None or attention_mask is None or known is not None and known.padding is None:
        return out, scores
    if not options:
        empty = empty_rows(mask, dims(query)[1], dims(key)[1])
    else:
        empty = ops.logical_not(ops.any(ops.cast(attention_mask, "bool"), -1))[:, None, :, None]
    return with_means(out, value, empty), scores

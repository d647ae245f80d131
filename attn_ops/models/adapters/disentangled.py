"""Scores with terms that no option of ours has, which go into a dense bias `[batch, heads, seqlen_q, seqlen_k]`."""

from __future__ import annotations

import math
import sys

from keras import ops

from attn_ops.models.adapters import heads
from attn_ops.models.adapters.training import in_training


def deberta(layer, stock, inputs, rel_embeddings, attention_mask=None, return_attention_scores=False, training=None):
    """`call` of DeBERTa's: terms of queries, and of keys, with embeddings of the distance between the two."""
    if return_attention_scores:
        return stock(inputs, rel_embeddings, attention_mask, return_attention_scores, training)
    query, key, value = (project(inputs) for project in (layer._query_dense, layer._key_dense, layer._value_dense))
    rel_embeddings = layer._position_dropout_layer(rel_embeddings, training=training)
    out, _ = heads.attention(
        query,
        key,
        value,
        scale=layer.scale_factor,
        bias=layer._compute_disentangled_attention(query=query, key=key, rel_embeddings=rel_embeddings),
        mask=heads.visible(attention_mask, -3),
        dropout=layer._attn_dropout_layer,
        training=training,
    )
    return layer._output_dense(heads.join(out))


def xlnet(
    layer,
    stock,
    query,
    key,
    value,
    position,
    content_attention_bias,
    positional_attention_bias,
    segment_matrix=None,
    segment_encoding=None,
    segment_attention_bias=None,
    attention_mask=None,
):
    """`compute_attention` of XLNet's, of `[batch, seqlen, heads, dim]`: terms of the distance, and of one segment or two."""
    shift = sys.modules["keras_hub.src.models.xlnet.relative_attention"]._rel_shift
    bias = ops.einsum("aecd,abcd->acbe", position, query + positional_attention_bias)
    bias = shift(bias, klen=ops.shape(key)[1])
    if segment_matrix is not None:
        segments = ops.einsum("bind,snd->bnis", query + segment_attention_bias, segment_encoding)
        bias = bias + ops.where(segment_matrix[:, None], segments[..., 1:], segments[..., :1])
    scale = 1.0 / math.sqrt(layer._key_dim)
    return heads.attention(
        query + content_attention_bias,
        key,
        value,
        scale=scale,
        bias=bias * scale,
        mask=heads.visible(attention_mask, -3),
        dropout=layer._dropout_layer,
        training=in_training() if layer._dropout else None,
    )[0]

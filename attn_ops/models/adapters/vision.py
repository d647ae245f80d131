"""Vision transformers: layers that project `[batch, seqlen, features]`, attend and project again."""

from __future__ import annotations

from keras import ops

from attn_ops.masks import constructors
from attn_ops.models.adapters import heads


def paligemma(layer, stock, x, attention_mask=None, return_attention_scores=None, training=False):
    """`call` of PaliGemma's and Gemma 3's; the mask is added to the scores.

    The second result is None unless `return_attention_scores` asks for it. The stock layers always make it, and nothing
    in KerasHub reads it.
    """
    query, key, value = (
        heads.split(project(x), layer.num_heads) for project in (layer.query_proj, layer.key_proj, layer.value_proj)
    )
    out, scores = heads.attention(
        query,
        key,
        value,
        scale=layer.head_dim**-0.5,
        bias=None if attention_mask is None else heads.rank_4(ops.cast(attention_mask, query.dtype)),
        dropout=layer.dropout_layer,
        training=training,
        scores="undropped" if return_attention_scores else None,
    )
    return layer.out_proj(heads.join(out), training=training), scores


def dinov3(layer, stock, inputs, attention_mask=None, position_embeddings=None, num_prefix_tokens=0, training=None):
    """`call`; the tokens after the first ones are rotated."""
    query, key, value = (
        heads.split(project(inputs, training=training), layer.num_heads)
        for project in (layer.query_dense, layer.key_dense, layer.value_dense)
    )
    if position_embeddings is not None:
        query, key = layer._apply_rotary(query, key, *position_embeddings, num_prefix_tokens)
    out = heads.as_keras_op(query, key, value, mask=attention_mask, scale=layer.scale)
    return layer.output_dense(layer.dropout(heads.join(out), training=training), training=training)


def qwen(layer, stock, x, position_embeddings, cu_seqlens=None):
    """`call` of Qwen 3.5's: `[seqlen, features]`, frames one after the other of which each sees itself."""
    query, key, value = ops.unstack(ops.reshape(layer.qkv(x), (-1, 3, layer.num_heads, layer.head_dim)), axis=1)
    query, key = (layer._apply_rotary(tensor, *position_embeddings) for tensor in (query, key))
    if not query.dtype == key.dtype == value.dtype:
        return stock(x, position_embeddings, cu_seqlens)
    several = cu_seqlens is not None and len(cu_seqlens) > 2
    out, _ = heads.attention(
        query[None],
        key[None],
        value[None],
        scale=layer._inv_scale,
        mask=constructors.packed(cu_seqlens) if several else None,
    )
    return layer.proj(heads.join(out[0]))


def gemma4(layer, stock, q, k, v, attention_mask, training=False):
    """`_compute_attention` of `[batch, seqlen, heads, dim]` tensors and a mask of the keys."""
    return heads.attention(
        q,
        k,
        v,
        scale=1.0,
        mask=heads.visible(attention_mask, 1),
        logits_soft_cap=layer.logit_soft_cap,
        dropout=layer.dropout_layer,
        training=training,
    )[0]


def video_prism(layer, stock, query, value, key=None, attention_mask=None, training=None):
    """`call`; queries are scaled by learned factors, or by the usual one."""
    key = query if key is None else key
    query, key, value = layer.query_dense(query), layer.key_dense(key), layer.value_dense(value)
    learned = layer.use_per_dim_scale
    out, _ = heads.attention(
        layer.per_dim_scale_layer(query) if learned else query,
        key,
        value,
        scale=1.0 if learned else layer.key_dim**-0.5,
        mask=heads.visible(attention_mask, 1),
        logits_soft_cap=layer.attention_logit_soft_cap,
        dropout=layer.dropout_layer,
        training=training,
        means=True,
    )
    return layer.output_dense(out)

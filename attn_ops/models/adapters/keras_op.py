"""Layers of KerasHub that call `keras.ops.dot_product_attention` themselves, answered as that does."""

from __future__ import annotations

import keras
from keras import ops

from attn_ops.layers.axes import dims
from attn_ops.models.adapters import heads


def sam3(layer, stock, query, key, value, attention_mask=None, attention_bias=None, training=None):
    """`call` of SAM 3's attention."""
    if attention_mask is not None and attention_bias is not None:  # Keras shows a hidden key before one with a low bias
        return stock(query, key, value, attention_mask, attention_bias, training)
    query, key, value = (
        heads.split(project(x, training=training), layer.num_heads)
        for project, x in ((layer.q_proj, query), (layer.k_proj, key), (layer.v_proj, value))
    )
    out = heads.as_keras_op(query, key, value, mask=attention_mask, bias=attention_bias, scale=layer.scale)
    return layer.o_proj(heads.join(out), training=training)


def sam3_rotary(layer, stock, hidden_states, position_embeddings, training=None):
    """`call` of SAM 3's attention over an image `[batch, height, width, features]`."""
    shape = (-1, layer.height * layer.width, layer.num_heads, layer.head_dim)
    query, key, value = (
        ops.reshape(project(hidden_states, training=training), shape)
        for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    cos, sin = position_embeddings
    query, key = layer.apply_rotary_pos_emb_2d(query, key, cos=cos, sin=sin)
    out = heads.as_keras_op(query, key, value, scale=layer.scale)
    out = ops.reshape(out, (-1, layer.height, layer.width, layer.hidden_dim))
    return layer.o_proj(out, training=training)


def roformer(layer, stock, x, attention_mask=None):
    """`call` of RoFormer's and ESM's, whose mask `[batch, seqlen]` hides rows, not keys: real tokens see the padding.

    The rows of padding give the mean of the values, which the real tokens of the next layer read.
    """
    if keras.config.is_flash_attention_enabled():
        return stock(x, attention_mask)
    query, key, value = (
        heads.split(project(x), layer.heads) for project in (layer.q_dense, layer.k_dense, layer.v_dense)
    )
    if getattr(layer, "use_rotary", None) is None:
        query, key = layer.rotary_embedding_layer([query, key])
    elif layer.use_rotary:
        query, key = layer.rotary_embedding_layer(query, key)
    batch, seqlen = dims(x)[:2]
    out = heads.as_keras_op(query, key, value, mask=ops.reshape(attention_mask, (batch, 1, seqlen, 1)))
    return layer.o_dense(heads.join(out))

"""Attention over the positions of an image or of windows of it."""

from __future__ import annotations

import math

import keras
from keras import ops

from attn_ops.models.adapters import heads
from attn_ops.models.adapters.training import in_training


def vit_det(layer, stock, x):
    """`call` of ViTDet's (and so of SAM's image encoder): `[batch, height, width, features]`.

    A row adds to the score of a key one learned term for the key's line of the image and one for its column, both dot
    products with the row's query. There are few lines and columns, so they are further dimensions of the heads: the
    row's terms for all of them beside its query, and ones at those of the key beside the key. Nothing of the size of
    the scores is made.
    """
    batch, height, width, channels = ops.shape(x)
    shape = (batch, height * width, 3, layer.num_heads, layer.key_dim)
    query, key, value = ops.unstack(ops.reshape(layer.qkv(x), shape), axis=2)
    if not layer.use_rel_pos:
        out, _ = heads.attention(query, key, value, scale=layer.scale)
    else:
        relative = layer.add_decomposed_relative_pe
        grid = ops.reshape(query, (batch, height, width, layer.num_heads, layer.key_dim))
        lines = relative._get_rel_pos(height, height, relative.rel_pos_h)
        columns = relative._get_rel_pos(width, width, relative.rel_pos_w)
        terms = ops.einsum("bhwnc,hkc->bhwnk", grid, lines), ops.einsum("bhwnc,wkc->bhwnk", grid, columns)
        shape = (batch, height * width, layer.num_heads, -1)
        terms = (ops.reshape(ops.cast(x, query.dtype), shape) for x in terms)
        places = [ops.repeat(ops.eye(height, dtype=key.dtype), width, axis=0)]
        places += [ops.tile(ops.eye(width, dtype=key.dtype), (height, 1))]
        places = ops.concatenate(places, axis=-1)[None, :, None, :]
        places = ops.broadcast_to(places, (batch, height * width, layer.num_heads, height + width))
        query = ops.concatenate([query * layer.scale, *terms], axis=-1)
        out, _ = heads.attention(query, ops.concatenate([key, places], axis=-1), value, scale=1.0)
    return layer.projection(ops.reshape(out, (batch, height, width, channels)))


def swin(layer, stock, x, mask=None, return_attns=False):
    """`call` of `[batch * windows, seqlen, features]`, with a bias of each head, and of each window if there is a mask."""
    if return_attns:
        return stock(x, mask, return_attns)
    rows, seqlen, channels = ops.shape(x)
    bias = layer._get_rel_pos_bias()[None]
    windows = 1
    if mask is not None:
        windows = ops.shape(mask)[0]
        # Windows are heads here, so that nothing is repeated for each image. 16 bits would round what is visible.
        wide = keras.backend.result_type(bias.dtype, "float32")
        bias = ops.cast(bias, wide) + ops.cast(mask, wide)[:, None]
        bias = ops.reshape(bias, (1, windows * layer.num_heads, seqlen, seqlen))
    qkv = ops.reshape(layer.qkv(x), (rows // windows, windows, seqlen, 3, layer.num_heads, layer.head_dim))
    qkv = ops.transpose(qkv, (3, 0, 1, 4, 2, 5))
    query, key, value = (
        ops.reshape(part, (rows // windows, windows * layer.num_heads, seqlen, layer.head_dim))
        for part in ops.unstack(qkv)
    )
    out, _ = heads.attention(
        query,
        key,
        value,
        scale=layer.scale,
        bias=bias,
        layout="BHSD",
        dropout=layer.attention_dropout_layer,
        training=in_training() if layer.attn_drop_rate else None,
    )
    out = ops.reshape(out, (rows, layer.num_heads, seqlen, layer.head_dim))
    out = ops.reshape(ops.transpose(out, (0, 2, 1, 3)), (rows, seqlen, channels))
    return layer.proj_drop(layer.proj(out))


def segformer(layer, stock, x):
    """`call` of `[batch, height * width, features]`, of a square image; keys and values are of a smaller one."""
    batch, seqlen, channels = ops.shape(x)
    query = heads.split(layer.q(x), layer.num_heads)
    if layer.sr_ratio > 1:
        side = int(math.sqrt(seqlen))
        x = layer.sr(ops.reshape(x, (batch, side, side, channels)))
        x = layer.norm(ops.reshape(x, (batch, -1, channels)))
    key, value = (heads.split(project(x), layer.num_heads) for project in (layer.k, layer.v))
    training = in_training()
    out, _ = heads.attention(query, key, value, scale=layer.scale, dropout=layer.dropout, training=training)
    return layer.proj_drop(layer.proj(heads.join(out)))


def mobile(layer, stock, x, attn_mask=None, training=False):
    """`call` of MobileNetV5's with as many key heads as query heads; the mask is added to the scores."""
    extents = ops.shape(x)
    batch = extents[0]
    height, width = extents[2:] if layer.data_format == "channels_first" else extents[1:3]
    qkv = layer.qkv(x)
    if layer.data_format == "channels_last":
        qkv = ops.transpose(qkv, (0, 3, 1, 2))
    qkv = ops.reshape(qkv, (batch, 3, layer.num_heads, layer.head_dim, height * width))
    query, key, value = ops.unstack(ops.transpose(qkv, (1, 0, 4, 2, 3)))
    out, _ = heads.attention(
        query,
        key,
        value,
        scale=layer.head_dim**-0.5,
        bias=None if attn_mask is None else heads.rank_4(ops.cast(attn_mask, query.dtype)),
        dropout=layer.attn_drop_layer,
        training=training,
    )
    out = ops.transpose(out, (0, 2, 3, 1))  # as the stock layer has it, also where the channels are last
    last = layer.data_format == "channels_last"
    out = ops.reshape(out, (batch, height, width, -1) if last else (batch, -1, height, width))
    return layer.proj_drop_layer(layer.proj(out), training=training)


def mobile_multi_query(layer, stock, x, training=False):
    """`call` of MobileNetV5's with one key head, whose keys and values are of a smaller image."""

    def through(layers, x):
        for inner in layers:
            try:
                x = inner(x, training=training)
            except TypeError:
                x = inner(x)
        return x

    first = layer.data_format == "channels_first"
    query, key, value = (through(layers, x) for layers in (layer.query_layers, layer.key_layers, layer.value_layers))
    if first:
        query, key, value = (ops.transpose(tensor, (0, 2, 3, 1)) for tensor in (query, key, value))
    batch, height, width, _ = ops.shape(query)
    query = ops.reshape(query, (batch, -1, layer.num_heads, layer.key_dim))
    key, value = (ops.reshape(tensor, (batch, -1, 1, tensor.shape[-1])) for tensor in (key, value))
    out, _ = heads.attention(query, key, value, scale=layer.scale, dropout=layer.attn_drop_layer, training=training)
    out = ops.reshape(out, (batch, height, width, layer.num_heads * layer.value_dim))
    return through(layer.output_proj_layers, ops.transpose(out, (0, 3, 1, 2)) if first else out)

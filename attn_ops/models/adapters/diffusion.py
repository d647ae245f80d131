"""Models that make images from noise: Stable Diffusion 3, Flux, and their autoencoder."""

from __future__ import annotations

import sys

from keras import ops

from attn_ops.models.adapters import heads

_FLUX = "keras_hub.src.models.flux.flux_maths"


def joint_blocks(layer, stock, query, key, value):
    """`_compute_attention` of MMDiT: `[batch, seqlen, heads, dim]`; returns the heads joined."""
    return heads.join(heads.attention(query, key, value, scale=layer._inverse_sqrt_key_dim)[0])


def flux(layer, stock, q, k, v, positional_encoding):
    """`call` of `[batch, heads, seqlen, dim]` tensors, rotated first; returns the heads joined."""
    if layer.dropout_p > 0 or layer.is_causal:  # drops in inference too; cannot be causal in KerasHub 0.32
        return stock(q, k, v, positional_encoding)
    q, k = sys.modules[_FLUX].ApplyRoPE()(q, k, positional_encoding)
    q, k, v = (ops.transpose(x, (0, 2, 1, 3)) for x in (q, k, ops.cast(v, q.dtype)))
    return heads.join(heads.attention(q, k, v, scale=q.shape[-1] ** -0.5)[0])


def feature_map(layer, stock, inputs, training=None):
    """`call` of the autoencoder's attention in one head over the pixels of `[batch, height, width, filters]`."""
    if layer.data_format != "channels_last":
        return stock(inputs, training=training)
    x = layer.group_norm(inputs, training=training)
    query, key, value = (
        ops.reshape(project(x, training=training), (ops.shape(inputs)[0], -1, 1, layer.filters))
        for project in (layer.query_conv2d, layer.key_conv2d, layer.value_conv2d)
    )
    out, _ = heads.attention(query, key, value, scale=layer._inverse_sqrt_filters)
    return ops.add(layer.output_conv2d(ops.reshape(out, ops.shape(inputs)), training=training), inputs)

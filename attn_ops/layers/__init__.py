"""Keras layers over :func:`attn_ops.scaled_dot_product_attention`.

``MultiHeadAttention``, ``GroupedQueryAttention`` (in Keras's public namespace ``GroupQueryAttention``) and
``Attention`` are the stock layers with the attention itself replaced: same constructor, call, weights, names and files.
``SelfAttention``, ``AttentionLayer`` and ``AttentionLayerWithWeights`` are the small single-head layers of tutorials.
"""

import keras

if keras.config.backend() != "tensorflow":
    raise ImportError(
        "attn_ops.layers needs Keras on the tensorflow backend, not on "
        f"{keras.config.backend()!r}: set KERAS_BACKEND=tensorflow before importing keras"
    )

from attn_ops.layers.attention import Attention  # noqa: E402
from attn_ops.layers.attention_layer import AttentionLayer, AttentionLayerWithWeights  # noqa: E402
from attn_ops.layers.grouped_query_attention import GroupedQueryAttention  # noqa: E402
from attn_ops.layers.multi_head_attention import MultiHeadAttention  # noqa: E402
from attn_ops.layers.self_attention import SelfAttention  # noqa: E402

GroupQueryAttention = GroupedQueryAttention

__all__ = [
    "Attention",
    "AttentionLayer",
    "AttentionLayerWithWeights",
    "GroupQueryAttention",
    "GroupedQueryAttention",
    "MultiHeadAttention",
    "SelfAttention",
]

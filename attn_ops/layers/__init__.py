"""Keras layers over :func:`attn_ops.scaled_dot_product_attention`, or on the jax backend of Keras over
:func:`attn_ops.jax.scaled_dot_product_attention`. Other backends raise ImportError.

``MultiHeadAttention``, ``GroupedQueryAttention`` (in Keras's public namespace ``GroupQueryAttention``) and
``Attention`` are the stock layers with the attention itself replaced: same constructor, call, weights, names and files.
``SelfAttention``, ``AttentionLayer`` and ``AttentionLayerWithWeights`` are the small single-head layers of tutorials.
``HierarchicalAttention`` makes sentences of words and documents of sentences.
``RotaryEmbedding`` turns queries and keys by their positions, with the arguments of KerasHub's layer.
"""

from attn_ops import requirements

requirements.check_keras("attn_ops.layers")

# The rest uses what older versions of Keras do not have.
from attn_ops.layers.attention import Attention  # noqa: E402
from attn_ops.layers.attention_layer import AttentionLayer, AttentionLayerWithWeights  # noqa: E402
from attn_ops.layers.grouped_query_attention import GroupedQueryAttention  # noqa: E402
from attn_ops.layers.hierarchical_attention import HierarchicalAttention  # noqa: E402
from attn_ops.layers.multi_head_attention import MultiHeadAttention  # noqa: E402
from attn_ops.layers.rotary_embedding import RotaryEmbedding  # noqa: E402
from attn_ops.layers.self_attention import SelfAttention  # noqa: E402

GroupQueryAttention = GroupedQueryAttention

__all__ = [
    "Attention",
    "AttentionLayer",
    "AttentionLayerWithWeights",
    "GroupQueryAttention",
    "GroupedQueryAttention",
    "HierarchicalAttention",
    "MultiHeadAttention",
    "RotaryEmbedding",
    "SelfAttention",
]

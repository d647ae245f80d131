"""Keras layers over :func:`attn_ops.scaled_dot_product_attention`, or on the jax backend of Keras over
:func:`attn_ops.jax.scaled_dot_product_attention`. Other backends raise ImportError.

``MultiHeadAttention``, ``GroupedQueryAttention`` (in Keras's public namespace ``GroupQueryAttention``) and
``Attention`` are the stock layers with the attention itself replaced: same constructor, call, weights, names and files.
``SelfAttention``, ``AttentionLayer`` and ``AttentionLayerWithWeights`` are the small single-head layers of tutorials.
``HierarchicalAttention`` makes sentences of words and documents of sentences.
``RotaryEmbedding`` turns queries and keys by their positions, with the arguments of KerasHub's layer.
"""

from __future__ import annotations

from attn_ops import lazy, requirements

requirements.check_keras("attn_ops.layers")

# What follows uses what older versions of Keras do not have.
from attn_ops.layers import backend as _backend  # noqa: E402, F401  refuses other backends now, not with the first layer

_HOMES = {
    "Attention": ".attention",
    "AttentionLayer": ".attention_layer",
    "AttentionLayerWithWeights": ".attention_layer",
    "GroupQueryAttention": ".grouped_query_attention",
    "GroupedQueryAttention": ".grouped_query_attention",
    "HierarchicalAttention": ".hierarchical_attention",
    "MultiHeadAttention": ".multi_head_attention",
    "RotaryEmbedding": ".rotary_embedding",
    "SelfAttention": ".self_attention",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = lazy.attach(__name__, _HOMES)

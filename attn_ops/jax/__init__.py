"""Fused attention for JAX, by the kernels that TensorFlow runs.

    import attn_ops.jax
    out = attn_ops.jax.scaled_dot_product_attention(query, key, value, is_causal=True)

Works under `jax.jit`, `jax.grad` (to any order), `jax.vmap`, `jax.lax.scan` and `jax.checkpoint`, and where arrays
are sharded. TensorFlow is not needed.
"""

from attn_ops.generation.cache import KVCache
from attn_ops.generation.page_pool import PagedKVCache
from attn_ops.jax import parallel
from attn_ops.jax.attention import attention_weights, scaled_dot_product_attention
from attn_ops.jax.decode import decode_attention
from attn_ops.jax.explain import explain
from attn_ops.jax.merge import merge_attention
from attn_ops.jax.paged import paged_attention
from attn_ops.jax.rotary import rotary_embedding
from attn_ops.jax.varlen import varlen_attention

__all__ = [
    "KVCache",
    "PagedKVCache",
    "attention_weights",
    "decode_attention",
    "explain",
    "merge_attention",
    "paged_attention",
    "parallel",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "varlen_attention",
]

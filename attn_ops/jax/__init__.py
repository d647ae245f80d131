"""Fused attention for JAX, by the kernels that TensorFlow runs.

    import attn_ops.jax
    out = attn_ops.jax.scaled_dot_product_attention(query, key, value, is_causal=True)

Works under `jax.jit`, `jax.grad` (to any order), `jax.vmap`, `jax.lax.scan` and `jax.checkpoint`, and where arrays
are sharded. TensorFlow is not needed.
"""

from __future__ import annotations

from attn_ops import lazy
from attn_ops.jax import pytrees as _pytrees  # noqa: F401  needs JAX, as all that is here, and tells it what our classes hold

_HOMES = {
    "KVCache": "..generation.cache",
    "PagedKVCache": "..generation.page_pool",
    "attention_weights": ".attention",
    "decode_attention": ".decode",
    "explain": ".explanation",
    "merge_attention": ".merge",
    "paged_attention": ".paged",
    "parallel": ".parallel",
    "rotary_embedding": ".rotary",
    "scaled_dot_product_attention": ".attention",
    "varlen_attention": ".varlen",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = lazy.attach(__name__, _HOMES)

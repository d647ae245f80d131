"""Attention of a sequence that is divided among devices, inside `jax.shard_map` over a named axis of a mesh.

    from attn_ops.jax import parallel
    out = parallel.context_parallel(query, key, value, axis="sequence", is_causal=True)

Each device has a share of the rows and of the keys. Batch and heads need none of this: see docs/guides/distribution.md.
"""

from __future__ import annotations

from attn_ops import lazy

_HOMES = {
    "all_gather_kv": ".context",
    "context_parallel": ".context",
    "head_parallel": ".context",
    "ring": ".context",
    "unzigzag": ".order",
    "zigzag": ".order",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = lazy.attach(__name__, _HOMES)

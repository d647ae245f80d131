"""Attention of a sequence that is divided among devices, inside `jax.shard_map` over a named axis of a mesh.

    from attn_ops.jax import parallel
    out = parallel.context_parallel(query, key, value, axis="sequence", is_causal=True)

Each device has a share of the rows and of the keys. Batch and heads need none of this: see docs/guides/distribution.md.
"""

from attn_ops.jax.parallel.context import all_gather_kv, context_parallel, head_parallel, ring
from attn_ops.jax.parallel.order import unzigzag, zigzag

__all__ = ["all_gather_kv", "context_parallel", "head_parallel", "ring", "unzigzag", "zigzag"]

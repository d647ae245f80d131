"""What runs attention of sequences that are divided among devices: each feature by each method, as its program tells."""

from __future__ import annotations

import numpy as np

from attn_ops.cli import frameworks


def implementations(calls: dict) -> dict:
    """By method, and in it by feature: the implementation that runs the arguments ``calls[feature]``, or "no"."""
    import jax

    from attn_ops.jax import parallel

    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("sequence",))

    def of(attention):
        return {feature: _ran(mesh, attention, **given) for feature, given in calls.items()}

    with frameworks.jax_on_cpu_in_float64():
        return {f.__name__: of(f) for f in (parallel.head_parallel, parallel.ring, parallel.all_gather_kv)}


def _ran(mesh, attention, query, key, value, **given):
    import jax
    from jax.sharding import PartitionSpec

    def attend(*inputs):
        return attention(*inputs, axis="sequence", **given)

    whole = PartitionSpec()
    try:
        function = jax.shard_map(attend, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
        program = str(jax.make_jaxpr(function)(query, key, value))
    except (NotImplementedError, ValueError):
        return "no"
    return "fused" if "attn_ops.forward" in program else "composite"

"""What runs attention of sequences that are divided among devices: each feature by each method, as its program tells."""

from __future__ import annotations

import numpy as np

from attn_ops.cli import frameworks


def implementations(calls: dict) -> dict:
    """By method, and in it by feature: the implementation that runs the arguments ``calls[feature]``, or "no"."""
    import jax

    from attn_ops.jax.parallel import context

    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("sequence",))

    def of(method):
        return {feature: _ran(mesh, method, **given) for feature, given in calls.items()}

    with frameworks.jax_on_cpu_in_float64():
        return {method: of(method) for method in context.METHODS if method != "auto"}


def _ran(mesh, method, query, key, value, **given):
    import jax
    from jax.sharding import PartitionSpec

    from attn_ops.jax import parallel

    def attend(*inputs):
        return parallel.context_parallel(*inputs, axis="sequence", method=method, **given)

    whole = PartitionSpec()
    try:
        function = jax.shard_map(attend, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
        program = str(jax.make_jaxpr(function)(query, key, value))
    except (NotImplementedError, ValueError):
        return "no"
    return "fused" if "attn_ops.forward" in program else "composite"

"""New rows in the memory of an array, where XLA would copy the array for them.

On CPUs XLA has no scatter of bfloat16: it makes float32 of a whole cache, and bfloat16 of that again, to write one row (a
cache of 32,768 tokens: 43 ms instead of 0.1). There the custom call of csrc/bindings/xla_append.h writes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from attn_ops.jax import forms, partition, place


def rows(scattered, axis, heads, old, new, *at):
    """``old`` [pages, …] with ``new[b, …, i, …]`` at ``[page[b, i], …, row[b, i], …]``, where there is such a place.

    Args:
        scattered: computes that of ``old, new, *at``.
        axis, heads: the axes of ``old`` and ``new`` that are rows, 1 or 2, and heads.
        at: page and row, int32 [batch, rows] each; or the row alone, where the pages are the sequences.
    """
    arrays = old, new, *at
    if (
        old.dtype != jnp.bfloat16
        or forms.unavailable_reason() is not None
        or place.exporting(old)
        or place.serializing(old)
        or not all(isinstance(n, int) for x in arrays for n in x.shape)
    ):
        return scattered(*arrays)

    def written(old, new, *at):
        if len(at) == 1:
            at = jnp.broadcast_to(jnp.arange(len(old))[:, None], at[0].shape), *at
        operands = place.varying_alike((old, new, *(x.astype(jnp.int32) for x in at)))
        result = place.result(old.shape, old.dtype, operands[0])
        call = jax.ffi.ffi_call("attn_ops.append", result, input_output_aliases={0: 0}, vmap_method="sequential")
        return call(*operands, axis=np.int64(axis))

    entries = "b" if len(at) == 1 else None  # pages belong to no sequence
    of_memory = (entries, *("h" if i == heads else None for i in range(1, old.ndim)))
    roles = [of_memory, of_memory, *[(entries, None)] * len(at)]
    on_cpus = partition.along(written, old.shape[0], old.shape[heads], roles, of_memory)

    @jax.custom_batching.custom_vmap  # of what is divided among devices `jax.vmap` knows nothing
    def chosen(*arrays):
        return jax.lax.platform_dependent(*arrays, cpu=on_cpus, default=scattered)

    @chosen.def_vmap
    def many(_, batched, *arrays):
        return jax.vmap(scattered, [0 if is_batched else None for is_batched in batched])(*arrays), True

    specs = (PartitionSpec(*place.spec(old)),)
    return place.without_explicit_axes(lambda *arrays: (chosen(*arrays),), specs, *arrays)[0]

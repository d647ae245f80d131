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


def rows(scattered, old, new, page, row, axis, heads):
    """``old`` [pages, …] with ``new[b, …, i, …]`` at ``[page[b, i], …, row[b, i], …]``, where there is such a place.

    Args:
        scattered: computes that of the arrays ``old, new, page, row``.
        old, new: arrays with the rows in ``axis``, 1 or 2, and the heads in the axis ``heads``.
        page: int32 [batch, rows]; None: the pages are the sequences.
        row: int32 [batch, rows].
    """
    arguments = old, new, *(() if page is None else (page,)), row

    def general(old, new, *at):
        return scattered(old, new, *(at if page is not None else (None, *at)))

    if (
        old.dtype != jnp.bfloat16
        or forms.unavailable_reason() is not None
        or place.exporting(old)
        or not all(isinstance(n, int) for x in arguments for n in x.shape)
    ):
        return general(*arguments)

    def written(old, new, *at):
        row = at[-1]
        pages = at[0] if page is not None else jnp.broadcast_to(jnp.arange(len(old), dtype=jnp.int32)[:, None], row.shape)
        operands = place.varying_alike((old, new, pages.astype(jnp.int32), row.astype(jnp.int32)))
        result = place.result(old.shape, old.dtype, operands[0])
        call = jax.ffi.ffi_call("attn_ops.append", result, input_output_aliases={0: 0}, vmap_method="sequential")
        return call(*operands, axis=np.int64(axis))

    entries = None if page is not None else "b"
    of_memory = (entries, *("h" if i == heads else None for i in range(1, old.ndim)))
    roles = [of_memory, of_memory, *[(entries, None)] * (len(arguments) - 2)]
    on_cpus = partition.along(written, old.shape[0], old.shape[heads], roles, of_memory)

    @jax.custom_batching.custom_vmap  # of what is divided among devices `jax.vmap` knows nothing
    def chosen(*arguments):
        return jax.lax.platform_dependent(*arguments, cpu=on_cpus, default=general)

    @chosen.def_vmap
    def many(_, batched, *arguments):
        return jax.vmap(general, [0 if is_batched else None for is_batched in batched])(*arguments), True

    specs = (PartitionSpec(*place.spec(old)),)
    return place.without_explicit_axes(lambda *arguments: (chosen(*arguments),), specs, *arguments)[0]

"""The dropout mask in JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attn_ops.call import philox


def origin(first_head, heads_of_entry, first_row=0, first_key=0):
    """Where a call stands in a larger one, uint32 array `[4]` in the order of the kernels: what number its first head of its
    first batch entry has there, how many heads an entry has there, and where its rows and keys begin."""
    return jnp.stack([jnp.asarray(n, "uint32") for n in (first_head, heads_of_entry, first_row, first_key)])


def keep(seed, batch, num_heads, rows, seqlen_k, rate, origin=None):
    """Which attention weights dropout keeps, in JAX; the bits of `call.philox.keep`.

    Args:
      seed: uint32 array `[4]`: low and high word of the seed, low and high word of the offset.
      batch, num_heads, seqlen_k: extents.
      rows: integer array `[n]`, the query rows wanted.
      rate: Python float, probability of dropping a weight, in [0, 1).
      origin: None, or that of a call that is a part of a larger one.
    Returns:
      bool array `[batch, num_heads, n, seqlen_k]`, true where the weight is kept.
    """
    uint32 = jnp.uint32

    def product(x, m):
        # JAX has no 64-bit integers by default: the high word comes from products of 16-bit halves.
        x0, x1, m0, m1 = x & 0xFFFF, x >> 16, m & 0xFFFF, m >> 16
        middle = x1 * m0 + (x0 * m0 >> 16)
        return x1 * m1 + (middle >> 16) + (x0 * m1 + (middle & 0xFFFF) >> 16), x * m

    limit = philox.threshold(rate)
    groups = -(-seqlen_k // 4) + (origin is not None)
    heads = jnp.arange(batch * num_heads, dtype=uint32).reshape(batch, num_heads, 1, 1)
    first_head, heads_of_entry, first_row, first_key = [0, num_heads, 0, 0] if origin is None else origin
    if origin is not None:
        heads = first_head + heads // num_heads * heads_of_entry + heads % num_heads
    words = philox.rounds(
        (
            jnp.arange(groups, dtype=uint32) + uint32(first_key) // 4,
            rows.astype(uint32)[:, None] + uint32(first_row),
            heads,
            seed[2],
        ),
        (seed[0], seed[1] ^ seed[3]),
        constant=uint32,
        product=product,
        add=jnp.add,
        xor=jnp.bitwise_xor,
    )
    words = jnp.stack(words, axis=-1).reshape(batch, num_heads, rows.size, 4 * groups)
    if origin is not None:
        words = jax.lax.dynamic_slice_in_dim(words, (first_key % 4).astype("int32"), seqlen_k, -1)
    return words[..., :seqlen_k] >= uint32(limit)

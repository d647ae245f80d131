"""The dropout mask: counter-based random bits, the same in every implementation.

The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011). Whether the weight of key j in row i is kept depends only on (seed, offset, batch, head, i, j):

    counter = (j >> 2, i, batch_index * num_heads + head, low32(offset))
    key     = (low32(seed), high32(seed) ^ high32(offset))
    keep    = output[j & 3] >= floor(rate * 2**32)

so the mask can be recomputed anywhere, whole or in part. `keep` computes it in NumPy, `keep_tensor` in TensorFlow
ops that also compile with XLA, `keep_jax` in JAX.
"""

import math

import numpy as np

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW32 = 0xFFFFFFFF


def threshold(rate):
    """The smallest 32-bit word that keeps its weight: floor(rate * 2**32), for 0 <= rate < 1."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout: rate must be in [0, 1), got {rate}")
    return math.floor(rate * 2.0**32)


def keep(seed, offset, batch, num_heads, seqlen_q, seqlen_k, rate):
    """Which attention weights dropout keeps, in NumPy.

    Args:
      seed, offset: integers, read as 64-bit words (negative ones in two's complement).
      batch, num_heads, seqlen_q, seqlen_k: extents of the weights.
      rate: probability of dropping a weight, in [0, 1).
    Returns:
      bool `[batch, num_heads, seqlen_q, seqlen_k]`, true where the weight is kept.
    """
    seed, offset = int(seed), int(offset)
    limit = threshold(rate)
    uint64 = np.uint64
    heads = np.arange(batch * num_heads, dtype=uint64).reshape(batch, num_heads, 1, 1)
    rows = np.arange(seqlen_q, dtype=uint64).reshape(1, 1, -1, 1)
    groups = np.arange(-(-seqlen_k // 4), dtype=uint64).reshape(1, 1, 1, -1)
    words = _philox(
        (groups, rows, heads, uint64(offset & _LOW32)),
        (uint64(seed & _LOW32), uint64((seed >> 32 ^ offset >> 32) & _LOW32)),
        constant=uint64,
        **_in_64_bits(lambda x: (x >> uint64(32), x & uint64(_LOW32))),
        xor=np.bitwise_xor,
    )
    # Ten rounds mix every counter into every word, so each word has the full broadcast shape.
    words = np.stack(words, axis=-1).reshape(batch, num_heads, seqlen_q, 4 * groups.size)
    return words[..., :seqlen_k] >= uint64(limit)


def keep_tensor(seed, batch, num_heads, rows, seqlen_k, rate):
    """Which attention weights dropout keeps, in TensorFlow ops; the bits of `keep`.

    Args:
      seed: int64 tensor `[2]`: seed and offset.
      batch, num_heads, seqlen_k: extents, Python integers or int32 scalars.
      rows: integer tensor `[n]`, the query rows wanted.
      rate: Python float, probability of dropping a weight, in [0, 1).
    Returns:
      bool tensor `[batch, num_heads, n, seqlen_k]`, true where the weight is kept.
    """
    import tensorflow as tf

    def constant(x):
        return tf.constant(x, tf.uint64)

    def low(x):
        return tf.bitwise.bitwise_and(x, constant(_LOW32))

    def high(x):
        return tf.bitwise.right_shift(x, constant(32))

    limit = threshold(rate)
    seed = tf.cast(seed, tf.uint64)
    num_groups = (seqlen_k + 3) // 4
    heads = tf.cast(tf.reshape(tf.range(batch * num_heads), [batch, num_heads, 1, 1]), tf.uint64)
    rows = tf.cast(rows, tf.uint64)[:, None]
    groups = tf.cast(tf.range(num_groups), tf.uint64)
    words = _philox(
        (groups, rows, heads, low(seed[1])),
        (low(seed[0]), tf.bitwise.bitwise_xor(high(seed[0]), high(seed[1]))),
        constant=constant,
        **_in_64_bits(lambda x: (high(x), low(x))),
        xor=tf.bitwise.bitwise_xor,
    )
    words = tf.reshape(tf.stack(words, axis=-1), [batch, num_heads, tf.shape(rows)[0], 4 * num_groups])
    # The words have 32 bits: as int64 they compare on every device.
    return tf.cast(words[..., :seqlen_k], tf.int64) >= limit


def keep_jax(seed, batch, num_heads, rows, seqlen_k, rate):
    """Which attention weights dropout keeps, in JAX; the bits of `keep`.

    Args:
      seed: uint32 array `[4]`: low and high word of the seed, low and high word of the offset.
      batch, num_heads, seqlen_k: extents.
      rows: integer array `[n]`, the query rows wanted.
      rate: Python float, probability of dropping a weight, in [0, 1).
    Returns:
      bool array `[batch, num_heads, n, seqlen_k]`, true where the weight is kept.
    """
    import jax.numpy as jnp

    uint32 = jnp.uint32

    def product(x, m):
        # JAX has no 64-bit integers by default: the high word comes from products of 16-bit halves.
        x0, x1, m0, m1 = x & 0xFFFF, x >> 16, m & 0xFFFF, m >> 16
        middle = x1 * m0 + (x0 * m0 >> 16)
        return x1 * m1 + (middle >> 16) + (x0 * m1 + (middle & 0xFFFF) >> 16), x * m

    limit = threshold(rate)
    groups = -(-seqlen_k // 4)
    words = _philox(
        (
            jnp.arange(groups, dtype=uint32),
            rows.astype(uint32)[:, None],
            jnp.arange(batch * num_heads, dtype=uint32).reshape(batch, num_heads, 1, 1),
            seed[2],
        ),
        (seed[0], seed[1] ^ seed[3]),
        constant=uint32,
        product=product,
        add=jnp.add,
        xor=jnp.bitwise_xor,
    )
    words = jnp.stack(words, axis=-1).reshape(batch, num_heads, rows.size, 4 * groups)
    return words[..., :seqlen_k] >= uint32(limit)


def _in_64_bits(halves):
    """`product` and `add` of `_philox` for words held in unsigned 64-bit integers; halves(x) is (high, low)."""
    return {"product": lambda a, b: halves(a * b), "add": lambda a, b: halves(a + b)[1]}


def _philox(counter, key, *, constant, product, add, xor):
    """Ten rounds over 32-bit words; shapes broadcast. `product` gives the high and the low word."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    m0, m1, w0, w1 = (constant(x) for x in (_M0, _M1, _W0, _W1))
    for _ in range(10):
        (high0, low0), (high1, low1) = product(c0, m0), product(c2, m1)
        c0, c1, c2, c3 = xor(xor(high1, c1), k0), low1, xor(xor(high0, c3), k1), low0
        k0, k1 = add(k0, w0), add(k1, w1)
    return c0, c1, c2, c3

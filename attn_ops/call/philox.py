"""The dropout mask: counter-based random bits, the same in every implementation.

The generator is Philox4x32-7 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011,
where seven rounds are the fewest that pass all tests of BigCrush; FlashAttention-2 takes as many). Whether the weight of
key j in row i is kept depends only on (seed, offset, batch, head, i, j):

    counter = (j >> 2, i, batch_index * num_heads + head, low32(offset))
    key     = (low32(seed), high32(seed) ^ high32(offset))
    keep    = output[j & 3] >= floor(rate * 2**32)

so the mask can be recomputed anywhere, whole or in part. `keep` computes it in NumPy; tensorflow/philox.py and
jax/philox.py have it in their operations.
"""

import math

import numpy as np

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
LOW32 = 0xFFFFFFFF
ROUNDS = 7


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
    words = rounds(
        (groups, rows, heads, uint64(offset & LOW32)),
        (uint64(seed & LOW32), uint64((seed >> 32 ^ offset >> 32) & LOW32)),
        constant=uint64,
        **in_64_bits(lambda x: (x >> uint64(32), x & uint64(LOW32))),
        xor=np.bitwise_xor,
    )
    # The rounds mix every counter into every word, so each word has the full broadcast shape.
    words = np.stack(words, axis=-1).reshape(batch, num_heads, seqlen_q, 4 * groups.size)
    return words[..., :seqlen_k] >= uint64(limit)


def in_64_bits(halves):
    """`product` and `add` of `rounds` for words held in unsigned 64-bit integers; halves(x) is (high, low)."""
    return {"product": lambda a, b: halves(a * b), "add": lambda a, b: halves(a + b)[1]}


def rounds(counter, key, *, constant, product, add, xor):
    """All rounds over 32-bit words; shapes broadcast. `product` gives the high and the low word."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    m0, m1, w0, w1 = (constant(x) for x in (_M0, _M1, _W0, _W1))
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = product(c0, m0), product(c2, m1)
        c0, c1, c2, c3 = xor(xor(high1, c1), k0), low1, xor(xor(high0, c3), k1), low0
        k0, k1 = add(k0, w0), add(k1, w1)
    return c0, c1, c2, c3

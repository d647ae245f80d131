"""The dropout bits: the published generator, and the same bits in NumPy, TensorFlow and XLA."""

import numpy as np
import pytest

from attn_ops.call import philox

MASK32 = 0xFFFFFFFF
PI = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]


def philox4x32(counter, key, rounds=7):
    """Philox4x32 with Python integers, straight from the paper."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK32, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK32]
        k = [(k[0] + 0x9E3779B9) & MASK32, (k[1] + 0xBB67AE85) & MASK32]
    return c


@pytest.mark.parametrize(
    "counter, key, rounds, words",
    [
        ([0] * 4, [0] * 2, 7, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ([MASK32] * 4, [MASK32] * 2, 7, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (PI[:4], PI[4:], 7, [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]),
        ([0] * 4, [0] * 2, 10, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MASK32] * 4, [MASK32] * 2, 10, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (PI[:4], PI[4:], 10, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)
def test_known_answers_of_the_generator(counter, key, rounds, words):
    # The known-answer vectors that the authors publish with the Random123 library.
    assert philox4x32(counter, key, rounds) == words


SEEDS = [(0, 0), (7, 0), (-1, -1), (0x123456789ABCDEF0, 0x0FEDCBA987654321), (-(2**63), 2**63 - 1)]


@pytest.mark.parametrize("seed, offset", SEEDS)
def test_keep_follows_its_definition(seed, offset):
    batch, num_heads, seqlen_q, seqlen_k, rate = 2, 3, 3, 10, 0.4
    kept = philox.keep(seed, offset, batch, num_heads, seqlen_q, seqlen_k, rate)
    assert kept.shape == (batch, num_heads, seqlen_q, seqlen_k) and kept.dtype == bool
    seed, offset = seed % 2**64, offset % 2**64
    for b, h, i, j in np.ndindex(kept.shape):
        counter = (j // 4, i, b * num_heads + h, offset & MASK32)
        word = philox4x32(counter, (seed & MASK32, seed >> 32 ^ offset >> 32))[j % 4]
        assert kept[b, h, i, j] == (word >= int(rate * 2**32)), (b, h, i, j)


@pytest.mark.parametrize("seed, offset", SEEDS)
@pytest.mark.parametrize("jit_compile", [None, False, True], ids=["eager", "graph", "xla"])
def test_keep_tensor_gives_the_same_bits(seed, offset, jit_compile):
    import tensorflow as tf
    from attn_ops.tensorflow import philox as tensorflow_philox

    def keep(seed, rows):
        return tensorflow_philox.keep(seed, 2, 3, rows, 11, 0.3)

    if jit_compile is not None:
        keep = tf.function(keep, jit_compile=jit_compile)
    expected = philox.keep(seed, offset, 2, 3, 9, 11, 0.3)
    seed = tf.constant([seed, offset], tf.int64)
    np.testing.assert_array_equal(keep(seed, tf.range(9)), expected)
    np.testing.assert_array_equal(keep(seed, tf.constant([8, 3])), expected[:, :, [8, 3]])


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0), (1, 1, 1, 1)])
def test_empty_extents(shape):
    import tensorflow as tf
    from attn_ops.tensorflow import philox as tensorflow_philox

    batch, num_heads, seqlen_q, seqlen_k = shape
    seed = tf.constant([1, 2], tf.int64)
    assert philox.keep(1, 2, *shape, 0.5).shape == shape
    assert tensorflow_philox.keep(seed, batch, num_heads, tf.range(seqlen_q), seqlen_k, 0.5).shape == shape


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.999])
def test_share_of_what_is_kept(rate):
    kept = philox.keep(3, 4, 2, 4, 128, 128, rate)
    # Five standard deviations of a binomial share.
    assert abs(kept.mean() - (1 - rate)) <= 5 * np.sqrt(rate * (1 - rate) / kept.size)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_rate_out_of_range(rate):
    with pytest.raises(ValueError, match=r"dropout: rate must be in \[0, 1\)"):
        philox.keep(0, 0, 1, 1, 1, 1, rate)

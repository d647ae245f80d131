"""The dropout mask in TensorFlow operations, which XLA compiles too."""

from __future__ import annotations

import tensorflow as tf

from attn_ops.call import philox


def keep(seed, batch, num_heads, rows, seqlen_k, rate):
    """Which attention weights dropout keeps, in TensorFlow ops; the bits of `call.philox.keep`.

    Args:
      seed: int64 tensor `[2]`: seed and offset.
      batch, num_heads, seqlen_k: extents, Python integers or int32 scalars.
      rows: integer tensor `[n]`, the query rows wanted.
      rate: Python float, probability of dropping a weight, in [0, 1).
    Returns:
      bool tensor `[batch, num_heads, n, seqlen_k]`, true where the weight is kept.
    """
    def constant(x):
        return tf.constant(x, tf.uint64)

    def low(x):
        return tf.bitwise.bitwise_and(x, constant(philox.LOW32))

    def high(x):
        return tf.bitwise.right_shift(x, constant(32))

    limit = philox.threshold(rate)
    seed = tf.cast(seed, tf.uint64)
    num_groups = (seqlen_k + 3) // 4
    heads = tf.cast(tf.reshape(tf.range(batch * num_heads), [batch, num_heads, 1, 1]), tf.uint64)
    rows = tf.cast(rows, tf.uint64)[:, None]
    groups = tf.cast(tf.range(num_groups), tf.uint64)
    words = philox.rounds(
        (groups, rows, heads, low(seed[1])),
        (low(seed[0]), tf.bitwise.bitwise_xor(high(seed[0]), high(seed[1]))),
        constant=constant,
        **philox.in_64_bits(lambda x: (high(x), low(x))),
        xor=tf.bitwise.bitwise_xor,
    )
    words = tf.reshape(tf.stack(words, axis=-1), [batch, num_heads, tf.shape(rows)[0], 4 * num_groups])
    # The words have 32 bits: as int64 they compare on every device.
    return tf.cast(words[..., :seqlen_k], tf.int64) >= limit

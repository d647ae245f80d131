"""The layers' own needs of TensorFlow; on_jax.py has the same names."""

from __future__ import annotations

import tensorflow as tf

import attn_ops
from attn_ops import philox, rematerialization

attention = attn_ops  # the module with scaled_dot_product_attention and attention_weights


def draw_seed(generator):
    """What a Keras `SeedGenerator` gives next, as a `dropout_seed`; the same again in the recomputation of a run."""
    return rematerialization.same_in_recomputation(lambda: tf.cast(generator.next(), tf.int64))


def kept(seed, shape, rate):
    """Which weights of this shape dropout keeps."""
    batch, num_heads, seqlen_q, seqlen_k = shape
    return philox.keep_tensor(seed, batch, num_heads, tf.range(seqlen_q), seqlen_k, rate)


def with_0_and_1_only(mask, message):
    """`mask`, or tf.errors.InvalidArgumentError; inside XLA always `mask`, since that drops assertions."""
    check = tf.debugging.Assert(tf.reduce_all((mask == 0) | (mask == 1)), [message, mask])
    with tf.control_dependencies([] if check is None else [check]):
        return tf.identity(mask)


def without_keras_mask(x):
    return x if getattr(x, "_keras_mask", None) is None else tf.identity(x)

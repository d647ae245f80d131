"""The layers' own needs of TensorFlow; on_jax.py has the same names."""

from __future__ import annotations

import importlib

import tensorflow as tf

import attn_ops
from attn_ops.tensorflow import choice, philox, rotary, xp  # noqa: F401  for others
from attn_ops.tensorflow import constants, place, rematerialization

attention = attn_ops  # the module with scaled_dot_product_attention and attention_weights


def decode_attention(*args, **kwargs):
    return attn_ops.decode_attention(*args, **kwargs)


def append_to_cache(*args):
    return importlib.import_module("attn_ops.tensorflow.append").append_to_cache(*args)


def attend_stacked(*args, **kwargs):
    return importlib.import_module("attn_ops.tensorflow.decode").attend_stacked(*args, **kwargs)


def expendable(cache):
    """A `KVCache` that an update may take over: any, since that leaves the old one as it is."""
    return cache


def is_ragged(x):
    return isinstance(x, tf.RaggedTensor)


def tokens(*args, **kwargs):
    """Ragged tensors as `attn_ops.layers.ragged.Tokens`."""
    from attn_ops.layers import ragged

    return ragged.tokens(*args, **kwargs)


def padded(*args):
    """Ragged tensors as `attn_ops.layers.ragged.Padded`."""
    from attn_ops.layers import ragged

    return ragged.padded(*args)


def padded_rows(*args):
    """A ragged tensor as `attn_ops.layers.ragged.PaddedRows`."""
    from attn_ops.layers import ragged

    return ragged.padded_rows(*args)


def mask_of_tokens(*args):
    from attn_ops.layers import ragged

    return ragged.mask_of_tokens(*args)


def values(x):
    """``x``, or of a ragged one `[batch, (seqlen), features]` the tokens, `[tokens, features]`."""
    return x.values if is_ragged(x) else x


def with_values(x, values):
    """``values`` in the place of those of ``x``."""
    return x.with_values(values) if is_ragged(x) else values


def draw_seed(generator):
    """What a Keras `SeedGenerator` gives next, as a `dropout_seed`; the same again in the recomputation of a run."""
    return rematerialization.same_in_recomputation(lambda: tf.cast(generator.next(), tf.int64))


def kept(seed, shape, rate):
    """Which weights of this shape dropout keeps."""
    batch, num_heads, seqlen_q, seqlen_k = shape
    return philox.keep(seed, batch, num_heads, tf.range(seqlen_q), seqlen_k, rate)


def known_values(x):
    """The values of `x` as a NumPy array, None where only the running graph knows them."""
    return constants.known_value(x)


def can_branch(*tensors):
    """Whether the data may choose between two computations with these: XLA compiles no gradient of a branch whose sizes are
    unknown."""
    return not (place.in_xla() and any(None in x.shape.as_list() for x in tensors))


def asserted(x, condition, message):
    """`x` once `condition` holds everywhere, else tf.errors.InvalidArgumentError; in XLA always, which asserts nothing."""
    with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(condition), [message])]):
        return tf.identity(x)


def without_keras_mask(x):
    return x if getattr(x, "_keras_mask", None) is None else tf.identity(x)

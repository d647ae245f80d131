"""What the rules for arguments (call/) need of TensorFlow; jax/xp.py is its twin."""

from __future__ import annotations

import tensorflow as tf

from attn_ops import namespaces
from attn_ops.tensorflow import rematerialization

FLOATS = frozenset([tf.float32, tf.bfloat16, tf.float16, tf.float64])

has_random_state = True  # `fresh_seed` is to be had

float32 = tf.float32
float64 = tf.float64
bool_ = tf.bool

cast = tf.cast
expand_dims = tf.expand_dims
logical_and = tf.logical_and
static_value = tf.get_static_value
stop_gradient = tf.stop_gradient
transpose = tf.transpose


def as_tensor(name, what, x):
    """``x`` as a dense tf.Tensor; TypeError naming ``what`` when it is something else."""
    if isinstance(x, tf.Tensor):
        return x
    if isinstance(x, tf.RaggedTensor):
        raise TypeError(
            f"{name}: {what} is a RaggedTensor; pass the dense {what}.to_tensor() and tell the lengths by "
            "query_seq_lengths and key_value_seq_lengths, or to a layer by masks"
        )
    if x is None or isinstance(x, (tf.SparseTensor, tf.IndexedSlices)):
        hint = "; tf.sparse.to_dense makes it one" if isinstance(x, tf.SparseTensor) else ""
        raise TypeError(f"{name}: {what} must be a dense tensor or an array, got {type(x).__name__}{hint}")
    try:
        return tf.convert_to_tensor(namespaces.native(x))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: {what} must be a dense tensor or an array, got {type(x).__name__}: {error}") from None


def cast_text(what):
    """How a user casts the argument ``what`` to a float."""
    return f"tf.cast({what}, tf.float32)"


def kind(x):
    """Dtype and extents of a tensor of known rank, hashable; None of everything else."""
    if not isinstance(x, tf.Tensor) or (known := extents(x)) is None:
        return None
    return (x.dtype, *known)


def extents(x):
    """The extents of ``x``, None where unknown; None when not even the rank is known."""
    try:
        return x.shape.as_list()
    except ValueError:
        return None


def extent(x, axis):
    """The extent of ``x`` along ``axis``: an integer where it is known, and an int32 scalar elsewhere."""
    known = x.shape[axis]
    return tf.shape(x)[axis] if known is None else known


def agreeing(x, other, axis, rule):
    """``x``, which has the extent of ``other`` along an axis: in a graph that does not know it before it runs,
    tf.errors.InvalidArgumentError with the ``rule`` where not. (XLA drops the check.)"""
    if isinstance(extent(x, axis), int) and isinstance(extent(other, axis), int):
        return x
    with tf.control_dependencies([tf.debugging.assert_equal(extent(x, axis), extent(other, axis), rule)]):
        return tf.identity(x)


def take_columns(x, indices):
    """The columns of ``x`` that a NumPy array of integers names."""
    return tf.gather(x, indices, axis=1)


def ensure_rank(x, rank, label):
    """``x`` of unknown rank with this one, which the running op checks."""
    return tf.ensure_shape(x, [None] * rank, name=label)


def is_floating(dtype):
    return dtype.is_floating


def is_integer(dtype):
    return dtype.is_integer


def as_int32(x):
    """Integers cast to int32. A cast would wrap values around into the valid range: clipped, they stay out of it."""
    if x.dtype == tf.int32:
        return x
    if x.dtype.size >= 4:
        x = tf.minimum(x, tf.cast(tf.int32.max, x.dtype))
        if not x.dtype.is_unsigned:
            x = tf.maximum(x, tf.cast(-1, x.dtype))
    return tf.cast(x, tf.int32)


def fresh_seed(name):
    """A random seed and offset, new at every run; the same again in the recomputation of a run."""
    return rematerialization.same_in_recomputation(
        lambda: tf.random.uniform([2], tf.int64.min, tf.int64.max, tf.int64)
    )


def seed_of_words(words):
    """Two Python integers of 64 bits as the ``seed`` of an AttentionCall."""
    return tf.constant(words, tf.int64)


def as_seed_array(name, seed):
    """A ``dropout_seed`` that is no Python integer as something with shape and dtype."""
    return as_tensor(name, "dropout_seed", seed)


def seed_of_array(seed):
    """Integers [2] as the ``seed`` of an AttentionCall."""
    return seed if seed.dtype == tf.int64 else tf.cast(seed, tf.int64)


# For rotary embeddings, and to merge.
cos, sin = tf.cos, tf.sin
exp, log, sqrt = tf.exp, tf.math.log, tf.sqrt
concat, stack, reshape = tf.concat, tf.stack, tf.reshape
int32 = tf.int32


def reshape_like(x, like):
    return tf.reshape(x, tf.shape(like))


def arange_like(count, like):
    """Integers from 0 in the dtype of ``like``, int32 if that is a Python integer."""
    return tf.range(tf.cast(count, like.dtype if tf.is_tensor(like) else tf.int32))


# For caches.
def is_tracing():
    """Whether what is done here becomes a part of a function."""
    return not tf.executing_eagerly()


def is_deleted(x):
    """Whether a function took the memory of ``x`` over; never here."""
    return False


minimum, maximum = tf.minimum, tf.maximum
int8 = tf.int8
where, zeros_like, ones_like, absolute, rounded = tf.where, tf.zeros_like, tf.ones_like, tf.abs, tf.round


def with_more_rows(x, axis, count):
    """``x`` with so many rows of zeros behind those along ``axis``."""
    return tf.pad(x, [[0, count if i == axis else 0] for i in range(x.shape.rank)])


def take_entries(x, indices):
    """The entries ``indices`` of ``x`` along the first axis."""
    return tf.gather(x, indices)


def take_along(x, indices):
    """x[b, indices[b, i]] of ``x`` [batch, n]."""
    return tf.gather(x, indices, batch_dims=1)


def take_rows(x, indices, axis):
    """The rows ``indices`` [batch, n] of ``x`` along ``axis``, of each batch entry its own."""
    return tf.gather(x, indices, axis=axis, batch_dims=1)


def highest(x):
    """The largest element along the last axis, which stays."""
    return tf.reduce_max(x, -1, keepdims=True)


def any_true(x):
    """Whether any element along the last axis is true."""
    return tf.reduce_any(x, -1)


def all_finite(x):
    """Whether all elements along the last axis, which stays, are finite."""
    return tf.reduce_all(tf.math.is_finite(x), -1, keepdims=True)

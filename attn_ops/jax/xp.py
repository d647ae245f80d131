"""What the rules for arguments (call/) need of JAX; tensorflow/xp.py is its twin."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from attn_ops import namespaces

has_random_state = False  # see `fresh_seed`

float32 = np.dtype("float32")
float64 = np.dtype("float64")
bool_ = np.dtype("bool")
FLOATS = frozenset([float32, float64, np.dtype("float16"), np.dtype(jnp.bfloat16)])

expand_dims = jnp.expand_dims
logical_and = jnp.logical_and
stop_gradient = jax.lax.stop_gradient
transpose = jnp.transpose


def as_tensor(name, what, x):
    """``x`` as a jax.Array; TypeError naming ``what`` when it cannot be one."""
    if isinstance(x := namespaces.held(x), jax.Array):
        return x
    if type(x).__name__ in ("RaggedTensor", "SparseTensor"):
        raise TypeError(f"{name}: {what} must be an array, got {type(x).__name__}; make it dense and pass the lengths")
    try:
        array = namespaces.listed(x)
        if isinstance(array, jax.Array):
            return array
        if array.dtype.kind in "OSU":
            raise TypeError(f"JAX has no arrays of {array.dtype}")
        if array.dtype.kind in "iu" and array.dtype.itemsize == 8 and not jax.config.jax_enable_x64:
            # JAX would wrap values around into the valid range: clipped, they stay out of it.
            array = np.clip(array, np.iinfo(np.int32).min, np.iinfo(np.int32).max)
        return jnp.asarray(array)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: {what} must be an array, got {type(x).__name__}: {error}") from None


def cast_text(what):
    """How a user casts the argument ``what`` to a float."""
    return f'{what}.astype("float32")'


def cast(x, dtype):
    return x.astype(dtype)


def kind(x):
    """Dtype and extents of an array, hashable; None of everything else."""
    return (x.dtype, *x.shape) if isinstance(x, jax.Array) else None


def extents(x):
    return list(x.shape)


def extent(x, axis):
    """The extent of ``x`` along ``axis``."""
    return x.shape[axis]


def agreeing(x, other, axis, rule):
    """``x``: extents are always known here, and have been compared."""
    return x


def take_columns(x, indices):
    """The columns of ``x`` that a NumPy array of integers names."""
    return x[:, indices]


def static_value(x):
    """The values of ``x`` as a NumPy array, None under a transformation that traces it."""
    return None if isinstance(x, jax.core.Tracer) else np.asarray(x)


def is_floating(dtype):
    return jnp.issubdtype(dtype, jnp.floating)


def is_integer(dtype):
    return jnp.issubdtype(dtype, jnp.integer)


def as_int32(x):
    """Integers cast to int32. A cast would wrap values around into the valid range: clipped, they stay out of it."""
    if x.dtype.itemsize >= 4 and x.dtype != np.int32:
        x = jnp.clip(x, max(-1, jnp.iinfo(x.dtype).min), np.iinfo(np.int32).max)
    return x.astype(np.int32)


def fresh_seed(name):
    raise ValueError(
        f"{name}: JAX has no hidden random state, so dropout_rate > 0 needs a dropout_seed: an integer, integers [2] or a "
        "key of jax.random"
    )


def seed_of_words(words):
    """Two Python integers of 64 bits as the ``seed`` of an AttentionCall."""
    return jnp.asarray(np.array(words, np.int64).view(np.uint32))


def as_seed_array(name, seed):
    """A ``dropout_seed`` that is no Python integer as something with shape and dtype; of a key the words it holds."""
    if not isinstance(seed := namespaces.held(seed), jax.Array):
        return namespaces.listed(seed)  # not yet JAX's, which would cut it to 32 bits
    if not jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        return seed
    data = jax.random.key_data(seed)
    return data if seed.shape or data.shape == (2,) else jax.random.bits(seed, (2,), "uint32")


def seed_of_array(seed):
    """Integers [2] as the ``seed`` of an AttentionCall."""
    if isinstance(seed, np.ndarray):
        return jnp.asarray(seed.astype(np.int64).view(np.uint32))
    wide = seed.dtype.itemsize == 8
    high = seed >> 32 if wide else jnp.where(seed < 0, -1, 0)
    low = seed & 0xFFFFFFFF if wide else seed
    return jnp.stack([low.astype(np.uint32), high.astype(np.uint32)], axis=-1).reshape(4)


# For rotary embeddings, and to merge.
cos, sin = jnp.cos, jnp.sin
exp, log, sqrt = jnp.exp, jnp.log, jnp.sqrt
concat, stack, reshape = jnp.concatenate, jnp.stack, jnp.reshape
int32 = np.dtype("int32")


def reshape_like(x, like):
    return x.reshape(like.shape)


def arange_like(count, like):
    """Integers from 0, such as ``like``."""
    return jnp.arange(count)


# For caches.
def is_tracing():
    """Whether what is done here becomes a part of a function."""
    return isinstance(jax.lax.add(0, 0), jax.core.Tracer)


def is_deleted(x):
    """Whether a function that ``x`` was donated to took its memory over."""
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_deleted()


minimum, maximum = jnp.minimum, jnp.maximum
int8 = np.dtype("int8")
where, zeros_like, ones_like, absolute, rounded = jnp.where, jnp.zeros_like, jnp.ones_like, jnp.abs, jnp.round


def with_more_rows(x, axis, count):
    """``x`` with so many rows of zeros behind those along ``axis``."""
    return jnp.pad(x, [(0, count if i == axis else 0) for i in range(x.ndim)])


def take_entries(x, indices):
    """The entries ``indices`` of ``x`` along the first axis."""
    return jnp.take(x, indices, axis=0, mode="clip")


def take_along(x, indices):
    """x[b, indices[b, i]] of ``x`` [batch, n]."""
    return jnp.take_along_axis(x, indices, 1, mode="clip")


def take_rows(x, indices, axis):
    """The rows ``indices`` [batch, n] of ``x`` along ``axis``, of each batch entry its own."""
    others = tuple(i for i in range(1, x.ndim) if i != axis)
    return jnp.take_along_axis(x, jnp.expand_dims(indices, others), axis, mode="clip")


def highest(x):
    """The largest element along the last axis, which stays."""
    return jnp.max(x, -1, keepdims=True)


def any_true(x):
    """Whether any element along the last axis is true."""
    return x.any(-1)


def all_finite(x):
    """Whether all elements along the last axis, which stays, are finite."""
    return jnp.all(jnp.isfinite(x), -1, keepdims=True)

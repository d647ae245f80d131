"""The layers' own needs of JAX; on_tensorflow.py has the same names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from attn_ops.jax import attention, choice, philox, rotary, xp  # noqa: F401  some for others
from attn_ops.jax.append import append_to_cache  # noqa: F401
from attn_ops.jax.decode import attend_stacked, decode_attention  # noqa: F401


def expendable(cache):
    """A `KVCache` that an update may take over: outside of functions a copy, since that deletes its arrays."""
    return cache if isinstance(cache.key, jax.core.Tracer) else cache.copy()


def is_ragged(x):
    return False  # JAX has none


def values(x):
    return x


def with_values(x, values):
    return values


def draw_seed(generator):
    """What a Keras `SeedGenerator` gives next, as a `dropout_seed`. JAX recomputes what it traced, with this seed."""
    return generator.next()


def kept(seed, shape, rate):
    """Which weights of this shape dropout keeps."""
    batch, num_heads, seqlen_q, seqlen_k = shape
    return philox.keep(xp.seed_of_array(seed), batch, num_heads, jnp.arange(seqlen_q), seqlen_k, rate)


def known_values(x):
    """The values of `x` as a NumPy array, None where only the compiled function knows them."""
    if not isinstance(x, jax.core.Tracer):
        return np.asarray(x)
    try:  # a constant of the function that is traced, as which Keras hands over a NumPy array
        value = x._trace.frame.constvar_to_val.get(x.val)
    except AttributeError:  # JAX keeps this to itself
        return None
    return None if value is None or isinstance(value, jax.core.Tracer) else np.asarray(value)


def can_branch(*tensors):
    """Whether the data may choose between two computations with these."""
    return True


def asserted(x, condition, message):
    """`x`: JAX asserts nothing in what it compiles."""
    return x


def without_keras_mask(x):
    # Keras keeps the masks of arrays by their identity; compiled, the copy costs nothing.
    return jnp.array(x, copy=True)

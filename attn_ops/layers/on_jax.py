"""The layers' own needs of JAX; on_tensorflow.py has the same names."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import attn_ops.jax
from attn_ops import philox
from attn_ops.jax import tensors

attention = attn_ops.jax  # the module with scaled_dot_product_attention and attention_weights


def draw_seed(generator):
    """What a Keras `SeedGenerator` gives next, as a `dropout_seed`. JAX recomputes what it traced, with this seed."""
    return generator.next()


def kept(seed, shape, rate):
    """Which weights of this shape dropout keeps."""
    batch, num_heads, seqlen_q, seqlen_k = shape
    return philox.keep_jax(tensors.seed_of_array(seed), batch, num_heads, jnp.arange(seqlen_q), seqlen_k, rate)


def with_0_and_1_only(mask, message):
    """`mask`, or ValueError; under a transformation that traces it (`jit`, and so `fit`) always `mask`."""
    if not isinstance(mask, jax.core.Tracer) and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{message} {mask}")
    return mask


def without_keras_mask(x):
    # Keras keeps the masks of arrays by their identity; compiled, the copy costs nothing.
    return jnp.array(x, copy=True)

"""Calls of JAX with a cache: `cached_calls` in every form that a function has there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_ops.jax
from cached_calls import BATCH, DIM, KV_HEADS, MAX_LENGTH, VALUE_DIM

TWO = (15, *[1] * 8)  # parts of two lengths: each is a function to compile
FORMS = {"eager": lambda f: f, "jit": functools.partial(jax.jit, donate_argnums=1)}
each_form = pytest.mark.parametrize("form", FORMS)
each_layout = pytest.mark.parametrize("layout", ["BSHD", "BHSD"])


def new_cache(dtype, batch=BATCH, length=MAX_LENGTH, **named):
    return attn_ops.jax.KVCache.create(batch, length, KV_HEADS, DIM, dtype, value_dim=VALUE_DIM, framework="jax", **named)


def array(x):
    return jnp.asarray(x, "float32")


def step_of(form, **options):
    return FORMS[form](lambda q, cache, k, v: attn_ops.jax.decode_attention(q, cache, k, v, **options))


def in_scan(cache, rows):
    """The cache and out after all ``rows`` (q, k, v) [batch, tokens, heads, dim], one at a time in `jax.lax.scan`."""
    rows = [jnp.moveaxis(array(x), 1, 0)[:, :, None] for x in rows]

    @jax.jit
    def run(cache, rows):
        def step(cache, row):
            q, k, v = row
            out, cache = attn_ops.jax.decode_attention(q, cache, k, v)
            return cache, out[:, 0]

        cache, outs = jax.lax.scan(step, cache, rows)
        return cache, jnp.moveaxis(outs, 0, 1)

    return run(cache, rows)


def close(found, right, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(found, np.float64), right, rtol=0, atol=tolerance)

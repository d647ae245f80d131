"""Calls of TensorFlow with a cache: `cached_calls` in every form that a function has there."""

import pytest
import tensorflow as tf

import attn_ops
from cached_calls import BATCH, DIM, KV_HEADS, MAX_LENGTH, VALUE_DIM

FORMS = {
    "eager": lambda f: f,
    "graph": lambda f: tf.function(f, autograph=False),
    "xla": lambda f: tf.function(f, autograph=False, jit_compile=True),
}
each_form = pytest.mark.parametrize("form", FORMS)
each_layout = pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
TWO = (15, *[1] * 8)  # parts of two lengths: each is a function to compile


def new_cache(dtype, batch=BATCH, length=MAX_LENGTH, **named):
    return attn_ops.KVCache.create(batch, length, KV_HEADS, DIM, dtype, value_dim=VALUE_DIM, **named)


def step_of(form, **options):
    return FORMS[form](lambda q, cache, k, v: attn_ops.decode_attention(q, cache, k, v, **options))

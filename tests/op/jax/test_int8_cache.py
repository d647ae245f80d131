"""Caches of JAX arrays in int8, and in 16 bits beside queries in float32: as tensorflow/test_int8_cache.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_ops.jax
import jax_caches
import int8_rows
from cached_calls import (
    HEADS, KEY, KV_HEADS, OPTIONS, QUERY, TOKENS, VALUE, in_parts,
)  # fmt: skip
from jax_caches import TWO, array, close, each_form, each_layout, in_scan, step_of

new_cache = functools.partial(jax_caches.new_cache, dtype="int8")


@pytest.mark.wide(80)
@pytest.mark.parametrize("forced", [None, "composite"])
@pytest.mark.parametrize("name", OPTIONS)
@each_layout
@each_form
def test_options(form, layout, name, forced):
    options = {what: array(x) if what == "bias" else x for what, x in OPTIONS[name][0].items()}
    out, cache = in_parts(step_of(form, implementation=forced, **options), new_cache(layout=layout), layout, TWO, array)
    close(out, int8_rows.whole(name))
    int8_rows.holds(cache, TOKENS, layout)


@pytest.mark.wide(12)
@pytest.mark.parametrize("window", [1, 5, 40])
@each_layout
@each_form
def test_window(form, layout, window, monkeypatch):
    for module in ("cache", "growth", "decode"):
        monkeypatch.setattr(f"attn_ops.generation.{module}.step", lambda window: 3)
    cache = new_cache(window=window, layout=layout, length=1000)
    out, _ = in_parts(step_of(form), cache, layout, (5, *[2] * 9), array)
    close(out, int8_rows.whole("plain", window=window))


def test_scan():
    cache, out = in_scan(new_cache(), (QUERY, KEY, VALUE))
    close(out, int8_rows.whole("plain"))
    int8_rows.holds(cache, TOKENS)


@pytest.mark.wide(2)
@pytest.mark.parametrize("forced", [None, "composite"])
def test_a_row_that_is_no_number_is_not_lost(forced):
    key = np.array(KEY)
    key[0, 3, 0, 2] = np.nan
    out, cache = step_of("jit", implementation=forced)(array(QUERY[:, :6]), new_cache(), array(key[:, :6]), array(VALUE[:, :6]))
    right = np.array(int8_rows.whole("plain")[:, :6])
    right[0, 3:, : HEADS // KV_HEADS] = np.nan
    close(out, right)
    assert np.isnan(cache.key_scale[0, 3, 0])


def test_memory_is_taken_over_and_a_copy_is_not():
    first = new_cache()
    copy = first.copy()
    addresses = [x.unsafe_buffer_pointer() for x in first.memory]
    second = first.update(array(KEY[:, :4]), array(VALUE[:, :4]))
    assert [x.unsafe_buffer_pointer() for x in second.memory] == addresses
    with pytest.raises(ValueError, match="this cache was taken over by an earlier update"):
        first.update(array(KEY[:, :2]), array(VALUE[:, :2]))
    assert not copy.key_scale.any()
    int8_rows.holds(second.rewind(2).update(array(KEY[:, 2:3]), array(VALUE[:, 2:3])), 3)


def test_structure():
    cache = new_cache(layout="BHSD", window=3)
    assert len(jax.tree_util.tree_leaves(cache)) == 5
    again = jax.jit(lambda cache: cache)(cache)
    assert type(again) is type(cache) and again.layout == "BHSD"
    with pytest.raises(ValueError, match="dtype must be float16, bfloat16, float32, float64 or int8, got int16"):
        new_cache(dtype="int16")


@pytest.mark.wide(4)
@pytest.mark.parametrize("forced", [None, "composite"])
@pytest.mark.parametrize("kept", ["float16", "bfloat16"])
def test_queries_are_not_rounded_to_the_cache(kept, forced):
    out, cache = in_parts(step_of("jit", implementation=forced), new_cache(dtype=kept), parts=TWO, array=array)
    assert out.dtype == np.float32 and cache.key.dtype == kept
    key, value = (np.asarray(jnp.asarray(x, "float32").astype(kept).astype("float32")) for x in (KEY, VALUE))
    close(out, attn_ops.reference.attention(QUERY, key, value, is_causal=True)[0])


@pytest.mark.parametrize("kept", ["int8", "bfloat16"])
def test_queries_have_no_gradient(kept):
    cache = new_cache(dtype=kept).update(array(KEY[:, :4]), array(VALUE[:, :4]))
    with pytest.raises(NotImplementedError, match="attention to a cache is for generation, and has no gradient"):
        jax.grad(lambda q: attn_ops.jax.decode_attention(q, cache, implementation="fused")[0].sum())(array(QUERY[:, :1]))

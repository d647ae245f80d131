"""Caches in int8, and others of another dtype than the queries, in TensorFlow. What int8 keeps is by its definition
(helpers/int8_rows.py), the same bits in every form; attending to it gives what the specification gives for that."""

import functools

import numpy as np
import pytest
import tensorflow as tf

import attn_ops
import int8_rows
import tensorflow_caches
from attn_ops import kernels
from attn_ops.call import attention_call
from attn_ops.tensorflow import append
from cached_calls import (
    BATCH, DIM, HEADS, KEY, KV_HEADS, MAX_LENGTH, OPTIONS, QUERY, TOKENS, VALUE, VALUE_DIM, in_parts, whole,
)  # fmt: skip
from tensorflow_caches import FORMS, TWO, each_form, each_layout, step_of

new_cache = functools.partial(tensorflow_caches.new_cache, dtype="int8")


def single(x):
    return tf.constant(x, tf.float32)


def address(tensor):
    return np.asarray(memoryview(tensor)).__array_interface__["data"][0]


def close(found, right, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(found, np.float64), right, rtol=0, atol=tolerance)


@pytest.mark.wide(60)
@pytest.mark.parametrize("forced", [None, "composite", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
@each_layout
@each_form
def test_options(form, layout, name, forced):
    if form == "xla" and forced == "reference":
        pytest.skip("NumPy")
    options = {what: single(x) if what == "bias" else x for what, x in OPTIONS[name][0].items()}
    out, cache = in_parts(step_of(form, **options, implementation=forced), new_cache(layout=layout), layout, TWO, single)
    close(out, int8_rows.whole(name))
    assert cache.lengths.numpy().tolist() == [TOKENS] * BATCH
    int8_rows.holds(cache, TOKENS, layout)
    if name == "plain":
        assert 0 < np.abs(out - whole(name)).max() < int8_rows.error_bound(QUERY, KEY, VALUE, DIM**-0.5)


@pytest.mark.wide(18)
@pytest.mark.parametrize("window", [1, 5, 40])
@each_layout
@each_form
def test_window(form, layout, window, monkeypatch):
    """Scales make way with their rows."""
    for module in ("cache", "growth", "decode"):
        monkeypatch.setattr(f"attn_ops.generation.{module}.step", lambda window: 3)
    cache = new_cache(window=window, layout=layout, length=1000)
    assert cache.rows == window + 6 and cache.key_scale.shape[1 if layout == "BSHD" else 2] == cache.rows
    parts = (5, 1, 1, 3, 4, 1, 2, 3, 1, 1, 1) if form == "eager" else (5, *[2] * 9)
    close(in_parts(step_of(form), cache, layout, parts, single)[0], int8_rows.whole("plain", window=window))


@pytest.mark.wide(3)
@each_form
def test_loop(form):
    query, key, value = map(single, (QUERY, KEY, VALUE))

    def run():
        first, cache = attn_ops.decode_attention(query[:, :5], new_cache(), key[:, :5], value[:, :5])

        def body(i, cache, out):
            q, k, v = (x[:, i : i + 1] for x in (query, key, value))
            o, cache = attn_ops.decode_attention(q, cache, k, v)
            at = tf.stack([tf.range(BATCH), tf.fill([BATCH], i)], 1)
            return i + 1, cache, tf.tensor_scatter_nd_update(out, at, o[:, 0])

        rest = tf.zeros([BATCH, TOKENS, HEADS, VALUE_DIM])
        _, cache, out = tf.while_loop(lambda i, *_: i < TOKENS, body, (5, cache, rest), maximum_iterations=TOKENS)
        return tf.concat([first, out[:, 5:]], 1), cache

    out, cache = FORMS[form](run)()
    close(out, int8_rows.whole("plain"))
    int8_rows.holds(cache, TOKENS)


@pytest.mark.wide(12)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@each_layout
@each_form
def test_scattered_rows_have_the_bits_of_the_operator(form, layout, dtype, monkeypatch):
    """Of every dtype of new rows, padding, and rows that are no numbers."""
    if form != "xla":
        monkeypatch.setattr(append, "only_scatters", lambda: True)
    k, v = (np.array(x[:, :4].swapaxes(1, 2) if layout == "BHSD" else x[:, :4]) for x in (KEY, VALUE))
    k[1, 1, 0, 3], v[0, 1, 0, 0], k[0, 0, 1] = np.nan, np.inf, 0
    k, v = (tf.cast(x, dtype) for x in (k, v))
    counts = [4, 2]
    update = FORMS[form](lambda cache, k, v: cache.update(k, v, counts).update(k, v, [1, 0]))
    cache = update(new_cache(layout=layout), k, v)
    monkeypatch.undo()
    native = new_cache(layout=layout).update(k, v, counts).update(k, v, [1, 0])
    for name in ("key", "value", "key_scale", "value_scale", "lengths"):
        found, right = getattr(cache, name).numpy(), getattr(native, name).numpy()
        for b, n in enumerate((5, 2) if name != "lengths" else ()):
            axis = 0 if layout == "BSHD" else 1
            np.testing.assert_array_equal(found[b].take(range(n), axis), right[b].take(range(n), axis))
    integers, scales = int8_rows.quantized(k)
    np.testing.assert_array_equal(native.key.numpy()[0].take(range(4), axis), integers[0].take(range(4), axis))
    np.testing.assert_array_equal(native.key_scale.numpy()[0].take(range(4), axis), scales[0].take(range(4), axis))
    assert np.isnan(native.value_scale.numpy()).any() and native.lengths.numpy().tolist() == [5, 2]


@pytest.mark.wide(6)
@pytest.mark.parametrize("forced", [None, "composite"])
@each_form
def test_a_row_that_is_no_number_is_not_lost(form, forced):
    key = np.array(KEY)
    key[0, 3, 0, 2] = np.inf
    rows = [single(x[:, :6]) for x in (QUERY, key, VALUE)]
    out, cache = step_of(form, implementation=forced)(rows[0], new_cache(), *rows[1:])
    right = np.array(int8_rows.whole("plain")[:, :6])
    right[0, 3:, : HEADS // KV_HEADS] = np.nan
    close(out, right)
    assert np.isnan(cache.key_scale[0, 3, 0]) and not cache.key[0, 3, 0].numpy().any()


def test_values_stay_values():
    """An update of an older cache, a copy, and what was tried and not taken."""
    first = new_cache().update(single(KEY[:, :10]), single(VALUE[:, :10]))
    memory = [x.numpy() for x in first]
    _, tried = attn_ops.decode_attention(-single(QUERY[:, :4]), first, -single(KEY[:, :4]), -single(VALUE[:, :4]))
    copy = tried.copy()
    for start in (first, tried.rewind(10), copy.rewind([10, 10])):
        rows = [single(x[:, 10:15]) for x in (QUERY, KEY, VALUE)]
        out, cache = attn_ops.decode_attention(rows[0], start, *rows[1:])
        close(out, int8_rows.whole("plain")[:, 10:15])
        int8_rows.holds(cache, 15)
    for x, before in zip(first[:2], memory):
        np.testing.assert_array_equal(x[:, :10], before[:, :10])
    for x in tried[4:] + tried[:2]:
        assert x.numpy()[:, 10:14].any()


@pytest.mark.skipif(kernels.unavailable_reason() is not None, reason="no compiled library")
def test_a_token_is_written_in_place():
    row = single(KEY[:, 3:4]), single(VALUE[:, 3:4])
    cache = new_cache().update(single(KEY[:, :3]), single(VALUE[:, :3]))
    places = [address(x) for x in cache.memory]
    assert [address(x) for x in cache.update(*row).memory] == places
    assert not set(places) & {address(x) for x in cache.update(*row).memory}  # its rows are taken: a copy


def test_structure():
    cache = new_cache(layout="BHSD", window=3, length=100)
    flat = tf.nest.flatten(cache)
    assert len(flat) == 6 and cache.memory[2].shape == cache.key.shape[:3]
    again = tf.nest.pack_sequence_as(cache, flat)
    assert type(again) is type(cache) and again.layout == "BHSD" and again.window == 3
    assert isinstance(cache, attn_ops.KVCache) and cache.key.dtype == "int8"
    function, arguments = cache.__reduce__()
    assert type(function(*arguments)) is type(cache)
    assert new_cache(dtype="float32").key_scale is None and len(new_cache(dtype="float32")) == 4


@pytest.mark.wide(9)
@pytest.mark.parametrize("forced", [None, "composite", "reference"])
@pytest.mark.parametrize("kept", ["float16", "bfloat16"])
@each_form
def test_queries_are_not_rounded_to_the_cache(form, kept, forced):
    """What the specification gives for the queries as they are, and the keys and values that the cache keeps."""
    if form == "xla" and forced == "reference":
        pytest.skip("NumPy")
    out, cache = in_parts(step_of(form, implementation=forced), new_cache(dtype=kept), parts=TWO, array=single)
    assert out.dtype == np.float32 and cache.key.dtype == kept
    key, value = (tf.cast(tf.cast(x, kept), tf.float64).numpy() for x in (KEY, VALUE))
    close(out, attn_ops.reference.attention(QUERY, key, value, is_causal=True)[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_queries_of_every_dtype(dtype):
    out, _ = in_parts(step_of("eager"), new_cache(), array=lambda x: tf.constant(x, dtype))
    assert out.dtype == dtype
    q, k, v = (tf.cast(x, dtype).numpy().astype("float64") for x in (QUERY, KEY, VALUE))
    k, v = (int8_rows.meant(*int8_rows.quantized(x)) for x in (k, v))
    right, _ = attn_ops.reference.attention(q, k, v, is_causal=True)
    close(out, right, {"float16": 2e-3, "bfloat16": 0.02, "float64": 2e-5}[dtype])


BAD = {
    "a dtype": (lambda: new_cache(dtype="uint8"), ValueError, "dtype must be float16, bfloat16, float32, float64 or int8, got uint8"),
    "integers": (lambda: new_cache().update(np.ones((2, 1, 2, 8), "int8"), VALUE[:, :1]), TypeError, "k_new must be floating, got int8"),
    "a full one": (lambda: new_cache(length=4).update(KEY[:, :5], VALUE[:, :5]), ValueError, "the cache is full"),
    "no scales": (
        lambda: attn_ops.KVCache(*new_cache()[:4]).update(KEY[:, :1], VALUE[:, :1]),
        TypeError,
        "or int8 of KVCache.create",
    ),
    "other scales": (
        lambda: new_cache()._replace(key_scale=tf.ones([BATCH, 3, KV_HEADS])).update(KEY[:, :1], VALUE[:, :1]),
        ValueError,
        "cache.key_scale must have the shape of the keys without their last axis",
    ),
    "scales of another dtype": (
        lambda: new_cache()._replace(value_scale=tf.ones([BATCH, MAX_LENGTH, KV_HEADS], tf.float64)).rewind(0),
        TypeError,
        "keys and values in int8 have scales in float32, got int8 and cache.value_scale in float64",
    ),
    "scales without integers": (
        lambda: new_cache()._replace(key=tf.ones([BATCH, MAX_LENGTH, KV_HEADS, DIM]), value=tf.ones([BATCH, MAX_LENGTH, KV_HEADS, DIM])).rewind(0),
        TypeError,
        "keys and values in int8 have scales in float32, got float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name):
    run, error, message = BAD[name]
    with pytest.raises(error, match=message):
        run()


def test_there_is_no_gradient():
    cache = new_cache().update(single(KEY), single(VALUE))
    query = single(QUERY)
    with tf.GradientTape() as tape:
        tape.watch(query)
        out, _ = attn_ops.decode_attention(query, cache)
    if attn_ops.can_use_fused(query, single(KEY), single(VALUE)):
        with pytest.raises(NotImplementedError, match="is for generation, and has no gradient"):
            tape.gradient(out, query)


@pytest.mark.parametrize("name", ["MultiHeadAttention", "GroupedQueryAttention"])
def test_layers(name):
    make = {
        "MultiHeadAttention": lambda: attn_ops.layers.MultiHeadAttention(4, 8),
        "GroupedQueryAttention": lambda: attn_ops.layers.GroupedQueryAttention(8, 4, 4),
    }
    x = np.random.default_rng(3).standard_normal((2, 9, 12)).astype("float32")
    layer = make[name]()
    right = layer(x, x, use_causal_mask=True)
    cache, outs = attn_ops.KVCache.create(2, 9, 4, 8, "int8"), []
    for at in (slice(0, 4), slice(4, 5), slice(5, 9)):
        out, cache = layer(x[:, at], x[:, at], cache=cache)
        outs.append(out)
    assert cache.key.dtype == "int8"
    # 1/254 of the largest of a row is lost, at most, of keys and values of the order of 1.
    assert 0 < np.abs(np.concatenate(outs, 1) - right).max() < 0.03


@pytest.mark.parametrize("kept, dtype", [("int8", "float32"), ("bfloat16", "float16"), ("float32", "float16")])
def test_kernels_of_gpus_do_not_read_them(kept, dtype):
    query, key = tf.zeros([1, 1, HEADS, DIM], dtype), tf.zeros([1, 4, KV_HEADS, DIM], kept)
    call = attention_call.AttentionCall(query, key, key)
    assert attention_call.beyond_cuda(call) == f"its kernels do not have keys of {kept} beside queries of {dtype}"


def test_kernels_of_gpus_read_narrow_keys_beside_float32():
    query, key = tf.zeros([1, 1, HEADS, DIM]), tf.zeros([1, 4, KV_HEADS, DIM], "bfloat16")
    assert attention_call.beyond_cuda(attention_call.AttentionCall(query, key, key)) is None

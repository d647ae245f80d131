"""attn_ops.decode_attention: rows in parts, with a cache, are the rows of one causal attention over the whole
sequence."""

import functools

import numpy as np
import pytest
import tensorflow as tf

import attn_ops
import tensorflow_caches
from attn_ops import kernels
from attn_ops.tensorflow import decode
from cached_calls import (
    BATCH, DIM, HEADS, KEY, KV_HEADS, MAX_LENGTH, OPTIONS, QUERY, TOKENS, VALUE, VALUE_DIM, in_parts, laid_out, turned, whole,
)  # fmt: skip
from tensorflow_caches import FORMS, TWO, each_form, each_layout, step_of

new_cache = functools.partial(tensorflow_caches.new_cache, dtype=tf.float64)
LARGEST_ERROR = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 0.1}


def close(found, right, dtype="float64"):
    np.testing.assert_allclose(np.asarray(found, np.float64), right, rtol=0, atol=LARGEST_ERROR[dtype])


@pytest.mark.wide(24)
@pytest.mark.parametrize("forced", [None, "composite"])
@pytest.mark.parametrize("name", OPTIONS)
@each_layout
@each_form
def test_options(form, layout, name, forced):
    step = step_of(form, **OPTIONS[name][0], implementation=forced)
    out, cache = in_parts(step, new_cache(layout=layout), layout, TWO, tf.constant)
    close(out, whole(name))
    assert cache.lengths.numpy().tolist() == [TOKENS] * BATCH


@pytest.mark.wide(3)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@each_form
def test_cache_of_another_dtype(form, dtype):
    """The output has that of the queries."""
    out, cache = in_parts(step_of(form), new_cache(dtype=dtype), parts=TWO, array=tf.constant)
    assert cache.key.dtype == dtype and out.dtype == np.float64
    close(out, whole("plain"), dtype)


@pytest.mark.wide(3)
@each_layout
@each_form
def test_rotary(form, layout):
    out, cache = in_parts(step_of(form, rotary=True), new_cache(layout=layout), layout, TWO, tf.constant)
    close(out, whole("plain", rotary=True), "float32")
    close(laid_out(cache.key.numpy(), layout)[:, :TOKENS], turned(KEY), "float32")


@pytest.mark.wide(27)
@pytest.mark.parametrize("name", ["plain", "slopes", "relative bias"])
@pytest.mark.parametrize("window", [1, 5, 40])
@each_layout
@each_form
def test_window(form, layout, window, name, monkeypatch):
    """Of which memory is bounded by the window, with as many new rows as make way at a time, more, and fewer."""
    from attn_ops.generation import cache as caches

    monkeypatch.setattr(caches, "step", lambda window: 3)  # also in growth, decode
    monkeypatch.setattr("attn_ops.generation.growth.step", lambda window: 3)
    monkeypatch.setattr("attn_ops.generation.decode.step", lambda window: 3)
    cache = new_cache(window=window, layout=layout, length=1000)
    assert cache.rows == window + 6 and cache.max_length == 2**30
    parts = (5, 1, 1, 3, 4, 1, 2, 3, 1, 1, 1) if form == "eager" else (5, *[2] * 9)
    out, _ = in_parts(step_of(form, **OPTIONS[name][0]), cache, layout, parts, tf.constant)
    close(out, whole(name, window=window))


def test_window_of_a_cache_that_need_not_roll():
    cache = new_cache(window=4)
    assert cache.rows == MAX_LENGTH == cache.max_length
    close(in_parts(step_of("eager"), cache)[0], whole("plain", window=4))
    narrower = in_parts(step_of("eager", window=(1, 0)), cache)[0]
    close(narrower, whole("plain", window=2))


@pytest.mark.wide(2)
@each_form
def test_prompts_of_different_lengths(form):
    """Padded at their ends: what is padding is not appended, and its rows are 0."""
    prompts = [3, 7]
    step = FORMS[form](lambda q, cache, k, v, n=None: attn_ops.decode_attention(q, cache, k, v, query_seq_lengths=n))
    right = whole("plain")
    out, cache = step(QUERY[:, :7], new_cache(), KEY[:, :7], VALUE[:, :7], tf.constant(prompts))
    for b, n in enumerate(prompts):
        close(out[b, :n], right[b, :n])
        assert not out[b, n:].numpy().any()
    assert cache.lengths.numpy().tolist() == prompts
    for _ in range(3):
        at = cache.lengths.numpy()
        rows = (x[np.arange(BATCH), at][:, None] for x in (QUERY, KEY, VALUE))
        q, k, v = rows
        out, cache = step(q, cache, k, v)
        close(out[:, 0], right[np.arange(BATCH), at])


@pytest.mark.wide(2)
@each_form
def test_loop(form):
    """A prompt, and then a token at a time in tf.while_loop."""
    query, key, value = (tf.constant(x) for x in (QUERY, KEY, VALUE))

    def run():
        first = attn_ops.decode_attention(query[:, :5], new_cache(), key[:, :5], value[:, :5])

        def body(i, cache, out):
            q, k, v = (x[:, i : i + 1] for x in (query, key, value))
            o, cache = attn_ops.decode_attention(q, cache, k, v)
            at = tf.stack([tf.range(BATCH), tf.fill([BATCH], i)], 1)
            return i + 1, cache, tf.tensor_scatter_nd_update(out, at, o[:, 0])

        rest = tf.zeros([BATCH, TOKENS, HEADS, VALUE_DIM], tf.float64)
        out = tf.while_loop(lambda i, *_: i < TOKENS, body, (5, first[1], rest), maximum_iterations=TOKENS)[2]
        return tf.concat([first[0], out[:, 5:]], 1)

    close(FORMS[form](run)(), whole("plain"))


@pytest.mark.wide(2)
@pytest.mark.parametrize("form", ["graph", "xla"])
def test_unknown_lengths(form):
    """One function for prompts, parts and tokens."""
    specs = [tf.TensorSpec([BATCH, None, heads, dim], tf.float64) for heads, dim in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))]
    step = tf.function(
        lambda q, k, v, cache: attn_ops.decode_attention(q, cache, k, v),
        autograph=False,
        jit_compile=form == "xla",
        input_signature=[*specs, attn_ops.KVCache(*(tf.TensorSpec(x.shape, x.dtype) for x in new_cache()))],
    )
    close(in_parts(lambda q, cache, k, v: step(q, k, v, cache), new_cache(), array=tf.constant)[0], whole("plain"))


@pytest.mark.wide(2)
@each_form
def test_keys_and_values_in_one_tensor(form):
    """KerasHub's cache, which the kernels read where it lies."""

    def step(q, cache, k, v):
        cache, at = cache
        out, cache = decode.attend_stacked(q, cache, k, v, at, logits_soft_cap=2.0, scale=0.5)
        return out, (cache, at + tf.shape(q)[1])

    value = np.concatenate([VALUE, VALUE[..., :2]], -1)  # as wide as the keys
    run = FORMS[form](step)
    cache, outs, at = (tf.zeros([BATCH, 2, MAX_LENGTH, KV_HEADS, DIM], tf.float64), tf.constant(0)), [], 0
    for count in TWO:
        out, cache = run(tf.constant(QUERY[:, at : at + count]), cache, *(tf.constant(x[:, at : at + count]) for x in (KEY, value)))
        outs.append(out)
        at += count
    close(np.concatenate(outs, 1)[..., :VALUE_DIM], whole("scale and cap"))


@pytest.mark.skipif(kernels.unavailable_reason() is not None, reason="no compiled library")
def test_keys_and_values_in_one_tensor_have_no_gradient():
    key = tf.zeros([1, 4, 1, 2])
    with tf.GradientTape() as tape:
        tape.watch(key)
        out = kernels.library().attn_ops_forward(key[:, :1], key, key, *[[]] * 12, halves=True)[0]
    with pytest.raises(NotImplementedError, match="keys and values in one tensor has no gradient"):
        tape.gradient(out, key)


def test_rows_that_are_there_already():
    """Without new keys, the rows are the last ones; as in cross-attention, they have no place."""
    cache = new_cache().update(KEY, VALUE)
    out, same = attn_ops.decode_attention(QUERY[:, -4:], cache)
    close(out, whole("plain")[:, -4:])
    assert same.lengths.numpy().tolist() == [TOKENS] * BATCH
    out, lse, _ = attn_ops.decode_attention(QUERY, new_cache().update(KEY[:, :3], VALUE[:, :3]), is_causal=False, return_lse=True)
    right, right_lse = attn_ops.reference.attention(QUERY, KEY[:, :3], VALUE[:, :3])
    close(out, right)
    close(lse, right_lse)


def test_speculation():
    """Tokens that are tried and not taken leave no trace."""
    cache = new_cache().update(KEY[:, :10], VALUE[:, :10])
    _, tried = attn_ops.decode_attention(-QUERY[:, :4], cache, -KEY[:, :4], -VALUE[:, :4])
    for start in (cache, tried.rewind([10, 10])):
        out, _ = attn_ops.decode_attention(QUERY[:, 10:15], start, KEY[:, 10:15], VALUE[:, 10:15])
        close(out, whole("plain")[:, 10:15])


@pytest.mark.parametrize("form", ["eager", "graph"])
def test_rewind_takes_one_length_for_all(form):
    cache = new_cache().update(KEY[:, :3], VALUE[:, :3])
    rewind = (lambda cache, n: cache.rewind(n)) if form == "eager" else tf.function(lambda cache, n: cache.rewind(n), autograph=False)
    for n in (2, np.array(2), tf.constant(2), tf.constant([2] * BATCH)):
        assert rewind(cache, n).lengths.numpy().tolist() == [2] * BATCH
    if form == "graph":  # what only the running op knows stays within what there is
        assert rewind(cache, tf.constant([-1, 9])).lengths.numpy().tolist() == [0, 3]
    with pytest.raises(TypeError, match="rewind: lengths must be a dense tensor or an array, got NoneType"):
        cache.rewind(None)


def test_saved_models_take_and_give_a_cache(tmp_path):
    module = tf.Module()
    cache = new_cache()
    module.step = tf.function(
        lambda q, cache, k, v: attn_ops.decode_attention(q, cache, k, v, implementation="composite"),
        autograph=False,
        input_signature=[
            tf.TensorSpec([BATCH, 1, HEADS, DIM], tf.float64),
            attn_ops.KVCache(*(tf.TensorSpec(x.shape, x.dtype) for x in cache)),
            tf.TensorSpec([BATCH, 1, KV_HEADS, DIM], tf.float64),
            tf.TensorSpec([BATCH, 1, KV_HEADS, VALUE_DIM], tf.float64),
        ],
    )
    tf.saved_model.save(module, str(tmp_path))
    step = tf.saved_model.load(str(tmp_path)).step
    out, cache = in_parts(step, cache, parts=(1,) * 3, array=tf.constant)
    close(out, whole("plain")[:, :3])


BAD = {
    "no cache": ({"cache": 3}, TypeError, "cache must be an attn_ops.KVCache, got int"),
    "a shape": ({"q": QUERY[:, :2, :, :4]}, ValueError, r"q must have shape \(2, rows, num_heads, 8\)"),
    "heads": ({"q": QUERY[:, :1, :3], "k_new": KEY[:, :1], "v_new": VALUE[:, :1]}, ValueError, r"num_heads \(3\) must be a multiple of num_kv_heads \(2\)"),
    "integers": ({"q": np.ones((2, 2, 4, 8), int)}, TypeError, "q must be floating, got int64"),
    "other rows": ({"q": QUERY[:, :3]}, ValueError, "there must be as many new keys as rows of q, got 2 and 3"),
    "no values": ({"v_new": None}, ValueError, "k_new and v_new come together, and v_new is None"),
    "a full cache": (
        {"q": QUERY[:, :5], "k_new": KEY[:, :5], "v_new": VALUE[:, :5]},
        ValueError,
        "the cache is full: sequence 0 has 3 of 4 positions, and 5 more do not fit",
    ),
    "lengths": ({"lengths": [2, 5]}, ValueError, "cache.lengths must be between 0 and 4, got 5"),
    "rows before the first": (
        {"k_new": None, "v_new": None, "q": QUERY[:, :4]},
        ValueError,
        r"the rows of q are the last ones of the cache, which has \[3, 3\] positions, and there are 4 rows",
    ),
    "an option": ({"query_offset": 3}, TypeError, "query_offset"),
    "rotary": ({"rotary": 7}, TypeError, "rotary must be None, True or a dict"),
    "a wider window": ({"window": 2, "options": {"window": (4, 0)}}, ValueError, "the cache keeps 2 keys of a row"),
    "no order": ({"window": 2, "options": {"is_causal": False}}, ValueError, "a cache with a window is causal"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_and_changes_nothing(name):
    given, error, message = BAD[name]
    given = dict(given)
    cache = new_cache(length=4, window=given.pop("window", None)).update(KEY[:, :3], VALUE[:, :3])
    before = [x.numpy() for x in cache]
    changed = cache._replace(lengths=given.pop("lengths", cache.lengths))
    given = {"cache": changed, "q": QUERY[:, :2], "k_new": KEY[:, :2], "v_new": VALUE[:, :2], **given.pop("options", {}), **given}
    with pytest.raises(error, match=message):
        attn_ops.decode_attention(given.pop("q"), given.pop("cache"), **given)
    assert all((x.numpy() == right).all() for x, right in zip(cache, before))  # `written` too


def test_options_by_position_are_refused_where_old_keys_make_way():
    cache = new_cache(window=2, length=1000)
    for options in ({"bias": np.zeros((1, 1, 1, cache.rows))}, {"mask": np.ones((1, cache.rows), bool)}):
        with pytest.raises(ValueError, match="goes by the positions of keys"):
            attn_ops.decode_attention(QUERY[:, :1], cache, KEY[:, :1], VALUE[:, :1], **options)
    for mask in (attn_ops.masks.causal(), [attn_ops.masks.causal(), attn_ops.masks.window(1, 0)]):
        attn_ops.decode_attention(QUERY[:, :1], cache, KEY[:, :1], VALUE[:, :1], mask=mask)


@pytest.mark.parametrize("dtype", ["float64", "int8"])
def test_one_function_for_caches_of_any_length(dtype):
    """Of which the memory is of unknown length where it is traced; that of one with a window tells whether it rolls."""
    step = tf.function(attn_ops.decode_attention, autograph=False, reduce_retracing=True)
    caches = [new_cache(length=length, dtype=dtype) for length in (40, TOKENS, MAX_LENGTH)]
    for cache in caches:
        out, full = in_parts(step, cache, array=tf.constant)
        np.testing.assert_allclose(out, whole("plain"), rtol=0, atol=0.05 if dtype == "int8" else 1e-12)
        assert full.lengths.numpy().tolist() == [TOKENS] * BATCH
    with pytest.raises(tf.errors.InvalidArgumentError):
        step(QUERY, caches[1].update(KEY[:, :1], VALUE[:, :1]), KEY, VALUE)
    with pytest.raises(ValueError, match="the memory of a cache with a window must be known"):
        for length in (4, 5):
            in_parts(step, new_cache(length=length, dtype=dtype, window=9), parts=(1,), array=tf.constant)


@pytest.mark.parametrize("form", ["graph", "xla"])
def test_a_full_cache_where_only_the_running_op_knows(form):
    step = step_of(form)
    cache = new_cache(length=4).update(KEY[:, :3], VALUE[:, :3])
    rows = [tf.constant(x[:, :2]) for x in (QUERY, KEY, VALUE)]
    if attn_ops.can_use_fused(*rows):
        with pytest.raises((tf.errors.InvalidArgumentError, tf.errors.InternalError)):
            step(rows[0], cache, *rows[1:])[0].numpy()
    close(cache.key[:, :3], KEY[:, :3])


def test_other_new_keys_than_rows_where_only_the_running_op_knows():
    """The keys would go where rows stand that are not there, or rows would see keys that nobody wrote."""
    cache = new_cache(length=4)
    unknown = [tf.TensorSpec([*x.shape[:1], None, *x.shape[2:]], tf.float32) for x in (QUERY, KEY, VALUE)]
    step = tf.function(lambda q, k, v: attn_ops.decode_attention(q, cache, k, v)[0], autograph=False, input_signature=unknown)
    q, k, v = (tf.constant(x[:, :2], tf.float32) for x in (QUERY, KEY, VALUE))
    assert step(q, k, v).shape[1] == 2
    with pytest.raises(tf.errors.InvalidArgumentError, match="there must be as many new keys as rows of q"):
        step(q[:, :1], k, v)

"""Sizes that only the data decide, in functions that XLA compiles: what stock Keras compiles, the op and layers do too.

The values are those of the plain formula, eagerly.
"""

import functools
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from attn_ops import layers, masks

# Tensors, which functions capture: of arrays XLA would know the sizes when it compiles.
KEPT_ROWS = tf.constant(np.array([1, 0, 1, 1, 0, 1, 1], bool))
KEPT_KEYS = tf.constant(np.array([1, 0, 1, 1, 0, 1, 1, 0, 1], bool))
KEPT_ENTRIES = tf.constant(np.array([0, 1, 1], bool))


def tensors():
    random = np.random.default_rng(0)
    shapes = [(3, 7, 2, 4), (3, 9, 2, 4), (3, 9, 2, 3), (3, 2, 7, 9)]
    return [tf.constant(random.standard_normal(shape), tf.float32) for shape in shapes]


def keep_rows(query, key, value, bias):
    return tf.boolean_mask(query, KEPT_ROWS, axis=1), key, value, tf.boolean_mask(bias, KEPT_ROWS, axis=2)


def keep_keys(query, key, value, bias):
    key, value = (tf.boolean_mask(x, KEPT_KEYS, axis=1) for x in (key, value))
    return query, key, value, tf.boolean_mask(bias, KEPT_KEYS, axis=3)


def keep_entries(*x):
    return tuple(tf.boolean_mask(x, KEPT_ENTRIES, axis=0) for x in x)


def keep_some_of_each(*x):
    return keep_entries(*keep_keys(*keep_rows(*x)))


def keep_rows_of_the_query_alone(query, key, value, bias):
    return tf.boolean_mask(query, KEPT_ROWS, axis=1), key, value, tf.reduce_sum(bias, 2, keepdims=True)


def plain(query, key, value, bias):
    """With a window that stands at the last key, and a mask."""
    scores = tf.einsum("bqhd,bkhd->bhqk", query, key) / 2 + bias
    rows, keys = tf.range(tf.shape(query)[1])[:, None], tf.range(tf.shape(key)[1])
    own = rows + tf.shape(key)[1] - tf.shape(query)[1]
    scores = tf.where((keys <= own + 2) & (bias > -1.5), scores, -1e9)
    weights = tf.nn.softmax(scores)
    return tf.einsum("bhqk,bkhd->bqhd", weights, value), tf.reduce_logsumexp(scores, -1), weights


def ours(chosen):
    def attend(query, key, value, bias):
        options = {"mask": bias > -1.5, "window": (None, 2), "causal_alignment": "bottom_right"}
        out, lse = attn_ops.scaled_dot_product_attention(
            query, key, value, bias=bias, return_lse=True, implementation=chosen, **options
        )
        return out, lse, attn_ops.attention_weights(query, key, bias=bias, **options)

    return attend


def with_gradients(attend, select, *x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        results = attend(*select(*x))
        loss = tf.add_n([tf.reduce_sum(tf.sin(y)) for y in results])
    return [*results, *tape.gradient(loss, x)]


SELECTIONS = (keep_rows, keep_keys, keep_entries, keep_some_of_each, keep_rows_of_the_query_alone)


@pytest.mark.wide(12)
@pytest.mark.parametrize("select", SELECTIONS, ids=lambda select: select.__name__)
@pytest.mark.parametrize("chosen", ["fused", "composite"])
def test_boolean_masks(chosen, select):
    found = tf.function(lambda *x: with_gradients(ours(chosen), select, *x), jit_compile=True, autograph=False)(
        *tensors()
    )
    for x, y in zip(found, with_gradients(plain, select, *tensors()), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_chunks_of_the_composite(monkeypatch):
    monkeypatch.setattr(attn_ops._load("tensorflow.composite", "composite"), "UNCHUNKED_SCORES", 8)
    monkeypatch.setattr(attn_ops._load("tensorflow.composite", "composite"), "CHUNK_SCORES", 100)
    test_boolean_masks("composite", keep_some_of_each)


def test_a_graph_that_a_compiled_function_calls():
    specs = [tf.TensorSpec([None, None, 2, n]) for n in (4, 4, 3)] + [tf.TensorSpec([None, 2, None, None])]
    graph = tf.function(ours("fused"), autograph=False, input_signature=specs)
    graph.get_concrete_function()
    found = tf.function(lambda *x: with_gradients(graph, keep_rows, *x), jit_compile=True, autograph=False)(*tensors())
    for x, y in zip(found, with_gradients(plain, keep_rows, *tensors()), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.wide(2)
@pytest.mark.parametrize("select", [keep_keys, keep_entries], ids=lambda select: select.__name__)
def test_a_graph_with_such_sizes_that_a_compiled_function_calls(select):
    """What was traced before knows nothing of XLA, and holds both forms of the kernels."""
    graph = tf.function(lambda *x: with_gradients(ours("fused"), select, *x), autograph=False)
    graph.get_concrete_function(*tensors())
    found = tf.function(lambda *x: graph(*x), jit_compile=True, autograph=False)(*tensors())
    for x, y in zip(found, with_gradients(plain, select, *tensors()), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_slices_in_a_loop():
    query, key, value, _ = tensors()

    def decode(query, key, value):
        def body(i, total):
            row = tf.slice(query, [0, i, 0, 0], [3, 1, 2, 4])
            return i + 1, total + attn_ops.scaled_dot_product_attention(row, key[:, : i + 1], value[:, : i + 1])

        return tf.while_loop(lambda i, _: i < 7, body, (0, tf.zeros([3, 1, 2, 3])), maximum_iterations=7)[1]

    found = tf.function(decode, jit_compile=True, autograph=False)(query, key, value)
    expected = attn_ops.reference.attention(*(x.numpy() for x in (query, key, value)), is_causal=True)[0]
    np.testing.assert_allclose(found, expected.sum(1, keepdims=True), rtol=1e-4, atol=1e-5)


LAYERS = {
    "MultiHeadAttention": (layers.MultiHeadAttention, keras.layers.MultiHeadAttention, (2, 4)),
    "GroupedQueryAttention": (layers.GroupedQueryAttention, keras.layers.GroupQueryAttention, (4, 4, 2)),
}


@pytest.mark.wide(4)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("axis", [0, 1])
def test_layers(axis, name):
    kind, stock, arguments = LAYERS[name]
    x = tf.constant(np.random.default_rng(0).standard_normal((3, 7, 8)), tf.float32)
    kept = KEPT_ROWS if axis else KEPT_ENTRIES
    layer, other = kind(*arguments), stock(*arguments)
    layer.build(x.shape, x.shape)
    other.build(x.shape, x.shape)
    layer.set_weights(other.get_weights())

    def step(layer, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.boolean_mask(x, kept, axis=axis)
            out = layer(y, y, use_causal_mask=True)
            loss = tf.reduce_sum(tf.sin(out))
        return out, tape.gradient(loss, x)

    found = tf.function(lambda x: step(layer, x), jit_compile=True, autograph=False)(x)
    for a, b in zip(found, step(other, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def everything_new(query, key, value, bias, chosen):
    """Scores and structured masks: all that is given by row, key or entry."""
    keys = tf.shape(key)[1]
    entries = tf.range(tf.shape(query)[0]) + 1
    by_row = tf.zeros_like(query[:, :, 0, 0], tf.int32) + tf.range(tf.shape(query)[1])
    by_key = tf.zeros_like(key[:, :, 0, 0], tf.int32) + tf.range(keys)
    return attn_ops.scaled_dot_product_attention(
        query,
        key,
        value,
        bias=bias,
        mask=masks.intervals(tf.maximum(by_row - 3, 0), tf.minimum(by_row + 3, keys)) & masks.segments(by_row % 2, by_key % 2),
        query_offset=entries,
        alibi_slopes=tf.cast(entries, tf.float32)[:, None] * [0.1, 0.2],
        relative_bias=tf.reshape(tf.range(10, dtype=tf.float32) / 7, [5, 2]),
        sinks=[0.3, -0.2],
        logits_soft_cap=1.5,
        return_lse=True,
        implementation=chosen,
    )


@pytest.mark.wide(20)
@pytest.mark.parametrize("select", SELECTIONS, ids=lambda select: select.__name__)
@pytest.mark.parametrize("chosen", ["fused", "composite"])
def test_scores_and_structured_masks(select, chosen):
    x = tensors()
    expected = with_gradients(functools.partial(everything_new, chosen="composite"), select, *x)

    @tf.function(jit_compile=True)
    def compiled(*x):
        return with_gradients(functools.partial(everything_new, chosen=chosen), select, *x)

    for found, wanted in zip(compiled(*x), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_graphs_of_unknown_sizes_are_optimized():
    """What is there for XLA alone does not stop TensorFlow's optimizer, which says so and goes on without."""
    code = """
import tensorflow as tf, attn_ops
@tf.function(input_signature=[tf.TensorSpec((None, 5, 2, 4))])
def gradient(x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        out = attn_ops.scaled_dot_product_attention(x, x, x)
    return tape.gradient(out, x)
gradient(tf.zeros((3, 5, 2, 4)))
"""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "optimizer failed" not in run.stderr

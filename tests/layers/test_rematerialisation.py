"""Dropout under `tf.recompute_grad`, `keras.remat` and `keras.RematScope`: the recomputation drops what the first run
did.

The output is of degree 1 in the values, so by Euler sum(v * dL/dv) = L for a linear L, whatever was dropped, if both
runs dropped the same. A recomputation with another mask misses that by several per cent.
"""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from attn_ops.tensorflow import rematerialization
from layer_twins import FLASH, KERAS, ours, random

pytestmark = pytest.mark.skipif(KERAS < (3, 9), reason="this Keras has no remat")

QUERY, KEY, VALUE = (random(2, 12, 8, seed=i, dtype="float32") for i in range(3))
WEIGHT = random(2, 12, 8, seed=3, dtype="float32")
RATE = {"dropout": 0.5, "seed": 3}
FORMS = {"eager": lambda f: f, "graph": tf.function, "xla": lambda f: tf.function(f, jit_compile=True)}


def mha(**options):
    layer = ours("MultiHeadAttention")(2, 4, use_bias=False, **RATE, **options)
    return layer, lambda q, k, v: layer(q, v, key=k, training=True)


def gqa(**options):
    layer = ours("GroupedQueryAttention")(4, 4, 2, use_bias=False, **RATE, **options)
    return layer, lambda q, k, v: layer(q, v, key=k, training=True)


def attention(**options):
    layer = ours("Attention")(**RATE, **options)
    return layer, lambda q, k, v: layer([q, v, k], training=True)


def attention_layer(**options):
    layer = ours("AttentionLayer")(**RATE, **options)
    return layer, lambda q, k, v: layer([q, k, v], training=True)


LAYERS = [mha, gqa, attention, attention_layer]


def seeded(layer):
    """Equal weights for equal layers."""
    rng = np.random.default_rng(0)
    layer.set_weights([rng.normal(size=w.shape) * 0.5 for w in layer.get_weights()])
    return layer


def value_and_gradients(function, variables=(), form="eager"):
    """L and its gradients to query, key, value and variables, in two steps of one compiled function."""

    def step(q, k, v):
        with tf.GradientTape() as tape:
            tape.watch([q, k, v])
            loss = tf.reduce_sum(function(q, k, v) * WEIGHT)
        return loss, tape.gradient(loss, [q, k, v, *(x.value for x in variables)])

    step = FORMS[form](step)
    return [tf.nest.map_structure(np.array, step(QUERY, KEY, VALUE)) for _ in range(2)]


def assert_euler(results):
    for loss, gradients in results:
        np.testing.assert_allclose((VALUE.numpy() * gradients[2]).sum(), loss, rtol=1e-3, atol=1e-3)
    assert abs(results[0][0] - results[1][0]) > 1e-3  # every step drops its own


def assert_same(results, expected):
    tf.nest.map_structure(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), results, expected)


@pytest.mark.wide(6)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", LAYERS)
def test_a_region_around_the_layer(make, form):
    layer, call = make()
    call(QUERY, KEY, VALUE)
    seeded(layer)
    results = value_and_gradients(tf.recompute_grad(call), layer.trainable_variables, form)
    assert_euler(results)
    plain, call = make()
    call(QUERY, KEY, VALUE)
    seeded(plain)
    assert_same(results, value_and_gradients(call, plain.trainable_variables, form))
    # And the state went one seed on at each of three calls.
    np.testing.assert_array_equal(*([v for v in x.variables if "seed" in v.path][0].numpy() for x in (layer, plain)))


@pytest.mark.wide(6)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", LAYERS)
def test_a_layer_made_in_a_scope(make, form):
    """Keras's own layers cannot run in graphs then, since they are called with arguments by keyword."""
    with keras.RematScope("full"):
        layer, call = make()
        call(QUERY, KEY, VALUE)
    seeded(layer)
    results = value_and_gradients(call, layer.trainable_variables, form)
    assert_euler(results)
    plain, call = make()
    call(QUERY, KEY, VALUE)
    seeded(plain)
    assert_same(results, value_and_gradients(call, plain.trainable_variables, form))


def test_the_masks_of_a_layer_made_in_a_scope():
    mask = np.arange(12) < np.array([[12], [7]])
    with keras.RematScope("full"):
        layer, call = mha()
    plain, plain_call = mha()
    results = []
    for each, function in ((layer, call), (plain, plain_call)):
        each(QUERY, VALUE)
        seeded(each)

        def masked(q, k, v, function=function):
            q, k, v = (tf.identity(x) for x in (q, k, v))
            q._keras_mask = k._keras_mask = v._keras_mask = tf.constant(mask)
            out = function(q, k, v)
            np.testing.assert_array_equal(out._keras_mask, mask)
            return out

        results.append(value_and_gradients(masked, each.trainable_variables))
    assert_same(*results)


@pytest.mark.parametrize("form", FORMS)
def test_nested_regions(form):
    """An inner region within an outer one, twice; around them calls of the same layers."""
    first, call_first = mha()
    second, call_second = gqa()

    def block(remat):
        inner = remat(lambda q, k, v: call_second(call_first(q, k, q), k, v))
        return remat(lambda q, k, v: inner(q, k, v) + inner(k, q, call_first(q, k, v)) + call_second(k, q, v))

    def run(remat):
        for layer in (first, second):
            seeded(layer)
            [state] = [v for v in layer.variables if "seed" in v.path]
            state.assign([7, 0])
        return value_and_gradients(block(remat), [*first.trainable_variables, *second.trainable_variables], form)

    for call in (call_first, call_second):
        call(QUERY, KEY, VALUE)
    results = run(keras.remat)
    assert_euler(results)
    assert_same(results, run(lambda f: f))


@pytest.mark.wide(4)
@pytest.mark.parametrize("flash", FLASH)
def test_other_tapes(flash):
    """A tape that is asked twice, and one outside of the compiled function."""
    layer, call = mha(flash_attention=FLASH[flash])
    call(QUERY, KEY, VALUE)
    region = tf.recompute_grad(call)
    for function in (region, tf.function(region), tf.function(region, jit_compile=True)):
        for times_asked in (1, 2):
            with tf.GradientTape(persistent=times_asked > 1) as tape:
                tape.watch(VALUE)
                loss = tf.reduce_sum(function(QUERY, KEY, VALUE) * WEIGHT)
            for _ in range(times_asked):
                gradient = tape.gradient(loss, VALUE)
                np.testing.assert_allclose(tf.reduce_sum(VALUE * gradient), loss, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_regions_in_the_body_of_a_loop(jit_compile):
    """With a layer without weights: TensorFlow cannot differentiate a region with variables there."""
    _, call = attention_layer()
    region = tf.recompute_grad(call)

    @tf.function(jit_compile=jit_compile)
    def step():
        with tf.GradientTape() as tape:
            tape.watch(VALUE)
            _, out = tf.while_loop(
                lambda i, x: i < 3, lambda i, x: (i + 1, region(QUERY, KEY, x)), (0, VALUE), maximum_iterations=3
            )
            loss = tf.reduce_sum(out * WEIGHT)
        return loss, tf.reduce_sum(VALUE * tape.gradient(loss, VALUE))

    np.testing.assert_allclose(*step(), rtol=1e-3, atol=1e-3)


def test_what_cannot_be_kept_is_refused():
    layer, call = mha()
    call(QUERY, KEY, VALUE)

    def branch(q, k, v):
        return tf.cond(tf.reduce_sum(q) > 0, lambda: call(q, k, v), lambda: v)

    for function in (tf.function(call), branch):
        with pytest.raises(ValueError, match="dropout inside tf.recompute_grad"):
            value_and_gradients(tf.recompute_grad(function), form="graph")
    calls = []

    def changing(q, k, v):
        calls.append(1)
        return v if len(calls) == 1 else call(q, k, v)

    with pytest.raises(ValueError, match="draws dropout seed 1, and its first run drew 0"):
        value_and_gradients(tf.recompute_grad(changing))


class Block(keras.layers.Layer):
    """A block of stock layers around ours, which rematerialises it in training."""

    def __init__(self, remat):
        super().__init__()
        self.attention = ours("MultiHeadAttention")(2, 4, **RATE)
        self.normalization = keras.layers.LayerNormalization()
        self.remat = remat

    def build(self, shape):
        self.attention.build(shape, shape)
        self.normalization.build(shape)
        seeded(self.attention)

    def call(self, x, training=None):
        function = self.remat(lambda x: self.normalization(x + self.attention(x, x, training=training)))
        return function(x)


@pytest.mark.wide(4)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit(jit_compile):
    def fitted(make):
        inputs = keras.Input((12, 8))
        model = keras.Model(inputs, make(inputs))
        model.compile(keras.optimizers.SGD(1.0), "mse", jit_compile=jit_compile)
        model.fit(QUERY, WEIGHT, epochs=2, shuffle=False, verbose=0)
        return model.get_weights()

    expected = fitted(Block(lambda f: f))
    assert_same(fitted(Block(keras.remat)), expected)

    def in_scope(inputs):
        with keras.RematScope("full"):
            layer = ours("MultiHeadAttention")(2, 4, **RATE)
        x = keras.layers.Add()([inputs, layer(inputs, inputs)])
        seeded(layer)
        return keras.layers.LayerNormalization()(x)

    assert_same(fitted(in_scope), expected)


@pytest.mark.parametrize("form", FORMS)
def test_the_op_without_a_seed(form):
    def op(q, k, v):
        return attn_ops.scaled_dot_product_attention(q, k, v, dropout_rate=0.5)

    assert_euler(value_and_gradients(tf.recompute_grad(op), form=form))


def test_the_self_attention_of_tutorials():
    layer = ours("SelfAttention")(**RATE)
    region = tf.recompute_grad(lambda x: layer(x, training=True))
    layer(QUERY)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(region(QUERY) * WEIGHT)
    gradient = tape.gradient(loss, layer.W_v.value)
    np.testing.assert_allclose(tf.reduce_sum(layer.W_v * gradient), loss, rtol=1e-3, atol=1e-3)


def test_history_is_bounded(monkeypatch):
    monkeypatch.setattr(rematerialization, "_LARGEST_HISTORY", 5)
    layer, call = attention_layer()
    region = tf.recompute_grad(call)
    with tf.GradientTape() as tape:
        tape.watch(VALUE)
        losses = [tf.reduce_sum(region(QUERY, KEY, VALUE)) for _ in range(10)]
        loss = losses[-1]
    assert len(rematerialization._drawn) <= 5
    np.testing.assert_allclose(tf.reduce_sum(VALUE * tape.gradient(loss, VALUE)), loss, rtol=1e-3, atol=1e-3)


def test_without_tensorflow_s_functions_dropout_still_runs(monkeypatch):
    """A TensorFlow that is made otherwise has no recomputations to recognise, and the reason is told."""
    monkeypatch.setattr(rematerialization, "_FIRST_RUN", None)
    assert "recompute_grad of TensorFlow" in rematerialization.unavailable_reason()
    layer, call = attention_layer()
    assert not np.allclose(call(QUERY, KEY, VALUE), call(QUERY, KEY, VALUE))
    monkeypatch.setattr(tf, "recompute_grad", lambda f: f)
    assert rematerialization._codes() == (None, None)


def test_tensorflow_is_made_as_expected():
    assert rematerialization.unavailable_reason() is None
    assert inspect.isfunction(tf.recompute_grad)

"""Masks of numbers in the layers: 0 and 1 are taken as Keras takes them, what is added to scores is refused, not inverted.

Known values are checked where the layer is called or traced, XLA included; the others by graphs as they run.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from attn_ops import masks
from attn_ops.tensorflow.constants import known_value

VISIBLE = np.tril(np.ones((5, 5), bool))
X = np.random.default_rng(0).standard_normal((2, 5, 6)).astype("float32")
HIDDEN = {
    "-1e9": np.float32(-1e9),
    "-inf": np.float32(-np.inf),
    "finfo.min": np.finfo("float32").min,
    "float16": np.float16(-10000),
    "float64": np.float64(-1e9),
    "an integer": -(10**9),
    "NaN": np.float32(np.nan),
    "a positive one": np.float32(2),
}
MODES = {"eager": None, "graph": False, "xla": True}


def additive(hidden):
    return np.where(VISIBLE, type(hidden)(0), hidden)


def layers():
    """Each layer that takes masks of numbers, as a function of the input and the mask."""
    mha = attn_ops.layers.MultiHeadAttention(2, 4)
    gqa = attn_ops.layers.GroupedQueryAttention(4, 2, 1)
    attention = attn_ops.layers.Attention()
    return {
        "MultiHeadAttention": lambda x, mask: mha(x, x, attention_mask=mask),
        "GroupedQueryAttention": lambda x, mask: gqa(x, x, attention_mask=mask),
        "Attention": lambda x, mask: attention([x, x], mask=[None, tf.broadcast_to(mask, (2, 5, 5))]),
    }


def traced(mode, function):
    return function if mode == "eager" else tf.function(function, jit_compile=MODES[mode], autograph=False)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("mode", MODES)
def test_a_known_additive_mask_is_refused(hidden, mode):
    mask = additive(HIDDEN[hidden])
    layer = layers()["MultiHeadAttention"]
    with pytest.raises(TypeError, match="attention_mask must be boolean .* additive mask would be inverted.*bias="):
        traced(mode, lambda: layer(X, mask))()


@pytest.mark.parametrize("name", ["GroupedQueryAttention", "Attention"])
@pytest.mark.parametrize("mode", MODES)
def test_by_every_layer(name, mode):
    layer = layers()[name]
    with pytest.raises(TypeError, match="must be boolean .* additive mask would be inverted"):
        traced(mode, lambda: layer(X, additive(np.float32(-1e9))))()


@pytest.mark.parametrize(
    "make",
    [
        lambda: tf.where(tf.linalg.band_part(tf.ones((5, 5)), -1, 0) > 0, 0.0, -1e9),
        lambda: keras.ops.triu(keras.ops.ones((5, 5)), 1) * -1e9,
        lambda: tf.cast(tf.constant(additive(np.float32(-1e9)))[None], tf.float16),
        lambda: (1 - tf.cast(tf.range(5)[:, None] >= tf.range(5), tf.float32)) * -1e9,
    ],
    ids=["where", "triu", "cast", "comparison"],
)
@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_one_that_a_traced_function_makes_of_constants_is_known(make, mode):
    layer = layers()["MultiHeadAttention"]
    with pytest.raises(TypeError, match="additive mask would be inverted"):
        traced(mode, lambda: layer(X, make()))()


def test_fit_which_compiles_refuses_one():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.attention = attn_ops.layers.MultiHeadAttention(2, 4)

        def call(self, x):
            return self.attention(x, x, attention_mask=keras.ops.triu(keras.ops.ones((5, 5)), 1) * -1e9)

    model = Model()
    model.compile("sgd", "mse", jit_compile=True)
    with pytest.raises(TypeError, match="additive mask would be inverted"):
        model.fit(X, X, verbose=0)


@pytest.mark.parametrize("hidden", ["-1e9", "-inf", "an integer"])
def test_one_that_only_the_data_decide_is_refused_by_the_running_graph(hidden):
    layer = layers()["MultiHeadAttention"]
    mask = tf.constant(additive(HIDDEN[hidden]))
    graph = traced("graph", lambda mask: layer(X, mask))
    with pytest.raises(tf.errors.InvalidArgumentError, match="additive mask would be inverted"):
        graph(mask)
    np.testing.assert_allclose(graph(tf.cast(VISIBLE, mask.dtype)), layer(X, VISIBLE), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "float16", "float32", "float64"])
@pytest.mark.parametrize("mode", MODES)
def test_zeros_and_ones_are_taken(dtype, mode):
    layer = layers()["MultiHeadAttention"]
    expected = layer(X, VISIBLE)
    found = traced(mode, lambda: layer(X, VISIBLE.astype(dtype)))()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_integers_are_visible_where_not_zero():
    """Such as token numbers, as in Keras."""
    layer = layers()["MultiHeadAttention"]
    np.testing.assert_array_equal(layer(X, VISIBLE * np.arange(1, 6)), layer(X, VISIBLE))


@pytest.mark.parametrize("take", [lambda m: attn_ops.scaled_dot_product_attention(*[X] * 3, mask=m), masks.boolean])
@pytest.mark.parametrize("dtype, hint", [("float32", "bias="), ("float16", "bias="), ("int32", "mask != 0")])
def test_the_op_and_the_masks_say_the_same(take, dtype, hint):
    """There the dtype alone tells."""
    with pytest.raises(TypeError, match=rf"mask must be boolean \(True = may be seen\), got {dtype}; .*{hint}"):
        take(VISIBLE.astype(dtype))


def test_what_is_known():
    seen = {}

    @tf.function
    def function(x):
        constant = tf.constant([1.0, 2.0])
        seen["constant"] = known_value(constant)
        seen["computed"] = known_value(tf.concat([constant * 3, tf.exp(tf.zeros(1))], 0))
        seen["captured"] = known_value(tf.sqrt(outside))
        seen["of a known shape"] = known_value(tf.cast(tf.shape(x), tf.float32) / 2)
        seen["data"] = known_value(x + constant)
        seen["a variable"] = known_value(tf.identity(variable) + 1)
        seen["random"] = known_value(tf.random.uniform([2]) > 2)
        seen["a branch"] = known_value(tf.cond(tf.constant(True), lambda: constant, lambda: x))
        return x

    outside, variable = tf.constant([4.0, 9.0]), tf.Variable([1.0])
    function(tf.ones(2))
    known = {name: value.tolist() for name, value in seen.items() if value is not None}
    assert known == {
        "constant": [1, 2],
        "computed": [3, 6, 1],
        "captured": [2, 3],
        "of a known shape": [1],
    }
    assert known_value(tf.constant([5])).tolist() == [5]

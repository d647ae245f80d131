"""Layers of Keras 2 and TensorFlow Addons made ours."""

import numpy as np
import pytest

import attn_ops

RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (RNG.normal(size=(2, n, d)).astype("float32") for n, d in ((5, 6), (7, 3), (7, 4)))


class MultiHeadAttention:
    """As much of `tfa.layers.MultiHeadAttention` as the converter reads: weights and config of a built layer."""

    built = True

    def __init__(self, use_projection_bias):
        shapes = [(2, 6, 8), (2, 3, 8), (2, 4, 8), (2, 8, 9)] + [(9,)] * use_projection_bias
        self.weights = [RNG.normal(size=shape).astype("float32") for shape in shapes]
        self.config = {
            "name": "old",
            "head_size": 8,
            "num_heads": 2,
            "output_size": 9,
            "dropout": 0.25,
            "use_projection_bias": use_projection_bias,
            "return_attn_coef": False,
        }

    def get_weights(self):
        return self.weights

    def get_config(self):
        return self.config


@pytest.mark.parametrize("bias", [False, True])
def test_tensorflow_addons(bias):
    """Its formula: projections by `[num_heads, features, head_size]` kernels, softmax(q k^T / sqrt(head_size)) v, projected."""
    old = MultiHeadAttention(bias)
    layer = attn_ops.models.from_tensorflow_addons(old)
    assert (layer.name, layer.dropout) == ("old", 0.25)
    mask = np.random.default_rng(1).random((2, 5, 7)) > 0.4
    mask[..., 0] = True
    query, key, value = (np.einsum("btd,hde->bthe", x, w) for x, w in zip((QUERY, KEY, VALUE), old.weights))
    scores = np.einsum("bthe,bshe->bhts", query, key) / np.sqrt(8)
    weights = np.exp(np.where(mask[:, None], scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshe,heo->bto", weights, value, old.weights[3]) + (old.weights[4] if bias else 0)
    np.testing.assert_allclose(layer(QUERY, VALUE, key=KEY, attention_mask=mask), expected, atol=1e-4)


def test_keras_2():
    tf_keras = pytest.importorskip("tf_keras")
    old = tf_keras.layers.MultiHeadAttention(2, 8, value_dim=5, dropout=0.1, output_shape=9, name="old")
    expected = old(QUERY, VALUE, key=KEY)
    layer = attn_ops.models.from_tf_keras(old)
    assert (layer.name, layer.dropout) == ("old", 0.1)
    np.testing.assert_allclose(layer(QUERY, VALUE, key=KEY), expected, atol=1e-5)


def test_other_layers_are_refused():
    import keras

    for function in (attn_ops.models.from_tf_keras, attn_ops.models.from_tensorflow_addons):
        for layer in (keras.layers.Dense(3), 3):
            with pytest.raises(TypeError, match=f"{function.__name__}: layer must be a MultiHeadAttention"):
                function(layer)
    with pytest.raises(ValueError, match="not built"):
        attn_ops.models.from_tf_keras(keras.layers.MultiHeadAttention(2, 8))


def test_models_of_keras_2_are_refused_by_name():
    """By one that looks like them: `tf_keras` is not among what tests install."""

    class Model:
        def _flatten_layers(self):
            return iter([self])

    Model.__module__ = "tf_keras.src.engine.training"
    mine = type("Mine", (Model,), {})()
    for function in (attn_ops.convert, attn_ops.revert, attn_ops.explain):
        with pytest.raises(TypeError, match=rf"attn_ops.{function.__name__}: .* got Mine of Keras 2, .*from_tf_keras"):
            function(mine)

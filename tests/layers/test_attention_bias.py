"""`attention_bias` of the layers of one head, which Keras does not have: added to the scaled scores, with its gradient."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from layer_twins import FLASH, ours, random

CALLS = {
    "Attention": ({}, lambda layer, x, y, **call: layer([x, y], **call)),
    "AttentionLayer": (dict(scale=0.5), lambda layer, x, y, **call: layer([x, y, y], **call)),
    "AttentionLayerWithWeights": (dict(scale=0.5), lambda layer, x, y, **call: layer([x, y, y], **call)[0]),
    "SelfAttention": (dict(units=4, scale=0.5), lambda layer, x, y, **call: layer(x, **call)),
}
each_layer = pytest.mark.parametrize("name, config, call", [(name, *x) for name, x in CALLS.items()], ids=CALLS)
X, Y = random(2, 5, 6), random(2, 5, 6, seed=1)
BIASES = {"rows and keys": (5, 5), "keys": (2, 1, 5), "with a batch": (2, 5, 5), "with an axis of heads": (2, 1, 5, 5)}


def plain(layer, x, y, bias):
    """The formula, in float64."""
    query, key, value = x, y, y
    if layer.weights:
        query, key, value = (x @ w.value for w in (layer.W_q, layer.W_k, layer.W_v))
    scale = 1.0 if layer.scale is None else layer.scale
    bias = bias[:, 0] if len(bias.shape) == 4 else bias
    return tf.nn.softmax(scale * tf.matmul(query, key, transpose_b=True) + bias) @ value


@each_layer
@pytest.mark.parametrize("shape", BIASES.values(), ids=BIASES)
def test_values_and_gradients(name, config, call, shape):
    layer, bias = ours(name)(**config, dtype="float64", flash_attention=FLASH["fused"]), random(*shape, seed=2)
    layer(X) if name == "SelfAttention" else layer([X, Y, Y])

    def results(attend):
        with tf.GradientTape() as tape:
            tape.watch([X, bias])
            out = attend(bias)
            total = tf.reduce_sum(tf.sin(out))
        return [out, *tape.gradient(total, [X, bias])]

    wanted = results(lambda bias: plain(layer, X, Y, bias))
    for attend in (lambda bias: call(layer, X, Y, attention_bias=bias), tf.function(lambda b: call(layer, X, Y, attention_bias=b))):
        for a, b in zip(results(attend), wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_more_axes_before_the_sequence():
    x, y = random(2, 3, 5, 6), random(2, 3, 4, 6, seed=1)
    layer = ours("Attention")(dtype="float64")
    for shape in ((5, 4), (2, 1, 1, 4), (2, 3, 5, 4)):
        bias = random(*shape, seed=2)
        wanted = tf.nn.softmax(tf.matmul(x, y, transpose_b=True) + bias) @ y
        np.testing.assert_allclose(layer([x, y], attention_bias=bias), wanted, rtol=1e-9, atol=1e-12)


@each_layer
def test_a_functional_model(name, config, call, tmp_path):
    x, bias = keras.Input((5, 6)), keras.Input((5, 5))
    model = keras.Model([x, bias], call(ours(name)(**config), x, x, attention_bias=bias))
    inputs = [tf.cast(X, "float32"), random(2, 5, 5, seed=2, dtype="float32")]
    layer = next(layer for layer in model.layers if isinstance(layer, ours(name)))
    wanted = call(layer, inputs[0], inputs[0], attention_bias=inputs[1])
    assert not np.allclose(wanted, call(layer, inputs[0], inputs[0]))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again.predict(inputs, verbose=0), wanted, atol=1e-6)
    assert ours(name).from_config(layer.get_config()).get_config() == layer.get_config()


@each_layer
def test_bad_input(name, config, call):
    layer = ours(name)(**config)
    with pytest.raises(ValueError, match="an attention_bias of shape .* has 1 axes"):
        call(layer, X, Y, attention_bias=np.zeros(5, "f"))
    with pytest.raises(ValueError, match="bias of shape .* does not broadcast"):
        call(layer, X, Y, attention_bias=np.zeros((4, 5), "f"))
    with pytest.raises(TypeError, match="bias must be floating"):
        call(layer, X, Y, attention_bias=np.zeros((5, 5), bool))


@pytest.mark.parametrize("config", [{"score_mode": "concat"}, {"as_in_keras": True}])
def test_keras_code_has_none(config):
    with pytest.raises(ValueError, match="Attention: Keras's own code has no attention_bias, and runs here: "):
        ours("Attention")(**config)([X, Y], attention_bias=np.zeros((5, 5), "f"))

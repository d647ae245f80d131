"""A stock Keras layer and ours with the same weights, and the comparison of what they give."""

import inspect

import keras
import numpy as np
import tensorflow as tf

import attn_ops

STOCK = {
    "MultiHeadAttention": keras.layers.MultiHeadAttention,
    "GroupedQueryAttention": keras.layers.GroupQueryAttention,
    "Attention": keras.layers.Attention,
}
KERAS = tuple(int(part) for part in keras.__version__.split(".")[:2])
HAS_WINDOW = "sliding_window" in inspect.signature(keras.layers.MultiHeadAttention).parameters  # Keras >= 3.15
HAS_GATE = "use_gate" in inspect.signature(keras.layers.MultiHeadAttention).parameters  # Keras >= 3.14

# flash_attention: ours without and with the fused op. True raises where the op is missing.
FLASH = {"composite": False, "fused": True}


def ours(name):
    return getattr(attn_ops.layers, name)


def twins(name, *shapes, flash_attention=None, dtype="float64", **config):
    """(stock, ours), built for inputs of these shapes, with equal random weights, biases included."""
    stock = STOCK[name](**config, dtype=dtype)
    mine = ours(name)(**config, dtype=dtype, flash_attention=flash_attention)
    rng = np.random.default_rng(7)
    for layer in (stock, mine):
        if name == "Attention":
            layer.build(list(shapes))
        else:
            layer.build(*shapes)
    weights = [rng.normal(size=w.shape) * 0.5 for w in stock.weights]
    stock.set_weights(weights)
    mine.set_weights(weights)
    return stock, mine


def random(*shape, seed=0, dtype="float64"):
    return tf.constant(np.random.default_rng(seed).normal(size=shape), dtype)


def values_and_gradients(layer, inputs, call, weight=None):
    """The outputs of `call(layer, inputs)` and the gradients of a random projection of them, to the inputs and the
    weights. `weight` multiplies the first output in it (zeros leave rows out)."""
    inputs = [tf.identity(x) for x in inputs]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = tf.nest.flatten(call(layer, inputs))
        total = 0.0
        for i, out in enumerate(outputs):
            # sin: not the plain sum, whose gradient through a softmax is 0.
            term = tf.sin(tf.cast(out, tf.float64)) * (1.0 + i)
            total += tf.reduce_sum(term if weight is None else term * weight[i])
    variables = [v.value for v in layer.trainable_variables]
    gradients = tape.gradient(total, [*inputs, *variables], unconnected_gradients="zero")
    return [x.numpy() for x in outputs], [tf.convert_to_tensor(g).numpy() for g in gradients]


def assert_same(stock, mine, inputs, call, weight=None, rtol=1e-9, atol=1e-9):
    """Equal outputs (times `weight`) and gradients."""
    expected, expected_gradients = values_and_gradients(stock, inputs, call, weight)
    actual, actual_gradients = values_and_gradients(mine, inputs, call, weight)
    assert [x.shape for x in actual] == [x.shape for x in expected]
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    for i, (a, e) in enumerate(zip(actual, expected)):
        w = 1.0 if weight is None else np.asarray(weight[i])
        np.testing.assert_allclose(a * w, e * w, rtol=rtol, atol=atol, err_msg=f"output {i}")
    for i, (a, e) in enumerate(zip(actual_gradients, expected_gradients)):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=atol, err_msg=f"gradient {i}")

"""fit, predict and evaluate with our layers, in every compilation mode and precision."""

import warnings

import keras
import numpy as np
import pytest

from layer_twins import STOCK, ours

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, 20, (64, 12))
TOKENS[:, 7:] *= RNG.integers(0, 2, (64, 1))  # some sequences are padded
TARGETS = RNG.normal(size=(64, 1)).astype("float32")


def model(classes, dropout=0.0, **kwargs):
    """Embedding with padding, each of our drop-in layers once, unknown length and batch."""
    mha, gqa, attention = classes
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(20, 8, mask_zero=True)(tokens)
    x = mha(2, 4, dropout=dropout, **kwargs)(x, x, use_causal_mask=True)
    x = gqa(4, 4, 2, dropout=dropout, **kwargs)(x, x)
    x = attention(use_scale=True, dropout=dropout, **kwargs)([x, x], use_causal_mask=True)
    return keras.Model(tokens, keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(x)))


OURS = [ours(name) for name in STOCK]


def fitted(net, jit_compile):
    """The losses of a few epochs."""
    net.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=jit_compile)
    return net.fit(TOKENS, TARGETS, batch_size=32, epochs=3, shuffle=False, verbose=0).history["loss"]


def losses(net, jit_compile):
    """The same, of a model that evaluates and predicts as one thing."""
    history = fitted(net, jit_compile)
    evaluated = net.evaluate(TOKENS, TARGETS, batch_size=32, verbose=0)
    predicted = net.predict(TOKENS, batch_size=32, verbose=0)
    np.testing.assert_allclose(np.mean((predicted - TARGETS) ** 2), evaluated, rtol=1e-2)
    return history


@pytest.fixture(scope="module")
def stock_run():
    """The initial weights of the stock model and its losses."""
    keras.utils.set_random_seed(0)
    stock = model(STOCK.values())
    weights = stock.get_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GroupQueryAttention's about masks
        return weights, fitted(stock, False)


@pytest.mark.wide(6)
@pytest.mark.parametrize("jit_compile", [False, True, "auto"])
def test_training_follows_that_of_the_stock_layers(stock_run, jit_compile):
    """The padded positions differ (zeros, not means) but the pooling leaves them out."""
    weights, expected = stock_run
    mine = model(OURS)
    mine.set_weights(weights)
    actual = losses(mine, jit_compile)
    np.testing.assert_allclose(actual, expected, rtol=2e-4)
    assert actual[-1] < actual[0]
    assert mine.jit_compile is (jit_compile is True)  # "auto" is False on machines without a GPU
    assert all(layer.supports_jit for layer in mine._flatten_layers())


@pytest.mark.wide(4)
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_training(policy):
    keras.utils.set_random_seed(0)
    net = model(OURS, dropout=0.1, dtype=policy)
    history = losses(net, jit_compile=False)
    assert np.isfinite(history).all() and history[-1] < history[0]


@pytest.mark.parametrize("jit_compile", [False, True])
def test_dropout_is_the_same_in_every_compilation_mode(jit_compile):
    """The masks follow from the layer's seed, not from who computes them."""
    results = []
    for compiled in (False, jit_compile):
        inputs = keras.Input((12, 8))
        outputs = ours("MultiHeadAttention")(2, 4, dropout=0.3, seed=1, kernel_initializer=seeded())(inputs, inputs)
        net = keras.Model(inputs, outputs)
        net.compile("sgd", "mse", jit_compile=compiled)
        x = np.random.default_rng(0).normal(size=(8, 12, 8)).astype("float32")
        results.append(net.fit(x, x, batch_size=8, epochs=3, verbose=0).history["loss"])
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5)


def seeded():
    return keras.initializers.RandomNormal(stddev=0.3, seed=2)


@pytest.mark.wide(4)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_forced_fusion_trains(jit_compile):
    keras.utils.set_random_seed(0)
    history = losses(model(OURS, dropout=0.1, flash_attention=True), jit_compile=jit_compile)
    assert history[-1] < history[0]

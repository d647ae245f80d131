"""SelfAttention, AttentionLayer and AttentionLayerWithWeights."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from layer_twins import FLASH, random

SelfAttention = attn_ops.layers.SelfAttention
AttentionLayer = attn_ops.layers.AttentionLayer
AttentionLayerWithWeights = attn_ops.layers.AttentionLayerWithWeights


@pytest.fixture(params=FLASH)
def flash(request):
    return FLASH[request.param]


def softmax_attention(q, k, v, scale=1.0, visible=None):
    scores = q @ k.swapaxes(-1, -2) * scale
    if visible is not None:
        scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights @ v, weights


@pytest.mark.parametrize("units, scale", [(None, None), (4, None), (4, 0.5)])
def test_self_attention(flash, units, scale):
    layer = SelfAttention(units, scale=scale, flash_attention=flash, dtype="float64")
    x = random(2, 5, 6).numpy()
    out, scores = layer(x, return_attention_scores=True)
    assert [w.name for w in layer.weights] == ["W_q", "W_k", "W_v"]
    assert [tuple(w.shape) for w in layer.weights] == [(6, units or 6)] * 3
    q, k, v = (x @ w.numpy() for w in (layer.W_q, layer.W_k, layer.W_v))
    expected, weights = softmax_attention(q, k, v, scale or 1.0)
    np.testing.assert_allclose(out, expected, rtol=1e-9)
    np.testing.assert_allclose(scores, weights, rtol=1e-9)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-9)
    _, causal = layer(x, use_causal_mask=True, return_attention_scores=True)
    assert not causal.numpy()[:, np.triu(np.ones((5, 5), bool), 1)].any()


def test_self_attention_hides_padding_and_passes_the_mask_on(flash):
    embedding = keras.layers.Embedding(4, 6, mask_zero=True)
    x = embedding(np.array([[1, 2, 3], [3, 1, 0]]))
    layer = SelfAttention(flash_attention=flash)
    out = layer(x)
    np.testing.assert_array_equal(out._keras_mask, [[True] * 3, [True, True, False]])
    np.testing.assert_allclose(out[1, :2], layer(x[1:, :2])[0], atol=1e-6)
    assert not out.numpy()[1, 2].any()


def test_self_attention_trains_after_a_recurrent_layer(flash):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((None, 3))
    x = keras.layers.Masking()(inputs)
    x = keras.layers.LSTM(8, return_sequences=True)(x)
    x = SelfAttention(4, scale=0.5, dropout=0.1, flash_attention=flash)(x)
    assert x.shape == (None, None, 4)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(x)))
    model.compile("adam", "mse", jit_compile=False)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 6, 3)).astype("float32"), rng.normal(size=(32, 1)).astype("float32")
    x[::2, 4:] = 0
    before = [w.numpy() for w in model.layers[3].weights]
    losses = model.fit(x, y, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert all((a != b.numpy()).any() for a, b in zip(before, model.layers[3].weights))


def test_self_attention_refuses_bad_arguments():
    with pytest.raises(ValueError, match="units must be None or a positive integer, got 0"):
        SelfAttention(0)
    with pytest.raises(ValueError, match="expected ndim=3"):
        SelfAttention()(random(2, 5))


def test_initial_weights_differ_even_from_a_seeded_initializer():
    layer = SelfAttention(kernel_initializer=keras.initializers.GlorotUniform())
    layer.build((None, 5, 6))
    assert not np.allclose(layer.W_q, layer.W_k) and not np.allclose(layer.W_k, layer.W_v)


def test_attention_layer_takes_query_key_value(flash):
    q, k, v = random(2, 5, 6).numpy(), random(2, 7, 6, seed=1).numpy(), random(2, 7, 3, seed=2).numpy()
    expected, weights = softmax_attention(q, k, v)
    np.testing.assert_allclose(AttentionLayer(flash_attention=flash, dtype="float64")([q, k, v]), expected, rtol=1e-9)
    out, returned = AttentionLayerWithWeights(flash_attention=flash, dtype="float64")([q, k, v])
    np.testing.assert_allclose(out, expected, rtol=1e-9)
    np.testing.assert_allclose(returned, weights, rtol=1e-9)
    scaled = AttentionLayer(scale=0.3, flash_attention=flash, dtype="float64")([q, k, v])
    np.testing.assert_allclose(scaled, softmax_attention(q, k, v, 0.3)[0], rtol=1e-9)


def test_attention_layer_masks(flash):
    q, k, v = random(2, 5, 6).numpy(), random(2, 5, 6, seed=1).numpy(), random(2, 5, 3, seed=2).numpy()
    query_mask, key_mask = np.arange(5) < [[5], [3]], np.arange(5) < [[4], [2]]
    layer = AttentionLayerWithWeights(flash_attention=flash, dtype="float64")
    out, weights = layer([q, k, v], mask=[query_mask, key_mask, None], use_causal_mask=True)
    visible = key_mask[:, None] & np.tril(np.ones((5, 5), bool))
    expected, expected_weights = softmax_attention(q, k, v, visible=visible)
    np.testing.assert_allclose(out, np.where(query_mask[..., None], expected, 0.0), rtol=1e-9)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-9)
    assert layer.compute_mask([q, k, v], [query_mask, None, None])[0] is query_mask


def test_masks_of_embeddings_reach_the_attention_layer(flash):
    embedding = keras.layers.Embedding(4, 6, mask_zero=True)
    x = embedding(np.array([[1, 2, 0], [3, 0, 0]]))
    for layer in (AttentionLayer(flash_attention=flash), AttentionLayerWithWeights(flash_attention=flash)):
        out = tf.nest.flatten(layer([x, x, x]))[0]
        np.testing.assert_array_equal(out._keras_mask, [[True, True, False], [True, False, False]])
        np.testing.assert_allclose(out[1, 0], x[1, 0], rtol=1e-6)


def test_weights_are_those_that_multiply_the_values(flash):
    layer = AttentionLayerWithWeights(dropout=0.5, seed=1, flash_attention=flash, dtype="float64")
    q, k, v = random(2, 16, 6), random(2, 16, 6, seed=1), random(2, 16, 3, seed=2)
    out, weights = layer([q, k, v], training=True)
    np.testing.assert_allclose(out, weights @ v, rtol=1e-9)
    assert 0.35 < (weights.numpy() == 0).mean() < 0.65


@pytest.mark.parametrize("cls", [AttentionLayer, AttentionLayerWithWeights])
def test_attention_layer_refuses_other_than_three_inputs(cls):
    x = random(2, 5, 6)
    with pytest.raises(ValueError, match=rf"{cls.__name__} must be called on \[query, key, value\]"):
        cls()([x, x])
    with pytest.raises(ValueError, match=r"takes the masks \[query_mask, key_mask, value_mask\]"):
        cls()([x, x, x], mask=[None, None])


@pytest.mark.parametrize(
    "layer",
    [
        lambda: SelfAttention(4, scale=0.5, dropout=0.1, kernel_regularizer="l2", seed=3, flash_attention=False),
        lambda: AttentionLayer(scale=0.5, dropout=0.1, seed=3),
        lambda: AttentionLayerWithWeights(scale=0.5),
    ],
)
def test_save_and_load(tmp_path, layer):
    layer = layer()
    inputs = keras.Input((5, 6))
    single = isinstance(layer, SelfAttention)
    model = keras.Model(inputs, layer(inputs if single else [inputs] * 3))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = random(2, 5, 6, dtype="float32")
    for a, b in zip(tf.nest.flatten(loaded(x)), tf.nest.flatten(model(x)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert loaded.layers[-1].get_config() == layer.get_config()
    symbolic = tf.nest.flatten(model.output)
    assert [tuple(s.shape[1:]) for s in symbolic] == [tuple(a.shape[1:]) for a in tf.nest.flatten(model(x))]

"""GroupedQueryAttention beyond parity."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from layer_twins import FLASH, HAS_GATE, STOCK, assert_same, random, twins

GQA = attn_ops.layers.GroupedQueryAttention


@pytest.fixture(params=FLASH)
def flash(request):
    return FLASH[request.param]


def built(flash, *shapes, **config):
    config = {"head_dim": 4, "num_query_heads": 4, "num_key_value_heads": 2, "flash_attention": flash, **config}
    layer = GQA(**config)
    layer.build(*(shapes or [(2, 5, 6), (2, 5, 6)]))
    return layer


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_heads_are_grouped_in_order(flash, kv_heads):
    config = dict(head_dim=4, num_query_heads=4, num_key_value_heads=kv_heads, flash_attention=flash)
    stock, mine = twins("GroupedQueryAttention", (2, 5, 6), (2, 7, 6), **config)
    inputs = [random(2, 5, 6), random(2, 7, 6, seed=1)]
    assert_same(stock, mine, inputs, lambda layer, x: layer(*x, return_attention_scores=True))


def test_keys_and_values_are_not_repeated(monkeypatch):
    seen = {}
    run = attn_ops.scaled_dot_product_attention

    def spy(query, key, value, **kwargs):
        seen["heads"] = query.shape[2], key.shape[2], value.shape[2]
        return run(query, key, value, **kwargs)

    monkeypatch.setattr(attn_ops, "scaled_dot_product_attention", spy)
    x = random(2, 5, 6, dtype="float32")
    built(None)(x, x)
    assert seen["heads"] == (4, 2, 2)


@pytest.mark.skipif(not HAS_GATE, reason="this Keras has no use_gate")
def test_gate(flash):
    config = dict(head_dim=4, num_query_heads=4, num_key_value_heads=2, use_gate=True, flash_attention=flash)
    stock, mine = twins("GroupedQueryAttention", (2, 5, 6), (2, 7, 6), **config)
    inputs = [random(2, 5, 6), random(2, 7, 6, seed=1)]
    assert_same(stock, mine, inputs, lambda layer, x: layer(*x))


def test_explicit_query_mask_is_used(flash):
    """As in Keras."""
    x, mask = random(2, 5, 6), np.arange(5) < np.array([[5], [3]])
    layer = built(flash, dtype="float64", use_bias=False)
    out = layer(x, x, query_mask=mask)
    assert not out.numpy()[~mask].any() and out.numpy()[mask].all()


def test_no_warning_and_no_side_effect_on_masked_inputs(flash):
    embedding = keras.layers.Embedding(4, 6, mask_zero=True)
    x = embedding(np.array([[1, 2, 0], [3, 0, 0]]))
    layer = built(flash, (2, 3, 6), (2, 3, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = layer(x, x)
    for tensor in (x, out):
        np.testing.assert_array_equal(tensor._keras_mask, [[True, True, False], [True, False, False]])


def test_scores_are_those_before_dropout(flash):
    layer = built(flash, dropout=0.5, seed=1, dtype="float64")
    x = random(2, 5, 6)
    out, scores = layer(x, x, return_attention_scores=True, training=True)
    np.testing.assert_allclose(scores.numpy().sum(-1), 1.0, rtol=1e-9)
    assert scores.shape == (2, 4, 5, 5)
    assert not np.allclose(out, layer(x, x, training=False))


def test_empty_rows_give_zeros(flash):
    layer = built(flash, use_bias=False)
    mask = np.ones((2, 5, 5), bool)
    mask[0, 2] = False
    x = random(2, 5, 6, dtype="float32")
    out, scores = layer(x, x, attention_mask=mask, return_attention_scores=True)
    assert not out.numpy()[0, 2].any() and not scores.numpy()[0, :, 2].any()
    assert out.numpy()[0, 1].all()


def test_additive_masks_are_refused(flash):
    x = random(2, 5, 6, dtype="float32")
    with pytest.raises(TypeError, match="additive mask would be inverted"):
        built(flash)(x, x, attention_mask=np.full((5, 5), -1e9, "float32"))


def test_subclasses_get_keras_contract():
    """An override of `_compute_attention` sees a dense mask and one key and value head per query head."""
    seen = {}

    class Sub(GQA):
        def _compute_attention(self, query, key, value, attention_mask=None, training=None):
            seen.update(heads=key.shape[2], mask=attention_mask)
            return super()._compute_attention(query, key, value, attention_mask, training)

    sub = Sub(head_dim=4, num_query_heads=4, num_key_value_heads=2)
    x = random(2, 5, 6, dtype="float32")
    out = sub(x, x, use_causal_mask=True)
    assert seen["heads"] == 4
    np.testing.assert_array_equal(np.broadcast_to(seen["mask"], (1, 5, 5))[0], np.tril(np.ones((5, 5), bool)))
    plain = built(None)
    plain.set_weights(sub.get_weights())
    np.testing.assert_allclose(out, plain(x, x, use_causal_mask=True), atol=1e-6)


def test_unknown_dimensions_and_xla(flash):
    layer = built(flash, (None, None, 6), (None, None, 6))
    x = random(2, 5, 6, dtype="float32")
    expected = layer(x, x, use_causal_mask=True)
    graph = tf.function(
        lambda x: layer(x, x, use_causal_mask=True), input_signature=[tf.TensorSpec([None, None, 6])]
    )
    np.testing.assert_allclose(graph(x), expected, atol=1e-6)
    automatic = built(None)
    automatic.set_weights(layer.get_weights())
    compiled = tf.function(lambda x: automatic(x, x, use_causal_mask=True), jit_compile=True)
    np.testing.assert_allclose(compiled(x), expected, atol=1e-5)


def test_config_and_names_are_those_of_keras():
    config = dict(head_dim=4, num_query_heads=4, num_key_value_heads=2, name="attention")
    stock, mine = STOCK["GroupedQueryAttention"](**config), GQA(**config)
    assert mine.get_config() == stock.get_config()
    assert STOCK["GroupedQueryAttention"].from_config(mine.get_config()).get_config() == stock.get_config()

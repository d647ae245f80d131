"""Attention (Luong) beyond parity."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from layer_twins import FLASH, KERAS, STOCK, assert_same, random, twins

Attention = attn_ops.layers.Attention


@pytest.fixture(params=FLASH)
def flash(request):
    return FLASH[request.param]


def test_scores_are_not_scaled(flash):
    q, v = random(2, 5, 6), random(2, 7, 6, seed=1)
    weights = tf.nn.softmax(tf.matmul(q, v, transpose_b=True))
    out, scores = Attention(flash_attention=flash, dtype="float64")([q, v], return_attention_scores=True)
    np.testing.assert_allclose(scores, weights, rtol=1e-9)
    np.testing.assert_allclose(out, weights @ v, rtol=1e-9)


def test_learned_scale_is_a_weight_with_a_gradient(flash):
    stock, mine = twins("Attention", (2, 5, 6), (2, 7, 6), use_scale=True, flash_attention=flash)
    assert [w.shape for w in mine.weights] == [()]
    assert_same(stock, mine, [random(2, 5, 6), random(2, 7, 6, seed=1)], lambda layer, x: layer(list(x)))


def test_wide_features(flash):
    """The features are the head_dim: hundreds of them."""
    shapes = (1, 3, 640), (1, 4, 640)
    stock, mine = twins("Attention", *shapes, flash_attention=flash)
    inputs = [random(*shape, seed=i) * 0.1 for i, shape in enumerate(shapes)]
    assert_same(stock, mine, inputs, lambda layer, x: layer(list(x)))


def test_scores_are_those_after_dropout(flash):
    layer = Attention(dropout=0.5, seed=1, flash_attention=flash, dtype="float64")
    q, v = random(2, 16, 6), random(2, 16, 6, seed=1)
    out, scores = layer([q, v], return_attention_scores=True, training=True)
    np.testing.assert_allclose(out, scores @ v, rtol=1e-9)
    dropped = (scores.numpy() == 0).mean()
    assert 0.35 < dropped < 0.65
    plain = layer([q, v], return_attention_scores=True)[1].numpy()
    kept = scores.numpy() != 0
    np.testing.assert_allclose(scores.numpy()[kept], 2 * plain[kept], rtol=1e-9)


def test_dropout_is_reproducible_and_advances(flash):
    q, v = random(2, 16, 6), random(2, 16, 6, seed=1)
    first, second = (Attention(dropout=0.5, seed=1, flash_attention=flash) for _ in range(2))
    runs = [first([q, v], training=True).numpy() for _ in range(2)]
    np.testing.assert_array_equal(runs, [second([q, v], training=True).numpy() for _ in range(2)])
    assert not np.allclose(*runs)


def test_query_mask_zeroes_rows_and_leaves_scores(flash):
    q, v = random(2, 3, 4), random(2, 5, 4, seed=1)
    mask = [np.array([[True, False, True]] * 2), None]
    out, scores = Attention(flash_attention=flash)([q, v], mask=mask, return_attention_scores=True)
    assert not out.numpy()[:, 1].any() and out.numpy()[:, [0, 2]].all()
    np.testing.assert_allclose(scores.numpy().sum(-1), 1.0, rtol=1e-5)


def test_masks_of_embeddings_are_used_and_passed_on(flash):
    embedding = keras.layers.Embedding(4, 6, mask_zero=True)
    x = embedding(np.array([[1, 2, 0], [3, 0, 0]]))
    out = Attention(flash_attention=flash)([x, x])
    np.testing.assert_array_equal(out._keras_mask, [[True, True, False], [True, False, False]])
    np.testing.assert_allclose(out[1, 0], x[1, 0], rtol=1e-6)  # the only key
    assert not out.numpy()[1, 1:].any()


def test_empty_rows_give_zeros(flash):
    """Keras gives the mean of all values."""
    layer = Attention(flash_attention=flash)
    q, v = random(2, 3, 4), random(2, 5, 4, seed=1)
    mask = [None, np.array([[False] * 5, [True] * 5])]
    out, scores = layer([q, v], mask=mask, return_attention_scores=True)
    assert not out.numpy()[0].any() and not scores.numpy()[0].any()
    assert out.numpy()[1].all()


def test_more_axes_before_the_sequence(flash):
    shapes = (2, 3, 5, 6), (2, 3, 7, 4), (2, 3, 7, 6)
    stock, mine = twins("Attention", *shapes, flash_attention=flash)
    inputs = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    if KERAS >= (3, 15):  # Keras takes only one batch axis before
        assert_same(stock, mine, inputs, lambda layer, x: layer(list(x), return_attention_scores=True))
    # A mask of all of them: in Keras it would be broadcast to the wrong axes.
    mask = np.random.default_rng(1).random((2, 3, 7)) > 0.4
    mask[..., 0] = True
    out = mine(inputs, mask=[None, mask]).numpy()
    for i in np.ndindex(2, 3):
        expected = mine([x[i][None] for x in inputs], mask=[None, mask[i][None]])
        np.testing.assert_allclose(out[i], expected[0], rtol=1e-9)


def test_inputs_that_broadcast_are_left_to_keras():
    stock, mine = twins("Attention", (3, 5, 6), (1, 7, 6))
    assert_same(stock, mine, [random(3, 5, 6), random(1, 7, 6)], lambda layer, x: layer(list(x)))
    with pytest.raises(ValueError, match="cannot run fused: the axes before the sequence differ"):
        Attention(flash_attention=True)([random(3, 5, 6), random(1, 7, 6)])


def test_concat_is_left_to_keras():
    stock, mine = twins("Attention", (2, 5, 6), (2, 7, 6), score_mode="concat", use_scale=True)
    inputs = [random(2, 5, 6), random(2, 7, 6)]
    assert_same(stock, mine, inputs, lambda layer, x: layer(list(x), return_attention_scores=True))
    with pytest.raises(ValueError, match="cannot run fused: score_mode is 'concat'"):
        Attention(score_mode="concat", flash_attention=True)(inputs)


def test_overridden_steps_are_left_to_keras():
    class Doubled(Attention):
        def _calculate_scores(self, query, key):
            return 2.0 * super()._calculate_scores(query, key)

    q, v = random(2, 5, 6), random(2, 7, 6, seed=1)
    np.testing.assert_allclose(Doubled(dtype="float64")([q, v]), Attention(dtype="float64")([2.0 * q, v]), rtol=1e-9)
    with pytest.raises(ValueError, match=r"Doubled overrides _calculate_scores\(\)"):
        Doubled(flash_attention=True)([q, v])


def test_unknown_dimensions_and_xla(flash):
    layer = Attention(use_scale=True, flash_attention=flash)
    layer.build([(None, None, 6), (None, None, 6)])
    q, v = random(2, 5, 6, dtype="float32"), random(2, 7, 6, seed=1, dtype="float32")
    mask = tf.constant(np.arange(7) < np.array([[7], [3]]))
    expected = layer([q, v], mask=[None, mask], use_causal_mask=True)
    graph = tf.function(
        lambda q, v, mask: layer([q, v], mask=[None, mask], use_causal_mask=True),
        input_signature=[tf.TensorSpec([None, None, 6])] * 2 + [tf.TensorSpec([None, None], tf.bool)],
    )
    np.testing.assert_allclose(graph(q, v, mask), expected, atol=1e-6)
    automatic = Attention(use_scale=True)
    compiled = tf.function(lambda q, v, m: automatic([q, v], mask=[None, m], use_causal_mask=True), jit_compile=True)
    np.testing.assert_allclose(compiled(q, v, mask), expected, atol=1e-5)


@pytest.mark.parametrize("policy, tolerance", [("mixed_float16", 4e-3), ("mixed_bfloat16", 3e-2)])
def test_mixed_precision(flash, policy, tolerance):
    q, v = random(2, 5, 6), random(2, 7, 6, seed=1)
    exact = Attention(use_scale=True, dtype="float64")
    low = Attention(use_scale=True, flash_attention=flash, dtype=policy)
    out = low([q, v])
    assert out.dtype == low.compute_dtype
    np.testing.assert_allclose(tf.cast(out, "float64"), exact([q, v]), atol=tolerance)


def test_config_is_that_of_keras_and_flash_attention_is_kept():
    stock, mine = STOCK["Attention"](use_scale=True, name="a"), Attention(use_scale=True, name="a")
    assert mine.get_config() == stock.get_config()
    assert Attention.from_config(Attention(flash_attention=False).get_config()).flash_attention is False


def test_a_query_mask_that_does_not_fit_is_named():
    q = random(2, 3, 5, 6)
    with pytest.raises(ValueError, match=r"a query mask of shape \(2, 5\) does not broadcast .* shape \(2, 3, 5, 6\)"):
        Attention()([q, q], mask=[np.ones((2, 5), bool), None])


def test_integers_with_a_scale_have_keras_s_answer():
    """Nobody casts them: Keras's scores are floats by the scale, and without one it fails."""
    stock, mine = twins("Attention", (2, 5, 6), (2, 7, 6), use_scale=True, dtype="float32")
    inputs = [np.random.default_rng(i).integers(-2, 3, shape) for i, shape in enumerate(((2, 5, 6), (2, 7, 6)))]
    np.testing.assert_allclose(mine(inputs), stock(inputs), rtol=1e-5)
    with pytest.raises(TypeError, match="query must be float"):
        Attention()(inputs)


def test_keras_s_answer_and_its_gradient_where_xla_knows_no_sizes():
    """Which rows are empty only the data tell, and of a branch with such sizes XLA makes no gradient."""
    stock, mine = STOCK["Attention"](), Attention(as_in_keras=True)

    @tf.function(input_signature=[tf.TensorSpec([None, None, 6]), tf.TensorSpec([None, None], tf.bool)], jit_compile=True)
    def gradient(x, mask):
        with tf.GradientTape() as tape:
            tape.watch(x)
            out = mine([x, x], mask=[mask, mask])
        return out, tape.gradient(out, x, tf.sin(out))

    x, mask = random(1, 4, 6, dtype="float32"), tf.constant([[True, True, True, False]])
    with tf.GradientTape() as tape:
        tape.watch(x)
        out = stock([x, x], mask=[mask, mask])
    for actual, expected in zip(gradient(x, mask), (out, tape.gradient(out, x, tf.sin(out)))):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)

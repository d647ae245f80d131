"""HierarchicalAttention against its formula in NumPy, and what padding, files and functional models make of it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops

Layer = attn_ops.layers.HierarchicalAttention
BATCH, SENTENCES, WORDS, FEATURES = 3, 4, 5, 6
FLASH = pytest.mark.parametrize("flash", [None, False])


def inputs(dtype="float64"):
    """Documents and a mask: with sentences of all words, of some and of none, and a document without words."""
    random = np.random.default_rng(0)
    mask = random.random((BATCH, SENTENCES, WORDS)) < 0.6
    mask[0, 0], mask[0, 1], mask[2] = True, False, False
    return random.standard_normal((BATCH, SENTENCES, WORDS, FEATURES)).astype(dtype), mask


def level(x, mask, kernel, bias, context):
    """One level by its formula: `[..., items, features]` to `[..., features]`, and the weights."""
    scores = np.where(mask, np.tanh(x @ kernel + bias) @ context, -np.inf)
    largest = scores.max(-1, keepdims=True)
    e = np.exp(scores - np.where(np.isfinite(largest), largest, 0))
    weights = e / np.maximum(e.sum(-1, keepdims=True), 1e-300)
    return (weights[..., None] * x).sum(-2), weights


def with_biases(layer):
    """Weights of all kinds that are not 0."""
    random = np.random.default_rng(1)
    layer.set_weights([random.standard_normal(w.shape) for w in layer.weights])
    return layer


@FLASH
@pytest.mark.parametrize("units", [None, 7])
def test_it_is_its_formula(units, flash):
    x, mask = inputs()
    layer = Layer(units, flash_attention=flash, dtype="float64")
    layer.build(x.shape)
    with_biases(layer)
    names = [w.path.rpartition("/")[2] for w in layer.weights]
    assert names == [f"{of}_{kind}" for of in ("word", "sentence") for kind in ("kernel", "bias", "context")]
    weights = [w.numpy() for w in layer.weights]
    sentence, of_words = level(x, mask, *weights[:3])
    document, of_sentences = level(sentence, mask.any(-1), *weights[3:])
    assert (document[2] == 0).all() and (of_sentences.sum(-1) > 0).tolist() == [True, True, False]
    found = layer(x, mask=mask, return_attention_scores=True)
    for result, expected in zip(found, (document, of_words, of_sentences), strict=True):
        np.testing.assert_allclose(result, expected, atol=1e-12)
    np.testing.assert_allclose(layer(x, mask=mask), document, atol=1e-12)
    everything = level(level(x, True, *weights[:3])[0], True, *weights[3:])[0]
    np.testing.assert_allclose(layer(x), everything, atol=1e-12)


def test_gradients_are_those_of_the_formula():
    """By finite differences along one direction of the input and all weights."""
    x, mask = inputs()
    layer = Layer(3, dtype="float64")
    layer.build(x.shape)
    with_biases(layer)
    random = np.random.default_rng(2)
    d_out = random.standard_normal((BATCH, FEATURES))
    variables = [tf.Variable(x), *(w.value for w in layer.trainable_weights)]
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(variables[0], mask=mask) * d_out)
    gradients = tape.gradient(loss, variables)
    directions = [random.standard_normal(v.shape) for v in variables]
    values = [v.numpy() for v in variables]

    def at(step):
        moved, *weights = (v + step * d for v, d in zip(values, directions))
        sentence, _ = level(moved, mask, *weights[:3])
        return (level(sentence, mask.any(-1), *weights[3:])[0] * d_out).sum()

    slope = sum((g.numpy() * d).sum() for g, d in zip(gradients, directions))
    assert slope == pytest.approx((at(1e-5) - at(-1e-5)) / 2e-5, rel=1e-6)


def test_more_padding_changes_nothing_whatever_it_holds():
    x, mask = inputs("float32")
    layer = Layer()
    expected = layer(x, mask=mask)
    more = np.full((BATCH, SENTENCES + 1, WORDS + 2, FEATURES), np.nan, np.float32)
    more[:, :SENTENCES, :WORDS] = np.where(mask[..., None], x, np.nan)
    np.testing.assert_allclose(layer(more, mask=np.pad(mask, ((0, 0), (0, 1), (0, 2)))), expected, atol=1e-6)


def model():
    tokens = keras.Input((None, None), dtype="int32")
    x = keras.layers.Embedding(9, FEATURES, mask_zero=True)(tokens)
    encoder = keras.layers.SimpleRNN(8, return_sequences=True)
    return keras.Model(tokens, Layer(5, encoder)(x, return_attention_scores=True))


def test_a_functional_model_of_unknown_sizes_has_the_mask_of_its_embedding(tmp_path):
    built = model()
    assert [tuple(x.shape) for x in built.outputs] == [(None, 8), (None, None, None), (None, None)]
    tokens = np.array([[[1, 2, 3], [4, 0, 0], [0, 0, 0]], [[5, 0, 0], [0, 0, 0], [0, 0, 0]]])
    document, of_words, of_sentences = built.predict(tokens, verbose=0)
    np.testing.assert_allclose(of_words.sum(-1), tokens.any(-1), atol=1e-6)
    assert (of_words[tokens == 0] == 0).all() and (of_sentences[~tokens.any(-1)] == 0).all()
    # The encoder between the levels skips what is padding, too.
    wider = np.pad(tokens, ((0, 0), (0, 2), (0, 1)))
    np.testing.assert_allclose(built.predict(wider, verbose=0)[0], document, atol=1e-6)

    built.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for found, expected in zip(loaded.predict(tokens, verbose=0), (document, of_words, of_sentences), strict=True):
        np.testing.assert_array_equal(found, expected)
    [row] = attn_ops.explain(built).layers
    assert row.cls == "HierarchicalAttention" and row.fused


@FLASH
def test_dropout_drops_and_is_reproducible(flash):
    x, mask = inputs("float32")

    def run(training):
        glorot = keras.initializers.GlorotUniform(1)
        layer = Layer(dropout=0.5, seed=3, kernel_initializer=glorot, flash_attention=flash)
        return [result.numpy() for result in layer(x, mask=mask, training=training, return_attention_scores=True)]

    once, again, plain = run(True), run(True), run(False)
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a, b)
    dropped = (once[1] == 0) & (plain[1] > 0)
    assert 0 < dropped.sum() < (plain[1] > 0).sum()
    np.testing.assert_allclose(once[1][once[1] > 0], 2 * plain[1][once[1] > 0], rtol=1e-5)


def test_half_precision():
    x, mask = inputs("float32")
    layer, half = Layer(dtype="float32"), Layer(dtype="mixed_float16")
    expected = layer(x, mask=mask)
    half.build(x.shape)
    half.set_weights(layer.get_weights())
    found = half(x, mask=mask)
    assert found.dtype == tf.float16
    np.testing.assert_allclose(found, expected, atol=5e-3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: Layer(0), ValueError, "units must be None or a positive integer, got 0"),
        (lambda: Layer(4, "gru"), TypeError, "sentence_encoder must be None or a Keras layer, got 'gru'"),
        (lambda: Layer()(np.ones((2, 3, 4))), ValueError, r"must be \[batch, sentences, words, features\]"),
        (lambda: Layer()(np.ones((2, 3, 4, 5)), mask=np.ones((2, 3), bool)), ValueError, r"mask must be \[batch"),
        (lambda: Layer(4, keras.layers.GRU(4))(np.ones((2, 3, 4, 5))), ValueError, "sentence_encoder must give"),
        (lambda: Layer()(np.ones((2, 3, 4, 5)), mask=np.full((2, 3, 4), -1e9)), TypeError, "mask must be boolean"),
    ],
)  # fmt: skip
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()

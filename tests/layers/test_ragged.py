"""Ragged input of the layers: each sequence gives what it gives by itself."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from attn_ops import masks
from layer_twins import FLASH, ours, random

CONFIGS = {
    "MultiHeadAttention": dict(num_heads=4, key_dim=4),
    "GroupedQueryAttention": dict(head_dim=4, num_query_heads=4, num_key_value_heads=2),
}
LENGTHS, OTHERS = [3, 0, 5, 1], [2, 4, 6, 3]
each_layer = pytest.mark.parametrize("name", CONFIGS)
OPTIONS = {
    "plain": ({}, {}),
    "causal": ({}, {"use_causal_mask": True}),
    "window": ({"mask": masks.window(1, 2)}, {}),
    "positions": (dict(rotary=True, position_bias="t5", sinks=True, logits_soft_cap=2.0, mask=masks.causal()), {}),
    "alibi": (dict(position_bias="alibi"), {"use_causal_mask": True}),
    "prefix, chunks": (dict(mask=masks.prefix(2)), {"attention_mask": masks.chunked(3)}),
    "offset": (dict(rotary=True), {"use_causal_mask": True, "query_offset": 1}),
}


@pytest.fixture(params=FLASH)
def flash(request):
    return FLASH[request.param]


def ragged(lengths, seed=0, dtype="float64"):
    return tf.RaggedTensor.from_row_lengths(random(sum(lengths), 8, seed=seed, dtype=dtype), lengths)


def made(name, flash=None, **config):
    layer = ours(name)(**CONFIGS[name], flash_attention=flash, dtype="float64", **config)
    layer.build((2, 6, 8), (2, 6, 8))
    rng = np.random.default_rng(7)
    layer.set_weights([rng.normal(size=w.shape) * 0.5 for w in layer.weights])
    return layer


def one_by_one(layer, query, context, **call):
    rows = [(query[i][None], context[i][None]) for i in range(query.shape[0])]
    return tf.concat([layer(q, c, **call)[0] for q, c in rows if q.shape[1]], 0)


@pytest.mark.wide(3)
@pytest.mark.parametrize("config, call", OPTIONS.values(), ids=OPTIONS)
@each_layer
def test_sequences_by_themselves(name, flash, config, call):
    layer, x = made(name, flash, **config), ragged(LENGTHS)
    out = layer(x, x, **call)
    assert isinstance(out, tf.RaggedTensor)
    np.testing.assert_array_equal(out.row_lengths(), LENGTHS)
    np.testing.assert_allclose(out.values, one_by_one(layer, x, x, **call), rtol=1e-9, atol=1e-9)
    traced = tf.function(lambda x: layer(x, x, **call), [tf.RaggedTensorSpec([None, None, 8], "float64", 1)])
    np.testing.assert_allclose(traced(x).values, out.values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config, call", [({}, {}), ({"rotary": True}, {"use_causal_mask": True})])
@each_layer
def test_queries_and_keys_of_other_lengths(name, flash, config, call):
    layer, x, y = made(name, flash, **config), ragged(LENGTHS), ragged(OTHERS, 1)
    np.testing.assert_allclose(layer(x, y, **call).values, one_by_one(layer, x, y, **call), rtol=1e-9, atol=1e-9)


@each_layer
def test_an_offset_for_each_sequence(name):
    layer, x, y = made(name, rotary=True), ragged(LENGTHS), ragged(OTHERS, 1)
    offsets = [0, 1, 2, 3]
    out = layer(x, y, use_causal_mask=True, query_offset=offsets)
    one = [layer(x[i][None], y[i][None], use_causal_mask=True, query_offset=n)[0] for i, n in enumerate(offsets) if LENGTHS[i]]
    np.testing.assert_allclose(out.values, tf.concat(one, 0), rtol=1e-9, atol=1e-9)


@each_layer
def test_gradients(name, flash):
    layer, x = made(name, flash, sinks=True), ragged(LENGTHS)

    def gradients(call):
        with tf.GradientTape() as tape:
            tape.watch(x.values)
            total = tf.reduce_sum(tf.sin(call()))
        return tape.gradient(total, [x.values, *(w.value for w in layer.trainable_variables)])

    found = gradients(lambda: layer(x, x, use_causal_mask=True).values)
    right = gradients(lambda: one_by_one(layer, x, x, use_causal_mask=True))
    for a, b in zip(found, right):
        np.testing.assert_allclose(tf.convert_to_tensor(a), tf.convert_to_tensor(b), rtol=1e-8, atol=1e-9)


@each_layer
def test_a_functional_model(name, tmp_path):
    x = keras.Input((None, 8), ragged=True)
    layer = ours(name)(**CONFIGS[name], dropout=0.2, seed=1)
    out = layer(x, x, use_causal_mask=True)
    assert out.ragged and out.shape == (None, None, 8)
    model = keras.Model(x, out)
    data = ragged(LENGTHS, dtype="float32")
    expected = one_by_one(layer, data, data, use_causal_mask=True)
    np.testing.assert_allclose(model.predict(data, verbose=0).values, expected, atol=1e-6)
    model.save(tmp_path / "model.keras")
    np.testing.assert_allclose(keras.models.load_model(tmp_path / "model.keras")(data).values, expected, atol=1e-6)
    assert not np.allclose(layer(data, data, training=True).values, layer(data, data).values)


@each_layer
def test_what_does_not_go_with_ragged_tensors(name):
    layer, x = made(name), ragged(LENGTHS)
    for given in (
        {"value_mask": np.ones((4, 5), bool)},
        {"attention_mask": np.ones((4, 5, 5), bool)},
        {"attention_bias": np.zeros((5, 5))},
        {"return_attention_scores": True},
    ):
        with pytest.raises(
            ValueError, match=f"{name}: a call with ragged tensors takes no {[*given][0]}: pass dense ones"
        ):
            layer(x, x, **given)
    with pytest.raises(TypeError, match=f"{name}: query, key and value must all be ragged .* value is dense"):
        layer(x, random(4, 5, 8), x)
    with pytest.raises(
        ValueError, match=f"{name}: of masks a call with ragged tensors has those that go by positions .*, got .*packed"
    ):
        made(name, mask=masks.packed([0, 3, 5]))(x, x)
    with pytest.raises(
        ValueError, match=f"{name}: Keras's own code has no ragged tensors, and runs here: as_in_keras=True"
    ):
        made(name, as_in_keras=True)(x, x)
    with pytest.raises(ValueError, match=f"{name}: key and value must have rows of the same lengths"):
        layer(x, ragged(OTHERS), ragged(OTHERS[::-1]))
    with pytest.raises(ValueError, match="position_bias|alibi_slopes needs sequences of the same lengths"):
        made(name, position_bias="alibi")(x, ragged(OTHERS))


# The layers of one head: how they are called on a query and a context.
ONE_HEAD = {
    "Attention": (dict(use_scale=True), lambda layer, x, y, **call: layer([x, y], **call)),
    "AttentionLayer": (dict(scale=0.5), lambda layer, x, y, **call: layer([x, y, y], **call)),
    "SelfAttention": (dict(units=4), lambda layer, x, y, **call: layer(x, **call)),
}
each_of_one_head = pytest.mark.parametrize("name, config, call", [(name, *x) for name, x in ONE_HEAD.items()], ids=ONE_HEAD)


@each_of_one_head
@pytest.mark.parametrize("is_causal", [False, True], ids=["plain", "causal"])
def test_one_head(name, config, call, is_causal, flash):
    layer, x, y = ours(name)(**config, flash_attention=flash, dtype="float64"), ragged(LENGTHS), ragged(OTHERS, 1)

    def results(x_values, y_values, attend):
        with tf.GradientTape() as tape:
            tape.watch([x_values, y_values])
            out = attend(x.with_values(x_values), y.with_values(y_values))
            total = tf.reduce_sum(tf.sin(out))
        gradients = tape.gradient(total, [x_values, y_values, *(w.value for w in layer.trainable_variables)])
        return [out, *(tf.convert_to_tensor(g) for g in gradients if g is not None)]

    def whole(x, y):
        out = call(layer, x, y, use_causal_mask=is_causal)
        assert isinstance(out, tf.RaggedTensor)
        np.testing.assert_array_equal(out.row_lengths(), LENGTHS)
        return out.values

    def one_by_one(x, y):
        pairs = [(x[i][None], y[i][None]) for i, n in enumerate(LENGTHS) if n]
        return tf.concat([call(layer, *pair, use_causal_mask=is_causal)[0] for pair in pairs], 0)

    for a, b in zip(results(x.values, y.values, whole), results(x.values, y.values, one_by_one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)
    traced = tf.function(
        lambda x, y: call(layer, x, y, use_causal_mask=is_causal), [tf.RaggedTensorSpec([None, None, 8], "float64", 1)] * 2
    )
    np.testing.assert_allclose(traced(x, y).values, whole(x, y), rtol=1e-9, atol=1e-9)


@each_of_one_head
def test_one_head_in_a_functional_model(name, config, call, tmp_path):
    x = keras.Input((None, 8), ragged=True)
    out = call(ours(name)(**config, dropout=0.2, seed=1), x, x, use_causal_mask=True)
    assert out.ragged and out.shape == (None, None, config.get("units", 8))
    model, data = keras.Model(x, out), ragged(LENGTHS, dtype="float32")
    expected = call(model.layers[-1], data, data, use_causal_mask=True).values
    assert not np.allclose(call(model.layers[-1], data, data, use_causal_mask=True, training=True).values, expected)
    np.testing.assert_allclose(model.predict(data, verbose=0).values, expected, atol=1e-6)
    model.save(tmp_path / "model.keras")
    np.testing.assert_allclose(keras.models.load_model(tmp_path / "model.keras")(data).values, expected, atol=1e-6)


@each_of_one_head
def test_what_does_not_go_with_one_ragged_head(name, config, call):
    layer, x = ours(name)(**config), ragged(LENGTHS, dtype="float32")
    mask = np.ones((4, 5), bool)
    masks_given = {"Attention": [mask, mask], "AttentionLayer": [mask] * 3, "SelfAttention": mask}
    words = {"mask": "query mask"} if name != "SelfAttention" else {}
    refused = [{"mask": masks_given[name]}, {"attention_bias": np.zeros((5, 5), "f")}]
    if name != "AttentionLayer":
        refused.append({"return_attention_scores": True})
    for given in refused:
        with pytest.raises(ValueError, match=f"{name}: a call with ragged tensors takes no {words.get([*given][0], [*given][0])}"):
            call(layer, x, x, **given)
    if name != "SelfAttention":
        with pytest.raises((TypeError, ValueError), match=f"{name}: .* must all be ragged"):
            call(layer, x, random(4, 5, 8, dtype="float32"))
    if name == "Attention":
        for config in ({"score_mode": "concat"}, {"as_in_keras": True}):
            with pytest.raises(ValueError, match="Attention: Keras's own code has no ragged tensors, and runs here: "):
                call(ours(name)(**config), x, x)


MASKED = {
    **{name: (CONFIGS[name], lambda layer, x: layer(x, x)) for name in CONFIGS},
    "Attention": ({}, lambda layer, x: layer([x, x])),
    "AttentionLayer": ({}, lambda layer, x: layer([x, x, x])),
    "SelfAttention": ({}, lambda layer, x: layer(x)),
}


@pytest.mark.parametrize("name", MASKED)
def test_masks_of_ragged_embeddings(name):
    """Which tokens are hidden is told as for padded ids; what is no padding stays what it is."""
    config, call = MASKED[name]
    ids = tf.ragged.constant([[1, 2, 0], [], [3, 0, 0, 4], [5]], dtype="int32")
    ragged_ids, padded_ids = keras.Input((None,), ragged=True, dtype="int32"), keras.Input((None,), dtype="int32")
    embedding, layer = keras.layers.Embedding(6, 8, mask_zero=True), ours(name)(**config)
    ragged_model, padded_model = (keras.Model(i, call(layer, embedding(i))) for i in (ragged_ids, padded_ids))
    out, wanted = ragged_model(ids), padded_model(ids.to_tensor())
    np.testing.assert_allclose(out.to_tensor(), np.where(tf.sequence_mask(ids.row_lengths())[..., None], wanted, 0), atol=1e-6)
    assert out._keras_mask.to_list() == (ids != 0).to_list()
    with pytest.raises(ValueError, match="an input and its mask must have rows of the same lengths"):
        x = embedding(ids)
        x._keras_mask = tf.ragged.constant([[True], [], [True], [True]])
        call(layer, x)


@pytest.mark.parametrize("name", MASKED)
def test_compiled_by_xla(name):
    config, call = MASKED[name]
    layer, x = ours(name)(**config, **({"rotary": True} if name in CONFIGS else {})), ragged(LENGTHS, dtype="float32")
    compiled = tf.function(lambda x: call(layer, x), jit_compile=True)
    np.testing.assert_allclose(compiled(x).values, call(layer, x).values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["MultiHeadAttention", "SelfAttention"])
def test_rematerialisation(name):
    config, call = MASKED[name]
    x = ragged(LENGTHS, dtype="float32")
    with keras.RematScope(mode="full"):
        layer = ours(name)(**config, dropout=0.5, seed=1)
    plain = ours(name)(**config, dropout=0.5, seed=1)
    call(layer, x), call(plain, x)
    plain.set_weights(layer.get_weights())

    def gradients(layer):
        with tf.GradientTape() as tape:
            tape.watch(x.values)
            total = tf.reduce_sum(tf.sin(call(functools.partial(layer, training=True), x).values))
        return tape.gradient(total, [x.values, *(w.value for w in layer.trainable_variables)])

    for run in (gradients, tf.function(gradients)):
        for found, wanted in zip(run(layer), run(plain), strict=True):
            np.testing.assert_allclose(tf.convert_to_tensor(found), tf.convert_to_tensor(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_causal", [False, True], ids=["plain", "causal"])
def test_weights_of_ragged_sequences(is_causal, flash):
    """Each sequence by itself: contexts, weights and gradients; functional models, and files of them, too."""
    layer = ours("AttentionLayerWithWeights")(scale=0.5, flash_attention=flash, dtype="float64")
    x, y = ragged(LENGTHS), ragged(OTHERS, 1)

    def results(attend):
        with tf.GradientTape() as tape:
            tape.watch([x.values, y.values])
            pairs = attend(x.with_values(tf.identity(x.values)), y.with_values(tf.identity(y.values)))
            total = tf.add_n([tf.reduce_sum(tf.sin(out)) + tf.reduce_sum(weights**2) for out, weights in pairs])
        return pairs, [tf.convert_to_tensor(d) for d in tape.gradient(total, [x.values, y.values])]

    def whole(x, y):
        out, weights = layer([x, y, y], use_causal_mask=is_causal)
        assert out.row_lengths().numpy().tolist() == weights.row_lengths().numpy().tolist() == LENGTHS
        return [(out[i], weights[i].to_tensor()) for i, n in enumerate(LENGTHS) if n]

    def one_by_one(x, y):
        pairs = [(x[i][None], y[i][None]) for i, n in enumerate(LENGTHS) if n]
        return [tuple(a[0] for a in layer([q, k, k], use_causal_mask=is_causal)) for q, k in pairs]

    for a, b in zip(tf.nest.flatten(results(whole)), tf.nest.flatten(results(one_by_one)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


def test_weights_in_a_functional_model(tmp_path):
    ids = tf.ragged.constant([[1, 2, 0], [], [3, 0, 0, 4], [5]], dtype="int32")
    inputs = keras.Input((None,), ragged=True, dtype="int32")
    x = keras.layers.Embedding(6, 8, mask_zero=True)(inputs)
    out, weights = ours("AttentionLayerWithWeights")(dropout=0.1, seed=1)([x, x, x])
    assert (out.ragged, weights.ragged, weights.shape) == (True, True, (None, None, None))
    model = keras.Model(inputs, [out, weights])
    model.save(tmp_path / "model.keras")
    found = model.predict(ids, verbose=0)
    for a, b in zip(found, keras.models.load_model(tmp_path / "model.keras")(ids)):
        np.testing.assert_allclose(a.flat_values, b.flat_values, atol=1e-6)
    shown = (ids != 0).to_list()
    for rows, seen in zip(found[1].to_list(), shown):
        for row in rows:
            assert [w > 0 for w in row] == seen
    with pytest.raises(ValueError, match="an input and its mask must have rows of the same lengths"):
        model.layers[-1]([found[0]] * 3, mask=[ids[:, :1] != 0] * 3)


DOCUMENTS = [[[1, 2], [3]], [], [[4, 5, 6]], [[7], [], [0, 1]]]


@pytest.mark.parametrize("encoder", [False, True], ids=["plain", "encoder"])
def test_ragged_documents(encoder, tmp_path):
    """Of sentences of words, each document by itself; ids of 0 are hidden."""
    ids = tf.ragged.constant(DOCUMENTS, ragged_rank=2, dtype="int32")
    inputs = keras.Input((None, None), ragged=True, dtype="int32")
    embedding = keras.layers.Embedding(9, 6, mask_zero=True)
    between = keras.layers.LSTM(4, return_sequences=True) if encoder else None
    layer = ours("HierarchicalAttention")(units=5, sentence_encoder=between)
    found = layer(embedding(inputs), return_attention_scores=True)
    assert [x.ragged for x in found] == [False, True, True] and found[1].shape == (None, None, None)
    model = keras.Model(inputs, found)
    out, of_words, of_sentences = model.predict(ids, verbose=0)
    assert of_words.row_lengths().numpy().tolist() == [2, 0, 1, 3] and of_sentences.ragged_rank == 1
    for n, document in enumerate(DOCUMENTS):
        if not document:
            np.testing.assert_array_equal(out[n], 0 * out[n])
            continue
        width = max(map(len, document))
        dense = np.array([[sentence + [0] * (width - len(sentence)) for sentence in document]])
        expected, words, sentences = layer(embedding(dense), return_attention_scores=True)
        np.testing.assert_allclose(out[n], expected[0], atol=1e-6)
        np.testing.assert_allclose(of_sentences[n], sentences[0], atol=1e-6)
        for sentence, a, b in zip(document, of_words[n], words[0]):
            np.testing.assert_allclose(a, b[: len(sentence)], atol=1e-6)
    alone = keras.Model(inputs, layer(embedding(inputs)))
    alone.compile("sgd", "mse")
    alone.fit(ids, np.ones_like(out), verbose=0)
    alone.save(tmp_path / "model.keras")
    np.testing.assert_allclose(keras.models.load_model(tmp_path / "model.keras")(ids), alone(ids), atol=1e-6)

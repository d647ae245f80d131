"""What test_jax.py runs in a process of its own: our layers on the jax backend of Keras, without TensorFlow."""

import sys

import jax
import keras
import numpy as np
import pytest

import attn_ops

layers = attn_ops.layers
RNG = np.random.default_rng(0)
FLASH = pytest.mark.parametrize("flash_attention", [True, False])
TOKENS = RNG.integers(0, 5, (16, 7))
TARGETS = RNG.normal(size=(16, 1)).astype("float32")


def random(*shape):
    return RNG.normal(size=shape).astype("float32")


def twins(name, build, flash_attention=None, **config):
    """A stock layer and ours, with the weights of the first."""
    stock = getattr(keras.layers, name)(**config)
    mine = getattr(layers, name)(**config, flash_attention=flash_attention)
    for layer in (stock, mine):
        build(layer)
    assert [w.path.split("/")[-1] for w in mine.weights] == [w.path.split("/")[-1] for w in stock.weights]
    mine.set_weights(stock.get_weights())
    return stock, mine


def assert_same(found, expected, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=atol, atol=atol), found, expected)


def test_this_is_jax_alone():
    assert keras.backend.backend() == "jax" and sys.modules["tensorflow"] is None
    assert layers.MultiHeadAttention(2, 8)(random(2, 3, 4), random(2, 3, 4)).shape == (2, 3, 4)


VISIBLE = np.tril(np.ones((5, 5), bool))
CALLS = {
    "plain": {},
    "causal": {"use_causal_mask": True},
    "mask": {"attention_mask": np.stack([VISIBLE, VISIBLE[::-1, ::-1]])},
    "float mask": {"attention_mask": np.stack([VISIBLE, VISIBLE]).astype("float32")},
    "padding": {"value_mask": np.arange(5) < [[3], [5]], "key_mask": np.arange(5) < [[4], [2]]},
    "scores": {"return_attention_scores": True, "use_causal_mask": True},
}
STOCK = {
    "MultiHeadAttention": {"num_heads": 4, "key_dim": 8},
    "GroupQueryAttention": {"head_dim": 8, "num_query_heads": 4, "num_key_value_heads": 2},
}


@pytest.mark.wide(12)
@FLASH
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", STOCK)
def test_parity(name, options, flash_attention):
    x, y = random(2, 5, 16), random(2, 5, 16)
    stock, mine = twins(name, lambda layer: layer.build(x.shape, y.shape), flash_attention, **STOCK[name])

    def results(layer):
        """The outputs, and the gradients of a sum of them."""

        def total(weights, x):
            out, _ = layer.stateless_call(weights, [], x, y, **options)
            return sum(jax.numpy.sin(o).sum() for o in jax.tree.leaves(out)), out

        weights = [w.value for w in layer.trainable_variables]
        (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(weights, jax.numpy.asarray(x))
        return out, gradients

    (out, gradients), (expected, expected_gradients) = results(mine), results(stock)
    assert_same(out, expected)
    assert_same(gradients, expected_gradients, 1e-4)


@FLASH
def test_parity_of_attention(flash_attention):
    inputs = [random(2, 5, 8), random(2, 6, 8)]
    stock, mine = twins("Attention", lambda layer: layer(inputs), flash_attention, use_scale=True)
    masks = [np.arange(5) < [[5], [3]], np.arange(6) < [[2], [6]]]
    for options in ({}, {"mask": masks}, {"return_attention_scores": True, "use_causal_mask": True}):
        assert_same(mine(inputs, **options), stock(inputs, **options))


def test_several_attention_axes():
    x = random(2, 3, 4, 8)
    config = {"num_heads": 2, "key_dim": 4, "attention_axes": (1, 2)}
    stock, mine = twins("MultiHeadAttention", lambda layer: layer.build(x.shape, x.shape), **config)
    found, expected = (jax.jit(lambda x: layer(x, x, return_attention_scores=True))(x) for layer in (mine, stock))
    assert_same(found, expected)


@FLASH
def test_hierarchical_attention(flash_attention):
    """Words that are hidden do not count, nor do sentences of them; its formula is tested on TensorFlow."""
    x, mask = random(2, 3, 4, 5), np.arange(4) < np.array([[4, 2, 0], [1, 0, 0]])[..., None]
    layer = layers.HierarchicalAttention(6, flash_attention=flash_attention)
    out, of_words, of_sentences = jax.jit(lambda x: layer(x, mask=mask, return_attention_scores=True))(x)
    np.testing.assert_allclose(of_words.sum(-1), mask.any(-1), atol=1e-6)
    np.testing.assert_allclose(of_sentences.sum(-1), 1, atol=1e-6)
    sentences = np.einsum("bsw,bswf->bsf", of_words, x)
    np.testing.assert_allclose(out, np.einsum("bs,bsf->bf", of_sentences, sentences), atol=1e-5)
    np.testing.assert_allclose(out[1], x[1, 0, 0], atol=1e-6)


def make_model(dropout=0.2):
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(5, 16, mask_zero=True)(inputs)
    x = layers.MultiHeadAttention(2, 8, dropout=dropout, seed=1)(x, x, use_causal_mask=True)
    x = layers.GroupedQueryAttention(8, 4, 2, dropout=dropout, seed=2)(x, x)
    x = layers.SelfAttention(8, dropout=dropout, seed=3)(x)
    x = layers.Attention(dropout=dropout, use_scale=True, seed=4)([x, x])
    x, weights = layers.AttentionLayerWithWeights(dropout=dropout, seed=5)([x, x, x])
    x = layers.AttentionLayer(dropout=dropout, seed=6)([x, x, x])
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(1)(x))


def test_fit_predict_evaluate_save_load(tmp_path):
    keras.utils.set_random_seed(0)
    model = make_model()
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    before = model.evaluate(TOKENS, TARGETS, verbose=0)
    states = [np.array(v) for v in model.non_trainable_variables]
    model.fit(TOKENS, TARGETS, epochs=15, batch_size=8, verbose=0)
    assert model.evaluate(TOKENS, TARGETS, verbose=0) < before
    # Every layer has drawn its own dropout at every step.
    assert all((a != b).any() for a, b in zip(states, map(np.array, model.non_trainable_variables)))
    expected = model.predict(TOKENS, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(TOKENS, verbose=0), expected)


@FLASH
def test_dropout_draws_and_repeats(flash_attention):
    x = random(2, 6, 8)

    def run(seed):
        layer = layers.AttentionLayerWithWeights(dropout=0.5, seed=seed, flash_attention=flash_attention)
        return [layer([x, x, x], training=True) for _ in range(2)]

    (first, weights), (second, _) = run(1)
    assert_same(np.einsum("bqk,bkd->bqd", weights, x), first)
    assert (np.array(weights) == 0).any() and np.abs(first - second).max() > 0.1
    assert_same(run(1)[0], (first, weights))


def test_mixed_precision():
    layer = layers.MultiHeadAttention(2, 8, dtype="mixed_bfloat16")
    x = random(2, 5, 16)
    out = layer(x, x)
    assert out.dtype == "bfloat16" and layer.weights[0].dtype == "float32"
    exact = layers.MultiHeadAttention(2, 8)
    exact(x, x)
    exact.set_weights(layer.get_weights())
    assert_same(np.array(out, "float32"), exact(x, x), 5e-2)


def attend(layer, mask):
    x = np.ones((1, 3, 4), "float32")
    return layer(x, x, attention_mask=mask)


@pytest.mark.wide(4)
@pytest.mark.parametrize("hidden", [-1e9, -np.inf, np.finfo("float32").min, -(10**9), 2.0])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [np.asarray, jax.numpy.asarray])
def test_an_additive_mask_is_refused(hidden, compiled, kind):
    """Also where the mask is a constant of a function that JAX traces."""
    layer = layers.MultiHeadAttention(2, 8)
    mask = kind(np.where(np.eye(3), type(hidden)(0), hidden)[None])
    call = jax.jit(lambda: attend(layer, mask)) if compiled else lambda: attend(layer, mask)
    with pytest.raises(TypeError, match="attention_mask must be boolean .* additive mask would be inverted"):
        call()


def test_an_additive_mask_that_the_data_decide_goes_unnoticed_in_what_jax_compiles():
    """As documented; 0 and 1 mean what they mean."""
    layer = layers.MultiHeadAttention(2, 8)
    attend(layer, np.eye(3, dtype=bool)[None])
    compiled = jax.jit(lambda mask: attend(layer, mask))
    compiled(np.where(np.eye(3), 0.0, -1e9)[None])
    assert_same(compiled(np.eye(3)[None]), attend(layer, np.eye(3, dtype=bool)[None]))


@pytest.mark.parametrize("dtype", ["int32", "uint8", "float32", "float16"])
def test_masks_of_zeros_and_ones(dtype):
    layer = layers.MultiHeadAttention(2, 8)
    expected = attend(layer, np.eye(3, dtype=bool)[None])
    assert_same(attend(layer, np.eye(3, dtype=dtype)[None]), expected)
    assert_same(jax.jit(lambda: attend(layer, np.eye(3, dtype=dtype)[None]))(), expected)


def test_a_function_of_keras_tensors():
    """By itself, and inside a layer whose shapes Keras infers: the batch has any size."""

    class Layer(keras.layers.Layer):
        def call(self, x):
            return attn_ops.jax.scaled_dot_product_attention(x, x, x[..., :3])

    x = keras.Input((5, 2, 8))
    assert Layer()(x).shape == (None, 5, 2, 3)
    padding = keras.Input((5,), dtype="int32")
    mask = attn_ops.masks.segments(padding, padding)
    out, lse = attn_ops.jax.scaled_dot_product_attention(x, x, x, mask=mask, return_lse=True)
    weights = attn_ops.jax.attention_weights(x, x, mask=mask, lse=lse)
    assert (out.shape, lse.shape, weights.shape) == ((None, 5, 2, 8), (None, 2, 5), (None, 2, 5, 5))
    model = keras.Model([x, padding], [out, weights])
    arrays = [random(2, 5, 2, 8), np.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 3]])]
    exact = attn_ops.masks.segments(arrays[1], arrays[1])
    expected = attn_ops.reference.attention(*[arrays[0]] * 3, mask=exact)[0]
    expected_weights = attn_ops.reference.attention_weights(*[arrays[0]] * 2, mask=exact)
    assert_same(model.predict(arrays, verbose=0), [expected, expected_weights])
    with pytest.raises(ValueError, match="dropout_seed"):
        attn_ops.jax.scaled_dot_product_attention(x, x, x, dropout_rate=0.1)


def test_kernels_are_used():
    layer = layers.MultiHeadAttention(2, 8, flash_attention=True)
    x = random(1, 3, 4)
    layer(x, x)
    assert "attn_ops.forward" in str(jax.make_jaxpr(lambda x: layer(x, x))(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_recomputation_drops_the_same(compiled):
    """By Euler: the output is linear in the values."""
    layer = layers.AttentionLayer(dropout=0.5, seed=1)
    q, k, v, weight = (random(2, 12, 8) for _ in range(4))
    layer([q, k, v])
    state = [x.value for x in layer.non_trainable_variables]

    @jax.checkpoint
    def total(v):
        out, _ = layer.stateless_call([], state, [q, k, v], training=True)
        return (out * weight).sum()

    run = jax.value_and_grad(total)
    value, gradient = (jax.jit(run) if compiled else run)(v)
    np.testing.assert_allclose((v * gradient).sum(), value, rtol=1e-3, atol=1e-3)


@pytest.mark.wide(4)
@pytest.mark.parametrize("name, config", [("MultiHeadAttention", (2, 8)), ("GroupedQueryAttention", (8, 4, 2))])
def test_padding_changes_no_real_token(name, config):
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(5, 16, mask_zero=True)(inputs)
    for _ in range(2):
        x = keras.layers.LayerNormalization()(keras.layers.Add()([x, getattr(layers, name)(*config)(x, x)]))
    model = keras.Model(inputs, x)
    tokens = np.array([[1, 2, 3, 0], [4, 3, 2, 1]])
    longer = np.pad(tokens, ((0, 0), (0, 5)))
    for run in (model, lambda x: model.predict(x, verbose=0)):
        short = np.array(run(tokens))[tokens != 0]
        np.testing.assert_allclose(np.array(run(longer))[:, :4][tokens != 0], short, atol=5e-6)


def test_a_given_query_mask_counts_and_is_passed_on():
    x, mask = jax.numpy.asarray(random(2, 5, 16)), np.arange(5) < [[5], [3]]
    out = layers.MultiHeadAttention(2, 8, use_bias=False)(x, x, query_mask=mask)
    assert not np.array(out)[~mask].any() and np.array(out)[mask].all()
    np.testing.assert_array_equal(keras.src.backend.get_keras_mask(out), mask)


def test_as_in_keras_gives_the_means_of_keras():
    x, visible = random(2, 5, 16), np.tril(np.ones((2, 5, 5), bool), -1)
    stock, mine = twins("MultiHeadAttention", lambda layer: layer(x, x), num_heads=2, key_dim=8)
    mine.as_in_keras = True
    assert_same(mine(x, x, attention_mask=visible), stock(x, x, attention_mask=visible))


@pytest.mark.parametrize("floatx", ["float16", "bfloat16"])
def test_as_in_keras_with_a_floatx_of_16_bits(floatx):
    """With which Keras counts in 16 bits, and takes Python's integers for floats."""
    before = keras.config.floatx()
    keras.config.set_floatx(floatx)
    try:
        x, visible = keras.ops.cast(random(2, 5, 16), floatx), np.array([[False, False, True, True, False], [True] * 5])
        stock, mine = twins("MultiHeadAttention", lambda layer: layer(x, x), num_heads=2, key_dim=8, dtype=floatx)
        mine.as_in_keras = True
        out, expected = (y(x, x, value_mask=visible, use_causal_mask=True).astype("float32") for y in (mine, stock))
        np.testing.assert_allclose(out, expected, rtol=0.02, atol=0.03)
    finally:
        keras.config.set_floatx(before)


@pytest.mark.wide(8)
@FLASH
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name, config", [("MultiHeadAttention", (4, 8)), ("GroupedQueryAttention", (8, 4, 2))])
def test_options_for_scores(name, config, compiled, flash_attention):
    """The projections are Keras's; the attention on them by the reference in NumPy, its rotation by `test_rotary.py`."""
    options = dict(logits_soft_cap=3.0, sinks=True, position_bias="t5", rotary=True, flash_attention=flash_attention)
    mask = attn_ops.masks.causal() & attn_ops.masks.chunked(4)
    layer = getattr(layers, name)(*config, **options, mask=mask)
    x, bias = random(2, 6, 16), random(1, 4, 6, 6)
    layer(x, x)

    def call(x, bias):
        return layer(x, x, attention_bias=bias, query_offset=0)

    q, k, v = (np.asarray(dense(x)) for dense in (layer._query_dense, layer._key_dense, layer._value_dense))
    q, k = (np.asarray(attn_ops.jax.rotary_embedding(y)) for y in (q, k))
    table = attn_ops.T5RelativeBias(np.asarray(layer.relative_attention_bias), bidirectional=False)
    out, _ = attn_ops.reference.attention(
        q, k, v, bias=bias, mask=mask, logits_soft_cap=3.0, sinks=np.asarray(layer.sinks), relative_bias=table
    )
    expected = layer._output_dense(np.asarray(out, "float32"))
    assert_same((jax.jit(call) if compiled else call)(x, bias), expected, 1e-4)
    again = type(layer).from_config(layer.get_config())
    assert again.get_config() == layer.get_config() and repr(again.mask) == repr(mask)


def test_the_layer_of_rotary_embedding():
    x = random(2, 5, 3, 8)
    layer = layers.RotaryEmbedding(interleaved=True)
    expected = attn_ops.jax.rotary_embedding(x, np.arange(5) + 7, interleaved=True)
    assert_same(jax.jit(lambda x, start: layer(x, start_index=start))(x, 7), expected)
    inputs = keras.Input((None, 3, 8))
    assert_same(keras.Model(inputs, layer(inputs)).predict(x, verbose=0), layer(x))


@pytest.mark.wide(4)
@pytest.mark.parametrize("name", STOCK)
def test_cache(name):
    """A prompt and three tokens by a cache, jitted, are the whole causal sequence."""
    x = random(2, 7, 16)
    layer = getattr(layers, name)(**STOCK[name], rotary=True)
    right = layer(x, x, use_causal_mask=True)
    heads = STOCK[name].get("num_key_value_heads", 4)
    weights = [w.value for w in layer.trainable_variables]

    @jax.jit
    def step(weights, x, cache):
        (out, cache), _ = layer.stateless_call(weights, [], x, x, cache=cache)
        return out, cache

    cache, outs = attn_ops.KVCache.create(2, 8, heads, 8), []
    stacked = jax.numpy.zeros((2, 2, 8, heads, 8))
    for begin, end in ((0, 4), (4, 5), (5, 6), (6, 7)):
        out, cache = step(weights, x[:, begin:end], cache)
        other, stacked = layer(x[:, begin:end], x[:, begin:end], cache=stacked, cache_update_index=begin)
        assert_same(other, out)
        outs.append(out)
    assert_same(np.concatenate(outs, 1), right)
    assert cache.lengths.tolist() == [7, 7]


def test_parts_with_a_tensor_in_functions():
    """KerasHub's cache, jitted, at positions that are arrays."""
    x = random(2, 5, 12)
    layer = layers.GroupedQueryAttention(8, 4, 2, rotary=True)
    expected = layer(x, x, use_causal_mask=True)
    step = jax.jit(lambda x, cache, at: layer(x, x, cache=cache, cache_update_index=at))
    cache, outs = jax.numpy.zeros((2, 2, 9, 2, 8)), []
    for start, end in ((0, 3), (3, 4), (4, 5)):
        out, cache = step(x[:, start:end], cache, jax.numpy.asarray(start))
        outs.append(out)
    assert_same(np.concatenate(outs, 1), expected)


def test_weights_of_a_model_are_read():
    """attn_ops.visualize, also without a function being compiled (tests/visualize has the rest)."""
    ids = np.array([[5, 3, 9, 1, 0, 0]])
    inputs = keras.Input((6,), dtype="int32")
    x = embedded = keras.layers.Embedding(10, 8, mask_zero=True)(inputs)
    x = keras.layers.MultiHeadAttention(2, 4, name="stock")(x, x)
    x = keras.layers.Attention(name="luong")([x, embedded])
    model = keras.Model(inputs, layers.MultiHeadAttention(2, 4, name="ours")(x, x))
    found = attn_ops.visualize.attention(model, ids)
    assert found.names == ["stock", "luong", "ours"]
    x = np.asarray(model.layers[1](ids))
    _, expected = model.get_layer("stock")(x, x, return_attention_scores=True, attention_mask=(ids != 0)[:, None])
    np.testing.assert_allclose(found["stock"].weights[:, :, :4], np.asarray(expected)[:, :, :4], atol=1e-6)
    assert type(model.get_layer("stock")) is keras.layers.MultiHeadAttention

"""MultiHeadAttention beyond parity: the traps of a reimplementation."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from layer_twins import FLASH, HAS_GATE, HAS_WINDOW, STOCK, assert_same, ours, random, twins, values_and_gradients

MHA = attn_ops.layers.MultiHeadAttention
TOKENS = np.array([[1, 2, 3, 0, 0], [3, 3, 1, 1, 2], [0, 0, 0, 0, 0]])


@pytest.fixture(params=FLASH)
def flash(request):
    return FLASH[request.param]


def built(flash, *shapes, **config):
    layer = MHA(**{"num_heads": 2, "key_dim": 4, "flash_attention": flash, **config})
    layer.build(*(shapes or [(2, 5, 6), (2, 5, 6)]))
    return layer


def call_self(layer, inputs):
    return layer(inputs[0], inputs[0])


def test_arguments_are_query_value_key(flash):
    shapes = (2, 5, 6), (2, 7, 4), (2, 7, 3)
    stock, mine = twins("MultiHeadAttention", *shapes, num_heads=2, key_dim=4, value_dim=5, flash_attention=flash)
    inputs = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    assert_same(stock, mine, inputs, lambda layer, x: layer(x[0], x[1], x[2]))


@pytest.mark.parametrize("output_shape", [4, (4,), [4], (4, 5)], ids=repr)
def test_output_shape(flash, output_shape):
    config = dict(num_heads=2, key_dim=4, output_shape=output_shape, flash_attention=flash)
    stock, mine = twins("MultiHeadAttention", (2, 5, 6), (2, 5, 6), **config)
    assert_same(stock, mine, [random(2, 5, 6)], call_self)


@pytest.mark.skipif(not HAS_GATE, reason="this Keras has no use_gate")
def test_gate(flash):
    config = dict(num_heads=2, key_dim=4, value_dim=4, use_gate=True, flash_attention=flash)
    stock, mine = twins("MultiHeadAttention", (2, 5, 6), (2, 7, 6), **config)
    assert [w.path.split("/", 1)[1] for w in mine.weights] == [w.path.split("/", 1)[1] for w in stock.weights]
    inputs = [random(2, 5, 6), random(2, 7, 6, seed=1)]
    assert_same(stock, mine, inputs, lambda layer, x: layer(*x, return_attention_scores=True))


def test_embedding_masks_reach_the_attention_and_go_on(flash):
    """Padding hides keys, padded queries give the output of an empty row, and the mask of the query is passed on."""
    embedding = keras.layers.Embedding(4, 6, mask_zero=True)
    layer = built(flash, (3, 5, 6), (3, 5, 6))
    out = layer(embedding(TOKENS), embedding(TOKENS))
    np.testing.assert_array_equal(out._keras_mask, TOKENS != 0)
    # The row without a visible key is the bias of the output projection alone.
    empty = np.broadcast_to(layer.output_dense.bias, (3, 5, 6))[TOKENS == 0]
    np.testing.assert_allclose(out.numpy()[TOKENS == 0], empty, atol=1e-6)
    # What stands in the padding does not matter.
    plain = embedding(TOKENS).numpy()
    plain[TOKENS == 0] = 7.0
    masked = tf.constant(plain)
    masked._keras_mask = tf.constant(TOKENS != 0)
    np.testing.assert_allclose(layer(masked, masked).numpy(), out.numpy(), atol=1e-6)


def test_masks_go_through_a_functional_model(flash):
    def model(cls, **kwargs):
        tokens = keras.Input((5,), dtype="int32")
        x = keras.layers.Embedding(4, 6, mask_zero=True)(tokens)
        x = cls(num_heads=2, key_dim=4, **kwargs)(x, x, use_causal_mask=True)
        return keras.Model(tokens, keras.layers.GlobalAveragePooling1D()(x))

    stock, mine = model(STOCK["MultiHeadAttention"]), model(MHA, flash_attention=flash)
    mine.set_weights(stock.get_weights())
    np.testing.assert_allclose(mine.predict(TOKENS, verbose=0), stock.predict(TOKENS, verbose=0), atol=1e-5)


def test_caller_tensors_keep_their_mask(flash):
    """Keras deletes it, and what is added to the output then hides nothing; see test_padding.py."""
    x = random(2, 5, 6, dtype="float32")
    x._keras_mask = tf.ones((2, 5), tf.bool)
    layer = built(flash)
    out = layer(x, x)
    assert x._keras_mask is not None
    assert keras.layers.Add()([x, out])._keras_mask is not None


def test_two_axes_are_query_and_key_not_padding(flash):
    """A [T, S] mask is not key padding, not even where T is the batch size."""
    x = random(5, 5, 6)
    mask = np.tril(np.ones((5, 5), bool))
    stock, mine = twins("MultiHeadAttention", (5, 5, 6), (5, 5, 6), num_heads=2, key_dim=4, flash_attention=flash)
    assert_same(stock, mine, [x], lambda layer, x: layer(x[0], x[0], attention_mask=mask))
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="to a layer by value_mask="):
        mine(random(3, 5, 6), random(3, 5, 6), attention_mask=np.ones((3, 5), bool))
    with pytest.raises(ValueError, match="has 1 axes, and needs 2"):
        mine(x, x, attention_mask=np.ones(5, bool))


@pytest.mark.parametrize(
    "shape", [(5, 7), (1, 5, 7), (3, 5, 7), (3, 1, 7), (3, 1, 1, 7), (3, 1, 5, 7), (3, 2, 5, 7), (1, 1, 5, 1)]
)
def test_attention_mask_broadcasts(flash, shape):
    shapes = (3, 5, 6), (3, 7, 6)
    stock, mine = twins("MultiHeadAttention", *shapes, num_heads=2, key_dim=4, flash_attention=flash)
    mask = np.random.default_rng(1).random(shape) > 0.4
    mask[..., 0] = True
    inputs = [random(*shapes[0]), random(*shapes[1], seed=1)]
    assert_same(stock, mine, inputs, lambda layer, x: layer(*x, attention_mask=mask))


@pytest.mark.parametrize("dtype", ["int32", "uint8", "float32"])
def test_numeric_masks_of_zeros_and_ones(flash, dtype):
    mask = np.tril(np.ones((5, 5)))
    x = random(2, 5, 6, dtype="float32")
    layer = built(flash)
    expected = layer(x, x, attention_mask=mask.astype(bool))
    np.testing.assert_array_equal(layer(x, x, attention_mask=mask.astype(dtype)), expected)
    graph = tf.function(lambda mask: layer(x, x, attention_mask=mask))
    np.testing.assert_allclose(graph(tf.constant(mask, dtype)), expected, atol=1e-6)


def test_additive_masks_are_refused(flash):
    additive = np.where(np.tril(np.ones((5, 5))), 0.0, -1e9).astype("float32")
    x = random(2, 5, 6, dtype="float32")
    layer = built(flash)
    with pytest.raises(TypeError, match="additive mask would be inverted"):
        layer(x, x, attention_mask=additive)
    with pytest.raises(tf.errors.InvalidArgumentError, match="additive mask would be inverted"):
        tf.function(lambda mask: layer(x, x, attention_mask=mask))(tf.constant(additive))


def test_empty_rows_give_zeros_and_no_gradient(flash):
    """Keras gives the mean of all values here, and their gradient."""
    layer = built(flash, use_bias=False, dtype="float64")
    mask = np.ones((2, 5, 5), bool)
    mask[0, 2] = False
    mask[1] = False
    x = random(2, 5, 6)
    [out], gradients = values_and_gradients(layer, [x], lambda layer, x: layer(x[0], x[0], attention_mask=mask))
    assert not out[0, 2].any() and not out[1].any()
    assert out[0, [0, 1, 3, 4]].all()
    assert not gradients[0][1].any()
    assert all(np.isfinite(g).all() for g in gradients)


def test_hidden_values_do_not_matter_even_nan(flash):
    layer = built(flash, use_bias=False)
    x = random(2, 5, 6, dtype="float32").numpy()
    mask = np.arange(5) < 3
    expected = layer(x, x, value_mask=np.stack([mask, mask]))
    poisoned = x.copy()
    poisoned[:, 3:] = np.nan
    for masks in ({"value_mask": np.stack([mask, mask])}, {"attention_mask": np.broadcast_to(mask, (5, 5))}):
        np.testing.assert_allclose(layer(x, poisoned, **masks), expected, atol=1e-6)


def test_scale_is_that_of_key_dim(flash):
    layer = built(flash, num_heads=1, key_dim=4, value_dim=9, use_bias=False, dtype="float64")
    x = random(2, 5, 6)
    q, k, v, o = (w.numpy() for w in layer.weights)
    query, key, value = (np.einsum("btd,dnh->bnth", x, w) for w in (q, k, v))
    weights = tf.nn.softmax(query @ key.swapaxes(-1, -2) / 2.0).numpy()
    expected = np.einsum("bnth,nhd->btd", weights @ value, o)
    np.testing.assert_allclose(layer(x, x), expected, rtol=1e-9)


def test_large_half_precision_logits_stay_finite(flash):
    """q·k is 2**17 before the scale: beyond float16, and NaN in Keras."""
    layer = built(flash, (1, 3, 4), (1, 3, 4), num_heads=1, key_dim=4, use_bias=False, dtype="float16")
    eye = np.eye(4)
    layer.set_weights([eye[:, None] * 64, eye[:, None] * 64, eye[:, None], eye[None]])
    x = np.full((1, 3, 4), 2.83, "float16")
    assert np.isfinite(layer(x, x)).all()


def test_scores_are_those_before_dropout(flash):
    layer = built(flash, dropout=0.5, seed=1, dtype="float64")
    x = random(2, 5, 6)
    _, scores = layer(x, x, return_attention_scores=True, training=True)
    np.testing.assert_allclose(scores.numpy().sum(-1), 1.0, rtol=1e-9)
    plain, expected = layer(x, x, return_attention_scores=True, training=False)
    np.testing.assert_allclose(scores, expected, rtol=1e-9)
    np.testing.assert_allclose(plain, layer(x, x), rtol=1e-12)


def test_dropout_is_reproducible_and_unbiased(flash):
    first, second = (built(flash, (256, 32, 6), (256, 32, 6), dropout=0.3, seed=3) for _ in range(2))
    second.set_weights(first.get_weights())
    x = tf.repeat(random(1, 32, 6, dtype="float32"), 256, axis=0)  # each row of the batch draws its own mask
    runs = [first(x, x, training=True).numpy() for _ in range(2)]
    np.testing.assert_array_equal(runs, [second(x, x, training=True).numpy() for _ in range(2)])
    assert not np.allclose(*runs)
    expected = first(x, x).numpy()
    # The mean of 512 draws, five standard errors wide.
    runs = np.concatenate(runs)
    assert (abs(runs.mean(0) - expected[0]) < 5 * runs.std(0) / np.sqrt(len(runs))).all()
    assert len(first.variables) - len(first.weights) == 1  # the seed, as in Keras


def test_dropout_mask_is_that_of_the_layer_seed(flash):
    """The same seed drops the same weights in every implementation, with the gradients of the same mask."""
    composite, other = (built(f, dropout=0.4, seed=5, dtype="float64") for f in (False, flash))
    other.set_weights(composite.get_weights())
    x = random(2, 5, 6)
    assert_same(composite, other, [x], lambda layer, x: layer(x[0], x[0], training=True, use_causal_mask=True))


@pytest.mark.parametrize("training", [True, tf.constant(True), np.True_], ids=["bool", "tensor", "numpy"])
def test_training_argument(flash, training):
    layer = built(flash, dropout=0.5, seed=1)
    x = random(2, 5, 6, dtype="float32")
    assert not np.allclose(layer(x, x, training=training), layer(x, x, training=False))


def test_flash_attention_argument_is_kept_and_means_something(monkeypatch):
    seen = []
    run = attn_ops.scaled_dot_product_attention

    def spy(*args, implementation=None, **kwargs):
        seen.append(implementation)
        return run(*args, implementation="composite", **kwargs)

    monkeypatch.setattr(attn_ops, "scaled_dot_product_attention", spy)
    x = random(2, 5, 6, dtype="float32")
    for flash, asked in ((None, None), (True, "fused"), (False, "composite")):
        layer = built(flash, dropout=0.1)
        layer(x, x, training=True)
        layer(x, x, return_attention_scores=True)
        assert seen == [asked, asked]
        seen.clear()
        restored = MHA.from_config(layer.get_config())
        assert restored.flash_attention is flash
        assert ("flash_attention" in layer.get_config()) == (flash is not None)
    keras.config.disable_flash_attention()
    try:
        assert built(None).implementation == "composite"
        assert built(True).implementation == "fused"
    finally:
        keras.config.enable_flash_attention()
    with pytest.raises(ValueError, match="flash_attention must be None, True or False, not 'yes'"):
        built("yes")


def test_forced_fusion_raises_with_the_reasons(monkeypatch):
    monkeypatch.setattr("attn_ops.kernels.unavailable_reason", lambda: "the library is not there")
    x = random(2, 5, 6, dtype="float32")
    with pytest.raises(ValueError, match="the library is not there"):
        built(True)(x, x)
    assert np.isfinite(built(None)(x, x)).all()


def test_fusion_inside_xla():
    x = random(2, 5, 6, dtype="float32")
    for layer in (built(True), built(None)):
        run = tf.function(lambda x, layer=layer: layer(x, x), jit_compile=True)
        np.testing.assert_allclose(run(x), layer(x, x), atol=1e-5)
        assert layer.supports_jit


def test_structured_mask_is_never_dense(monkeypatch):
    """Causal, window and padding reach the op apart from each other, not as [batch, T, S]."""
    seen = {}
    run = attn_ops.scaled_dot_product_attention

    def spy(*args, mask, **kwargs):
        seen["mask"] = mask
        return run(*args, mask=mask, **kwargs)

    monkeypatch.setattr(attn_ops, "scaled_dot_product_attention", spy)
    embedding = keras.layers.Embedding(4, 6, mask_zero=True)
    layer = built(None, (3, 5, 6), (3, 5, 6), **({"sliding_window": 3} if HAS_WINDOW else {}))
    x = embedding(TOKENS)
    layer(x, x, use_causal_mask=True)
    mask = seen["mask"]
    assert mask.is_causal and mask.window == ((2, 2) if HAS_WINDOW else None)
    assert sorted(tuple(t.shape) for t in mask.tensors()) == [(3, 1, 1, 5), (3, 1, 5, 1)]
    layer(random(3, 5, 6, dtype="float32"), random(3, 5, 6, dtype="float32"))
    assert seen["mask"] is None or HAS_WINDOW


def test_subclasses_get_keras_masks():
    """A subclass that overrides `_compute_attention` with an older signature sees Keras's dense mask."""
    seen = {}

    class Sub(MHA):
        def _compute_attention(self, query, key, value, attention_mask=None, training=None, *args):
            seen["mask"] = attention_mask
            return super()._compute_attention(query, key, value, attention_mask, training, *args)

    sub = Sub(num_heads=2, key_dim=4)
    x = random(2, 5, 6, dtype="float32")
    out = sub(x, x, use_causal_mask=True)
    np.testing.assert_array_equal(np.broadcast_to(seen["mask"], (1, 5, 5))[0], np.tril(np.ones((5, 5), bool)))
    plain = built(None)
    plain.set_weights(sub.get_weights())
    np.testing.assert_allclose(out, plain(x, x, use_causal_mask=True), atol=1e-6)


def test_calls_in_the_manner_of_kerashub():
    """A subclass with its own `call`, which gives projected tensors and a dense mask by keyword."""

    class Cached(MHA):
        def call(self, query, value, key=None, attention_mask=None, training=None):
            output, scores = self._compute_attention(
                query=self._query_dense(query),
                key=self._key_dense(value),
                value=self._value_dense(value),
                attention_mask=attention_mask,
                training=training,
            )
            assert scores is None
            return self._output_dense(output)

    x = random(2, 5, 6, dtype="float32")
    mask = np.tril(np.ones((2, 5, 5), "int32"))
    cached, plain = Cached(num_heads=2, key_dim=4), built(None)
    out = cached(x, x, attention_mask=mask)
    plain.set_weights(cached.get_weights())
    np.testing.assert_allclose(out, plain(x, x, use_causal_mask=True), atol=1e-6)


@pytest.mark.parametrize("axes, causal_axis", [((1,), 1), ((2,), 2)])
def test_causal_over_one_axis_of_many(flash, axes, causal_axis):
    """Keras takes the lengths of axis 1 whatever the axis, so the second case fails or is wrong there."""
    layer = built(flash, (2, 4, 3, 6), (2, 4, 3, 6), attention_axes=axes)
    x = random(2, 4, 3, 6, dtype="float32")
    before = layer(x, x, use_causal_mask=True).numpy()
    last = [slice(None)] * 4
    last[causal_axis] = slice(-1, None)
    first = [slice(None)] * 4
    first[causal_axis] = slice(None, -1)
    changed = x.numpy()
    changed[tuple(last)] = 5.0
    after = layer(changed, changed, use_causal_mask=True).numpy()
    np.testing.assert_allclose(after[tuple(first)], before[tuple(first)], atol=1e-6)
    assert not np.allclose(after[tuple(last)], before[tuple(last)])


def test_causal_over_several_axes_is_refused():
    layer = built(None, (2, 4, 3, 6), (2, 4, 3, 6))
    x = random(2, 4, 3, 6, dtype="float32")
    with pytest.raises(ValueError, match="needs exactly one attention axis"):
        layer(x, x, use_causal_mask=True)


@pytest.mark.parametrize("shape, key_shape, axes", [((2, 5, 6), (2, 7, 6), None), ((2, 3, 4, 6), (2, 2, 4, 6), 1),
                                                    ((2, 3, 4, 6), (2, 2, 5, 6), None)])  # fmt: skip
def test_symbolic_shapes_are_those_of_the_results(shape, key_shape, axes):
    layer = MHA(num_heads=2, key_dim=4, attention_axes=axes)
    before_build = layer.compute_output_spec(*map(keras.Input, (shape[1:], key_shape[1:])), return_attention_scores=True)
    symbolic = layer(keras.Input(shape[1:]), keras.Input(key_shape[1:]), return_attention_scores=True)
    actual = layer(random(*shape), random(*key_shape), return_attention_scores=True)
    for described in (before_build, symbolic):
        assert [tuple(s.shape)[1:] for s in described] == [tuple(a.shape)[1:] for a in actual]
    assert [s.dtype for s in symbolic] == [a.dtype for a in actual]


@pytest.mark.parametrize("scores", [False, True])
def test_unknown_dimensions(flash, scores):
    layer = built(flash, (None, None, 6), (None, None, 6))
    function = tf.function(
        lambda x, mask: layer(x, x, attention_mask=mask, return_attention_scores=scores),
        input_signature=[tf.TensorSpec([None, None, 6]), tf.TensorSpec([None, None, None], tf.bool)],
    )
    for batch, length in ((2, 5), (1, 3)):
        x, mask = random(batch, length, 6, dtype="float32"), np.tril(np.ones((batch, length, length), bool))
        expected = layer(x, x, attention_mask=mask, return_attention_scores=scores)
        tf.nest.map_structure(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), function(x, mask), expected)


@pytest.mark.parametrize("shapes", [((0, 5, 6), (0, 5, 6)), ((2, 0, 6), (2, 5, 6)), ((2, 5, 6), (2, 0, 6))], ids=str)
def test_empty_inputs(flash, shapes):
    layer = built(flash, *shapes, use_bias=False)
    out, scores = layer(tf.zeros(shapes[0]), tf.zeros(shapes[1]), return_attention_scores=True)
    assert out.shape == shapes[0] and not out.numpy().any()
    assert scores.shape == (shapes[0][0], 2, shapes[0][1], shapes[1][1])


def test_regularizers_go_to_the_projections(flash):
    config = dict(num_heads=2, key_dim=4, activity_regularizer="l2", kernel_regularizer="l1", flash_attention=flash)
    stock, mine = twins("MultiHeadAttention", (2, 5, 6), (2, 5, 6), dtype="float32", **config)
    x = random(2, 5, 6, dtype="float32")
    losses = []
    for layer in (stock, mine):
        layer(x, x)
        losses.append([float(loss) for loss in layer.losses])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert len(losses[0]) >= 4


@pytest.mark.parametrize("policy, tolerance", [("mixed_float16", 4e-3), ("mixed_bfloat16", 3e-2), ("float16", 4e-3)])
def test_low_precision(flash, policy, tolerance):
    exact = built(flash, dtype="float64")
    low = built(flash, dtype=policy)
    low.set_weights(exact.get_weights())
    x = random(2, 5, 6)
    out, scores = low(x, x, use_causal_mask=True, return_attention_scores=True)
    assert out.dtype == scores.dtype == low.compute_dtype
    expected = exact(x, x, use_causal_mask=True, return_attention_scores=True)
    np.testing.assert_allclose(tf.cast(out, "float64"), expected[0], atol=tolerance)
    np.testing.assert_allclose(tf.cast(scores, "float64"), expected[1], atol=tolerance)


def test_second_order_gradients(flash):
    stock, mine = twins("MultiHeadAttention", (2, 4, 6), (2, 4, 6), num_heads=2, key_dim=4, flash_attention=flash)
    x = random(2, 4, 6)
    results = []
    for layer in (stock, mine):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = tf.reduce_sum(tf.sin(layer(x, x, use_causal_mask=True)))
            g = inner.gradient(y, x)
            z = tf.reduce_sum(g**2)
        results.append(outer.gradient(z, x).numpy())
    np.testing.assert_allclose(results[1], results[0], rtol=1e-7, atol=1e-9)


def test_registered_under_our_package():
    for name in ("MultiHeadAttention", "GroupedQueryAttention", "Attention", "SelfAttention", "AttentionLayer"):
        cls = ours(name)
        assert keras.saving.get_registered_name(cls) == f"attn_ops>{name}"
    assert attn_ops.layers.GroupQueryAttention is attn_ops.layers.GroupedQueryAttention

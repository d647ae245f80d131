"""Adding padding changes no real token: every layer, behind additions and in several blocks, evaluated and trained."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from layer_twins import KERAS, STOCK, ours, random

L = keras.layers
WIDTH = 8
IDS = np.array([[5, 6, 7, 0], [3, 1, 2, 4]])
LONGER = np.pad(IDS, ((0, 0), (0, 5)))
REAL = IDS != 0


def mha(x, context):
    return ours("MultiHeadAttention")(2, 4)(x, context)


def gqa(x, context):
    return ours("GroupedQueryAttention")(4, 4, 2)(x, context)


def attention(x, context):
    return ours("Attention")(use_scale=True)([x, context])


def attention_layer(x, context):
    return ours("AttentionLayer")(scale=0.3)([x, context, context])


def attention_layer_with_weights(x, context):
    return ours("AttentionLayerWithWeights")(scale=0.3)([x, context, context])[0]


def self_attention(x, context):
    assert x is context
    return ours("SelfAttention")(scale=0.3)(x)


LAYERS = [mha, gqa, attention, attention_layer, attention_layer_with_weights, self_attention]


def post_norm(layer, x, context=None):
    return L.LayerNormalization()(L.Add()([x, layer(x, x if context is None else context)]))


def pre_norm(layer, x, context=None):
    h = L.LayerNormalization()(x)
    return L.Add()([x, layer(h, h if context is None else context)])


NORMS = [post_norm, pre_norm]


def embedded(ids):
    return L.Embedding(10, WIDTH, mask_zero=True)(ids)


def two_blocks(layer, norm, dtype="float32"):
    keras.utils.set_random_seed(0)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        ids = keras.Input((None,), dtype="int32")
        x = embedded(ids)
        for _ in range(2):
            x = norm(layer, x)
        return keras.Model(ids, x)
    finally:
        keras.config.set_dtype_policy(policy)


def encoder_decoder(layer, norm):
    keras.utils.set_random_seed(0)
    source, target = keras.Input((None,), dtype="int32"), keras.Input((3,), dtype="int32")
    x, y = embedded(source), embedded(target)
    for _ in range(2):
        x = norm(layer, x)
    for _ in range(2):
        y = norm(layer, norm(layer, y), x)
    return keras.Model([source, target], y)


def assert_same_at_real_tokens(run, atol=2e-6):
    short, longer = (np.array(run(ids), "float32") for ids in (IDS, LONGER))
    np.testing.assert_allclose(longer[:, : IDS.shape[1]][REAL], short[REAL], atol=atol)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_eagerly(layer, norm):
    assert_same_at_real_tokens(two_blocks(layer, norm))


@pytest.mark.wide(4)
@pytest.mark.parametrize("dtype, atol", [("mixed_float16", 4e-3), ("mixed_bfloat16", 4e-2)])
@pytest.mark.parametrize("layer", LAYERS)
def test_in_mixed_precision(layer, dtype, atol):
    assert_same_at_real_tokens(two_blocks(layer, post_norm, dtype), atol)


@pytest.mark.wide(6)
@pytest.mark.parametrize("layer, jit_compile", [*((layer, False) for layer in LAYERS), (mha, True), (gqa, True)])
def test_predict(layer, jit_compile):
    model = two_blocks(layer, post_norm)
    model.compile(jit_compile=jit_compile)
    assert_same_at_real_tokens(lambda ids: model.predict(ids, verbose=0))


@pytest.mark.wide(6)
@pytest.mark.parametrize(
    "layer, jit_compile", [*((layer, False) for layer in LAYERS), (mha, True), (self_attention, True)]
)
def test_fit(layer, jit_compile):
    """A step on longer batches changes the weights in the same way; the loss of padding does not count."""
    targets = random(*LONGER.shape, WIDTH, dtype="float32").numpy()
    results = []
    for ids in (IDS, LONGER):
        model = two_blocks(layer, post_norm)
        before = model.get_weights()
        model.compile(keras.optimizers.SGD(0.5), "mse", jit_compile=jit_compile)
        model.fit(ids, targets[:, : ids.shape[1]], verbose=0)
        results.append(model.get_weights())
    assert any((abs(a - b) > 1e-3).any() for a, b in zip(results[0], before))
    for longer, short in zip(results[1], results[0]):
        np.testing.assert_allclose(longer, short, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer is not self_attention])
def test_encoder_and_decoder(layer, norm):
    """The decoder's cross attention reads no padding of the source."""
    model = encoder_decoder(layer, norm)
    target = np.array([[1, 2, 0], [4, 5, 6]])
    short, longer = (model([ids, target]).numpy() for ids in (IDS, LONGER))
    np.testing.assert_allclose(longer[target != 0], short[target != 0], atol=2e-6)
    if norm is post_norm:
        model.compile()
        np.testing.assert_allclose(model.predict([LONGER, target], verbose=0), longer, atol=2e-6)


def masked(x, mask):
    x = tf.identity(x)
    x._keras_mask = tf.constant(mask)
    return x


X = random(2, 4, WIDTH, dtype="float32")


@pytest.mark.parametrize("layer", LAYERS)
def test_the_inputs_keep_their_masks_and_the_output_has_the_query_s(layer):
    query, context = masked(X, REAL), masked(X, ~REAL)
    out = layer(query, query if layer is self_attention else context)
    np.testing.assert_array_equal(query._keras_mask, REAL)
    np.testing.assert_array_equal(context._keras_mask, ~REAL)
    np.testing.assert_array_equal(out._keras_mask, REAL)


EXPLICIT = np.array([[True, True, False, False], [True, False, True, True]])
MULTIHEAD = {
    "MultiHeadAttention": dict(num_heads=2, key_dim=4, use_bias=False),
    "GroupedQueryAttention": dict(head_dim=4, num_query_heads=4, num_key_value_heads=2, use_bias=False),
}


@pytest.mark.parametrize("name", MULTIHEAD)
@pytest.mark.parametrize("dtype", ["bool", "int32"])
def test_given_masks_count_instead_of_the_inputs_own(name, dtype):
    layer = ours(name)(**MULTIHEAD[name])
    given = EXPLICIT.astype(dtype)
    hidden = masked(X, np.zeros_like(EXPLICIT))
    out = layer(hidden, hidden, hidden, query_mask=given, value_mask=given, key_mask=given)
    for row, mask in zip(range(2), EXPLICIT):
        expected = layer(X[row : row + 1, ...], tf.boolean_mask(X[row], mask)[None])[0]
        np.testing.assert_allclose(out[row][mask], expected[mask], atol=1e-6)
        assert not out[row][~mask].numpy().any()
    np.testing.assert_array_equal(out._keras_mask, EXPLICIT)
    # The other way round: what the inputs hide is seen when a mask says so.
    everything = np.ones_like(EXPLICIT)
    seen = layer(hidden, hidden, query_mask=everything, value_mask=everything)
    np.testing.assert_allclose(seen, layer(X, X), atol=1e-6)


@pytest.mark.parametrize("name", MULTIHEAD)
def test_a_given_query_mask_of_a_functional_model(name):
    x, mask = keras.Input((4, WIDTH)), keras.Input((4,), dtype="bool")
    out = ours(name)(**MULTIHEAD[name])(x, x, query_mask=mask)
    assert out._keras_mask is mask
    model = keras.Model([x, mask], out)
    result = model([X, tf.constant(EXPLICIT)])
    assert not result.numpy()[~EXPLICIT].any() and result.numpy()[EXPLICIT].all()


@pytest.mark.parametrize("layer", ["Attention", "AttentionLayer", "AttentionLayerWithWeights", "SelfAttention"])
def test_given_masks_of_the_layers_that_take_them_by_mask(layer):
    hidden = masked(X, np.zeros_like(EXPLICIT))
    inputs, plain = (hidden, X) if layer == "SelfAttention" else ([hidden] * 3, [X] * 3)
    masks = EXPLICIT if layer == "SelfAttention" else [tf.constant(EXPLICIT)] * 3
    layer = ours(layer)()
    out = tf.nest.flatten(layer(inputs, mask=masks))[0]
    expected = tf.nest.flatten(layer(plain, mask=masks))[0]
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert not out.numpy()[~EXPLICIT].any() and out.numpy()[EXPLICIT].all()
    np.testing.assert_array_equal(out._keras_mask, EXPLICIT)


@pytest.mark.parametrize("name", MULTIHEAD)
def test_a_subclass_may_change_the_mask(name):
    """Its `_compute_attention_mask` gets, and gives, a dense mask, as in Keras."""

    class Sub(ours(name)):
        def _compute_attention_mask(self, query, value, **kwargs):
            mask = super()._compute_attention_mask(query, value, **kwargs)
            return mask & (np.arange(4) != 1)

    sub, plain = Sub(**MULTIHEAD[name]), ours(name)(**MULTIHEAD[name])
    x = masked(X, REAL)
    out = sub(x, x, use_causal_mask=True)
    plain(x, x)
    plain.set_weights(sub.get_weights())
    mask = np.broadcast_to(np.arange(4) != 1, (1, 4, 4))
    np.testing.assert_allclose(out, plain(x, x, attention_mask=mask, use_causal_mask=True), atol=1e-6)


@pytest.mark.parametrize("name", MULTIHEAD)
def test_a_subclass_may_change_the_softmax(name):
    """Where Keras calls it: with scores or dropout."""

    class Sub(ours(name)):
        def _masked_softmax(self, scores, attention_mask=None):
            return super()._masked_softmax(2.0 * scores, attention_mask)

    config = {**MULTIHEAD[name], "dtype": "float64"}
    sub, plain = Sub(**config), ours(name)(**config)
    x = masked(random(2, 4, WIDTH), REAL)
    out, scores = sub(x, x, return_attention_scores=True)
    plain(x, x)
    weights = sub.get_weights()
    weights[0] = 2.0 * weights[0]
    plain.set_weights(weights)
    expected, expected_scores = plain(x, x, return_attention_scores=True)
    np.testing.assert_allclose(out[REAL], expected[REAL], rtol=1e-9)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-9)
    with pytest.raises(ValueError, match=r"cannot run fused: Sub overrides _masked_softmax\(\)"):
        Sub(**config, flash_attention=True)(x, x, return_attention_scores=True)


@pytest.mark.skipif(KERAS < (3, 8), reason="before, Keras left the masks where they were")
def test_keras_forgets_the_mask_behind_an_addition():
    """Why our layer has a `call` of its own; when this fails, it is no difference any more."""
    model = two_blocks(lambda x, context: STOCK["MultiHeadAttention"](2, 4)(x, context), post_norm)
    with pytest.raises(AssertionError):
        assert_same_at_real_tokens(model)

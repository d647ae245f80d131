"""Our layers against Keras's, values and gradients, over every combination of masks, windows and scores."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from layer_twins import FLASH, HAS_WINDOW, KERAS, STOCK, assert_same, random, twins

# Keras's GroupedQueryAttention warns about the masks of its inputs.
pytestmark = pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask")

BATCH, T, S, FEATURES = 3, 5, 7, 6
WINDOWS = (None, 2) if HAS_WINDOW else (None,)
PADDINGS = ("none", "value", "query_value", "all")
QUERY_MASK = np.arange(T) < np.array([[5], [3], [1]])
LAYERS = {
    "MultiHeadAttention": dict(num_heads=2, key_dim=4, value_dim=4),
    "GroupedQueryAttention": dict(head_dim=4, num_query_heads=4, num_key_value_heads=2),
}


def _value_mask(length):
    return np.arange(length) < np.array([[length], [2], [4]])


def _visible(length, causal, attention_mask, padding, window):
    """The dense mask [batch, 1, T, length] that all of it amounts to."""
    rows, columns = np.arange(T)[:, None], np.arange(length)[None, :]
    visible = np.ones((BATCH, T, length), bool)
    if causal:
        visible &= rows >= columns
    if window is not None:
        visible &= abs(rows - columns) < window
    if attention_mask is not None:
        visible &= attention_mask
    if padding in ("value", "query_value", "all"):
        visible &= _value_mask(length)[:, None, :]
    if padding in ("query_value", "all"):
        visible &= QUERY_MASK[:, :, None]
    if padding == "all":
        visible[:, :, 0] = False
    return visible[:, None]


def _keras_masked(x, mask):
    x = tf.identity(x)
    x._keras_mask = tf.constant(mask)
    return x


@pytest.mark.wide(4)
@pytest.mark.parametrize("flash", FLASH)
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("scores", [False, True], ids=["output", "scores"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_combination(name, scores, cross, flash):
    length = S if cross else T
    shapes = (BATCH, T, FEATURES), (BATCH, length, FEATURES)
    inputs = [random(*shapes[0], seed=1), random(*shapes[1], seed=2)]
    if cross:
        inputs.append(random(*shapes[1], seed=3))
    some = np.random.default_rng(4).random((BATCH, T, length)) > 0.3
    for window in WINDOWS:
        config = dict(LAYERS[name], sliding_window=window) if window else LAYERS[name]
        stock, mine = twins(name, *shapes, flash_attention=FLASH[flash], **config)
        for causal, attention_mask, padding in itertools.product((False, True), (None, some), PADDINGS):
            not_first = np.ones((BATCH, length), bool)
            not_first[:, 0] = False

            def call(layer, inputs):
                query, value = inputs[:2]
                key = inputs[2] if cross else value
                if padding in ("query_value", "all"):
                    query = _keras_masked(query, QUERY_MASK)
                if padding != "none":
                    value = _keras_masked(value, _value_mask(length))
                if padding == "all":
                    key = _keras_masked(key, not_first)
                return layer(
                    query,
                    value,
                    key=key if cross or padding == "all" else None,
                    attention_mask=attention_mask,
                    use_causal_mask=causal,
                    return_attention_scores=scores,
                )

            visible = _visible(length, causal, attention_mask, padding, window)
            # A row without any key is 0 in ours, and in Keras the mean of all values or 0: not compared here.
            rows = visible.any(-1).astype("float64")  # [batch, 1, T]
            weight = [rows[:, 0, :, None], rows[..., None]]
            assert_same(stock, mine, inputs, call, weight)
            if scores:
                weights = call(mine, inputs)[1].numpy()
                assert not weights[~np.broadcast_to(visible, weights.shape)].any()


@pytest.mark.parametrize("flash", FLASH)
@pytest.mark.parametrize("scores", [False, True], ids=["output", "scores"])
@pytest.mark.parametrize("use_scale", [False, True], ids=["unscaled", "learned_scale"])
def test_attention(use_scale, scores, flash):
    shapes = (BATCH, T, FEATURES), (BATCH, S, 4), (BATCH, S, FEATURES)
    stock, mine = twins("Attention", *shapes, flash_attention=FLASH[flash], use_scale=use_scale)
    inputs = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    value_mask = _value_mask(S)
    value_mask[2, 0] = False  # under a causal mask, row 0 of that entry sees nothing
    for causal, with_value_mask, with_query_mask in itertools.product((False, True), repeat=3):
        if with_value_mask and not causal and KERAS < (3, 12):
            continue  # Keras's own layer does not broadcast this mask
        mask = [QUERY_MASK if with_query_mask else None, value_mask if with_value_mask else None]

        def call(layer, inputs):
            return layer(
                inputs,
                mask=[m if m is None else tf.constant(m) for m in mask],
                use_causal_mask=causal,
                return_attention_scores=scores,
            )

        visible = np.ones((BATCH, T, S), bool)
        if causal:
            visible &= np.arange(T)[:, None] >= np.arange(S)
        if with_value_mask:
            visible &= value_mask[:, None]
        rows = visible.any(-1, keepdims=True).astype("float64")
        assert_same(stock, mine, inputs, call, [rows, rows])


@pytest.mark.parametrize("flash", FLASH)
def test_attention_takes_a_mask_of_the_scores(flash):
    shapes = (BATCH, T, FEATURES), (BATCH, S, FEATURES)
    stock, mine = twins("Attention", *shapes, flash_attention=FLASH[flash])
    mask = np.random.default_rng(5).random((BATCH, T, S)) > 0.4
    mask[..., 3] = True

    def call(layer, inputs):
        return layer(inputs, mask=[None, tf.constant(mask)], return_attention_scores=True)

    assert_same(stock, mine, [random(*shape, seed=i) for i, shape in enumerate(shapes)], call)


# Input shapes, attention_axes, and a mask shape that Keras accepts for them.
ND = {
    "free_axis_mask2": ((2, 3, 4, 6), (2, 3, 2, 6), (2,), (4, 2)),
    "free_axis_mask3": ((2, 3, 4, 6), (2, 3, 2, 6), (2,), (2, 4, 2)),
    "free_axis_mask4": ((2, 3, 4, 6), (2, 3, 2, 6), (2,), (2, 3, 4, 2)),
    "free_axis_mask_heads": ((2, 3, 4, 6), (2, 3, 2, 6), (2,), (2, 3, 2, 4, 2)),
    "free_axis_mask_partly_broadcast": ((2, 3, 4, 6), (2, 3, 2, 6), (2,), (2, 1, 1, 4, 1)),
    "negative_axis": ((2, 3, 4, 6), (2, 3, 2, 6), (-2,), (2, 3, 4, 2)),
    "first_of_two_axes": ((2, 4, 3, 6), (2, 5, 3, 6), (1,), (2, 4, 5)),
    "both_axes": ((2, 3, 4, 6), (2, 2, 5, 6), (1, 2), (3, 4, 2, 5)),
    "both_axes_by_default": ((2, 3, 4, 6), (2, 2, 5, 6), None, (2, 3, 4, 2, 5)),
    "both_axes_swapped": ((2, 3, 4, 6), (2, 2, 5, 6), (2, 1), (2, 4, 3, 5, 2)),
    "rank_5": ((2, 3, 2, 4, 6), (2, 3, 1, 5, 6), (2, 3), (2, 3, 2, 4, 1, 5)),
    "rank_5_outer": ((2, 3, 2, 4, 6), (2, 5, 2, 3, 6), (3, 1), (2, 4, 3, 3, 5)),
}
if KERAS < (3, 12):
    del ND["negative_axis"]  # wrong in Keras

@pytest.mark.wide(2)
@pytest.mark.parametrize("flash", FLASH)
@pytest.mark.parametrize("case", ND)
def test_attention_axes(case, flash):
    query_shape, value_shape, axes, mask_shape = ND[case]
    config = dict(num_heads=2, key_dim=4, value_dim=4, attention_axes=axes)
    stock, mine = twins("MultiHeadAttention", query_shape, value_shape, flash_attention=FLASH[flash], **config)
    inputs = [random(*query_shape, seed=1), random(*value_shape, seed=2)]
    mask = np.random.default_rng(3).random(mask_shape) > 0.3
    # Every query sees some key: the first of each attended axis of the keys.
    attended = len(mine._attention_axes)
    mask[(..., *[0] * attended)] = True
    for attention_mask, scores in itertools.product((None, mask), (False, True)):

        def call(layer, inputs):
            return layer(*inputs, attention_mask=attention_mask, return_attention_scores=scores)

        assert_same(stock, mine, inputs, call)


@pytest.mark.parametrize("flash", FLASH)
def test_keras_masks_of_inputs_with_more_axes(flash):
    """[batch, seqlen] masks of [batch, seqlen, channels, features], and those that cover the free axes too."""
    shape = (2, 4, 3, 6)
    x = random(*shape)
    stock, mine = twins("MultiHeadAttention", shape, shape, num_heads=2, key_dim=4, attention_axes=1,
                        flash_attention=FLASH[flash])  # fmt: skip
    mask = np.array([[True, True, True, False], [True, True, False, False]])
    rows = mask.astype("float64")[:, :, None, None]

    def call(layer, inputs):
        return layer(_keras_masked(inputs[0], mask), inputs[0])

    assert_same(stock, mine, [x], call, [rows])

    full = np.random.default_rng(1).random((2, 3, 4)) > 0.4
    full[..., 0] = True
    shape = (2, 3, 4, 6)
    x = random(*shape)
    stock, mine = twins("MultiHeadAttention", shape, shape, num_heads=2, key_dim=4, attention_axes=2,
                        flash_attention=FLASH[flash])  # fmt: skip
    rows = full.astype("float64")[..., None]

    def call(layer, inputs):
        return layer(_keras_masked(inputs[0], full), _keras_masked(inputs[0], full))

    assert_same(stock, mine, [x], call, [rows])


@pytest.mark.parametrize("flash", FLASH)
@pytest.mark.parametrize("name", LAYERS)
def test_masks_of_fewer_axes_beside_others(name, flash):
    """Keras's conjunction broadcasts them; alone they are refused there and here."""
    stock, mine = twins(name, (BATCH, T, FEATURES), (BATCH, S, FEATURES), flash_attention=FLASH[flash], **LAYERS[name])
    inputs = [random(BATCH, T, FEATURES, seed=1), random(BATCH, S, FEATURES, seed=2)]
    some = np.arange(S) % 3 != 1
    for mask, others in (
        (some, dict(use_causal_mask=True)),
        (some.astype("int32"), dict(value_mask=tf.constant(_value_mask(S)))),
        (True, dict(value_mask=tf.constant(_value_mask(S)))),
    ):
        assert_same(stock, mine, inputs, lambda layer, x: layer(*x, attention_mask=tf.constant(mask), **others))
    with pytest.raises(ValueError, match="has 1 axes, and needs 2"):
        mine(*inputs, attention_mask=tf.constant(some))


@pytest.mark.parametrize("flash", FLASH)
def test_padding_of_an_attended_axis_that_is_not_the_first(flash):
    shape = (2, 4, T, FEATURES)
    config = dict(num_heads=2, key_dim=4, attention_axes=2)
    stock, mine = twins("MultiHeadAttention", shape, shape, flash_attention=FLASH[flash], **config)
    padding = tf.constant(np.arange(T) < np.array([[T], [2]]))
    x = random(*shape, seed=3)
    assert_same(stock, mine, [x], lambda layer, x: layer(x[0], x[0], value_mask=padding))


@pytest.mark.parametrize("name", LAYERS)
def test_training_may_be_a_tensor_without_dropout(name):
    _, mine = twins(name, (BATCH, T, FEATURES), (BATCH, T, FEATURES), **LAYERS[name])
    x = random(BATCH, T, FEATURES, seed=1)
    traced = tf.function(lambda training: mine(x, x, training=training))(tf.constant(True))
    np.testing.assert_allclose(traced, mine(x, x), rtol=1e-9)


@pytest.mark.parametrize("name, sizes", [("MultiHeadAttention", (2, 4)), ("GroupedQueryAttention", (4, 4, 2))])
def test_projections_with_policies_of_their_own(name, sizes):
    """What they give is promoted; scores have the layer's dtype."""
    x = tf.constant(np.random.default_rng(0).normal(size=(2, 6, 8)), tf.float32)
    layer = STOCK[name](*sizes)
    layer(x, x)
    policies = {"_query_dense": "mixed_bfloat16", "_key_dense": "mixed_bfloat16", "_value_dense": "float64"}
    for projection, policy in policies.items():
        getattr(layer, projection).dtype_policy = keras.dtype_policies.get(policy)

    def answers():
        plain = [layer(x, x) for _ in range(2)]  # the second one may go a shorter way
        return [*plain, *layer(x, x, return_attention_scores=True)]

    expected = answers()
    with attn_ops.patched():
        patched = answers()
    for found in (patched, attn_ops.convert(layer) and answers()):
        for actual, wanted in zip(found, expected, strict=True):
            assert actual.dtype == wanted.dtype
            np.testing.assert_allclose(actual, wanted, atol=1e-2)

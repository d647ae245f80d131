"""`tf.debugging.enable_check_numerics` finds no infinity and no NaN that we made, as it finds none in stock Keras.

XLA is left out: it compiles none of the checks.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from attn_ops import layers

_VISIBLE = np.ones((2, 1, 5, 6), bool)
_VISIBLE[0, 0, 2] = False  # a row without keys
_VISIBLE[1] = False  # an entry without any
FEATURES = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right window": {"window": (1, 0), "causal_alignment": "bottom_right"},
    "mask": {"mask": _VISIBLE},
    "large bias": {"bias": np.where(_VISIBLE, 0, -1e9).astype("f4")},
    "lengths": {"query_seq_lengths": np.array([5, 0]), "key_value_seq_lengths": np.array([0, 3])},
    "dropout": {"dropout_rate": 0.5, "dropout_seed": 3, "mask": _VISIBLE},
}
MODES = {"eager": lambda step: step, "graph": lambda step: tf.function(step, autograph=False)}


@pytest.fixture(autouse=True)
def checks():
    tf.debugging.enable_check_numerics()
    yield
    tf.debugging.disable_check_numerics()


def inputs():
    random = np.random.default_rng(0)
    return [tf.constant(random.standard_normal(shape), tf.float32) for shape in [(2, 5, 4, 8), (2, 6, 2, 8)]]


@pytest.mark.wide(4)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chosen", ["composite", "fused"])
def test_attention_weights_and_gradients(chosen, mode, feature):
    options = FEATURES[feature]
    undropped = {name: x for name, x in options.items() if "dropout" not in name}

    def step(query, key):
        with tf.GradientTape() as tape:
            tape.watch([query, key])
            out = attn_ops.scaled_dot_product_attention(query, key, key, implementation=chosen, **options)
            weights = attn_ops.attention_weights(query, key, implementation=chosen, **undropped)
            loss = tf.reduce_sum(out**2) + tf.reduce_sum(weights**2)
        return [weights, *tape.gradient(loss, [query, key])]

    weights, *gradients = MODES[mode](step)(*inputs())
    seen = np.any(weights, -1)
    np.testing.assert_allclose(np.sum(weights, -1), seen, atol=1e-5)
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chosen", ["composite", "fused"])
def test_no_keys_at_all(chosen, mode):
    query, key = inputs()
    step = MODES[mode](lambda q, k: attn_ops.scaled_dot_product_attention(q, k, k, implementation=chosen))
    np.testing.assert_array_equal(step(query, key[:, :0]), np.zeros(query.shape))


def test_minus_infinity_where_it_is_asked_for():
    query, key = inputs()
    for chosen in ("composite", "fused"):
        with pytest.raises(tf.errors.InvalidArgumentError, match="Inf"):
            attn_ops.scaled_dot_product_attention(
                query, key, key, mask=_VISIBLE, return_lse=True, implementation=chosen
            )


LAYERS = {
    "MultiHeadAttention": (layers.MultiHeadAttention, keras.layers.MultiHeadAttention, (2, 4)),
    "GroupedQueryAttention": (layers.GroupedQueryAttention, keras.layers.GroupQueryAttention, (4, 4, 2)),
}


@pytest.mark.wide(4)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("flash", [None, False])
@pytest.mark.parametrize("mode", MODES)
def test_layers_train_with_padding_and_scores(mode, flash, name):
    ours, stock, arguments = LAYERS[name]
    x = tf.constant(np.random.default_rng(0).standard_normal((2, 5, 8)), tf.float32)
    padding = tf.constant(np.arange(5) < np.array([[3], [0]]))
    for layer in (stock(*arguments, dropout=0.2), ours(*arguments, dropout=0.2, flash_attention=flash)):

        def step(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                out, scores = layer(
                    x, x, query_mask=padding, value_mask=padding, use_causal_mask=True,
                    return_attention_scores=True, training=True,
                )  # fmt: skip
                loss = tf.reduce_sum(out**2) + tf.reduce_sum(scores**2)
            return tape.gradient(loss, x)

        assert np.isfinite(MODES[mode](step)(x)).all()

"""One query, many keys, is_causal and the default alignment: a warning that names "bottom_right", once."""

import warnings

import jax
import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
import attn_ops.jax
from attn_ops import masks

KEY = np.random.default_rng(0).standard_normal((1, 6, 2, 4)).astype("float32")
QUERY = KEY[:, -1:]
tensorflow, numpy_of_jax = attn_ops.scaled_dot_product_attention, attn_ops.jax.scaled_dot_product_attention
CALLS = {
    "eager": lambda **o: tensorflow(QUERY, KEY, KEY, **o),
    "graph": lambda **o: tf.function(lambda: tensorflow(QUERY, KEY, KEY, **o), autograph=False)(),
    "composite": lambda **o: tensorflow(QUERY, KEY, KEY, implementation="composite", **o),
    "weights": lambda **o: attn_ops.attention_weights(QUERY, KEY, **o),
    "jax": lambda **o: numpy_of_jax(QUERY, KEY, KEY, **o),
    "jit": lambda **o: jax.jit(lambda q: numpy_of_jax(q, KEY, KEY, **o))(QUERY),
}


def warned(call, *, times=1):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            call()
    return [w for w in caught if "bottom_right" in str(w.message)]


@pytest.mark.parametrize("kind", CALLS)
def test_it_warns_once(kind):
    [warning] = warned(lambda: CALLS[kind](is_causal=True), times=3)
    assert "is_causal=True, one query and 6 keys" in str(warning.message)
    assert 'causal_alignment="bottom_right"' in str(warning.message)
    assert warning.category is UserWarning


def test_it_points_at_the_call():
    [warning] = warned(lambda: CALLS["eager"](is_causal=True))
    assert warning.filename == __file__


def test_a_mask_object_is_told_too():
    assert len(warned(lambda: CALLS["eager"](mask=masks.causal() & masks.key_padding(np.ones((1, 6), bool))))) == 1


@pytest.mark.parametrize(
    "options",
    [
        dict(is_causal=True, causal_alignment="bottom_right"),
        dict(is_causal=True, causal_alignment="top_left"),
        dict(mask=masks.causal("top_left")),
        dict(mask=masks.causal("top_left"), is_causal=True),
        dict(mask=masks.causal(), causal_alignment="top_left"),
        dict(mask=masks.causal("bottom_right")),
        dict(window=(2, 0)),
        dict(),
    ],
    ids=str,
)
def test_whoever_says_the_alignment_is_not_told(options):
    assert not warned(lambda: CALLS["eager"](**options))


def test_neither_are_as_many_queries_as_keys_nor_one_key():
    assert not warned(lambda: tensorflow(KEY, KEY, KEY, is_causal=True))
    assert not warned(lambda: tensorflow(QUERY, QUERY, QUERY, is_causal=True))


def test_stock_compatible_code_is_not_told():
    """The answer of Keras is what is wanted there."""
    q, k = (x.reshape(*x.shape[:2], 8) for x in (QUERY, KEY))
    assert not warned(lambda: attn_ops.layers.MultiHeadAttention(2, 4)(q, k, use_causal_mask=True))
    assert not warned(lambda: attn_ops.layers.GroupedQueryAttention(4, 2, 1)(q, k, use_causal_mask=True))
    assert not warned(lambda: attn_ops.layers.Attention()([q, k], use_causal_mask=True))
    with attn_ops.patched():
        assert not warned(lambda: keras.layers.MultiHeadAttention(2, 4)(q, k, use_causal_mask=True))
        assert not warned(lambda: keras.ops.dot_product_attention(QUERY, KEY, KEY, is_causal=True))


def test_the_default_is_what_it_was():
    with pytest.warns(UserWarning, match="bottom_right"):
        np.testing.assert_allclose(CALLS["eager"](is_causal=True), KEY[:, :1], rtol=1e-6)
    assert masks.causal().causal_alignment == "top_left" and repr(masks.causal("bottom_right")) == "<Mask: causal(bottom_right)>"

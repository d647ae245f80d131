"""Rank 2, a single sequence of a tutorial, and rank 3: the results of rank 4 without the axes that the inputs lack."""

import jax
import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
import attn_ops.jax
from attn_ops import masks, reference

RNG = np.random.default_rng(0)
Q, K, V, D_OUT = (RNG.standard_normal(shape).astype("float32") for shape in ((5, 8), (7, 8), (7, 3), (5, 3)))
BIAS = RNG.standard_normal((5, 7)).astype("float32")
MASK = RNG.random((5, 7)) < 0.7
MASK[:, 0] = True
OPTIONS = dict(bias=BIAS, mask=[MASK, masks.window(3, 4)], scale=0.4)


def plain():
    """(out, lse, weights) by the formula in float64."""
    rows, columns = np.mgrid[:5, :7]
    visible = MASK & (columns >= rows - 3) & (columns <= rows + 4)
    s = np.where(visible, 0.4 * (Q.astype("float64") @ K.T) + BIAS, -np.inf)
    lse = np.log(np.exp(s).sum(-1))
    weights = np.exp(s - lse[:, None])
    return weights @ V, lse, weights


def by_jax(q, k, v, **options):
    return attn_ops.jax.scaled_dot_product_attention(q, k, v, **options)


def traced(jit_compile):
    return tf.function(attn_ops.scaled_dot_product_attention, jit_compile=jit_compile, autograph=False)


def unknown_rank(q, k, v, **options):
    specs = [tf.TensorSpec(shape, "float32") for shape in (None, [None] * k.ndim, None)]
    return tf.function(lambda *x: attn_ops.scaled_dot_product_attention(*x, **options), specs, autograph=False)(q, k, v)


RUN = {
    "reference": reference.attention,
    "eager": attn_ops.scaled_dot_product_attention,
    "graph": lambda *x, **options: traced(False)(*x, **options),
    "xla": lambda *x, **options: traced(True)(*x, **options),
    "unknown rank": unknown_rank,
    "jax": by_jax,
    "jit": lambda *x, **options: jax.jit(lambda *y: by_jax(*y, **options))(*x),
}


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("how", RUN)
@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
def test_out_and_lse(how, rank, layout):
    options = dict(OPTIONS, layout=layout)
    if how != "reference":
        options["return_lse"] = True
    batch = (None,) * (rank - 2)
    out, lse = RUN[how](Q[batch], K[batch], V[batch], **options)
    expected, expected_lse, _ = plain()
    assert out.shape == expected[batch].shape and lse.shape == expected_lse[batch].shape
    np.testing.assert_allclose(out, expected[batch], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse[batch], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("forced", ["fused", "composite", "reference"])
def test_implementations(forced):
    out = attn_ops.scaled_dot_product_attention(Q, K, V, **OPTIONS, implementation=forced)
    np.testing.assert_allclose(out, plain()[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weigh", [reference, attn_ops, attn_ops.jax], ids=["reference", "tensorflow", "jax"])
@pytest.mark.parametrize("rank", [2, 3])
def test_weights(weigh, rank):
    batch = (None,) * (rank - 2)
    _, lse, expected = plain()
    found = weigh.attention_weights(Q[batch], K[batch], **OPTIONS)
    assert found.shape == expected[batch].shape
    np.testing.assert_allclose(found, expected[batch], rtol=1e-5, atol=1e-5)
    if weigh is not reference:
        again = weigh.attention_weights(Q[batch], K[batch], **OPTIONS, lse=lse[batch].astype("float32"))
        np.testing.assert_allclose(again, expected[batch], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("framework", ["reference", "tensorflow", "jax"])
def test_gradients(framework):
    """dv = weights^T d_out, dbias = weights * (d_out v^T - rowsum), dq = scale dbias k, dk = scale dbias^T q."""
    out, _, weights = plain()
    d_bias = weights * (D_OUT @ V.T - (D_OUT * out).sum(-1, keepdims=True))
    expected = 0.4 * d_bias @ K, 0.4 * d_bias.T @ Q, weights.T @ D_OUT, d_bias
    options = {name: x for name, x in OPTIONS.items() if name != "bias"}
    if framework == "reference":
        found = reference.attention_gradients(Q, K, V, D_OUT, bias=BIAS, **options)
    elif framework == "jax":
        loss = lambda q, k, v, b: (by_jax(q, k, v, bias=b, **options) * D_OUT).sum()  # noqa: E731
        found = jax.grad(loss, (0, 1, 2, 3))(Q, K, V, BIAS)
    else:
        inputs = [tf.constant(x) for x in (Q, K, V, BIAS)]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            out = attn_ops.scaled_dot_product_attention(*inputs[:3], bias=inputs[3], **options)
        found = tape.gradient(out, inputs, D_OUT)
    for gradient, right in zip(found, expected):
        assert gradient.shape == right.shape
        np.testing.assert_allclose(gradient, right, rtol=1e-4, atol=1e-5)


def test_keras_tensors():
    x = keras.Input(batch_shape=(5, 8))
    out, lse = attn_ops.scaled_dot_product_attention(x, x, x, return_lse=True)
    weights = attn_ops.attention_weights(x, x, lse=lse)
    assert (out.shape, lse.shape, weights.shape) == ((5, 8), (5,), (5, 5))
    found = keras.Model(x, [out, weights])(Q)
    np.testing.assert_allclose(found[0], reference.attention(Q, Q, Q)[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1], reference.attention_weights(Q, Q), rtol=1e-5, atol=1e-5)


def test_the_first_snippet_of_the_tutorial():
    """Integers: the reference takes them, the op says how to cast."""
    q, k, v = (np.array(x) for x in ([[1, 0, 1], [0, 2, 1]], [[1, 0, 1], [0, 1, 2]], [[1, 2], [3, 4]]))
    e = np.exp(np.array([[2, 2], [1, 4]]) / np.sqrt(3))  # Q K^T / sqrt(d)
    weights = e / e.sum(-1, keepdims=True)
    np.testing.assert_allclose(reference.attention(q, k, v)[0], weights @ v, rtol=1e-12)
    np.testing.assert_allclose(reference.attention_weights(q, k), weights, rtol=1e-12)
    np.testing.assert_allclose(reference.attention(q[None], k[None], v[None])[0], [weights @ v], rtol=1e-12)
    rank_4 = (x[None, :, None] for x in (q, k, v))
    np.testing.assert_allclose(reference.attention(*rank_4)[0][0, :, 0], weights @ v, rtol=1e-12)
    with pytest.raises(TypeError, match=r"got int64; cast it: tf.cast\(query, tf.float32\)"):
        attn_ops.scaled_dot_product_attention(q, k, v)
    floats = [tf.cast(x, tf.float32) for x in (q, k, v)]
    np.testing.assert_allclose(attn_ops.scaled_dot_product_attention(*floats), weights @ v, rtol=1e-6)


def test_lengths_of_a_single_sequence():
    found = attn_ops.scaled_dot_product_attention(Q, K, V, key_value_seq_lengths=[4], query_seq_lengths=[3])
    np.testing.assert_allclose(found[:3], reference.attention(Q[:3], K[:4], V[:4])[0], rtol=1e-5, atol=1e-5)
    assert not found[3:].numpy().any()


@pytest.mark.parametrize("ranks", [(2, 3, 3), (4, 3, 3), (1, 1, 1), (5, 5, 5)])
def test_other_ranks_are_refused(ranks):
    shapes = [(1,) * rank for rank in ranks]
    for attend in (attn_ops.scaled_dot_product_attention, by_jax, reference.attention):
        with pytest.raises(ValueError, match="rank .*4.* 3 .*2 "):
            attend(*(np.ones(shape, "float32") for shape in shapes))


@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (2, 3, 4), (1, 3, 1)])
def test_the_reference_takes_biases_of_lower_ranks(shape):
    rng = np.random.default_rng(0)
    q, k, d_out = rng.standard_normal((2, 3, 2, 5)), rng.standard_normal((2, 4, 1, 5)), rng.standard_normal((2, 3, 2, 5))
    bias = rng.standard_normal(shape)
    full = bias[None, None] if bias.ndim == 2 else bias[:, None]
    for function, more in ((reference.attention, ()), (reference.attention_gradients, (d_out,))):
        found, wanted = function(q, k, k, *more, bias=bias), function(q, k, k, *more, bias=full)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a, b.reshape(a.shape))
    assert found[3].shape == shape

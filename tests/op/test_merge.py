"""merge_attention: parts of the keys make the whole, in both frameworks, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
import attn_ops.jax
from attn_ops import reference

RNG = np.random.default_rng(0)
B, T, S, H, D = 2, 5, 9, 2, 4
QUERY, KEY, VALUE = (RNG.standard_normal((B, n, H, D)) for n in (T, S, S))
MASK = RNG.random((B, 1, T, S)) > 0.4
MASK[0, 0, 1] = False  # nobody
MASK[:, :, 2, :4] = False  # nobody of the first part
CUTS = [(0, 4), (4, 5), (5, 9)]


def parts(query, key, value, layout="BSHD"):
    axis = 1 if layout == "BSHD" else 2
    swapped = [x if layout == "BSHD" else x.swapaxes(1, 2) for x in (query, key, value)]
    query, key, value = swapped
    cut = [[np.take(x, range(*ends), axis) for x in (key, value)] for ends in CUTS]
    found = [reference.attention(query, k, v, mask=MASK[..., a:b], layout=layout) for (k, v), (a, b) in zip(cut, CUTS)]
    return zip(*found)


@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
@pytest.mark.parametrize("merge", [attn_ops.merge_attention, attn_ops.jax.merge_attention, reference.merge_attention])
def test_parts_make_the_whole(merge, layout):
    outs, lses = ([np.asarray(x, "float32") for x in xs] for xs in parts(QUERY, KEY, VALUE, layout))
    out, lse = merge(list(outs), list(lses), layout=layout)
    whole = reference.attention(QUERY, KEY, VALUE, mask=MASK)
    np.testing.assert_allclose(out if layout == "BSHD" else np.swapaxes(out, 1, 2), whole[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, whole[1], rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(lse)[0, :, 1] == -np.inf)


@pytest.mark.parametrize("framework", ["tensorflow", "jax"])
def test_gradients(framework):
    """Those of the whole, also where rows see nothing in one part or in none."""
    d_out, d_lse = RNG.standard_normal((B, T, H, D)), RNG.standard_normal((B, H, T))
    d_lse[0, :, 1] = 0
    expected = reference.attention_gradients(QUERY, KEY, VALUE, d_out, d_lse, mask=MASK)[:3]
    arrays = [x.astype("float32") for x in (QUERY, KEY, VALUE)]
    module = attn_ops if framework == "tensorflow" else attn_ops.jax

    def loss(query, key, value, finite, total):
        found = [
            module.scaled_dot_product_attention(query, key[:, a:b], value[:, a:b], mask=MASK[..., a:b], return_lse=True)
            for a, b in CUTS
        ]
        out, lse = module.merge_attention(*zip(*found))
        return total(out * d_out.astype("float32")) + total(finite(lse) * d_lse.astype("float32"))

    if framework == "jax":
        gradients = jax.grad(lambda *x: loss(*x, lambda x: jnp.where(jnp.isfinite(x), x, 0), jnp.sum), (0, 1, 2))(
            *arrays
        )
    else:
        tensors = [tf.constant(x) for x in arrays]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = loss(*tensors, lambda x: tf.where(tf.math.is_finite(x), x, tf.zeros_like(x)), tf.reduce_sum)
        gradients = tape.gradient(value, tensors)
    for found, right in zip(gradients, expected):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("merge", [attn_ops.merge_attention, attn_ops.jax.merge_attention, reference.merge_attention])
def test_nan_stays_in_its_row(merge):
    """It is neither hidden nor spread."""
    outs, lses = ([np.array(x, "float32") for x in xs] for xs in parts(QUERY, KEY, VALUE))
    right = reference.merge_attention(outs, lses)
    lses[1][0, 1, 3] = outs[2][1, 4, 0, 0] = np.nan
    out, lse = (np.asarray(x) for x in merge(outs, lses))
    assert np.isnan(lse[0, 1, 3]) and np.isnan(out[0, 3, 1]).all() and np.isnan(out[1, 4, 0, 0])
    assert np.isnan(lse).sum() == 1 and np.isnan(out).sum() == D + 1
    np.testing.assert_allclose(out[~np.isnan(out)], right[0][~np.isnan(out)], rtol=1e-5, atol=1e-6)


def test_lower_ranks_and_sixteen_bits():
    outs, lses = (list(x) for x in parts(QUERY, KEY, VALUE))
    single = [x[:, :, 0] for x in outs], [x[:, 0] for x in lses]
    out, lse = attn_ops.jax.merge_attention(*([jnp.asarray(x, "float32") for x in xs] for xs in single))
    right = reference.merge_attention(outs, lses)
    np.testing.assert_allclose(out, right[0][:, :, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, right[1][:, 0], rtol=1e-5, atol=1e-6)
    half, _ = attn_ops.merge_attention(
        [tf.constant(x, tf.bfloat16) for x in outs], [tf.constant(x, tf.float32) for x in lses]
    )
    assert half.dtype == tf.bfloat16
    np.testing.assert_allclose(tf.cast(half, tf.float32), right[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("merge", [attn_ops.merge_attention, attn_ops.jax.merge_attention])
def test_what_does_not_fit_is_refused(merge):
    out, lse = np.zeros((B, T, H, D), "float32"), np.zeros((B, H, T), "float32")
    for outs, lses, error, rule in [
        ([], [], ValueError, "at least one"),
        ([out, out], [lse], ValueError, "as many outs as lses"),
        ([out], [lse[..., None]], ValueError, "lses what it returned"),
        ([out, out[:1]], [lse, lse[:1]], ValueError, "one shape"),
        ([out, out.astype("float16")], [lse, lse], TypeError, "one dtype"),
        ([out.astype("int32")], [lse], TypeError, "floating"),
        (None, [lse], TypeError, "outs must be a list of tensors, got NoneType"),
        ([out], 3, TypeError, "lses must be a list of tensors, got int"),
    ]:
        with pytest.raises(error, match=f"merge_attention: .*{rule}"):
            merge(outs, lses)
    with pytest.raises(ValueError, match="layout"):
        merge([out], [lse], layout="SBHD")

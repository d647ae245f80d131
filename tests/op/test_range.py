"""The ends of the number range, rows far from zero, long sums, and what 16 bits may not lose.

Right values are those of the specification in float64, or an identity: adding the same number to all scores of a row changes
neither its output nor a gradient.
"""

import numpy as np
import pytest

from cases import DTYPES, make_inputs
from children import run
from implementations import Cuda, specification

# A bias beside 16 bits is float32, and so are their scores.
BIAS = {"float64": np.float64, "float32": np.float32, "float16": np.float32, "bfloat16": np.float32}
ENDS = {dtype: np.finfo(of) for dtype, of in BIAS.items()}
ROUNDING = {"float64": 1e-14, "float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}


def assert_gradients_close(result, expected, tolerance):
    for name, array in result.items():
        if name == "lse":
            continue
        wanted = np.asarray(getattr(expected, name), np.float64)
        error = np.abs(array.astype(np.float64) - wanted).max()
        assert error <= tolerance * max(1.0, np.abs(wanted).max()), f"{name}: off by {error}"


@pytest.mark.parametrize("seqlen_q", [2, 40])  # the kernels have one way for few rows and one for many
def test_the_lowest_bias_everywhere_is_no_mask(implementation, dtype, seqlen_q):
    query, key, value, d_out, _ = make_inputs(dtype, 1, seqlen_q, 50, 2, 2, 16)
    lowest = ENDS[dtype].min
    bias = np.full((1, 1, seqlen_q, 50), lowest, BIAS[dtype])
    result = implementation(query, key, value, d_out, bias=bias)
    mean = value.astype(np.float64).mean(axis=1, keepdims=True)
    tolerance = ROUNDING[dtype]
    out, dv = (np.asarray(x, np.float64) for x in (result.out, result.dv))
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), atol=tolerance)
    np.testing.assert_array_equal(result.lse, lowest)
    # The weights are 1 / 50 whatever the query is, but dv and d_bias know of them.
    rows = np.swapaxes(d_out.astype(np.float64), 1, 2).sum(axis=2) / 50
    np.testing.assert_allclose(dv, np.broadcast_to(rows[:, None], value.shape), atol=tolerance)


@pytest.mark.parametrize("seqlen_q", [2, 40])
def test_the_largest_bias_wins(implementation, dtype, seqlen_q):
    query, key, value, d_out, _ = make_inputs(dtype, 1, seqlen_q, 50, 2, 2, 16)
    ends = ENDS[dtype]
    bias = np.full((1, 1, seqlen_q, 50), ends.min, BIAS[dtype])
    bias[..., 31] = ends.max
    bias[..., 7] = ends.max / 2
    result = implementation(query, key, value, d_out, bias=bias)
    for name, array in result.items():
        assert np.isfinite(array.astype(np.float64)).all(), name
    out, wanted = (np.asarray(x, np.float64) for x in (result.out, value[:, 31:32]))
    np.testing.assert_allclose(out, np.broadcast_to(wanted, out.shape), rtol=max(1e-6, ROUNDING[dtype]))
    assert np.abs(result.dq).max() < 1e-5 and np.abs(np.delete(result.dv, 31, axis=1)).max() == 0


@pytest.mark.parametrize("seqlen_q", [2, 40])
@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_and_biases_that_add_up_to_more_than_there_is(implementation, dtype, seqlen_q, sign):
    """Every sum of a score and its bias is beyond the largest number: all of them count the same."""
    query, key, value, d_out, _ = make_inputs(dtype, 1, seqlen_q, 50, 2, 2, 16)
    ends = ENDS[dtype]
    root = np.sqrt(ends.max) / 8 if dtype == BIAS[dtype] else np.float32(1.0)  # 16 bits have no such numbers
    query[:], key[:] = sign * root, root
    bias = np.full((1, 1, seqlen_q, 50), 0.9 * sign * ends.max, BIAS[dtype])
    scale = float(ends.max / 64 / root**2)  # scores of sign * max / 4
    result = implementation(query, key, value, d_out, bias=bias, scale=scale)
    mean = np.broadcast_to(value.astype(np.float64).mean(axis=1, keepdims=True), result.out.shape)
    np.testing.assert_allclose(np.asarray(result.out, np.float64), mean, atol=max(1e-6, ROUNDING[dtype]))
    assert np.isfinite(result.dv.astype(np.float64)).all() and not np.isnan(result.lse).any()  # which is beyond the range too


@pytest.mark.parametrize("seqlen_q", [2, 40])
@pytest.mark.parametrize("shift", [-1, 1])
def test_rows_far_from_zero_have_the_gradients_of_rows_near_it(implementation, dtype, seqlen_q, shift):
    """Scores are multiples of 1/4, and so small that adding the shift is exact in either dtype."""
    query, key, value, d_out, d_lse = make_inputs(dtype, 1, seqlen_q, 60, 4, 2, 16)
    query, key = ((np.round(2 * x).clip(-2, 2) / 2).astype(x.dtype) for x in (query, key))
    far = np.full((1, 1, 1, 1), shift * (2.0**49 if dtype == "float64" else 2.0**20), BIAS[dtype])
    options = dict(scale=1.0, is_causal=True, causal_alignment="bottom_right")
    result = implementation(query, key, value, d_out, d_lse, bias=far, **options)
    expected = specification(query, key, value, d_out, d_lse, bias=np.zeros_like(far), **options)
    expected.d_bias = result.d_bias  # the sum of numbers that cancel
    assert_gradients_close(result, expected, 10 * ROUNDING[dtype] if dtype in ("float32", "float64") else ROUNDING[dtype])


@pytest.mark.parametrize("of, tolerance", [("float16", 2e-3), ("bfloat16", 1e-2)])
def test_a_massive_activation_leaves_the_query_its_gradient(implementation, of, tolerance):
    """One channel of the keys of one head is huge and the same for all: the softmax does not see it, delta does."""
    query, key, value, d_out, _ = make_inputs("float64", 1, 192, 192, 2, 2, 32)
    key[:, :, 1, 5] = -300.0
    query[..., 5] *= 0.1
    inputs = [x.astype(DTYPES[of]) for x in (query, key, value, d_out)]
    result = implementation(*inputs, is_causal=True)
    expected = specification(*inputs, is_causal=True)
    for name in ("out", "dq", "dk", "dv"):
        for head in range(2):
            found, wanted = (np.asarray(getattr(x, name)[:, :, head], np.float64) for x in (result, expected))
            assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max(), f"{name} of head {head}"


@pytest.mark.parametrize("of", ["float16", "bfloat16"])
def test_a_bias_beside_16_bits_keeps_its_own(implementation, of):
    """ALiBi: at a distance of 100 a bfloat16 is good to 1/2, and the next key looks as near as this one."""
    query, key, value, d_out, _ = make_inputs(of, 1, 20, 60, 2, 2, 16)
    bias = np.float32(100.0 - 0.125 * np.arange(60))[None, None, None] + np.zeros((1, 2, 20, 1), np.float32)
    result = implementation(query, key, value, d_out, bias=bias)
    expected = specification(query, key, value, d_out, bias=bias)
    assert result.d_bias.dtype == np.float32
    assert_gradients_close(result, expected, {"float16": 2e-3, "bfloat16": 2e-2}[of])
    # The gradient of the bias was never rounded to 16 bits.
    assert np.abs(result.d_bias - expected.d_bias).max() <= 5e-5 * np.abs(expected.d_bias).max()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_a_bias_hides_from_rows_of_their_own_never_counts(implementation, dtype, value):
    """Nine rows leave lanes of the kernels' tiles without one: no mask speaks of those."""
    query, key, value_, d_out, d_lse = make_inputs(dtype, 1, 9, 40, 2, 2, 8)
    bias = np.zeros((1, 1, 9, 40), BIAS[dtype])
    bias[..., 0] = -np.inf
    expected = implementation(query, key, value_, d_out, d_lse, bias=bias)
    key[:, 0], value_[:, 0] = value, value
    result = implementation(query, key, value_, d_out, d_lse, bias=bias)
    for (name, array), (_, wanted) in zip(result.items(), expected.items()):
        np.testing.assert_array_equal(array, wanted, name)


@pytest.mark.parametrize("seqlen_q", [1, 20])
def test_long_sums_keep_their_digits(implementation, seqlen_q):
    if isinstance(implementation, Cuda) or not implementation.name.startswith(("core", "fused", "jax-fused")):
        pytest.skip("sums of the composite are the framework's, the reference is float64, and CUDA's blocks run one by one")
    seqlen_k = 2**17
    query, key = np.zeros((1, seqlen_q, 1, 8), np.float32), np.zeros((1, seqlen_k, 1, 8), np.float32)
    value = np.ones((1, seqlen_k, 1, 8), np.float32)
    query[..., 0], key[:, 0, :, 0] = 1.0, 1.0  # equal scores but one: nothing cancels the errors of the sum
    result = implementation(query, key, value, np.zeros_like(query), scale=1.0)
    exact = np.log(np.float64(seqlen_k - 1) + np.e)
    np.testing.assert_allclose(result.lse, exact, rtol=0, atol=4 * np.spacing(np.float32(exact)))
    np.testing.assert_allclose(result.out, 1.0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 40, 1), (1, 1, 1, 512), (2, 4, 1, 1), (2, 1, 40, 1)])
def test_the_gradient_of_a_bias_that_many_scores_share(implementation, shape):
    """All weights are 1/512 and the gradient of a score is that of lse / 512: equal terms, whose roundings do not cancel."""
    if isinstance(implementation, Cuda) or not implementation.name.startswith(("core", "fused", "jax-fused")):
        pytest.skip("sums of the composite are the framework's, the reference is float64, and CUDA's plain chain is a limit in docs/guides/gpu.md")
    batch, num_heads, seqlen_q, seqlen_k = 2, 4, 40, 512
    query, d_out = np.zeros((2, batch, seqlen_q, num_heads, 8), np.float32)
    key = value = np.zeros((batch, seqlen_k, num_heads, 8), np.float32)
    d_lse = np.full((batch, num_heads, seqlen_q), 0.7, np.float32)
    result = implementation(query, key, value, d_out, d_lse, bias=np.zeros(shape, np.float32))
    scores = batch * num_heads * seqlen_q * seqlen_k
    exact = np.float64(d_lse[0, 0, 0]) / seqlen_k * scores / np.prod(shape)
    np.testing.assert_allclose(result.d_bias, np.full(shape, exact), rtol=3e-7, atol=0)


def test_halves_below_the_normal_ones_survive_flushing():
    """TensorFlow runs kernels with subnormals flushed; those of float16 are ordinary numbers of float32."""
    program = """
import numpy as np, tensorflow as tf, attn_ops
value = np.float16([6e-8, 3e-6, 6e-5, -6e-8, 1.0, 0.0, 6.2e-5, -3e-6])[None, :, None, None]
zero = np.zeros((1, 8, 1, 1), np.float16)
for i in range(8):
    seen = np.arange(8) == i
    out = attn_ops.scaled_dot_product_attention(zero, zero, value, mask=seen[None, None, None], implementation="fused")
    assert (out.numpy() == value[:, i : i + 1]).all(), (i, out.numpy().ravel(), value.ravel())
"""
    done = run(program, ATTN_OPS_ISA="generic")
    assert done.returncode == 0, done.stderr[-2000:]

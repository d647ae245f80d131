"""The numbers that CUDA's forward leaves for its backward, the ends of the range, and what 16 bits must not lose.

On the stand-in driver, or with `pytest -m gpu` on a device. What is right comes from float64.
"""

import ml_dtypes
import numpy as np
import pytest
from attn_ops.kernels import cuda

import cuda_run
from cases import DTYPES, TOLERANCES, make_inputs
from cuda_arrays import Array
from implementations import Cuda, Result, specification
from plain_formula import plain_attention

KINDS = ("float32", "float16", "bfloat16")
LARGEST = float(np.finfo(np.float32).max)


@pytest.fixture(params=(True, False), ids=("", "without-decode"))
def attend(cuda, on_device, request):
    return Cuda(on_device, request.param)


def relative(found, wanted):
    return np.abs(found.astype(np.float64) - wanted).max() / np.abs(wanted).max()


# -------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(5, 700), (70, 90)])  # the first is decoded, in parts
def test_maximum_and_sum_of_a_row(attend, seqlen_q, seqlen_k):
    inputs = make_inputs("float32", 2, seqlen_q, seqlen_k, 2, 1, 16)
    bias = np.random.default_rng(1).standard_normal((1, 2, seqlen_q, seqlen_k)).astype(np.float32)
    lengths = np.array([seqlen_k, 0])  # the second batch entry sees no key
    attend(*inputs[:4], bias=bias, key_value_seq_lengths=lengths)  # chooses the kernel
    options = {"layout": "BSHD", "bias": bias, "key_value_seq_lengths": lengths}
    found = cuda_run.run_all(*inputs, options)["statistics"]
    q, k = (x.astype(np.float64) for x in inputs[:2])
    scores = np.einsum("bihd,bjd->bhij", q, k[:, :, 0]) / 4 + bias
    maximum = scores.max(-1)
    np.testing.assert_allclose(found[0, ..., 0], maximum[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[0, ..., 1], np.exp(scores - maximum[..., None]).sum(-1)[0], rtol=1e-5)
    np.testing.assert_array_equal(found[1], 0)


@pytest.mark.parametrize("seqlen_q", [3, 70])
def test_lse_need_not_be_written(attend, seqlen_q):
    query, key, value, d_out, _ = make_inputs("float16", 1, seqlen_q, 90, 2, 2, 16)
    expected = attend(query, key, value, d_out)
    arrays = [Array(x) for x in (query, key, value)]
    out, statistics = Array.unwritten(query.shape, "float16"), Array.unwritten((1, 2, seqlen_q, 2), "float32")
    kept = cuda_run.launch(cuda.Forward(*(x.view for x in arrays), out.view, statistics.view))
    np.testing.assert_array_equal(out.numpy(), expected.out)
    found = statistics.numpy().astype(np.float64)
    np.testing.assert_allclose(found[..., 0] + np.log(found[..., 1]), expected.lse, rtol=1e-6, atol=1e-6)
    del kept


# ------------------------------------------------------------------------------------------ the ends of the range


def with_bias(attend, dtype, row, seqlen_q=70, bias_dtype=np.float32):
    """A bias of the same row for every query: the result, and the inputs."""
    inputs = make_inputs(dtype, 1, seqlen_q, len(row), 2, 2, 16)
    bias = np.broadcast_to(np.asarray(row, np.float64), (1, 1, seqlen_q, len(row))).astype(bias_dtype)
    return attend(*inputs[:4], bias=bias), inputs


@pytest.mark.parametrize("seqlen_q", [3, 70])
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("bias", [-LARGEST, LARGEST, -3e38, 3e38, -1e30])
def test_the_same_large_bias_everywhere_gives_the_mean(attend, dtype, bias, seqlen_q):
    """Whatever is added to it, a float32 so large stays what it is."""
    result, (_, _, value, d_out, _) = with_bias(attend, dtype, np.full(75, bias), seqlen_q)
    mean = np.broadcast_to(value.astype(np.float64).mean(1, keepdims=True), result.out.shape)
    assert relative(result.out, mean) < TOLERANCES[dtype]
    np.testing.assert_allclose(result.lse, bias, rtol=1e-6)
    d_value = np.broadcast_to(d_out.astype(np.float64).sum(1, keepdims=True) / 75, value.shape)
    assert relative(result.dv, d_value) < TOLERANCES[dtype]
    for name, array in result.items():
        assert np.isfinite(array.astype(np.float64)).all(), name


@pytest.mark.parametrize("seqlen_q", [3, 70])
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("low, high", [(-LARGEST, LARGEST), (-LARGEST, -1e38), (0.0, 2.5e38), (-LARGEST, 0.0)])
def test_the_largest_bias_wins(attend, dtype, low, high, seqlen_q):
    row = np.full(75, low)
    row[40] = high
    result, (_, _, value, d_out, _) = with_bias(attend, dtype, row, seqlen_q)
    expected = np.broadcast_to(value[:, 40:41].astype(np.float64), result.out.shape)
    assert relative(result.out, expected) < TOLERANCES[dtype]
    d_value = np.zeros(value.shape)
    d_value[:, 40] = d_out.astype(np.float64).sum(1)
    assert relative(result.dv, d_value) < TOLERANCES[dtype]
    for name, array in result.items():
        assert np.isfinite(array.astype(np.float64)).all(), name


@pytest.mark.parametrize("seqlen_q", [3, 70])
@pytest.mark.parametrize("bias", [LARGEST, -LARGEST])
def test_sums_beyond_the_range_stay_at_its_end(attend, bias, seqlen_q):
    """Products of 1e38 for ten keys and -1e38 for ten, beside a bias at the end of the range: the former win."""
    query, key, value, d_out, _ = make_inputs("float32", 1, seqlen_q, 20, 1, 1, 4)
    query[:], key[:] = 0, 0
    query[..., 0], key[..., 0] = 1e19, 1e19
    key[:, 10:, :, 0] *= -1
    result = attend(query, key, value, d_out, bias=np.full((1, 1, 1, 20), bias, np.float32), scale=1.0)
    mean = np.broadcast_to(value[:, :10].astype(np.float64).mean(1, keepdims=True), result.out.shape)
    assert relative(result.out, mean) < 1e-5
    np.testing.assert_allclose(result.lse, min(1e38 + bias, LARGEST), rtol=1e-6)


@pytest.mark.parametrize("seqlen_q", [3, 70])
@pytest.mark.parametrize("dtype", KINDS)
def test_the_largest_numbers_behind_a_mask_do_not_count(attend, dtype, seqlen_q):
    """Rounded to the 11 bits of TF32 they would be infinite, and 0 times them NaN."""
    query, key, value, d_out, d_lse = make_inputs(dtype, 1, seqlen_q, 20, 2, 1, 16)
    mask = np.arange(20).reshape(1, 1, 1, 20) < 13
    expected = attend(query, key, value, d_out, d_lse, mask=mask)
    largest = np.array(ml_dtypes.finfo(key.dtype).max, key.dtype)
    key[:, 13:], value[:, 13:] = largest, -largest
    result = attend(query, key, value, d_out, d_lse, mask=mask)
    for (name, found), (_, wanted) in zip(result.items(), expected.items(), strict=True):
        np.testing.assert_array_equal(found.astype(np.float32), wanted.astype(np.float32), name)


@pytest.mark.parametrize("seqlen_q", [3, 70])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, 0xFFC00000])
def test_every_nan_stays_one(attend, bits, seqlen_q):
    """The first is the one that a GPU makes: rounding it in its bits would make a zero of it."""
    query, key, value, d_out, _ = make_inputs("float32", 1, seqlen_q, 20, 2, 2, 16)
    key[0, 7, 1, 3] = np.uint32(bits).view(np.float32)
    result = attend(query, key, value, d_out)
    assert np.isnan(result.out[:, :, 1]).all() and np.isfinite(result.out[:, :, 0]).all()
    assert np.isnan(result.dq[:, :, 1]).all() and np.isnan(result.dv[:, :, 1]).all()


@pytest.mark.parametrize("seqlen_q", [3, 70])
@pytest.mark.parametrize("large", [3.4e38, 3.4022e38, LARGEST])
def test_the_largest_numbers_are_not_infinite(attend, large, seqlen_q):
    """As key and as value: of TF32 the last two would be infinite."""
    query, key, value, d_out, _ = make_inputs("float32", 1, seqlen_q, 20, 1, 1, 16)
    query[:], key[:] = 0, 0
    query[..., 0], key[:, 7, :, 0], value[:, 7, :, 2] = 1e-36, large, -large
    result = attend(query, key, value, d_out, scale=1.0)
    np.testing.assert_allclose(result.out[..., 2], -large, rtol=1e-5)
    np.testing.assert_allclose(result.lse, 1e-36 * large, rtol=1e-3)


def test_what_tf32_makes_infinite_behind_a_mask_does_not_count(attend):
    query, key, value, d_out, _ = make_inputs("float32", 1, 70, 20, 2, 1, 16)
    mask = np.arange(20).reshape(1, 1, 1, 20) < 13
    attend(query, key, value, d_out, mask=mask)  # chooses the kernel
    options = {"layout": "BSHD", "mask": mask}
    expected = cuda_run.run(query, key, value, d_out, None, options, allow_tf32=True)
    key[:, 13:], value[:, 13:] = LARGEST, -LARGEST
    found = cuda_run.run(query, key, value, d_out, None, options, allow_tf32=True)
    for name in ("out", "lse", "dq", "dk", "dv"):
        np.testing.assert_array_equal(found[name], expected[name], name)


@pytest.mark.parametrize("seqlen_q", [3, 70])
@pytest.mark.parametrize("scale", [1e3, 1e38])
def test_a_scale_makes_no_infinity_of_finite_scores(attend, scale, seqlen_q):
    """bfloat16 goes as far as float32: 1e36 1e3 is beyond."""
    query, key, value, d_out, _ = make_inputs("bfloat16", 1, seqlen_q, 75, 2, 2, 16)
    query[:], key[:] = 0, 0
    query[..., 0], key[..., 0] = 1e18, 1e18
    result = attend(query, key, value, d_out, scale=scale)
    mean = np.broadcast_to(value.astype(np.float64).mean(1, keepdims=True), result.out.shape)
    assert relative(result.out, mean) < TOLERANCES["bfloat16"]


@pytest.mark.parametrize("dtype", KINDS)
def test_minus_infinity_beside_the_end_of_the_range_still_hides(attend, dtype):
    row = np.full(75, -LARGEST)
    row[10:] = -np.inf
    result, (_, _, value, _, _) = with_bias(attend, dtype, row)
    mean = np.broadcast_to(value[:, :10].astype(np.float64).mean(1, keepdims=True), result.out.shape)
    assert relative(result.out, mean) < TOLERANCES[dtype]
    assert (result.dv[:, 10:] == 0).all() and (result.dk[:, 10:] == 0).all()


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_rows_far_from_zero_have_gradients_as_the_plain_formula(attend, shift):
    query, key, value, d_out, _ = make_inputs("float32", 1, 70, 150, 2, 2, 64)
    bias = (shift + np.random.default_rng(1).standard_normal((1, 1, 1, 150))).astype(np.float32)
    found = attend(query, key, value, d_out, bias=bias)
    expected = specification(query, key, value, d_out, bias=bias)
    plain = plain_attention(query, key, value, np.float32, d_out, bias=bias)
    for name, formula in zip(("out", "dq", "dk", "dv"), plain, strict=True):
        wanted = getattr(expected, name)
        assert relative(getattr(found, name), wanted) <= 2 * relative(formula, wanted) + 1e-6, name


@pytest.mark.parametrize("seqlen_q, head_dim", [(3, 64), (70, 64), (70, 160)])
def test_backward_multiplies_as_forward_did(attend, seqlen_q, head_dim):
    """Scores of thousands, which TF32 has to a few units only: with other products than forward's, weights would be
    anything. With a gradient of ones, dv sums them up."""
    query, key, value, _, _ = make_inputs("float32", 1, seqlen_q, 150, 2, 2, head_dim)
    attend(query, key, value, np.ones(query.shape, np.float32))  # chooses the kernel
    ones = np.ones((1, seqlen_q, 2, head_dim), np.float32)
    options = {"layout": "BSHD"}
    result = Result(**cuda_run.run(1000 * query, key, value, ones, None, options, allow_tf32=True))
    np.testing.assert_allclose(result.dv[..., 0].sum(1), seqlen_q, rtol=2e-3)


# ------------------------------------------------------------------------------------------------------ 16 bits


BESIDE = {
    "plain": {},
    "dropout": {"dropout_rate": 0.2, "dropout_seed": 3},
    "cap": {"logits_soft_cap": 1e5},
    "sinks": {"sinks": np.array([-2.0, 3.0], np.float32)},
    "mask": {"mask": np.random.default_rng(4).random((1, 1, 192, 192)) < 0.7},
}


@pytest.mark.wide(8)
@pytest.mark.parametrize("dtype, largest", [("bfloat16", 1e4), ("float16", 2e4)])
@pytest.mark.parametrize("spread", [0, 0.01])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192])
@pytest.mark.parametrize("options", BESIDE)
def test_massive_activations(attend, dtype, largest, spread, head_dim, options):
    """A channel of one head's keys that is huge, and the same or nearly so in all of them, cancels in the gradient of
    the queries, which must be as good as the plain formula's in float32, rounded at the end."""
    rng = np.random.default_rng(0)
    query, key, value, d_out, _ = make_inputs(dtype, 1, 192, 192, 2, 2, head_dim)
    key[:, :, 0, 3] = -largest * (1 + spread * rng.standard_normal((1, 192)))
    wide = [x.astype(np.float32) for x in (query, key, value, d_out)]
    visible = np.tri(192, dtype=bool)
    formula = plain_attention(*wide[:3], np.float32, wide[3], visible=visible)[1].astype(query.dtype)
    right = specification(query, key, value, d_out, is_causal=True).dq
    found = attend(query, key, value, d_out, is_causal=True, **BESIDE[options]).dq
    expected = specification(query, key, value, d_out, is_causal=True, **BESIDE[options]).dq
    for head in range(2):
        error = relative(found[:, :, head], expected[:, :, head])
        limit = relative(formula[:, :, head], right[:, :, head])
        most = (2 if options == "plain" or head_dim == 64 else 3) * limit  # the formula's is of no options
        assert error <= most, f"head {head}: {error:.2g}, and the formula's is {limit:.2g}"


@pytest.mark.wide(2)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 128, 192])
@pytest.mark.parametrize("size", ["small", "smaller from row to row", "larger from key to key", "of lse alone"])
def test_gradients_of_any_size(attend, dtype, head_dim, size):
    """float16 has 11 bits from 2^-14 to 2^16 only: gradients of scores are brought there, whatever their size is."""
    query, key, value, d_out, d_lse = (x.astype(np.float64) for x in make_inputs(dtype, 1, 70, 200, 2, 2, head_dim))
    d_lse[:] *= size == "of lse alone"
    if size == "small":
        key, d_out = 64 * key, d_out * 2.0**-13
    elif size == "smaller from row to row":
        key, d_out = 64 * key, d_out * 2.0 ** (-np.arange(70) / 6)[None, :, None, None]
    elif size == "larger from key to key":
        value *= 2.0 ** (np.arange(200) / 14 - 9)[None, :, None, None]
    else:
        d_out[:] = 0
    query, key, value, d_out = (x.astype(DTYPES[dtype]) for x in (query / 64, key, value, d_out))
    found = attend(query, key, value, d_out, d_lse.astype(np.float32))
    expected = specification(query, key, value, d_out, d_lse)
    for row in range(0, 70, 23):
        error = relative(found.dq[:, row], expected.dq[:, row])
        assert error < TOLERANCES[dtype] / 6, f"row {row}: {error:.2g}"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("seqlen_q", [3, 70])
def test_a_float32_bias_keeps_its_bits(attend, dtype, seqlen_q):
    """Long distances of ALiBi: 16 bits have them to 2 or 16 units only."""
    inputs = make_inputs(dtype, 1, seqlen_q, 150, 2, 2, 16)
    bias = (-3000 + 0.03125 * np.arange(150, dtype=np.float32))[None, None, None]
    bias = np.broadcast_to(bias, (1, 2, seqlen_q, 150)).copy()
    found, expected = attend(*inputs, bias=bias), specification(*inputs, bias=bias)
    assert found.d_bias.dtype == np.float32
    np.testing.assert_allclose(found.lse, expected.lse, rtol=1e-6)
    assert relative(found.d_bias, expected.d_bias) < 1e-4
    for name in ("out", "dq", "dk", "dv"):
        assert relative(getattr(found, name), getattr(expected, name)) < TOLERANCES[dtype] / 4, name


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shape", [(1, 2, 20, 30), (1, 1, 1, 30), (2, 1, 20, 1)])
def test_the_gradient_of_a_bias_has_its_dtype(attend, dtype, shape):
    inputs = make_inputs(dtype, 2, 20, 30, 2, 2, 16)
    bias = np.random.default_rng(1).standard_normal(shape).astype(DTYPES[dtype])
    expected = specification(*inputs, bias=bias)
    for of in {DTYPES[dtype], np.dtype("float32")}:
        found = attend(*inputs, bias=bias.astype(of)).d_bias
        assert found.dtype == of and found.shape == shape
        assert relative(found, expected.d_bias) < (1e-4 if of == np.float32 else TOLERANCES[dtype] / 4)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("seqlen_q", [3, 70])
def test_a_score_computed_again_is_the_same(attend, dtype, seqlen_q):
    """Of one key, whose weight is 1 whatever the score: where scores are 10^20, off by its rounding it would be 0."""
    query, key, value, d_out, _ = make_inputs(dtype, 1, seqlen_q, 1, 2, 2, 40)
    large = 1e10 if dtype == "float32" else 100
    result = attend(query * DTYPES[dtype].type(large), key * DTYPES[dtype].type(large), value, d_out, None, scale=1.0)
    wanted = d_out.astype(np.float64).sum(1, keepdims=True)
    np.testing.assert_allclose(result.dv.astype(np.float64), wanted, atol=TOLERANCES[dtype] * seqlen_q)

"""Numbers at their limits: huge logits, 16-bit ranges, infinities in the bias, threads, and merging by lse."""

import functools

import numpy as np
import pytest

from cases import DTYPES, check, make_inputs
from implementations import isas, run_core, specification


@pytest.mark.parametrize("of", ["float32", "float64", "bfloat16", "float16"])
def test_probabilities_recomputed_from_huge_logits_do_not_exceed_1(implementation, of):
    # With one row and a gradient of ones, the gradient of the values is the probabilities. lse of logits this large
    # is rounded by more than 1, so that exp(score - lse) alone can be anything.
    for seed in range(3):
        query, key, value, d_out, _ = make_inputs(of, 2, 1, 150, 4, 4, 64, 8, seed=seed)
        size = {"float16": 100, "bfloat16": 3e4, "float32": 3e4, "float64": 1e9}[of]
        query, key = (query * DTYPES[of].type(size)), (key * DTYPES[of].type(size))
        result = implementation(query, key, value, np.ones_like(d_out))
        for name, array in result.items():
            assert np.isfinite(array.astype(np.float64)).all(), name
        assert result.dv.astype(np.float64).max() <= 1
        assert (result.dv >= 0).all()


def test_large_logits_keep_their_gradients(implementation):
    query, key, value, d_out, _ = make_inputs("float32", 2, 40, 50, 4, 2, 16)
    query = 300 * query  # logits up to several thousand, where a float32 is good to a thousandth
    result = implementation(query, key, value, d_out)
    expected = specification(query, key, value, d_out)
    for name, array in result.items():
        wanted = getattr(expected, name)
        assert np.abs(array - wanted).max() <= 1e-2 * np.abs(wanted).max(), name


def test_float16_logits_beyond_its_range(implementation):
    # 100 * 100 * 64 = 640 000, and float16 ends at 65 504: equal logits, so the output is the mean of the values.
    query, key, value, d_out, _ = make_inputs("float16", 1, 3, 10, 2, 2, 64, 4)
    query[:], key[:] = 100, 100
    result = implementation(query, key, value, d_out, scale=1.0)
    mean = value.astype(np.float64).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(result.out.astype(np.float64), np.broadcast_to(mean, result.out.shape), atol=2e-3)


def test_logits_far_below_zero_are_no_mask(implementation):
    # Keras hides by adding -1e9, and so loses rows whose every logit is lower. Here they are all -3e10, and equal.
    query, key, value, d_out, _ = make_inputs(num_kv_heads=4)
    bias = np.full((1, 1, 1, 17), -3e10, np.float32)
    result = implementation(np.zeros_like(query), key, value, d_out, bias=bias)
    mean = value.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(result.out, np.broadcast_to(mean, result.out.shape), atol=1e-6)
    np.testing.assert_allclose(result.lse, -3e10, rtol=1e-6)


@pytest.mark.parametrize("place, value", [("bias", np.nan), ("bias", np.inf), ("d_out", np.nan), ("d_lse", np.nan)])
def test_what_is_not_finite_elsewhere_propagates(implementation, place, value):
    inputs = make_inputs()
    bias = np.zeros((2, 4, 13, 17), np.float32)
    target = {"bias": bias, "d_out": inputs[3], "d_lse": inputs[4]}[place]
    target[(1, 2, 3, 4)[: target.ndim]] = value
    check(implementation, inputs=inputs, bias=bias)


def test_partial_results_merge_by_lse_differentiably(implementation):
    query, key, value, d_out, _ = make_inputs("float64" if "float64" in implementation.dtypes else "float32")
    d_out64 = d_out.astype(np.float64)
    parts = [(key[:, :6], value[:, :6]), (key[:, 6:], value[:, 6:])]
    halves = [implementation(query, k, v, np.zeros_like(d_out)) for k, v in parts]
    lse = np.logaddexp(halves[0].lse, halves[1].lse)
    shares = [np.exp(h.lse - lse).swapaxes(1, 2)[..., None] for h in halves]
    merged = sum(share * h.out for share, h in zip(shares, halves))
    whole = specification(query, key, value, d_out)
    tolerance = 1e-12 if query.dtype == np.float64 else 1e-5
    np.testing.assert_allclose(merged, whole.out, rtol=tolerance, atol=tolerance)

    # d merged / d lse of a part: its share times what it differs from the whole by.
    dq = 0
    for (k, v), share, half in zip(parts, shares, halves):
        d_part = (share * d_out64).astype(query.dtype)
        d_lse = (share * (half.out - merged) * d_out64).sum(-1).swapaxes(1, 2).astype(half.lse.dtype)
        dq = dq + implementation(query, k, v, d_part, d_lse).dq
    np.testing.assert_allclose(dq, whole.dq, rtol=100 * tolerance, atol=tolerance)


FEATURES = dict(
    window=(150, 30),
    causal_alignment="bottom_right",
    dropout_rate=0.1,
    dropout_seed=np.array([1, 2], np.int64),
    key_value_seq_lengths=np.array([257, 100], np.int32),
)


def thread_inputs(dtype="float32"):
    inputs = make_inputs(dtype, 2, 190, 257, 6, 2, 40)
    return inputs, np.random.default_rng(0).standard_normal((1, 6, 1, 257)).astype(dtype)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("seqlen_q", [1, 190])
def test_any_number_of_threads_gives_the_same_bits(isa, seqlen_q):
    inputs, bias = thread_inputs()
    inputs = inputs[0][:, :seqlen_q], *inputs[1:3], inputs[3][:, :seqlen_q], inputs[4][:, :, :seqlen_q]
    results = [
        run_core(isa, *inputs, {"bias": bias, **FEATURES}, num_threads=num_threads) for num_threads in (1, 2, 3, 5, 16)
    ]
    for result in results[1:]:
        for (name, array), (_, first) in zip(result.items(), results[0].items()):
            np.testing.assert_array_equal(array, first, name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_op_gives_the_bits_of_the_kernels(dtype):
    import tensorflow as tf
    from attn_ops import scaled_dot_product_attention

    (query, key, value, d_out, d_lse), bias = thread_inputs(dtype)
    core = run_core(None, query, key, value, d_out, d_lse, {"bias": bias, **FEATURES})
    inputs = [tf.constant(x) for x in (query, key, value, bias)]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        results = scaled_dot_product_attention(
            *inputs[:3], bias=inputs[3], return_lse=True, implementation="fused", **FEATURES
        )
    gradients = tape.gradient(results, inputs, output_gradients=[tf.constant(d_out), tf.constant(d_lse)])
    for (name, array), found in zip(core.items(), (*results, *gradients)):
        np.testing.assert_array_equal(found, array, name)


def test_runs_repeat_bit_for_bit():
    (query, key, value, d_out, d_lse), bias = thread_inputs()
    run = functools.partial(run_core, None, query, key, value, d_out, d_lse, {"bias": bias, **FEATURES})
    first = run()
    for _ in range(5):
        for (name, array), (_, wanted) in zip(run().items(), first.items()):
            np.testing.assert_array_equal(array, wanted, name)


def test_a_sink_of_minus_infinity_is_nothing_in_a_row_of_nan(implementation):
    query, key, value, d_out, _ = make_inputs(num_kv_heads=2)
    key[0, 3, 0] = np.nan  # heads 0 and 1 see it
    result = implementation(query, key, value, d_out, sinks=np.array([-np.inf, 0.5, -np.inf, 0.5], "float32"))
    assert np.isnan(result.out[0, :, :2]).all()
    assert (result.d_sinks[[0, 2]] == 0).all() and np.isfinite(result.d_sinks[3]) and result.d_sinks[3] != 0

"""The specification itself: a loop over single rows, finite differences, and the edges it promises."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from attn_ops import T5RelativeBias, masks, reference
from attn_ops.call import philox
from position_buckets import mesh_tensorflow_bucket
from reference_cases import CASES, Case, differentiable


each_case = pytest.mark.parametrize("case", CASES, ids=repr)


def one_row_at_a_time(case):
    """out and lse from sums over the keys each row sees: no select, no broadcast, no matrix."""
    options = dict(case.options)
    bhsd = options.pop("layout", "BSHD") == "BHSD"
    q, k, v = (x if bhsd else x.swapaxes(1, 2) for x in case.inputs.values())
    batch, num_heads, seqlen_q, seqlen_k = case.scores_shape
    bias = np.broadcast_to(options.get("bias", np.zeros((1, 1, 1, 1))), case.scores_shape)
    mask = masks.combined(
        options.get("mask"),
        is_causal=options.get("is_causal", False),
        causal_alignment=options.get("causal_alignment", "top_left"),
        window=options.get("window"),
        query_lengths=options.get("query_seq_lengths"),
        key_lengths=options.get("key_value_seq_lengths"),
    )
    offset = options.get("query_offset")
    visible = mask.materialize(seqlen_q, seqlen_k, query_offset=offset)
    visible = np.broadcast_to(visible, case.scores_shape)
    cap, table, sinks = (options.get(name) for name in ("logits_soft_cap", "relative_bias", "sinks"))
    slopes = np.broadcast_to(options.get("alibi_slopes", np.zeros(num_heads)), (batch, num_heads))
    rate, seed = options.get("dropout_rate", 0.0), options.get("dropout_seed", 0)
    kept = philox.keep(*(seed if isinstance(seed, tuple) else (seed, 0)), *case.scores_shape, rate)
    out = np.zeros((batch, num_heads, seqlen_q, v.shape[-1]))
    lse = np.full((batch, num_heads, seqlen_q), -np.inf)
    for b, h, i in np.ndindex(lse.shape):
        g = h // (num_heads // k.shape[1])
        keys = [j for j in range(seqlen_k) if visible[b, h, i, j] and bias[b, h, i, j] != -np.inf]
        scale = options.get("scale", q.shape[-1] ** -0.5)
        own = i
        if offset is not None:
            own = i + (offset if np.ndim(offset) == 0 else offset[b])
        elif mask.bottom_right:
            length_q, length_k = (
                n if given is None else given[b]
                for n, given in ((seqlen_q, mask.query_lengths), (seqlen_k, mask.key_lengths))
            )
            own = i + length_k - length_q
        s = {}
        for j in keys:
            x = scale * float(q[b, h, i] @ k[b, g, j])
            x = x if cap is None else cap * np.tanh(x / cap)
            x += slopes[b, h] * (j - own) + bias[b, h, i, j] + from_table(table, j - own, h)
            if x != -np.inf:
                s[j] = x
        sink = np.exp(-np.inf if sinks is None else sinks[h])
        if not s and sink == 0:
            continue
        keys = list(s)
        lse[b, h, i] = np.log(sum(np.exp(x) for x in s.values()) + sink)
        for j in keys:
            if kept[b, h, i, j]:
                out[b, h, i] += np.exp(s[j] - lse[b, h, i]) / (1 - rate) * v[b, g, j]
    return out if bhsd else out.swapaxes(1, 2), lse


def from_table(table, distance, head):
    """What a relative_bias adds at a distance."""
    if table is None:
        return 0.0
    if isinstance(table, T5RelativeBias):
        bucket = mesh_tensorflow_bucket(distance, table.bidirectional, len(table.table), table.max_distance)
        return table.table[bucket, head]
    reach = len(table) // 2
    return table[reach + max(-reach, min(reach, distance)), head]


@each_case
def test_forward_is_the_sum_over_visible_keys(case):
    out, lse = reference.attention(**case.inputs, **case.options)
    expected_out, expected_lse = one_row_at_a_time(case)
    np.testing.assert_allclose(out, expected_out, rtol=0, atol=1e-13)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-13)


@pytest.mark.wide(3)
@each_case
def test_gradients_are_finite_differences(case):
    inputs, options, of_caller = differentiable(case)

    def loss(inputs):
        out, lse = reference.attention(**of_caller(inputs), **options)
        return np.sum(case.d_out * out) + np.sum(case.d_lse * np.where(lse == -np.inf, 0.0, lse))

    gradients = reference.attention_gradients(**of_caller(inputs), **options, d_out=case.d_out, d_lse=case.d_lse)
    assert (gradients[3] is None) == ("bias" not in inputs)
    gradients = [gradient for gradient in gradients if gradient is not None]
    assert len(gradients) == len(inputs)
    step = 1e-5
    for (name, x), gradient in zip(inputs.items(), gradients):
        assert gradient.shape == x.shape
        for index in np.ndindex(x.shape):
            if x[index] == -np.inf:
                assert gradient[index] == 0, f"{name}{index} hides, so it has no gradient"
                continue
            above, below = x.copy(), x.copy()
            above[index] += step
            below[index] -= step
            slope = (loss({**inputs, name: above}) - loss({**inputs, name: below})) / (2 * step)
            assert abs(gradient[index] - slope) < 1e-8 * max(1, abs(slope)), f"{name}{index}"


@each_case
def test_weights(case):
    options = dict(case.options)
    rate, seed = options.pop("dropout_rate", 0.0), options.pop("dropout_seed", 0)
    p = reference.attention_weights(case.inputs["query"], case.inputs["key"], **options)
    out, lse = reference.attention(**case.inputs, **case.options)
    sinks = np.full(lse.shape[1], -np.inf) if "sinks" not in options else options["sinks"]
    sums = np.where(lse == -np.inf, 0.0, 1.0 - np.exp(sinks[:, None] - np.where(lse == -np.inf, 0.0, lse)))
    np.testing.assert_allclose(p.sum(axis=-1), sums, atol=1e-13)
    # With dropout applied afterwards they are what multiplies the values.
    kept = philox.keep(*(seed if isinstance(seed, tuple) else (seed, 0)), *case.scores_shape, rate) / (1 - rate)
    bhsd = options.get("layout") == "BHSD"
    v = case.inputs["value"] if bhsd else case.inputs["value"].swapaxes(1, 2)
    v = np.repeat(v, case.scores_shape[1] // v.shape[1], axis=1)
    np.testing.assert_allclose((p * kept) @ v, out if bhsd else out.swapaxes(1, 2), atol=1e-13)


def test_dropout_offset_and_seed_both_count():
    case = CASES[0]
    drops = [
        reference.attention(**case.inputs, dropout_rate=0.5, dropout_seed=seed)[0] for seed in (1, (1, 0), (1, 1), 2)
    ]
    np.testing.assert_array_equal(drops[0], drops[1])
    assert not np.array_equal(drops[0], drops[2]) and not np.array_equal(drops[0], drops[3])


def test_dropout_is_unbiased():
    case = CASES[0]
    kept_all, lse = reference.attention(**case.inputs)
    runs = [reference.attention(**case.inputs, dropout_rate=0.5, dropout_seed=seed) for seed in range(2000)]
    assert all(np.array_equal(run[1], lse) for run in runs)
    outs = np.stack([run[0] for run in runs])
    error_of_mean = outs.std(axis=0) / np.sqrt(len(outs))
    assert (np.abs(outs.mean(axis=0) - kept_all) < 6 * error_of_mean).all()


def gradients(inputs, **options):
    d_out = np.ones(inputs["query"].shape[:3] + inputs["value"].shape[3:])
    return reference.attention_gradients(**inputs, d_out=d_out, **options)


HIDERS = {
    "lengths": {"key_value_seq_lengths": [3, 3]},
    "mask": {"mask": np.array([True, True, True, False, False])[None, None, None]},
    "bias": {"bias": np.array([0, 0, 0, -np.inf, -np.inf])[None, None, None]},
    "causal": {"window": (None, -1), "mask": masks.window(right=0), "is_causal": True},
}


@pytest.mark.parametrize("hidden_by", HIDERS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_hidden_keys_and_values_never_count(hidden_by, poison):
    case = Case("poison", HIDERS[hidden_by], seqlen_q=3)
    poisoned = {name: x.copy() for name, x in case.inputs.items()}
    poisoned["key"][:, 3:] = poison
    poisoned["value"][:, 3:] = poison
    for found, expected in zip(
        (*reference.attention(**poisoned, **case.options), *gradients(poisoned, **case.options)[:3]),
        (*reference.attention(**case.inputs, **case.options), *gradients(case.inputs, **case.options)[:3]),
    ):
        np.testing.assert_array_equal(found, expected)


def test_poison_stays_with_the_rows_that_see_it():
    case = Case("poison", {"is_causal": True}, seqlen_q=5)
    for name in ("query", "key", "value"):
        poisoned = {n: x.copy() for n, x in case.inputs.items()}
        poisoned[name][0, 2, 1, 0] = np.nan
        out, lse = reference.attention(**poisoned, is_causal=True)
        seen_by = [2] if name == "query" else [2, 3, 4]
        bad_rows = np.isnan(out).any(axis=-1)
        assert np.argwhere(bad_rows).tolist() == [[0, i, 1] for i in seen_by], name
        assert np.isnan(lse[0, 1]).tolist() == [name != "value" and i in seen_by for i in range(5)]
        assert not np.isnan(lse[1]).any() and not np.isnan(lse[0, 0]).any()
        # Keys that a poisoned row does not see keep their gradients.
        dk = gradients(poisoned, is_causal=True)[1]
        assert not np.isnan(dk[:, :, 0]).any() and not np.isnan(dk[1]).any()
        last_seen = 2 if name == "query" else 4
        assert np.isnan(dk[0, : last_seen + 1, 1]).any(axis=-1).all()
        assert not np.isnan(dk[0, last_seen + 1 :, 1]).any()


def test_rows_that_see_nothing_are_zero_whatever_comes_in():
    case = Case("empty", {})
    mask = np.ones((1, 1, 4, 1), bool)
    mask[0, 0, 1] = False
    for x in (case.inputs["query"], case.d_out):
        x[:, 1] = np.nan
    case.d_lse[:, :, 1] = np.nan
    out, lse = reference.attention(**case.inputs, mask=mask)
    assert (out[:, 1] == 0).all() and (lse[:, :, 1] == -np.inf).all()
    dq, dk, dv, _ = reference.attention_gradients(**case.inputs, mask=mask, d_out=case.d_out, d_lse=case.d_lse)
    assert (dq[:, 1] == 0).all()
    assert np.isfinite(dk).all() and np.isfinite(dv).all() and np.abs(dk).min() > 0


def test_scores_of_minus_infinity_make_an_empty_row():
    query, key, value = np.full((1, 1, 1, 1), np.inf), np.full((1, 2, 1, 1), -1.0), np.ones((1, 2, 1, 1))
    out, lse = reference.attention(query, key, value)
    assert out.item() == 0 and lse.item() == -np.inf
    out, lse = reference.attention(query, -key, value)
    assert np.isnan(out.item()) and np.isnan(lse.item())


def test_huge_logits():
    query, key = np.full((1, 1, 1, 1), 1e4), np.array([1e3, 1e3 - 1, -1e3]).reshape(1, 3, 1, 1)
    value = np.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
    out, lse = reference.attention(query, key, value, scale=1.0)
    assert out.item() == 1.0 and lse.item() == 1e7
    for gradient in reference.attention_gradients(query, key, value, np.ones((1, 1, 1, 1)), scale=1.0)[:3]:
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}])
def test_empty_extents(sizes):
    case = Case("empty", {"is_causal": True}, **sizes)
    out, lse = reference.attention(**case.inputs, is_causal=True)
    assert out.shape == case.d_out.shape and (out == 0).all() and (lse == -np.inf).all()
    for gradient, x in zip(gradients(case.inputs, is_causal=True), case.inputs.values()):
        assert gradient.shape == x.shape and (gradient == 0).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_narrow_inputs_are_widened(dtype):
    inputs = {name: x.astype(dtype) for name, x in CASES[0].inputs.items()}
    wide = {name: x.astype(np.float64) for name, x in inputs.items()}
    for found, expected in zip(reference.attention(**inputs), reference.attention(**wide)):
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, expected)


BAD = [
    (ValueError, r"reference\.attention: rank must be 4 .*\(2, 4, 6\)", {"query": np.ones((2, 4, 6))}),
    (ValueError, r"num_heads \(3\) must be a multiple of num_kv_heads \(2\)", {"query": np.ones((2, 4, 3, 3))}),
    (ValueError, r"must agree in batch, .*\(2, 4, 2, 4\)", {"query": np.ones((2, 4, 2, 4))}),
    (ValueError, "head_dim must be at least 1", {name: np.ones((2, 6, 2, 0)) for name in ("query", "key", "value")}),
    (ValueError, r"must agree in batch, .*\(2, 6, 2, 3\)", {"value": np.ones((2, 6, 2, 3))}),
    (ValueError, r"bias of shape \(3, 1, 1, 5\) does not broadcast to", {"bias": np.zeros((3, 1, 1, 5))}),
    (ValueError, r"bias of shape \(1, 1, 4, 6\) does not broadcast to", {"bias": np.zeros((4, 6))}),
    (ValueError, r"does not broadcast to \[batch, num_heads, 4, 5\]", {"mask": np.ones((1, 1, 4, 6), bool)}),
    (ValueError, r"mask of shape \(3, 1, 4, 5\) does not broadcast to", {"mask": np.ones((3, 1, 1, 1), bool)}),
    (TypeError, r"boolean: mask must be boolean .*, got float64; pass .* as bias=", {"mask": np.zeros((4, 5))}),
    (ValueError, r"key_lengths must be in \[0, 5\], got \[6 1\]", {"key_value_seq_lengths": [6, 1]}),
    (ValueError, r"query_lengths must be in \[0, 4\], got \[-1  1\]", {"query_seq_lengths": [-1, 1]}),
    (ValueError, r"dropout_rate=0\.5 needs a dropout_seed", {"dropout_rate": 0.5}),
    (ValueError, r"rate must be in \[0, 1\), got 1\.0", {"dropout_rate": 1.0, "dropout_seed": 1}),
    (ValueError, r"layout must be 'BSHD' or 'BHSD', got 'SBHD'", {"layout": "SBHD"}),
    (ValueError, r"causal_alignment must be one of .*, got 'left'", {"causal_alignment": "left"}),
    (TypeError, r"query must hold floats or integers, got complex128", {"query": np.ones((2, 4, 2, 3), complex)}),
    (TypeError, r"value must hold floats or integers, got bool", {"value": np.ones((2, 5, 2, 3), bool)}),
]


@pytest.mark.parametrize("error, message, change", BAD, ids=[message for _, message, _ in BAD])
def test_bad_input(error, message, change):
    with pytest.raises(error, match=message):
        reference.attention(**{**CASES[0].inputs, **change})


def test_bad_cotangents():
    case = CASES[0]
    with pytest.raises(ValueError, match="d_out must be shaped like out"):
        reference.attention_gradients(**case.inputs, d_out=case.d_out[:1])
    with pytest.raises(ValueError, match="d_lse must be shaped like lse"):
        reference.attention_gradients(**case.inputs, d_out=case.d_out, d_lse=case.d_lse[..., :1])


def test_needs_no_tensorflow():
    program = "import sys, attn_ops.reference, attn_ops.masks, attn_ops.call.philox; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_weight_of_a_large_sink():
    """Four keys as large as the sink leave it a fifth: whatever a sum of 1e300 and log 5 is."""
    q, k = np.zeros((1, 1, 1, 2)), np.zeros((1, 4, 1, 2))
    d_out, value = np.ones((1, 1, 1, 2)), np.ones((1, 4, 1, 2))
    for size in (0.0, 1e17, 1e300):
        options = {"bias": np.full((1, 1, 1, 4), size), "sinks": np.array([size])}
        *_, d_sinks = reference.attention_gradients(q, k, value, d_out, **options)
        np.testing.assert_allclose(d_sinks, [-0.2 * 0.8 * 2], rtol=1e-12)

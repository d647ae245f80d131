"""ONNX's operator Attention: the cases of its own tests (onnx 1.23.2, backend/test/case/node/attention.py: opsets 23 to 25),
by their names, and what it computes, in NumPy from the operator's specification.

Where rows stand: at key i, after a cache of `past` keys at i + past, and with `nonpad` keys at i + nonpad - seqlen_q.
The output of scores is compared where it is that of the softmax (`scores` 3); we do not give the scores before that.
"""

import numpy as np
import pytest

import attn_ops

from cases import DTYPES, TOLERANCES

CASES = {
    "4d": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8)),
    "23_boolmask_fullymasked_row_nan_robustness": dict(q=(1, 2, 2, 8), k=(1, 2, 2, 8), visible=(2, 2)),
    "23_fullymasked_qk_matmul_output_mode3_zero": dict(q=(1, 2, 2, 8), k=(1, 2, 2, 8), visible=(2, 2), scores=3),
    "24_fullymasked_qk_matmul_output_mode3_zero": dict(q=(1, 2, 2, 8), k=(1, 2, 2, 8), visible=(2, 2), scores=3),
    "24_qk_matmul_output_mode3_softmax_precision": dict(q=(1, 2, 2, 8), k=(1, 2, 2, 8), visible=(2, 2), dtype='float16', scores=3),
    "3d": dict(q=(2, 4, 24), k=(2, 6, 24), heads=(3, 3)),
    "3d_attn_mask": dict(q=(2, 4, 24), k=(2, 6, 24), mask=(4, 6), heads=(3, 3)),
    "3d_causal": dict(q=(2, 4, 24), k=(2, 6, 24), heads=(3, 3), causal=True),
    "3d_causal_bf16": dict(q=(2, 4, 24), k=(2, 6, 24), heads=(3, 3), causal=True, dtype='bfloat16'),
    "3d_diff_heads_sizes": dict(q=(2, 4, 24), k=(2, 6, 24), v=(2, 6, 30), heads=(3, 3)),
    "3d_diff_heads_sizes_attn_mask": dict(q=(2, 4, 24), k=(2, 6, 24), v=(2, 6, 30), mask=(4, 6), heads=(3, 3)),
    "3d_diff_heads_sizes_causal": dict(q=(2, 4, 24), k=(2, 6, 24), v=(2, 6, 30), heads=(3, 3), causal=True),
    "3d_diff_heads_sizes_scaled": dict(q=(2, 4, 24), k=(2, 6, 24), v=(2, 6, 30), heads=(3, 3), scale=0.01),
    "3d_diff_heads_sizes_softcap": dict(q=(2, 4, 24), k=(2, 6, 24), v=(2, 6, 30), heads=(3, 3), softcap=3.0),
    "3d_diff_heads_with_past_and_present": dict(q=(2, 4, 24), k=(2, 6, 24), v=(2, 6, 30), mask=(4, 18), past=12, heads=(3, 3)),
    "3d_gqa": dict(q=(2, 4, 72), k=(2, 6, 24), heads=(9, 3)),
    "3d_gqa_attn_mask": dict(q=(2, 4, 72), k=(2, 6, 24), mask=(4, 6), heads=(9, 3)),
    "3d_gqa_causal": dict(q=(2, 4, 72), k=(2, 6, 24), heads=(9, 3), causal=True),
    "3d_gqa_scaled": dict(q=(2, 4, 72), k=(2, 6, 24), heads=(9, 3), scale=0.01),
    "3d_gqa_softcap": dict(q=(2, 4, 72), k=(2, 6, 24), heads=(9, 3), softcap=3.0),
    "3d_gqa_with_past_and_present": dict(q=(2, 4, 72), k=(2, 6, 24), mask=(4, 18), past=12, heads=(9, 3)),
    "3d_local_window": dict(q=(2, 4, 32), k=(2, 6, 8), v=(2, 6, 6), heads=(4, 1), causal=True, window=(2, -1)),
    "3d_scaled": dict(q=(2, 4, 24), k=(2, 6, 24), heads=(3, 3), scale=0.01),
    "3d_softcap": dict(q=(2, 4, 24), k=(2, 6, 24), heads=(3, 3), softcap=3.0),
    "3d_transpose_verification": dict(q=(1, 2, 12), k=(1, 2, 12), heads=(3, 3)),
    "3d_with_past_and_present": dict(q=(2, 4, 24), k=(2, 6, 24), mask=(4, 18), past=12, heads=(3, 3)),
    "3d_with_past_and_present_qk_matmul": dict(q=(2, 4, 24), k=(2, 6, 24), mask=(4, 18), past=12, heads=(3, 3), scores=0),
    "3d_with_past_and_present_qk_matmul_bias": dict(q=(2, 4, 24), k=(2, 6, 24), mask=(4, 18), past=12, heads=(3, 3), scores=2),
    "3d_with_past_and_present_qk_matmul_softcap": dict(q=(2, 4, 24), k=(2, 6, 24), mask=(4, 18), past=12, heads=(3, 3), softcap=2.0, scores=1),
    "3d_with_past_and_present_qk_matmul_softmax": dict(q=(2, 4, 24), k=(2, 6, 24), mask=(4, 18), past=12, heads=(3, 3), scores=3),
    "4d_causal_nonpad_attn_mask_composition": dict(q=(2, 2, 3, 8), k=(2, 2, 6, 8), visible=(2, 1, 3, 6), nonpad=(4, 5), causal=True),
    "4d_causal_nonpad_batch_prefill": dict(q=(3, 2, 2, 8), k=(3, 2, 6, 8), nonpad=(4, 5, 6), causal=True),
    "4d_causal_nonpad_continued_prefill": dict(q=(1, 2, 2, 8), k=(1, 2, 4, 8), nonpad=(4,), causal=True),
    "4d_causal_nonpad_negative_offset_structural_empty": dict(q=(1, 2, 4, 8), k=(1, 2, 4, 8), nonpad=(2,), causal=True),
    "4d_causal_with_past_and_present": dict(q=(2, 3, 4, 8), k=(2, 3, 4, 8), past=3, causal=True),
    "4d_diff_heads_mask4d_padded_kv": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), v=(2, 3, 6, 10), mask=(2, 3, 4, 4), nonpad=(3, 4)),
    "4d_gqa_causal_nonpad_decode": dict(q=(2, 4, 1, 8), k=(2, 2, 8, 8), nonpad=(8, 5), causal=True),
    "4d_gqa_causal_nonpad_decode_fp16": dict(q=(2, 4, 1, 8), k=(2, 2, 8, 8), nonpad=(8, 5), causal=True, dtype='float16'),
    "4d_attn_mask_3d": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), mask=(2, 1, 4, 6)),
    "4d_attn_mask_3d_causal": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), mask=(2, 1, 4, 6), causal=True),
    "4d_attn_mask_4d": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), mask=(2, 3, 4, 6)),
    "4d_attn_mask_4d_causal": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), mask=(2, 3, 4, 6), causal=True),
    "4d_attn_mask": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), mask=(4, 6)),
    "4d_attn_mask_bool": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), visible=(4, 6)),
    "4d_attn_mask_bool_4d": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), visible=(2, 3, 4, 6)),
    "4d_attn_mask_causal_bf16": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), mask=(2, 1, 4, 6), causal=True, dtype='bfloat16'),
    "bidirectional_window": dict(q=(1, 1, 5, 1), k=(1, 1, 5, 1), window=(1, 2)),
    "4d_causal": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), causal=True),
    "4d_causal_bf16": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), causal=True, dtype='bfloat16'),
    "causal_boolmask_nan_robustness": dict(q=(1, 2, 2, 8), k=(1, 2, 2, 8), visible=(2, 2), causal=True),
    "4d_causal_fp16": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), causal=True, dtype='float16'),
    "4d_causal_padded_kv_bf16": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), mask=(2, 3, 4, 4), nonpad=(3, 4), causal=True, dtype='bfloat16'),
    "4d_diff_heads_sizes": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), v=(2, 3, 6, 10)),
    "4d_diff_heads_sizes_attn_mask": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), v=(2, 3, 6, 10), mask=(4, 6)),
    "4d_diff_heads_sizes_causal": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), v=(2, 3, 6, 10), causal=True),
    "4d_diff_heads_sizes_scaled": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), v=(2, 3, 6, 10), scale=0.01),
    "4d_diff_heads_sizes_softcap": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), v=(2, 3, 6, 10), softcap=2.0),
    "4d_diff_heads_with_past_and_present": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), v=(2, 3, 6, 10), mask=(4, 18), past=12),
    "4d_diff_heads_with_past_and_present_mask3d": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), v=(2, 3, 6, 10), mask=(2, 1, 4, 18), past=12),
    "4d_diff_heads_with_past_and_present_mask4d": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), v=(2, 3, 6, 10), mask=(2, 3, 4, 18), past=12),
    "4d_fp16": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), dtype='float16'),
    "4d_gqa": dict(q=(2, 9, 4, 8), k=(2, 3, 6, 8)),
    "4d_gqa_attn_mask": dict(q=(2, 9, 4, 8), k=(2, 3, 6, 8), mask=(4, 6)),
    "4d_gqa_causal": dict(q=(2, 9, 4, 8), k=(2, 3, 6, 8), causal=True),
    "4d_gqa_scaled": dict(q=(2, 9, 4, 8), k=(2, 3, 6, 8), scale=0.01),
    "4d_gqa_softcap": dict(q=(2, 9, 4, 8), k=(2, 3, 6, 8), softcap=2.0),
    "4d_gqa_with_past_and_present": dict(q=(2, 9, 4, 8), k=(2, 3, 6, 8), mask=(4, 18), past=12),
    "4d_gqa_with_past_and_present_fp16": dict(q=(2, 9, 4, 8), k=(2, 3, 6, 8), mask=(4, 18), past=12, dtype='float16'),
    "local_window": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), causal=True, window=(2, -1)),
    "local_window_default": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), window=(-1, -1)),
    "local_window_ext_cache_float16_mask": dict(q=(2, 3, 4, 8), k=(2, 3, 8, 8), mask=(1, 8), nonpad=(6, 7), causal=True, window=(2, -1), dtype='float16'),
    "local_window_ext_cache_rank2_mask": dict(q=(2, 3, 4, 8), k=(2, 3, 8, 8), mask=(1, 8), nonpad=(6, 7), causal=True, window=(2, -1)),
    "local_window_ext_cache_rank3_head_mask": dict(q=(2, 3, 4, 8), k=(2, 3, 8, 8), mask=(3, 4, 8), nonpad=(6, 7), causal=True, window=(2, -1)),
    "local_window_ext_cache_rank4_batch_mask": dict(q=(2, 3, 4, 8), k=(2, 3, 8, 8), mask=(2, 1, 4, 8), nonpad=(6, 7), causal=True, window=(2, -1)),
    "local_window_gqa_rank4_mask": dict(q=(2, 4, 4, 8), k=(2, 2, 6, 8), v=(2, 2, 6, 6), visible=(2, 4, 4, 6), causal=True, softcap=2.0, window=(2, -1), scores=3),
    "local_window_rank1_boolean_mask": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), visible=(6,), causal=True, window=(2, -1)),
    "local_window_with_past": dict(q=(2, 3, 4, 8), k=(2, 3, 2, 8), past=8, causal=True, window=(2, -1)),
    "4d_padded_kv_bf16": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), mask=(2, 3, 4, 4), nonpad=(3, 4), dtype='bfloat16'),
    "4d_scaled": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), scale=0.01),
    "4d_softcap": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), softcap=2.0),
    "4d_softcap_neginf_mask": dict(q=(1, 1, 4, 8), k=(1, 1, 6, 8), mask=(4, 6), softcap=0.5),
    "4d_softcap_neginf_mask_poison": dict(q=(1, 1, 4, 8), k=(1, 1, 6, 8), mask=(4, 6), softcap=0.5),
    "4d_with_past_and_present": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), mask=(4, 18), past=12),
    "4d_with_past_and_present_qk_matmul": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), mask=(4, 18), past=12, scores=0),
    "4d_with_past_and_present_qk_matmul_bias": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), mask=(4, 18), past=12, scores=2),
    "4d_with_past_and_present_qk_matmul_bias_3d_mask": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), mask=(2, 1, 4, 18), past=12, scores=2),
    "4d_with_past_and_present_qk_matmul_bias_3d_mask_causal": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), mask=(2, 1, 4, 18), past=12, causal=True, scores=2),
    "4d_with_past_and_present_qk_matmul_bias_4d_mask": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), mask=(2, 3, 4, 18), past=12, scores=2),
    "4d_with_past_and_present_qk_matmul_bias_4d_mask_causal": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), mask=(2, 3, 4, 18), past=12, causal=True, scores=2),
    "4d_with_qk_matmul": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), scores=0),
    "4d_with_qk_matmul_bias": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), mask=(4, 6), scores=2),
    "4d_with_qk_matmul_softcap": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), mask=(4, 6), softcap=2.0, scores=1),
    "4d_with_qk_matmul_softmax": dict(q=(2, 3, 4, 8), k=(2, 3, 6, 8), mask=(4, 6), scores=3),
}  # fmt: skip


def drawn(name):
    """(query, key, value) of four axes, heads first, (past key, past value) or None, and the mask or None; as the case has
    them but for the numbers."""
    case = CASES[name]
    rng = np.random.default_rng(sorted(CASES).index(name))
    dtype = DTYPES[case.get("dtype", "float32")]

    def normal(shape, heads):
        x = rng.standard_normal(shape).astype(dtype)
        return x if len(shape) == 4 else x.reshape(*shape[:2], heads, -1).swapaxes(1, 2)

    heads = case.get("heads", (None, None))
    query, key = normal(case["q"], heads[0]), normal(case["k"], heads[1])
    value = normal(case.get("v", case["k"]), heads[1])
    past = None
    if "past" in case:
        past = [normal((*x.shape[:2], case["past"], x.shape[3]), None) for x in (key, value)]
    mask = None
    if "visible" in case:
        mask = rng.random(case["visible"]) < 0.7
        mask[(0,) * (mask.ndim - 1)] = mask.ndim == 1  # a row without keys
    elif "mask" in case:
        mask = rng.standard_normal(case["mask"]).astype(dtype)
    if "neginf" in name:
        mask[..., -2:] = -np.inf
        value[..., -2:, :] = 1000.0
    return (query, key, value), past, mask


def onnx_attention(case, query, key, value, past, mask):
    """(Y, the weights) in float64, both `[batch, heads, ...]`."""
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    batch, heads, rows, dim = query.shape
    position = np.zeros((batch, 1, 1, 1))
    if past is not None:
        key, value = (np.concatenate([old.astype(np.float64), x], 2) for old, x in zip(past, (key, value)))
        position += case["past"]
    keys = key.shape[2]
    own, there = np.arange(rows)[:, None], np.arange(keys)
    bias = np.zeros((batch, 1, rows, keys))
    if mask is not None:
        mask = np.where(mask, 0.0, -np.inf) if mask.dtype == bool else mask.astype(np.float64)
        missing = [(0, 0)] * (mask.ndim - 1) + [(0, keys - mask.shape[-1])]
        bias = bias + np.pad(mask, missing, constant_values=-np.inf)
    if "nonpad" in case:
        nonpad = np.array(case["nonpad"])[:, None, None, None]
        position = nonpad - rows
        bias = np.where(there < nonpad, bias, -np.inf)
    ahead = there - own - position
    left, right = case.get("window", (-1, -1))
    if case.get("causal"):
        bias = np.where(ahead <= 0, bias, -np.inf)
    bias = np.where(((ahead >= -left) | (left < 0)) & ((ahead <= right) | (right < 0)), bias, -np.inf)
    key, value = (np.repeat(x, heads // x.shape[1], 1) for x in (key, value))
    scores = case.get("scale", 1 / np.sqrt(dim)) * (query @ key.swapaxes(2, 3))
    if case.get("softcap"):
        scores = case["softcap"] * np.tanh(scores / case["softcap"])
    scores = scores + bias
    empty = (bias == -np.inf).all(-1, keepdims=True)  # rows that see no key have weights of 0
    weights = np.exp(scores - np.where(empty, 0, scores.max(-1, keepdims=True)))
    weights /= np.where(empty, 1, weights.sum(-1, keepdims=True))
    return weights @ value, weights


def arguments(case, query, key, value, past, mask):
    """The same call of ours. 3-D inputs go in as `[batch, seqlen, heads, dim]`."""
    given = {"scale": case.get("scale"), "logits_soft_cap": case.get("softcap"), "is_causal": case.get("causal", False)}
    given["window"] = case.get("window")
    if past is not None:
        key, value = (np.concatenate([old, x], 2) for old, x in zip(past, (key, value)))
        given["query_offset"] = case["past"]
    if "nonpad" in case:
        given["key_value_seq_lengths"] = np.array(case["nonpad"])
        given["causal_alignment"] = "bottom_right"
    if mask is not None:
        missing = [(0, 0)] * (mask.ndim - 1) + [(0, key.shape[2] - mask.shape[-1])]
        mask = np.pad(mask, missing, constant_values=False if mask.dtype == bool else -np.inf)
        given["mask" if mask.dtype == bool else "bias"] = mask[(None,) * (4 - mask.ndim)]
    given = {name: x for name, x in given.items() if x is not None}
    inputs = dict(query=query, key=key, value=value)
    if len(case["q"]) == 4:
        return inputs, {**given, "layout": "BHSD"}
    return {name: x.swapaxes(1, 2) for name, x in inputs.items()}, given


def check(name, module, **chosen):
    case = CASES[name]
    inputs, past, mask = drawn(name)
    expected, weights = onnx_attention(case, *inputs, past, mask)
    inputs, given = arguments(case, *inputs, past, mask)
    tolerance = TOLERANCES[case.get("dtype", "float32")]
    if module is attn_ops.reference:
        out = module.attention(**inputs, **given)[0]
    else:
        out = module.scaled_dot_product_attention(**inputs, **given, **chosen)
    out = np.asarray(out).astype(np.float64)
    out = out if len(case["q"]) == 4 else out.swapaxes(1, 2)
    np.testing.assert_allclose(out, expected, atol=tolerance * max(1, np.abs(expected).max()), rtol=0)
    if case.get("scores") == 3:
        found = np.asarray(module.attention_weights(inputs["query"], inputs["key"], **given, **chosen)).astype(np.float64)
        np.testing.assert_allclose(found, weights, atol=tolerance, rtol=0)


def test_all_of_them():
    assert len(CASES) == 93


@pytest.mark.parametrize("name", CASES)
def test_tensorflow(name):
    check(name, attn_ops)


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    check(name, attn_ops.reference)


@pytest.mark.wide(5)
@pytest.mark.parametrize("name", CASES)
def test_composite(name):
    check(name, attn_ops, implementation="composite")


@pytest.mark.wide(20)
@pytest.mark.parametrize("name", CASES)
def test_jax(name):
    import attn_ops.jax

    check(name, attn_ops.jax)

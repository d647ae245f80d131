"""Every feature of the attention, in every implementation, against the specification."""

import numpy as np
import pytest

from attn_ops import masks
from cases import check, make_inputs
from implementations import Cuda, specification


def test_plain(implementation, dtype):
    check(implementation, dtype, with_d_lse=False)


def test_gradient_through_lse(implementation, dtype):
    check(implementation, dtype)


def test_gradient_of_lse_alone(implementation, dtype):
    query, key, value, d_out, d_lse = make_inputs(dtype)
    check(implementation, dtype, inputs=(query, key, value, np.zeros_like(d_out), d_lse))


def test_value_dim_differs(implementation, dtype):
    check(implementation, dtype, head_dim=8, value_dim=5)


def test_scale(implementation, dtype):
    for scale in implementation.thin([0.3, -0.7, 0.0, 3, np.float32(0.1)]):
        check(implementation, dtype, scale=scale)


def test_mask_comes_after_a_scale_that_is_not_positive(implementation, dtype):
    # Hiding by a large negative score before scaling would make hidden keys equal or dominant here.
    for scale in (-1.0, 0.0):
        check(implementation, dtype, scale=scale, is_causal=True)


ALIGNMENTS = ("top_left", "bottom_right")


def test_causal(implementation, dtype):
    for alignment in ALIGNMENTS:
        for seqlen_q, seqlen_k in implementation.thin([(5, 12), (9, 9), (12, 5)]):
            check(
                implementation,
                dtype,
                seqlen_q=seqlen_q,
                seqlen_k=seqlen_k,
                is_causal=True,
                causal_alignment=alignment,
            )


def test_causal_rows_before_the_first_key(implementation, dtype):
    result, _ = check(implementation, dtype, seqlen_q=12, seqlen_k=5, is_causal=True, causal_alignment="bottom_right")
    assert (result.lse[:, :, :7] == -np.inf).all() and (result.out[:, :7] == 0).all()
    assert (result.dq[:, :7] == 0).all()


def test_window(implementation, dtype):
    windows = [(2, 1), (3, None), (None, 2), (0, 0), (-1, -1), (100, 100), (2**62, 2**63 - 1)]
    for alignment in ALIGNMENTS:
        for window in implementation.thin(windows):
            check(implementation, dtype, window=window, causal_alignment=alignment)


def test_causal_window(implementation, dtype):
    check(implementation, dtype, window=(3, 5), is_causal=True)


def test_window_beside_the_keys(implementation, dtype):
    for seqlen_q, seqlen_k, window in implementation.thin([(12, 4, (2, 0)), (3, 12, (1, 1))]):
        check(implementation, dtype, seqlen_q=seqlen_q, seqlen_k=seqlen_k, window=window)


def test_lengths(implementation, dtype):
    for query_lengths, key_lengths in implementation.thin([([5, 0], [17, 9]), ([13, 13], [17, 17]), ([13, 7], [0, 1])]):
        lengths = dict(
            query_seq_lengths=np.array(query_lengths, np.int32), key_value_seq_lengths=np.array(key_lengths, np.int32)
        )
        check(implementation, dtype, **lengths)
        for alignment in ALIGNMENTS:
            check(implementation, dtype, is_causal=True, causal_alignment=alignment, **lengths)


def test_key_lengths_alone(implementation, dtype):
    check(implementation, dtype, key_value_seq_lengths=np.array([3, 17], np.int32), window=(4, 4))


def test_layout_bhsd(implementation, dtype):
    check(implementation, dtype, layout="BHSD", value_dim=5, is_causal=True)


def test_grouped_heads(implementation, dtype):
    for num_heads, num_kv_heads in implementation.thin([(6, 2), (1, 1), (4, 4), (6, 1)]):
        check(implementation, dtype, num_heads=num_heads, num_kv_heads=num_kv_heads)


def random_mask(shape, seed=0):
    return np.random.default_rng(seed).random(shape) < 0.6


BROADCASTS = [
    (full_batch, full_heads, full_q, full_k)
    for full_batch in (False, True)
    for full_heads in (False, True)
    for full_q in (False, True)
    for full_k in (False, True)
]


def broadcast_shape(full):
    return tuple(n if f else 1 for n, f in zip((2, 4, 13, 17), full))


def test_boolean_mask_of_every_broadcast(implementation, dtype):
    for full in implementation.thin(BROADCASTS):
        check(implementation, dtype, mask=random_mask(broadcast_shape(full), seed=3))


def test_boolean_mask_of_lower_rank(implementation, dtype):
    for shape in implementation.thin([(13, 17), (2, 13, 17), (2, 1, 17), (1, 17)]):
        check(implementation, dtype, mask=random_mask(shape))


def test_several_boolean_masks(implementation, dtype):
    shapes = [(2, 1, 1, 17), (2, 1, 13, 1), (1, 4, 13, 17), (13, 17), (2, 4, 1, 17), (1, 1, 13, 17)]
    for number in implementation.thin([4, 2]):
        parts = [np.random.default_rng(i).random(s) < 0.9 for i, s in enumerate(shapes[:number])]
        check(implementation, dtype, mask=parts, is_causal=True)


def test_mask_object(implementation, dtype):
    segment_ids = np.repeat([[0, 1, 2], [0, 0, 1]], [5, 5, 3], axis=1)
    mask = masks.causal() & masks.segments(segment_ids, segment_ids) & masks.padding(key_lengths=np.array([13, 9]))
    check(implementation, dtype, seqlen_k=13, mask=mask)


def test_mask_object_meets_arguments(implementation, dtype):
    mask = masks.key_padding(random_mask((2, 17))) & masks.window(left=6)
    check(
        implementation,
        dtype,
        mask=mask,
        is_causal=True,
        query_seq_lengths=np.array([13, 4], np.int32),
    )


def test_bias_of_every_broadcast(implementation, dtype):
    rng = np.random.default_rng(1)
    for full in implementation.thin(BROADCASTS):
        check(implementation, dtype, bias=rng.standard_normal(broadcast_shape(full)).astype(dtype))


def test_bias_with_everything(implementation, dtype):
    check(
        implementation,
        dtype,
        bias=np.random.default_rng(2).standard_normal((1, 4, 13, 17)).astype(dtype),
        mask=random_mask((2, 1, 1, 17)),
        is_causal=True,
        causal_alignment="bottom_right",
        window=(9, None),
        query_seq_lengths=np.array([11, 13], np.int32),
        key_value_seq_lengths=np.array([17, 12], np.int32),
        scale=0.3,
        dropout_rate=0.2,
        dropout_seed=np.array([5, 1], np.int64),
    )


def test_bias_of_minus_infinity_hides(implementation, dtype):
    bias = np.where(random_mask((2, 1, 13, 17)), 0.5, -np.inf).astype(dtype)
    bias[0, 0, 4] = -np.inf
    result, _ = check(implementation, dtype, bias=bias)
    assert (result.lse[0, :, 4] == -np.inf).all() and (result.out[0, 4] == 0).all()
    assert (result.d_bias[bias == -np.inf] == 0).all()


def test_rows_that_see_nothing(implementation, dtype):
    mask = random_mask((2, 1, 13, 17))
    mask[0, 0, 2] = mask[1, 0, 12] = False
    result, _ = check(implementation, dtype, mask=mask)
    for b, i in ((0, 2), (1, 12)):
        assert (result.out[b, i] == 0).all() and (result.dq[b, i] == 0).all()
        assert (result.lse[b, :, i] == -np.inf).all()


def test_no_key_is_seen_at_all(implementation, dtype):
    result, _ = check(implementation, dtype, mask=np.zeros((1, 1, 1, 17), bool))
    for name in ("out", "dq", "dk", "dv"):
        assert (getattr(result, name) == 0).all(), name


def test_dropout_drops_what_the_reference_drops(implementation, dtype):
    seed = np.array([-(2**62) + 12345, 2**40 + 7], np.int64)
    for rate in implementation.thin([0.5, 0.1, 0.99]):
        check(implementation, dtype, dropout_rate=rate, dropout_seed=seed, is_causal=True)


def test_dropout_of_an_integer_seed(implementation, dtype):
    check(implementation, dtype, dropout_rate=0.3, dropout_seed=42)


def test_what_one_bias_hides_the_other_cannot_show(implementation):
    """A table and a bias, -inf in one where NaN or infinity is in the other."""
    if implementation.is_slow and not implementation.name.startswith("jax"):
        pytest.skip("the operations in graphs are those of eager calls")
    rng = np.random.default_rng(4)
    for garbage, seqlen_q in implementation.thin([(np.nan, 13), (np.inf, 13), (np.nan, 1), (np.inf, 1)]):
        table = rng.standard_normal((5, 4)).astype("float32")
        bias = rng.standard_normal((1, 4, seqlen_q, 17)).astype("float32")
        far_behind = np.arange(17) - np.arange(seqlen_q)[:, None] - 2 <= -2
        table[0], bias[..., far_behind] = -np.inf, garbage
        table[4, 1], bias[:, 1, :, ~far_behind[0]] = garbage, -np.inf
        result, _ = check(implementation, seqlen_q=seqlen_q, relative_bias=table, bias=bias, query_offset=2)
        for name, array in result.items():
            assert not np.isnan(array).any(), name


@pytest.mark.parametrize("hidden_by", ["lengths", "mask", "bias", "causal"])
def test_what_is_masked_never_counts_even_nan(implementation, dtype, hidden_by):
    seen = np.arange(17) < 9
    options = {
        "lengths": dict(key_value_seq_lengths=np.array([9, 5], np.int32)),
        "mask": dict(mask=seen[None, None, None]),
        "bias": dict(bias=np.where(seen, 0.0, -np.inf).astype(dtype)[None, None, None]),
        "causal": dict(is_causal=True),
    }[hidden_by]
    for poisoned in implementation.thin([("key", "value"), ("key",), ("value",)]):
        inputs = dict(zip(("query", "key", "value", "d_out", "d_lse"), make_inputs(dtype, seqlen_q=9)))
        for name in poisoned:
            inputs[name][:, 9:12] = np.array([np.nan, np.inf, -np.inf], dtype)[:, None, None]
            inputs[name][:, 12:] = np.nan
        result, _ = check(implementation, dtype, inputs=tuple(inputs.values()), **options)
        for name, array in result.items():
            assert not np.isnan(array).any(), f"{name}, with {poisoned} poisoned"
        assert (result.dk[:, 9:] == 0).all() and (result.dv[:, 9:] == 0).all()


def test_padded_queries_never_count_even_nan(implementation, dtype):
    query, key, value, d_out, d_lse = make_inputs(dtype)
    query[:, 10:] = np.nan
    d_out[:, 10:] = np.nan
    result, _ = check(
        implementation, dtype, inputs=(query, key, value, d_out, d_lse), query_seq_lengths=np.array([10, 3], np.int32)
    )
    assert (result.out[:, 10:] == 0).all() and (result.dq[:, 10:] == 0).all()


def test_what_is_not_finite_and_seen_propagates(implementation, dtype):
    names = ("query", "key", "value", "d_out", "d_lse")
    cases = [(name, value) for value in (np.nan, np.inf, -np.inf) for name in names[:3]]
    for name, value in implementation.thin(cases):
        inputs = dict(zip(names, make_inputs(dtype, seed=1)))
        inputs[name][1, 3, 1, 2] = value
        if isinstance(implementation, Cuda) and dtype == "float32" and name == "value" and np.isinf(value):
            # 3xTF32 may make NaN of an infinite gradient of a score, and of what is summed from it.
            found, wanted = (f(*inputs.values(), is_causal=True) for f in (implementation, specification))
            for (what, array), (_, expected) in zip(found.items(), wanted.items()):
                np.testing.assert_array_equal(np.isfinite(array), np.isfinite(expected), what)
        else:
            check(implementation, dtype, inputs=tuple(inputs.values()), is_causal=True)


def test_empty_dimensions(implementation, dtype):
    result, _ = check(implementation, dtype, seqlen_k=0)
    assert (result.out == 0).all() and (result.lse == -np.inf).all() and (result.dq == 0).all()
    for sizes in implementation.thin([dict(batch=0), dict(seqlen_q=0), dict(seqlen_q=0, seqlen_k=0)]):
        # A bias that all of the empty dimension would have shared: its gradient is an empty sum.
        bias = np.ones((1, 1, sizes.get("seqlen_q", 13), 1), dtype)
        result, _ = check(implementation, dtype, bias=bias, **sizes)
        assert (result.d_bias == 0).all()


def test_single_query_and_single_key(implementation, dtype):
    for seqlen_q, seqlen_k in implementation.thin([(1, 1), (1, 17), (13, 1)]):
        check(implementation, dtype, seqlen_q=seqlen_q, seqlen_k=seqlen_k)

"""Calls that are like one that was checked before: the same call comes out, and what is wrong stays wrong."""

import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from attn_ops.call import checked_before, precision
from attn_ops.call.attention_call import AttentionCall
from attn_ops.call.normalize import normalize
from attn_ops.tensorflow import xp


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(checked_before, "_options", {})


def call(*tensors, **given):
    return normalize(xp, "test", *tensors, **given)


def make(*shape, dtype="float32"):
    return tf.constant(np.random.default_rng(0).normal(size=shape), dtype)


REMEMBERED = [
    {},
    {"is_causal": True},
    {"scale": 0.5, "return_lse": True},
    {"layout": "BHSD", "logits_soft_cap": 30.0},
    {"dropout_rate": 0.0, "causal_alignment": "bottom_right", "is_causal": True},
]


@pytest.mark.parametrize("given", REMEMBERED, ids=str)
def test_what_is_recalled_is_what_was_checked(given):
    q, k = make(2, 3, 4, 8), make(2, 3, 4, 8)
    first = call(q, k, k, **given)
    assert len(checked_before._options) == 1
    others = make(2, 3, 4, 8), make(2, 3, 4, 8), make(2, 3, 4, 8)
    again = call(*others, **given)
    assert isinstance(again, AttentionCall) and again[3:] == first[3:]
    assert all(x is y for x, y in zip(again, others))


NOT_KEPT = [
    {"bias": np.zeros((1, 1, 3, 3), "float32")},
    {"mask": np.ones((1, 1, 3, 3), bool)},
    {"mask": attn_ops.masks.prefix(2)},
    {"query_seq_lengths": [1, 2]},
    {"dropout_rate": 0.5},
    {"query_offset": 1},
    {"sinks": np.zeros(4, "float32")},
    {"alibi_slopes": np.ones(4, "float32")},
    {"relative_bias": np.ones((3, 4), "float32")},
    {"window": (1, None)},
]


@pytest.mark.parametrize("given", NOT_KEPT, ids=lambda given: next(iter(given)))
def test_arrays_of_one_call_are_not_those_of_the_next(given):
    q = make(2, 3, 4, 8)
    call(q, q, q, **given)
    assert not checked_before._options


def test_tensors_that_were_changed_are_not_recalled():
    half, full, flat = make(2, 3, 4, 8, dtype="float16"), make(2, 3, 4, 8), make(2, 3, 8)
    for _ in range(2):
        assert call(half, full, full).query.dtype == tf.float32
        assert call(flat, flat, flat).query.shape.rank == 4
    assert not checked_before._options


@pytest.mark.parametrize(
    "right, wrong",
    [
        ({"is_causal": True}, {"is_causal": 1.0}),
        ({"dropout_rate": 0.0}, {"dropout_rate": False}),
        ({"scale": 1.0}, {"scale": float("inf")}),
        ({"layout": "BSHD"}, {"layout": "BHDS"}),
        ({"logits_soft_cap": 1.0}, {"logits_soft_cap": -1.0}),
    ],
    ids=str,
)
def test_what_equals_a_right_value_may_be_wrong(right, wrong):
    q = make(2, 3, 4, 8)
    call(q, q, q, **right)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError)):
            call(q, q, q, **wrong)


def test_other_shapes_and_dtypes_are_checked():
    q = make(2, 3, 4, 8)
    call(q, q, q)
    with pytest.raises(ValueError, match="head_dim"):
        call(q, make(2, 3, 4, 6), make(2, 3, 4, 6))
    with pytest.raises(TypeError, match="query"):
        call(tf.cast(q, tf.int32), tf.cast(q, tf.int32), tf.cast(q, tf.int32))


def test_the_precision_of_the_process_counts():
    q = make(2, 3, 4, 8)
    assert not call(q, q, q).allow_tf32
    precision.set_allow_tf32(True)
    try:
        assert call(q, q, q).allow_tf32
    finally:
        precision.set_allow_tf32(False)
    assert not call(q, q, q).allow_tf32


def test_the_warning_of_a_row_at_the_first_key_comes_again():
    q, k = make(1, 1, 2, 8), make(1, 5, 2, 8)
    for _ in range(2):
        with pytest.warns(UserWarning, match="bottom_right"):
            call(q, k, k, is_causal=True)


def test_tensors_of_graphs_with_unknown_extents_are_calls_of_their_own():
    seen = []

    @tf.function(input_signature=[tf.TensorSpec([None, 3, None, 8])])
    def function(q):
        seen.append(call(q, q, q))
        return attn_ops.scaled_dot_product_attention(q, q, q)

    q = make(2, 3, 4, 8)
    np.testing.assert_allclose(function(q), attn_ops.scaled_dot_product_attention(q, q, q), rtol=1e-6)
    assert seen[0].query.shape.as_list() == [None, 3, None, 8]


def test_there_is_an_end_to_what_is_kept(monkeypatch):
    monkeypatch.setattr(checked_before, "_LARGEST", 4)
    for rows in range(1, 12):
        q = make(1, rows, 1, 4)
        call(q, q, q)
        assert len(checked_before._options) <= 4

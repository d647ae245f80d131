"""The forms that arguments and results may take: rank 3, mixed dtypes, masks of several kinds, weights."""

import numpy as np
import pytest
import tensorflow as tf

from attn_ops import attention_weights, masks, reference, scaled_dot_product_attention
from attn_ops.tensorflow import xp
from attn_ops.call.normalize import normalize
from cases import make_inputs

both = pytest.mark.parametrize("chosen", ["fused", "composite"])


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
def test_rank_3_is_one_head(chosen, layout):
    query, key, value = make_inputs("float32", num_heads=1, num_kv_heads=1, value_dim=5)[:3]
    mask = np.random.default_rng(0).random((2, 13, 17)) < 0.7
    options = dict(mask=mask, is_causal=True, return_lse=True, implementation=chosen)
    out, lse = scaled_dot_product_attention(query[:, :, 0], key[:, :, 0], value[:, :, 0], layout=layout, **options)
    expected_out, expected_lse = reference.attention(query, key, value, mask=mask, is_causal=True)
    close(out, expected_out[:, :, 0])
    close(lse, expected_lse[:, 0])


def test_rank_3_gradient():
    inputs = [tf.constant(x[:, :, 0]) for x in make_inputs("float64", num_heads=1, num_kv_heads=1)[:3]]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        out = scaled_dot_product_attention(*inputs)
    assert [g.shape for g in tape.gradient(out, inputs)] == [x.shape for x in inputs]


def test_no_lse_unless_asked_for():
    out = scaled_dot_product_attention(*make_inputs()[:3])
    assert isinstance(out, tf.Tensor)


def in_the_other_order(x):
    return np.asarray(x).astype(np.asarray(x).dtype.newbyteorder())


ARRAYS = {
    "query": lambda of: {"query": of(make_inputs()[0])},
    "bias": lambda of: {"bias": of(np.float32([[0.5, -1, 2] * 5 + [0, 1]]))},
    "lengths": lambda of: {"query_seq_lengths": of([3, 5]), "key_value_seq_lengths": of([4, 17])},
    "query_offset": lambda of: {"query_offset": of([3, 1]), "is_causal": True},
    "seed": lambda of: {"dropout_rate": 0.5, "dropout_seed": of([3, 5])},
    "mask": lambda of: {"mask": masks.padding(key_lengths=of([4, 9])) & masks.prefix(of([2, 5]))},
    "ids": lambda of: {"mask": masks.segments(of([[0] * 6 + [3] * 7] * 2), of([[0] * 9 + [3] * 8] * 2), contiguous=True)},
    "packed": lambda of: {"mask": masks.packed(of([0, 5, 13]), of([0, 9, 17]))},
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", ARRAYS)
def test_the_other_order_of_bytes(name, traced):
    """In graphs TensorFlow takes such arrays of NumPy for other numbers, in silence."""

    def attend(of):
        arguments = dict(zip(("query", "key", "value"), make_inputs())) | ARRAYS[name](of)
        return scaled_dot_product_attention(**arguments)

    found = tf.function(lambda: attend(in_the_other_order))() if traced else attend(in_the_other_order)
    close(found, attend(lambda x: x))


F16, BF16, F32, F64 = "float16", "bfloat16", "float32", "float64"


@both
@pytest.mark.parametrize(
    "dtypes, common",
    [
        ((F16, F32, F32), F32),
        ((F16, BF16, F16), F32),
        ((BF16, BF16, F32), F32),
        ((F32, F64, F16), F64),
        ((BF16, BF16, BF16), BF16),
        ((F16, F16, F16), F16),
    ],
)
def test_mixed_dtypes_promote(chosen, dtypes, common):
    arrays = make_inputs("float32")[:3]
    inputs = [tf.cast(x, dtype) for x, dtype in zip(arrays, dtypes)]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        out, lse = scaled_dot_product_attention(*inputs, return_lse=True, implementation=chosen)
    assert out.dtype == common and lse.dtype == ("float64" if common == F64 else "float32")
    assert [g.dtype for g in tape.gradient(out, inputs)] == [tf.as_dtype(d) for d in dtypes]
    np.testing.assert_allclose(tf.cast(out, F64), reference.attention(*arrays)[0], atol=0.05)


@both
def test_bias_takes_the_common_dtype(chosen):
    query, key, value = (tf.cast(x, BF16) for x in make_inputs("float32")[:3])
    bias = tf.constant(np.random.default_rng(0).standard_normal((1, 1, 1, 17)), tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(bias)
        out = scaled_dot_product_attention(query, key, value, bias=bias, implementation=chosen)
    assert out.dtype == BF16 and tape.gradient(out, bias).dtype == F64


@both
def test_bias_of_lower_rank(chosen):
    query, key, value = make_inputs("float32")[:3]
    rng = np.random.default_rng(0)
    for shape, full in [((13, 17), (1, 1, 13, 17)), ((2, 13, 17), (2, 1, 13, 17)), ((2, 1, 17), (2, 1, 1, 17))]:
        bias = rng.standard_normal(shape).astype("float32")
        found = scaled_dot_product_attention(query, key, value, bias=bias, implementation=chosen)
        close(found, reference.attention(query, key, value, bias=bias.reshape(full))[0])


def test_lists_of_masks_nest_every_kind():
    query, key, value = make_inputs("float32")[:3]
    rng = np.random.default_rng(0)
    padding, dense, heads = rng.random((2, 17)) < 0.9, rng.random((13, 17)) < 0.9, rng.random((1, 4, 1, 17)) < 0.9
    mask = [masks.key_padding(padding), None, tf.constant(dense), heads, masks.window(5, 3) & masks.causal()]
    expected = reference.attention(
        query,
        key,
        value,
        mask=[padding[:, None, None], dense[None, None], heads],
        window=(5, 0),
    )[0]
    close(scaled_dot_product_attention(query, key, value, mask=mask), expected)


def test_nested_lists_of_python_values_are_one_mask():
    """Not a list of masks, one for each entry of the first axis."""
    query, key, value = make_inputs("float32")[:3]
    mask = np.random.default_rng(0).random((2, 1, 13, 17)) < 0.5
    expected = reference.attention(query, key, value, mask=mask)[0]
    for given in (mask.tolist(), [mask.tolist(), np.ones((1, 17), bool)]):
        close(scaled_dot_product_attention(query, key, value, mask=given), expected)
    np.testing.assert_array_equal(reference.attention(query, key, value, mask=mask.tolist())[0], expected)
    with pytest.raises(TypeError, match="scaled_dot_product_attention: mask: an array is needed, or lists that make one"):
        scaled_dot_product_attention(query, key, value, mask=[[True], [True, False]])


def test_more_masks_than_the_kernels_take_are_combined_in_the_last():
    parts = [np.random.default_rng(i).random((2, 1, 13, 17)) < 0.95 for i in range(7)]
    call = normalize(xp, "test", *make_inputs()[:3], mask=parts)
    assert len(call.masks) == 4
    np.testing.assert_array_equal(np.all(call.masks, axis=0), np.all(parts, axis=0))


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint8, np.uint64])
def test_lengths_of_any_integer_type(dtype):
    query, key, value = make_inputs("float32")[:3]
    lengths = np.array([9, 0], dtype)
    found = scaled_dot_product_attention(query, key, value, key_value_seq_lengths=lengths)
    close(found, reference.attention(query, key, value, key_value_seq_lengths=lengths.astype(int))[0])


def test_numbers_of_numpy_are_numbers():
    query, key, value = make_inputs("float32")[:3]
    found = scaled_dot_product_attention(
        query, key, value, scale=np.float64(0.3), window=(np.int32(3), np.int64(2)), dropout_rate=np.float32(0.0)
    )
    close(found, reference.attention(query, key, value, scale=0.3, window=(3, 2))[0])


WEIGHTS = {
    "plain": {},
    "causal": dict(is_causal=True, causal_alignment="bottom_right"),
    "everything": dict(
        bias=np.random.default_rng(0).standard_normal((1, 4, 13, 17)).astype("float32"),
        mask=np.random.default_rng(1).random((2, 1, 1, 17)) < 0.8,
        window=(6, 3),
        query_seq_lengths=np.array([13, 0], np.int32),
        key_value_seq_lengths=np.array([5, 17], np.int32),
        scale=0.4,
    ),
}


@both
@pytest.mark.parametrize("case", WEIGHTS)
def test_attention_weights(chosen, case):
    query, key, value = make_inputs("float32")[:3]
    expected = reference.attention_weights(query, key, **WEIGHTS[case])
    close(attention_weights(query, key, implementation=chosen, **WEIGHTS[case]), expected)
    _, lse = scaled_dot_product_attention(query, key, value, return_lse=True, implementation=chosen, **WEIGHTS[case])
    close(attention_weights(query, key, lse=lse, **WEIGHTS[case]), expected)


@both
def test_attention_weights_of_rank_3_and_of_bhsd(chosen):
    query, key = make_inputs("float32", num_heads=1, num_kv_heads=1)[:2]
    expected = reference.attention_weights(query, key)
    close(attention_weights(query[:, :, 0], key[:, :, 0], implementation=chosen), expected[:, 0])
    _, lse = scaled_dot_product_attention(query[:, :, 0], key[:, :, 0], key[:, :, 0], return_lse=True)
    close(attention_weights(query[:, :, 0], key[:, :, 0], lse=lse), expected[:, 0])
    query, key = (x.swapaxes(1, 2) for x in make_inputs("float32")[:2])
    close(
        attention_weights(query, key, layout="BHSD", implementation=chosen),
        reference.attention_weights(query, key, layout="BHSD"),
    )


@both
def test_attention_weights_are_differentiable(chosen):
    query, key = (tf.constant(x) for x in make_inputs("float64", 1, 3, 4, 2, 1, 3)[:2])

    def function(query, key):
        return tf.reduce_sum(attention_weights(query, key, is_causal=True, implementation=chosen) ** 2)

    theoretical, numeric = tf.test.compute_gradient(function, [query, key], delta=1e-5)
    for t, n in zip(theoretical, numeric):
        np.testing.assert_allclose(t, n, rtol=1e-7, atol=1e-8)

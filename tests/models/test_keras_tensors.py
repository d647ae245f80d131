"""scaled_dot_product_attention on KerasTensors and in Keras models."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from attn_ops import masks, reference, scaled_dot_product_attention
from cases import make_inputs


def symbols(query=(5, 4, 8), key=(7, 2, 8), value=(7, 2, 3), dtype="float32"):
    return [keras.Input(shape, dtype=dtype) for shape in (query, key, value)]


def test_shapes_and_dtypes():
    query, key, value = symbols()
    out = scaled_dot_product_attention(query, key, value)
    assert isinstance(out, keras.KerasTensor)
    assert (out.shape, out.dtype) == ((None, 5, 4, 3), "float32")
    out, lse = scaled_dot_product_attention(*symbols(dtype="bfloat16"), return_lse=True)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((None, 5, 4, 3), "bfloat16", (None, 4, 5), "float32")
    out, lse = scaled_dot_product_attention(*symbols(dtype="float64"), return_lse=True)
    assert (out.dtype, lse.dtype) == ("float64", "float64")


def test_shapes_of_other_layouts_and_ranks():
    bhsd = symbols((4, None, 8), (2, 7, 8), (2, 7, 3))
    out, lse = scaled_dot_product_attention(*bhsd, layout="BHSD", return_lse=True)
    assert (out.shape, lse.shape) == ((None, 4, None, 3), (None, 4, None))
    out, lse = scaled_dot_product_attention(*symbols((5, 8), (7, 8), (7, 3)), return_lse=True)
    assert (out.shape, lse.shape) == ((None, 5, 3), (None, 5))


def test_mixed_dtypes_promote():
    query, key, value = symbols()
    half = keras.Input((5, 4, 8), dtype="float16")
    assert scaled_dot_product_attention(half, key, value).dtype == "float32"
    brain = keras.Input((7, 2, 8), dtype="bfloat16")
    assert scaled_dot_product_attention(half, brain, keras.Input((7, 2, 3), dtype="float16")).dtype == "float32"


@pytest.mark.parametrize(
    "change, exception, message",
    [
        (dict(scale=float("nan")), ValueError, "scale must be finite"),
        (dict(dropout_rate=1.5), ValueError, r"dropout_rate must be in \[0, 1\)"),
        (dict(mask=np.ones([5, 7], np.float32)), TypeError, "mask must be boolean"),
        (dict(query=keras.Input((5, 3, 8))), ValueError, r"num_heads \(3\) must be a multiple of num_kv_heads \(2\)"),
        (dict(implementation="flash"), ValueError, "'flash'"),
        (dict(value=keras.Input((7, 2, 3), sparse=True)), TypeError, "value must be a dense tensor"),
    ],
)
def test_bad_input(change, exception, message):
    arguments = {**dict(zip(("query", "key", "value"), symbols())), **change}
    with pytest.raises(exception, match=f"scaled_dot_product_attention: .*{message}"):
        scaled_dot_product_attention(**arguments)


def model_with_everything():
    query, key, value = symbols()
    bias = keras.Input((4, 5, 7))
    padding = keras.Input((7,), dtype="bool")
    lengths = keras.Input((), dtype="int32")
    out, lse = scaled_dot_product_attention(
        query,
        key,
        value,
        bias=bias,
        mask=[masks.causal("bottom_right") & masks.key_padding(padding), np.arange(7)[None, None, None] != 4],
        scale=0.3,
        window=(4, None),
        causal_alignment="bottom_right",
        query_seq_lengths=lengths,
        dropout_rate=0.3,
        dropout_seed=(1, 2),
        return_lse=True,
    )
    return keras.Model([query, key, value, bias, padding, lengths], [out, lse])


def everything():
    """The inputs of that model, and what it should give."""
    query, key, value = make_inputs("float32", 2, 5, 7, 4, 2, 8, 3)[:3]
    rng = np.random.default_rng(0)
    bias = rng.standard_normal((2, 4, 5, 7)).astype("float32")
    padding = rng.random((2, 7)) < 0.8
    lengths = np.array([5, 3], np.int32)
    expected = reference.attention(
        query,
        key,
        value,
        bias=bias,
        mask=[masks.key_padding(padding), np.arange(7)[None, None, None] != 4],
        scale=0.3,
        is_causal=True,
        causal_alignment="bottom_right",
        window=(4, None),
        query_seq_lengths=lengths,
        dropout_rate=0.3,
        dropout_seed=(1, 2),
    )
    return [query, key, value, bias, padding, lengths], expected


def assert_everything(model):
    inputs, (out, lse) = everything()
    found_out, found_lse = model(inputs)
    np.testing.assert_allclose(found_out, out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found_lse, lse, rtol=1e-5, atol=1e-6)


def test_functional_model():
    assert_everything(model_with_everything())


def test_functional_model_saves_and_loads(tmp_path):
    path = str(tmp_path / "model.keras")
    model_with_everything().save(path)
    assert_everything(keras.models.load_model(path))


def test_attention_weights_in_a_functional_model(tmp_path):
    query, key, _ = symbols()
    padding, lengths = keras.Input((7,), dtype="bool"), keras.Input((), dtype="int32")
    bias = keras.Input((4, 5, 7))
    scale = keras.Input(batch_shape=())
    mask = [masks.causal() & masks.key_padding(padding), np.arange(7)[None, None, None] != 4]
    options = dict(bias=bias, mask=mask, window=(4, None), query_seq_lengths=lengths, scale=scale)
    weights = attn_ops.attention_weights(query, key, **options)
    assert (weights.shape, weights.dtype) == ((None, 4, 5, 7), "float32")
    assert attn_ops.attention_weights(*symbols(dtype="bfloat16")[:2]).dtype == "bfloat16"
    model = keras.Model([query, key, padding, lengths, bias, scale], weights)
    arrays = make_inputs("float32", 2, 5, 7, 4, 2, 8, 3)[:2]
    rng = np.random.default_rng(0)
    rest = [rng.random((2, 7)) < 0.8, np.array([5, 3]), rng.standard_normal((2, 4, 5, 7)).astype("float32"), np.float32(0.3)]
    expected = reference.attention_weights(
        *arrays,
        bias=rest[2],
        mask=[masks.causal() & masks.key_padding(rest[0]), np.arange(7)[None, None, None] != 4],
        window=(4, None),
        query_seq_lengths=rest[1],
        scale=0.3,
    )
    np.testing.assert_allclose(model([*arrays, *rest]), expected, rtol=1e-5, atol=1e-6)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded([*arrays, *rest]), expected, rtol=1e-5, atol=1e-6)


def test_attention_weights_by_the_lse_of_the_attention():
    query, key, value = symbols((4, None, 8), (2, 7, 8), (2, 7, 3))
    out, lse = scaled_dot_product_attention(query, key, value, layout="BHSD", return_lse=True)
    weights = attn_ops.attention_weights(query, key, layout="BHSD", lse=lse)
    assert weights.shape == (None, 4, None, 7)
    with pytest.raises(ValueError, match="attention_weights: lse must be what the attention returned, of shape"):
        attn_ops.attention_weights(query, key, layout="BHSD", lse=keras.Input((5, 4)))
    with pytest.raises(ValueError, match="attention_weights: query and key must have the same head_dim, got 8, 9"):
        attn_ops.attention_weights(query, keras.Input((2, 7, 9)), layout="BHSD")


def test_masks_of_keras_tensors_combine():
    """Segments, and lengths of both sides of an `&`."""
    query, key, value = symbols()
    ids = keras.Input((5,), dtype="int32"), keras.Input((7,), dtype="int32")
    lengths = keras.Input((), dtype="int32"), keras.Input((), dtype="int32")
    mask = masks.segments(*ids) & masks.padding(None, lengths[0]) & masks.padding(None, lengths[1])
    model = keras.Model([query, key, value, *ids, *lengths], scaled_dot_product_attention(query, key, value, mask=mask))
    arrays = make_inputs("float32", 2, 5, 7, 4, 2, 8, 3)[:3]
    rng = np.random.default_rng(0)
    rest = [rng.integers(0, 2, (2, 5)), rng.integers(0, 2, (2, 7)), np.array([7, 3]), np.array([5, 6])]
    exact = masks.segments(*rest[:2]) & masks.padding(None, np.minimum(*rest[2:]))
    expected = reference.attention(*arrays, mask=exact)[0]
    np.testing.assert_allclose(model([*arrays, *rest]), expected, rtol=1e-5, atol=1e-6)


def test_symbols_are_not_written_down():
    padding, start = keras.Input((7,), dtype="bool"), keras.Input((), dtype="int32")
    for mask, given in ((masks.key_padding(padding), {}), (masks.causal(), {"query_offset": start})):
        with pytest.raises(TypeError, match="Mask.materialize: a tensor of a Keras model .* has no values"):
            mask.materialize(5, 7, **given)


def test_structured_masks_of_keras_tensors(tmp_path):
    """Parts that hold symbols, arrays and numbers, and a function, in a model and in its file."""
    query, key, value = symbols()
    ids, length, cu = keras.Input((7,), dtype="int32"), keras.Input((), dtype="int32"), np.array([0, 2, 5])
    blocks = np.array([[True, False], [True, True], [False, True]])

    def mask_of(ids, length):
        return (
            masks.segments(ids[:, :5], ids)
            & masks.prefix(length)
            & masks.chunked(6)
            & masks.packed(cu, cu + [0, 1, 2])
            & masks.block_sparse(blocks, 2, 4)
            & masks.intervals([0, 0, 0, 1, 1], None)
            & masks.from_function(lambda b, h, q, k: q + 2 >= k)
        )

    out = scaled_dot_product_attention(query, key, value, mask=mask_of(ids, length), implementation="composite")
    model = keras.Model([query, key, value, ids, length], out)
    arrays = make_inputs("float32", 2, 5, 7, 4, 2, 8, 3)[:3]
    rest = [np.array([[1, 1, 1, 2, 2, 2, 2], [4, 4, 4, 4, 4, 4, 3]]), np.array([3, 0])]
    expected = reference.attention(*arrays, mask=mask_of(*rest))[0]
    assert np.any(expected) and not np.all(expected)
    model.save(tmp_path / "model.keras")
    for each in (model, keras.models.load_model(tmp_path / "model.keras")):
        np.testing.assert_allclose(each([*arrays, *rest]), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="from_function: seqlen_q must be known .* give static shapes"):
        scaled_dot_product_attention(*symbols((None, 4, 8)), mask=masks.from_function(lambda b, h, q, k: q >= k))


def test_a_scale_that_is_a_tensor():
    query, key, value = symbols()
    scale = keras.Input(batch_shape=())
    model = keras.Model([query, key, value, scale], scaled_dot_product_attention(query, key, value, scale=scale))
    arrays = make_inputs("float32", 2, 5, 7, 4, 2, 8, 3)[:3]
    found = model([*arrays, np.float32(0.2)])
    np.testing.assert_allclose(found, reference.attention(*arrays, scale=0.2)[0], rtol=1e-5, atol=1e-6)


def trained(jit_compile):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 8))
    query, key, value = (keras.layers.EinsumDense("btd,dnh->btnh", (6, 2, 4))(inputs) for _ in range(3))
    x = scaled_dot_product_attention(query, key, value, is_causal=True)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(x)))
    model.compile("adam", "mse", jit_compile=jit_compile)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((50, 6, 8)).astype("float32"), rng.standard_normal((50, 1)).astype("float32")
    return model.fit(x, y, batch_size=16, epochs=3, verbose=0, shuffle=False).history["loss"]


def test_fit_with_and_without_xla_agree():
    plain, compiled = trained(False), trained(True)
    assert plain[-1] < plain[0]
    np.testing.assert_allclose(compiled, plain, rtol=1e-4)


def test_explain_takes_keras_tensors():
    assert attn_ops.explain(*symbols(), is_causal=True).implementation == "fused"


def test_layer_that_calls_the_function_builds_symbolically():
    class Layer(keras.layers.Layer):
        def call(self, x):
            return scaled_dot_product_attention(x, x, x[..., :3])

    out = Layer()(keras.Input((None, 16)))
    assert out.shape == (None, None, 3)


def test_same_as_the_keras_function():
    query, key, value = make_inputs("float32", 2, 9, 9, 4, 4, 8)[:3]
    mask = np.random.default_rng(0).random((2, 4, 9, 9)) < 0.8
    mask |= np.eye(9, dtype=bool)  # Keras gives a mean where a row sees nothing
    bias = np.random.default_rng(1).standard_normal((1, 4, 9, 9)).astype("float32")
    for options in ({}, dict(is_causal=True), dict(mask=mask), dict(bias=bias), dict(scale=0.2, mask=mask, bias=bias)):
        np.testing.assert_allclose(
            scaled_dot_product_attention(query, key, value, **options),
            keras.ops.dot_product_attention(query, key, value, **options),
            rtol=1e-5,
            atol=1e-6,
        )


def test_one_key_value_head_which_keras_cannot():
    query, key, value = make_inputs("float32", 2, 9, 9, 4, 1, 8)[:3]
    out = scaled_dot_product_attention(query, key, value)
    np.testing.assert_allclose(out, reference.attention(query, key, value)[0], rtol=1e-5, atol=1e-6)


def test_keras_random_seed_generator_feeds_the_dropout():
    query, key, value = (tf.constant(x) for x in make_inputs("float32", 1, 20, 20, 2, 2, 4)[:3])
    generator = keras.random.SeedGenerator(7)
    drops = [
        scaled_dot_product_attention(query, key, value, dropout_rate=0.5, dropout_seed=generator.next()).numpy()
        for _ in range(2)
    ]
    assert (drops[0] != drops[1]).any()

"""`patched()` and `convert` change no real token of a stock model, whatever a mask empties or Keras forgets."""

import contextlib
import functools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from layer_twins import FLASH, HAS_WINDOW, STOCK, assert_same, ours, random, twins

L = keras.layers
MINIMUM = float(np.finfo("float32").min)
FORMS = {"eager": lambda f: f, "graph": tf.function, "xla": lambda f: tf.function(f, jit_compile=True)}

pytestmark = pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask")


def some(*shape):
    return np.random.default_rng(9).random(shape) > 0.5


REAL_ROWS = np.array([[False, False, True, True, True], [False] * 5])
MASKS = {
    "rows": REAL_ROWS[:, None, :, None],
    "keys": some(2, 1, 1, 7) & np.array([True, False])[:, None, None, None],
    "heads": some(2, 4, 5, 7) & (np.arange(4) != 2)[:, None, None] & REAL_ROWS[:, None, :, None],
    "everything": np.zeros((1, 1), bool),
    "none": None,
}
BIASES = {
    "none": None,
    "small": np.random.default_rng(8).normal(size=(1, 4, 5, 7)),
    "minimum": np.where(some(2, 1, 1, 7), 0.0, MINIMUM),
    "infinite": np.where(np.arange(7) == 3, 0.0, -np.inf)[None, None, None],
}


def op_values_and_gradients(form, inputs, options):
    def step(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            out = keras.ops.dot_product_attention(*inputs, scale=0.5, **options)
            loss = tf.reduce_sum(tf.sin(tf.cast(out, "float64")))
        return out, *tape.gradient(loss, inputs)

    return FORMS[form](step)(*inputs)


CASES = [(mask, bias, causal) for mask in MASKS for bias in BIASES for causal in (False, True)]
# Without a mask Keras gives NaN where every bias is infinite, and it is the business of the op where it is finite.
CASES = [case for case in CASES if case[0] != "none" or case[2]]


@pytest.mark.parametrize("mask, bias, causal", CASES)
def test_the_op_gives_what_keras_gives(mask, bias, causal):
    options = {"mask": MASKS[mask], "bias": BIASES[bias], "is_causal": causal}
    inputs = [random(2, n, 4, d, seed=i) for i, (n, d) in enumerate([(5, 8), (7, 8), (7, 3)])]
    expected = op_values_and_gradients("eager", inputs, options)
    with attn_ops.patched():
        actual = op_values_and_gradients("eager", inputs, options)
    for a, e in zip(actual, expected):
        np.testing.assert_allclose(a, e, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("form", ["graph", "xla"])
@pytest.mark.parametrize("mask, bias", [("rows", "none"), ("heads", "small"), ("keys", "minimum")])
def test_the_op_in_functions(form, mask, bias):
    options = {"mask": MASKS[mask], "bias": BIASES[bias]}
    inputs = [random(2, n, 4, d, seed=i, dtype="float32") for i, (n, d) in enumerate([(5, 8), (7, 8), (7, 3)])]
    expected = op_values_and_gradients("eager", inputs, options)
    with attn_ops.patched():
        actual = op_values_and_gradients(form, inputs, options)
    for a, e in zip(actual, expected):
        np.testing.assert_allclose(a, e, atol=1e-5)


@pytest.mark.parametrize("dtype, atol", [("float16", 4e-3), ("bfloat16", 3e-2)])
def test_the_op_in_half_precision(dtype, atol):
    inputs = [random(2, 5, 2, 8, seed=i, dtype=dtype) for i in range(3)]
    mask = MASKS["rows"]
    expected = keras.ops.dot_product_attention(*inputs, mask=mask)
    with attn_ops.patched():
        actual = keras.ops.dot_product_attention(*inputs, mask=mask)
    assert actual.dtype == expected.dtype
    np.testing.assert_allclose(tf.cast(actual, "float32"), tf.cast(expected, "float32"), atol=atol)


@pytest.mark.parametrize("seqlen_k, heads", [(7, 1), (7, 2), (0, 4)])
def test_the_op_with_few_heads_or_no_keys(seqlen_k, heads):
    """Keras repeats grouped heads, from 3.15 on and only for more than one; no keys give zeros."""
    q, k, v = random(2, 5, 4, 8), random(2, seqlen_k, heads, 8, seed=1), random(2, seqlen_k, heads, 3, seed=2)
    mask = MASKS["rows"]
    repeated = [tf.repeat(x, 4 // heads, axis=2) for x in (k, v)]
    expected = keras.ops.dot_product_attention(q, *repeated, mask=mask, scale=0.5)
    with attn_ops.patched():
        actual = keras.ops.dot_product_attention(q, k, v, mask=mask, scale=0.5)
    np.testing.assert_allclose(actual, expected, atol=1e-9)
    assert np.isfinite(actual).all()


@pytest.mark.parametrize("form", ["eager", "xla"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("lowest", [-3.0, MINIMUM])
def test_the_op_with_few_heads_and_a_bias(lowest, heads, form):
    """Whose values choose between two computations, the one of Keras with few heads too."""
    bias = tf.constant([0.5, lowest, 0.0, 1.0, -1.0, 2.0, 0.0])
    q, k, v = (random(2, n, h, 8, seed=i, dtype="float32") for i, (n, h) in enumerate(((5, 4), (7, heads), (7, heads))))
    options = {"is_causal": True, "mask": MASKS["rows"]}
    repeated = [q, *(tf.repeat(x, 4 // heads, axis=2) for x in (k, v)), bias]
    out, d_query, *others, d_bias = op_values_and_gradients("eager", repeated, options)
    expected = out, d_query, *(tf.reduce_sum(tf.reshape(d, (2, 7, heads, -1, 8)), 3) for d in others), d_bias
    with attn_ops.patched():
        actual = op_values_and_gradients(form, [q, k, v, bias], options)
    for a, e in zip(actual, expected):
        np.testing.assert_allclose(a, e, atol=1e-5)


def test_a_bias_hides_by_its_value_in_the_dtype_of_the_inputs():
    """-1e9 is -inf in float16, as which Keras adds it: a row that sees only such keys has the mean of the hidden ones."""
    inputs = [random(2, n, 2, 8, seed=n, dtype="float16") for n in (4, 5, 6)]
    inputs = [inputs[0], inputs[1], inputs[2][:, :5]]
    options = {"bias": np.array([-1e9, 0.0, 0.0, 0.0, 0.0], "f"), "is_causal": True}
    expected = keras.ops.dot_product_attention(*inputs, **options)
    with attn_ops.patched():
        actual = keras.ops.dot_product_attention(*inputs, **options)
    np.testing.assert_allclose(actual, expected, atol=4e-3)


# Models

IDS = np.array([[5, 6, 7, 0, 0], [3, 1, 2, 4, 0], [0, 0, 0, 0, 0]])
REAL = IDS != 0


class RowMasked(L.Layer):
    """The attention of ESM and RoFormer in KerasHub: the padding mask hides rows, not keys."""

    def __init__(self):
        super().__init__()
        self.projections = [L.Dense(8), L.Dense(8), L.Dense(8)]

    def build(self, shape):
        for dense in self.projections:
            dense.build(shape)

    def call(self, x, padding):
        q, k, v = (keras.ops.reshape(dense(x), (-1, 5, 2, 4)) for dense in self.projections)
        out = keras.ops.dot_product_attention(q, k, v, mask=padding[:, None, :, None])
        return keras.ops.reshape(out, (-1, 5, 8))


def row_masked(x, padding):
    return RowMasked()(x, padding)


def mha(x, _):
    return L.MultiHeadAttention(2, 4)(x, x)


def mha_with_dropout(x, _):
    return L.MultiHeadAttention(2, 4, dropout=0.2)(x, x)


def mha_causal(x, _):
    return L.MultiHeadAttention(2, 4)(x, x, use_causal_mask=True)


def mha_with_scores(x, _):
    return L.MultiHeadAttention(2, 4)(x, x, return_attention_scores=True)[0]


def mha_of_rows(x, padding):
    return L.MultiHeadAttention(2, 4)(x, x, attention_mask=padding[:, :, None])


def mha_with_a_query_mask(x, padding):
    return L.MultiHeadAttention(2, 4)(x, x, query_mask=padding)


def gqa(x, _):
    return L.GroupQueryAttention(4, 4, 2)(x, x)


def gqa_with_a_query_mask(x, padding):
    return L.GroupQueryAttention(4, 4, 2)(x, x, query_mask=padding)


def attention(x, _):
    return L.Attention(use_scale=True)([x, x])


def attention_causal(x, _):
    return L.Attention(dropout=0.2)([x, x], use_causal_mask=True)


LAYERS = [
    row_masked,
    mha,
    mha_with_dropout,
    mha_causal,
    mha_with_scores,
    mha_of_rows,
    mha_with_a_query_mask,
    gqa,
    gqa_with_a_query_mask,
    attention,
    attention_causal,
]


def post_norm(layer, x, padding):
    return L.LayerNormalization()(L.Add()([x, layer(x, padding)]))


def lost(layer, x, padding):
    """An addition of TensorFlow's, behind which no tensor has a mask."""
    return L.LayerNormalization()(x + layer(x, padding))


def pre_norm(layer, x, padding):
    return L.Add()([x, layer(L.LayerNormalization()(x), padding)])


def model_of(layer, norm):
    keras.utils.set_random_seed(0)
    ids = keras.Input((5,), dtype="int32")
    padding = keras.ops.not_equal(ids, 0)
    x = L.Embedding(10, 8, mask_zero=True)(ids)
    for _ in range(2):
        x = norm(layer, x, padding)
    return keras.Model(ids, x)


@pytest.mark.parametrize("norm", [post_norm, lost])
@pytest.mark.parametrize("layer", LAYERS)
def test_models(layer, norm):
    model = model_of(layer, norm)
    expected = model(IDS).numpy()[REAL]
    with attn_ops.patched():
        np.testing.assert_allclose(model(IDS).numpy()[REAL], expected, atol=3e-6)
    attn_ops.convert(model)
    np.testing.assert_allclose(model(IDS).numpy()[REAL], expected, atol=3e-6)


@pytest.mark.parametrize("layer", [row_masked, mha, gqa, attention])
def test_predict(layer):
    model = model_of(layer, post_norm)
    expected = model(IDS).numpy()[REAL]
    with attn_ops.patched():
        np.testing.assert_allclose(model.predict(IDS, verbose=0)[REAL], expected, atol=3e-6)
    if layer is not row_masked:
        attn_ops.convert(model)
        np.testing.assert_allclose(model.predict(IDS, verbose=0)[REAL], expected, atol=3e-6)


@pytest.mark.parametrize("layer", [mha, gqa, attention])
def test_pre_norm_models(layer):
    model = model_of(layer, pre_norm)
    expected = model(IDS).numpy()[REAL]
    np.testing.assert_allclose(attn_ops.convert(model)(IDS).numpy()[REAL], expected, atol=3e-6)


@pytest.mark.parametrize(
    "layer, how",
    [
        (row_masked, "patched"),
        (mha, "patched"),
        pytest.param(mha, "convert", marks=pytest.mark.wide(4)),
        pytest.param(gqa, "convert", marks=pytest.mark.wide(4)),
        (attention, "convert, XLA"),
    ],
)
def test_training(layer, how):
    """The same weights after two steps on the same batches, the padding's gradients included."""
    for ours_, theirs in zip(trained(layer, how), trained(layer, ""), strict=True):
        np.testing.assert_allclose(ours_, theirs, atol=2e-6)


@functools.cache
def trained(layer, how):
    model = model_of(layer, post_norm)
    if "convert" in how:
        attn_ops.convert(model)
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile="XLA" in how)
    with attn_ops.patched() if how == "patched" else contextlib.nullcontext():
        model.fit(IDS, random(3, 5, 8, dtype="float32").numpy(), epochs=2, verbose=0)
    return model.get_weights()


def test_converted_models_stay_so_in_files_and_can_be_told_otherwise(tmp_path):
    model = attn_ops.convert(model_of(mha, post_norm))
    expected = model(IDS).numpy()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    [layer, _] = [layer for layer in loaded._flatten_layers() if isinstance(layer, ours("MultiHeadAttention"))]
    assert layer.as_in_keras and layer.get_config()["as_in_keras"]
    np.testing.assert_array_equal(loaded(IDS), expected)
    for layer in loaded._flatten_layers():
        if isinstance(layer, ours("MultiHeadAttention")):
            layer.as_in_keras = False
    short = loaded(np.array([[5, 6, 7, 0, 0]]))[:, :3]
    other = keras.Model.from_config(loaded.get_config())
    other.set_weights(loaded.get_weights())
    assert not np.allclose(short, expected[:1, :3], atol=1e-3)  # now it reads no padding
    reverted = attn_ops.revert(model)
    assert "as_in_keras" not in [layer for layer in reverted.layers if "attention" in layer.name][0].get_config()
    np.testing.assert_allclose(reverted(IDS).numpy()[REAL], expected[REAL], atol=3e-6)


# as_in_keras, layer by layer: the whole output and all gradients, rows without keys included

CONFIGS = {
    "MultiHeadAttention": dict(num_heads=2, key_dim=4, value_dim=4),
    "GroupedQueryAttention": dict(head_dim=4, num_query_heads=4, num_key_value_heads=2),
}
ROWS = np.array([[True, True, False, True, False], [False] * 5, [True] * 5])
KEYS = np.array([[False, False, True, True, False, True, False], [True] * 7, [False] * 7])
DENSE = some(3, 5, 7)
DENSE[0, 1] = DENSE[2] = False


@pytest.mark.wide(4)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("flash", FLASH)
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_give_what_keras_gives(name, flash, dropout):
    shapes = (3, 5, 6), (3, 7, 6)
    inputs = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    for window in (None, 1, 3) if HAS_WINDOW else (None,):
        config = {**CONFIGS[name], "dropout": dropout, **({"sliding_window": window} if window else {})}
        stock, mine = twins(name, *shapes, flash_attention=FLASH[flash], **config)
        mine.as_in_keras = True
        for options in (
            {},
            {"attention_mask": DENSE},
            {"use_causal_mask": True, "attention_mask": DENSE[:, :1] | DENSE[:, 1:2]},
            {"return_attention_scores": True, "attention_mask": DENSE},
        ):
            for rows, keys in ((None, None), (ROWS, None), (None, KEYS), (ROWS, KEYS)):

                def call(layer, inputs):
                    query, value = inputs
                    if rows is not None:
                        query = tf.identity(query)
                        query._keras_mask = tf.constant(rows)
                    return layer(query, value, value_mask=keys, **options)

                assert_same(stock, mine, inputs, call)


@pytest.mark.parametrize("floatx", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_floatx_of_16_bits(name, floatx):
    """Which makes `ops.arange` count in 16 bits, that TensorFlow's graphs do not have."""
    before = keras.config.floatx()
    keras.config.set_floatx(floatx)
    try:
        stock, mine = twins(name, (3, 5, 6), (3, 5, 6), dtype=floatx, **CONFIGS[name])
        mine.as_in_keras = True
        x = random(3, 5, 6, dtype=floatx)
        for options in ({}, {"attention_mask": DENSE[..., :5]}, {"value_mask": KEYS[:, :5]}):
            graph = tf.function(functools.partial(mine, use_causal_mask=True, **options))
            expected = tf.cast(stock(x, x, use_causal_mask=True, **options), "float32")
            np.testing.assert_allclose(tf.cast(graph(x, x), "float32"), expected, rtol=0.02, atol=0.03)
    finally:
        keras.config.set_floatx(before)


@pytest.mark.parametrize("flash", FLASH)
@pytest.mark.parametrize("dtype, rtol", [("float64", 1e-9), ("float32", 1e-4)])
def test_attention_gives_what_keras_gives(flash, dtype, rtol):
    """Large scores: in float32 the 1e9 that Keras takes from the masked ones leaves multiples of 64."""
    shapes = (3, 5, 6), (3, 7, 6)
    stock, mine = twins("Attention", *shapes, flash_attention=FLASH[flash], dtype=dtype, use_scale=True)
    mine.as_in_keras = True
    inputs = [random(*shape, seed=i, dtype=dtype) * 5.0 for i, shape in enumerate(shapes)]
    for keys in (KEYS, KEYS | True, None):
        for causal in (False, True):

            def call(layer, inputs):
                mask = [tf.constant(ROWS), None if keys is None else tf.constant(keys)]
                return layer(list(inputs), mask=mask, use_causal_mask=causal, return_attention_scores=True)

            assert_same(stock, mine, inputs, call, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_attention_in_functions(jit_compile):
    stock, mine = twins("Attention", (3, 5, 6), (3, 7, 6), dtype="float32")
    mine.as_in_keras = True
    inputs = [random(3, 5, 6, dtype="float32"), random(3, 7, 6, seed=1, dtype="float32")]
    run = tf.function(lambda q, v, m: mine([q, v], mask=[None, m]), jit_compile=jit_compile)
    for keys in (KEYS, KEYS | True):
        np.testing.assert_allclose(run(*inputs, keys), stock(inputs, mask=[None, tf.constant(keys)]), atol=1e-5)


def test_masks_of_a_converted_layer_are_where_keras_leaves_them():
    for make in (lambda: L.MultiHeadAttention(2, 4), lambda: L.GroupQueryAttention(4, 4, 2)):
        marks = []
        for change in (lambda layer: layer, attn_ops.convert):
            x = random(3, 5, 6, dtype="float32")
            x._keras_mask = tf.constant(ROWS)
            layer = change(make())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out = layer(x, x, query_mask=~ROWS)
            marks.append([getattr(t, "_keras_mask", None) is None for t in (x, out)])
        assert marks[0] == marks[1]
    assert type(L.MultiHeadAttention(2, 4)) is STOCK["MultiHeadAttention"]

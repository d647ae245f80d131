"""Layers of Keras 2 and TensorFlow Addons made ours."""

import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from children import run

RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (RNG.normal(size=(2, n, d)).astype("float32") for n, d in ((5, 6), (7, 3), (7, 4)))


class Policy:
    name = "mixed_bfloat16"


class MultiHeadAttention:
    """As much of `tfa.layers.MultiHeadAttention` as the converter reads: weights and config of a built layer."""

    built, dtype_policy = True, None

    def __init__(self, use_projection_bias):
        shapes = [(2, 6, 8), (2, 3, 8), (2, 4, 8), (2, 8, 9)] + [(9,)] * use_projection_bias
        self.weights = [RNG.normal(size=shape).astype("float32") for shape in shapes]
        self.config = {
            "name": "old",
            "head_size": 8,
            "num_heads": 2,
            "output_size": 9,
            "dropout": 0.25,
            "use_projection_bias": use_projection_bias,
            "return_attn_coef": False,
        }

    def get_weights(self):
        return self.weights

    def get_config(self):
        return self.config


@pytest.mark.parametrize("bias", [False, True])
def test_tensorflow_addons(bias):
    """Its formula: projections by `[num_heads, features, head_size]` kernels, softmax(q k^T / sqrt(head_size)) v, projected."""
    old = MultiHeadAttention(bias)
    layer = attn_ops.models.from_tensorflow_addons(old)
    assert (layer.name, layer.dropout) == ("old", 0.25)
    mask = np.random.default_rng(1).random((2, 5, 7)) > 0.4
    mask[..., 0] = True
    query, key, value = (np.einsum("btd,hde->bthe", x, w) for x, w in zip((QUERY, KEY, VALUE), old.weights))
    scores = np.einsum("bthe,bshe->bhts", query, key) / np.sqrt(8)
    weights = np.exp(np.where(mask[:, None], scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshe,heo->bto", weights, value, old.weights[3]) + (old.weights[4] if bias else 0)
    np.testing.assert_allclose(layer(QUERY, VALUE, key=KEY, attention_mask=mask), expected, atol=1e-4)


def test_what_training_asks_of_a_layer_is_kept():
    """Precision, regularizers, constraints, and whether it is trained at all."""
    old = MultiHeadAttention(True)
    old.dtype_policy = Policy()
    l2 = {"module": "keras.regularizers", "class_name": "L2", "config": {"l2": 0.5}, "registered_name": None}  # as of Keras 2
    old.config |= {"trainable": False, "kernel_regularizer": l2, "bias_constraint": "non_neg", "kernel_initializer": "unknown"}
    layer = attn_ops.models.from_tensorflow_addons(old)
    assert layer.dtype_policy.name == "mixed_bfloat16" and layer(QUERY, VALUE, key=KEY).dtype == "bfloat16"
    assert not layer.trainable_weights
    layer.trainable = True
    assert [bool(w.regularizer) for w in layer.weights] == [True, False] * 4
    assert [bool(w.constraint) for w in layer.weights] == [False, True] * 4
    np.testing.assert_allclose(sum(layer.losses), 0.5 * sum(np.sum(w**2) for w in old.weights[:4]), rtol=1e-5)


def test_keras_2():
    tf_keras = pytest.importorskip("tf_keras")
    old = tf_keras.layers.MultiHeadAttention(2, 8, value_dim=5, dropout=0.1, output_shape=9, name="old")
    expected = old(QUERY, VALUE, key=KEY)
    layer = attn_ops.models.from_tf_keras(old)
    assert (layer.name, layer.dropout) == ("old", 0.1)
    np.testing.assert_allclose(layer(QUERY, VALUE, key=KEY), expected, atol=1e-5)


def model_of_keras_2(tf_keras, **options):
    """A functional model with both functions on KerasTensors of Keras 2."""
    x, lengths = tf_keras.Input((5, 2, 4)), tf_keras.Input((), dtype="int32")
    options |= {"mask": attn_ops.masks.window(2, 2), "key_value_seq_lengths": lengths}
    out = attn_ops.scaled_dot_product_attention(x, x, x, scale=0.5, **options)
    return tf_keras.Model([x, lengths], [out, attn_ops.attention_weights(out, x, is_causal=True)])


HEADS, LENGTHS = np.random.default_rng(1).normal(size=(3, 5, 2, 4)).astype("float32"), np.array([3, 5, 1])


@pytest.mark.parametrize("jit_compile", [False, True])
def test_functional_models_of_keras_2(jit_compile):
    tf_keras = pytest.importorskip("tf_keras")
    model = model_of_keras_2(tf_keras)
    options = {"mask": attn_ops.masks.window(2, 2), "key_value_seq_lengths": LENGTHS, "scale": 0.5}
    out = attn_ops.scaled_dot_product_attention(HEADS, HEADS, HEADS, **options)
    expected = out, attn_ops.attention_weights(out, HEADS, is_causal=True)
    assert [x.shape.as_list() for x in model.outputs] == [[None, 5, 2, 4], [None, 2, 5, 5]]
    for made in (model, tf_keras.models.clone_model(model), tf_keras.models.model_from_json(model.to_json())):
        made.compile("sgd", "mse", jit_compile=jit_compile)
        for a, e in zip(made.predict([HEADS, LENGTHS], verbose=0), expected):
            np.testing.assert_allclose(a, e, atol=1e-6)
    assert attn_ops.explain(*[tf_keras.Input((5, 2, 4))] * 3).implementation == "fused"


def test_functional_models_of_keras_2_drop_anew_in_each_call():
    tf_keras = pytest.importorskip("tf_keras")
    model = model_of_keras_2(tf_keras, dropout_rate=0.5)
    assert abs(model([HEADS, LENGTHS])[0] - model([HEADS, LENGTHS])[0]).numpy().max() > 0.1


def test_files_of_keras_2_load_after_importing_us_alone(tmp_path):
    tf_keras = pytest.importorskip("tf_keras")
    model = model_of_keras_2(tf_keras)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "values.npz", *model.predict([HEADS, LENGTHS], verbose=0), x=HEADS, lengths=LENGTHS)
    loads = """
import sys
import numpy as np
import attn_ops, tf_keras
files = np.load(sys.argv[1] + "/values.npz")
results = tf_keras.models.load_model(sys.argv[1] + "/model.keras").predict([files["x"], files["lengths"]], verbose=0)
for i, result in enumerate(results):
    np.testing.assert_allclose(result, files[f"arr_{i}"], atol=1e-6)
"""
    done = run(loads, str(tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_caches_in_functional_models_of_keras_2(dtype):
    tf_keras = pytest.importorskip("tf_keras")
    cache = attn_ops.KVCache.create(3, 16, 2, 4, dtype, layout="BSHD", window=4)

    def steps(x, cache, lengths):
        cache = cache.update(x, x, lengths)
        return attn_ops.decode_attention(x, cache, x, x, scale=0.5, query_seq_lengths=lengths)

    inputs = [tf_keras.Input(x.shape[1:], batch_size=3, dtype=x.dtype) for x in cache]
    x, lengths = tf_keras.Input((5, 2, 4), batch_size=3), tf_keras.Input((), batch_size=3, dtype="int32")
    model = tf_keras.Model([x, lengths, *inputs], list(steps(x, cache._make(inputs), lengths)))
    out, expected = steps(HEADS, cache, LENGTHS.astype("int32"))
    for made in (model, tf_keras.models.model_from_json(model.to_json())):
        for jit_compile in (False, True):
            run = tf.function(made, jit_compile=jit_compile)
            found, *fields = tf.nest.flatten(run([HEADS, LENGTHS.astype("int32"), *cache]))
            np.testing.assert_allclose(found, out, atol=1e-5)
            np.testing.assert_array_equal(cache._make(fields).lengths, expected.lengths)
    assert type(model.output[1]) is type(cache)
    with pytest.raises(TypeError, match="decode_attention: .*KVCache"):
        attn_ops.decode_attention(x, None, x, x)


def test_other_layers_are_refused():
    import keras

    for function in (attn_ops.models.from_tf_keras, attn_ops.models.from_tensorflow_addons):
        for layer in (keras.layers.Dense(3), 3):
            with pytest.raises(TypeError, match=f"{function.__name__}: layer must be a MultiHeadAttention"):
                function(layer)
    with pytest.raises(ValueError, match="not built"):
        attn_ops.models.from_tf_keras(keras.layers.MultiHeadAttention(2, 8))


def test_models_of_keras_2_are_refused_by_name():
    """By one that looks like them: `tf_keras` is not among what tests install."""

    class Model:
        def _flatten_layers(self):
            return iter([self])

    Model.__module__ = "tf_keras.src.engine.training"
    mine = type("Mine", (Model,), {})()
    for function in (attn_ops.convert, attn_ops.revert, attn_ops.explain):
        with pytest.raises(TypeError, match=rf"attn_ops.{function.__name__}: .* got Mine of Keras 2, .*from_tf_keras"):
            function(mine)

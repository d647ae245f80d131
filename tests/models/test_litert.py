"""Exports that LiteRT runs: with its builtin operators alone, for any batch."""

import attn_ops
import keras
import numpy as np
import pytest
import tensorflow as tf


def model_of(layer, padding=False, **call):
    inputs = [keras.Input((12, 16))]
    if padding:
        inputs.append(keras.Input((12,), dtype="bool"))
        call["key_mask"] = inputs[1]
    x = inputs[0]
    return keras.Model(inputs, layer(x, x, **call))


def grouped():
    return attn_ops.layers.GroupedQueryAttention(head_dim=8, num_query_heads=4, num_key_value_heads=2)


def multi_head():
    return attn_ops.layers.MultiHeadAttention(num_heads=2, key_dim=8)


def turned():
    """By positions that only the running model knows."""
    x, positions = keras.Input((12, 16)), keras.Input((12,), dtype="int32")
    return keras.Model([x, positions], attn_ops.layers.RotaryEmbedding()(x, positions=positions))


MODELS = {
    "plain": lambda: model_of(multi_head()),
    "causal": lambda: model_of(multi_head(), use_causal_mask=True),
    "key padding": lambda: model_of(multi_head(), padding=True),
    "grouped, causal": lambda: model_of(grouped(), use_causal_mask=True),
    "rotary": turned,
}


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("kind", MODELS)
def test_litert(tmp_path, kind):
    model = MODELS[kind]()
    model.export(tmp_path, verbose=False)
    interpreter = tf.lite.Interpreter(
        model_content=tf.lite.TFLiteConverter.from_saved_model(str(tmp_path)).convert(),
        experimental_op_resolver_type=tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    rng = np.random.default_rng(0)
    for batch in (1, 3):
        feeds = [rng.normal(size=(batch, 12, 16)).astype("float32")]
        if model.inputs[-1].dtype == "bool":
            feeds.append(np.arange(12) < rng.integers(1, 13, size=(batch, 1)))
        if model.inputs[-1].dtype == "int32":
            feeds.append(rng.integers(-(2**20), 2**20, size=(batch, 12)).astype("int32"))
        indices = {details["dtype"]: details["index"] for details in interpreter.get_input_details()}
        for feed in feeds:
            interpreter.resize_tensor_input(indices[feed.dtype.type], feed.shape)
        interpreter.allocate_tensors()
        for feed in feeds:
            interpreter.set_tensor(indices[feed.dtype.type], feed)
        interpreter.invoke()
        [output] = interpreter.get_output_details()
        expected = model.predict(feeds, verbose=0)
        np.testing.assert_allclose(interpreter.get_tensor(output["index"]), expected, atol=1e-5)


def test_a_forced_choice_says_why_it_is_refused():
    """By a warning: what the trace raises, the converter catches."""
    layer = attn_ops.layers.MultiHeadAttention(num_heads=2, key_dim=8, flash_attention=True)
    converter = tf.lite.TFLiteConverter.from_keras_model(model_of(layer))
    with pytest.warns(UserWarning, match="'fused' cannot run: .* a format other than TensorFlow's"), pytest.raises(Exception):
        converter.convert()

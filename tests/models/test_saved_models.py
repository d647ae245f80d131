"""Which operations an export holds, and what loading one says where the library is missing."""

import logging

import attn_ops
import keras
import numpy as np
import pytest
import tensorflow as tf

from children import run

X = np.random.default_rng(0).normal(size=(3, 12, 16)).astype("float32")


class Plain(keras.layers.Layer):
    """Attention of a layer that is not ours."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def call(self, x):
        x = keras.ops.reshape(x, (-1, 12, 2, 8))
        return self.attention(x, x, x, is_causal=True)


def of_our_layers(**options):
    inputs = keras.Input((12, 16))
    x = attn_ops.layers.MultiHeadAttention(num_heads=2, key_dim=8, **options)(inputs, inputs, use_causal_mask=True)
    query = keras.layers.Dense(8)(x)
    return keras.Model(inputs, attn_ops.layers.Attention()([query, query]))


def of_a_layer(attention):
    inputs = keras.Input((12, 16))
    return keras.Model(inputs, Plain(attention)(inputs))


def holds_the_op(path):
    return b"AttnOps>" in (path / "saved_model.pb").read_bytes()


MODELS = {
    "our layers": of_our_layers,
    "the op": lambda: of_a_layer(attn_ops.scaled_dot_product_attention),
    "keras.ops": lambda: of_a_layer(keras.ops.dot_product_attention),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("way", ["model.export", "composite", "fused"])
def test_export_holds_what_was_asked_for(tmp_path, kind, way):
    with attn_ops.patched():
        model = MODELS[kind]()
        expected = model.predict(X, verbose=0)  # traces it with the op, before the export
        if way == "model.export":
            model.export(tmp_path, verbose=False)
        else:
            attn_ops.export(model, tmp_path, ops=way, verbose=False)
    assert holds_the_op(tmp_path) == (way == "fused")
    loaded = tf.saved_model.load(str(tmp_path))
    np.testing.assert_allclose(loaded.serve(X), expected, atol=1e-5)


def test_an_export_leaves_the_model_as_it_was(tmp_path):
    model = of_our_layers()
    attn_ops.export(model, tmp_path / "fused", ops="fused", verbose=False)
    model.export(tmp_path / "composite", verbose=False)
    assert not holds_the_op(tmp_path / "composite")

    def chosen(x):
        return attn_ops.explain(x, x, x)

    choices = []
    tf.function(lambda x: choices.append(chosen(x)))(tf.zeros((1, 4, 2, 8)))
    choices.append(chosen(tf.zeros((1, 4, 2, 8))))
    assert [choice.form for choice in choices] == ["op or xla", "op"]


def test_saving_a_module_gives_the_composite(tmp_path):
    module = tf.Module()
    module.attend = tf.function(
        lambda x: attn_ops.scaled_dot_product_attention(x, x, x), input_signature=[tf.TensorSpec((None, 4, 2, 8))]
    )
    tf.saved_model.save(module, str(tmp_path))
    assert not holds_the_op(tmp_path)


def test_a_fused_model_is_differentiable_after_loading(tmp_path):
    model = of_our_layers()
    attn_ops.export(model, tmp_path, ops="fused", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path))
    x = tf.constant(X)
    gradients = []
    for function in (model, loaded.serve):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(function(x) ** 2)
        gradients.append(tape.gradient(loss, x))
    np.testing.assert_allclose(gradients[1], gradients[0], atol=1e-4)


def test_explain_tells_of_exports():
    """What `test_export_holds_what_was_asked_for` and `test_a_forced_choice_is_kept` find in files."""
    layers = [attn_ops.layers.MultiHeadAttention(1, 4, flash_attention=asked) for asked in (None, True, False)]
    told = [attn_ops.explain(layer).layers[0] for layer in layers]
    assert [x.export for x in told] == ["composite", "fused", "composite"]
    assert [x.fused for x in told] == [True, True, False] and told[0].reason is None


def test_an_export_of_keras_on_jax_holds_the_composite(tmp_path):
    """`jax2tf` takes no custom call of ours."""
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    code = """
import sys
import attn_ops, keras, numpy as np
inputs = keras.Input((5, 8))
model = keras.Model(inputs, attn_ops.layers.MultiHeadAttention(2, 4)(inputs, inputs, use_causal_mask=True))
x = np.load(sys.argv[1] + "/x.npy")
np.save(sys.argv[1] + "/out.npy", model.predict(x, verbose=0))
model.export(sys.argv[1] + "/exported", verbose=False)
"""
    process = run(code, str(tmp_path), without=("matplotlib",), KERAS_BACKEND="jax")
    assert process.returncode == 0, process.stderr[-3000:]
    loaded = tf.saved_model.load(tmp_path / "exported")  # has the variables
    np.testing.assert_allclose(loaded.serve(x), np.load(tmp_path / "out.npy"), rtol=1e-5, atol=1e-6)


def test_a_forced_choice_is_kept(tmp_path):
    model = of_our_layers(flash_attention=True)
    with pytest.raises(ValueError, match=r'traced for an export.*attn_ops\.export\(model, path, ops="fused"\) keeps'):
        attn_ops.export(model, tmp_path / "composite", ops="composite", verbose=False)
    model.export(tmp_path / "fused", verbose=False)
    assert holds_the_op(tmp_path / "fused")


@pytest.mark.parametrize("module", ["tf2onnx.convert", "openvino.frontend.tensorflow.utils"])
def test_converters_that_trace_get_the_composite(module):
    """What they trace is recognised by the name of their module on the stack, here of a function in their place."""
    converter = {"__name__": module, "tf": tf}
    exec("def trace(model, spec):\n    return tf.function(lambda x: model(x)).get_concrete_function(spec)", converter)
    spec = tf.TensorSpec(X.shape)
    definition = converter["trace"](of_our_layers(), spec).graph.as_graph_def()
    assert not [op for op in (b"AttnOps>", b"XlaCallModule", b"DeviceIndex") if op in definition.SerializeToString()]
    with pytest.raises(ValueError, match="'fused' cannot run: the call is traced for a format other than TensorFlow's"):
        converter["trace"](of_our_layers(flash_attention=True), spec)


def test_a_forced_choice_is_refused_where_the_format_has_no_place_for_it(tmp_path):
    """LiteRT's converter itself would say "failed to legalize operation 'vhlo.custom_call_v1'", that of ONNX less."""
    with pytest.raises(ValueError, match="'fused' cannot run: the call is traced for a format other than TensorFlow's"):
        of_our_layers(flash_attention=True).export(tmp_path / "model.tflite", format="litert", verbose=False)


def test_saving_the_op_has_autograph_convert_nothing_of_ours(tmp_path, caplog, monkeypatch):
    """It took a second, and warned of what it cannot convert."""
    monkeypatch.setattr(logging.getLogger("tensorflow"), "propagate", True)
    with caplog.at_level("WARNING", logger="tensorflow"):
        attn_ops.export(of_our_layers(), tmp_path, ops="fused", verbose=False)
    assert not [record for record in caplog.records if "AutoGraph" in record.getMessage()]


def test_bad_arguments(tmp_path, monkeypatch):
    model = of_our_layers()
    with pytest.raises(TypeError, match="attn_ops.export: model must be a Keras model or a tf.Module, got Dense"):
        attn_ops.export(keras.layers.Dense(1), tmp_path)
    with pytest.raises(ValueError, match="attn_ops.export: ops must be one of 'composite', 'fused', got 'reference'"):
        attn_ops.export(model, tmp_path, ops="reference")
    with pytest.raises(ValueError, match="'tf_saved_model', the only one that can hold the op, got format 'onnx'"):
        attn_ops.export(model, tmp_path, ops="fused", format="onnx")
    monkeypatch.setattr("attn_ops.kernels.unavailable_reason", lambda: "it is switched off")
    with pytest.raises(ValueError, match="ops='fused' needs the library, and it is switched off"):
        attn_ops.export(model, tmp_path, ops="fused")
    with pytest.raises(ImportError, match="attn_ops.load_library: it is switched off"):
        attn_ops.load_library()


LOADING = """
import sys
import numpy as np
import tensorflow as tf

path, library = sys.argv[1:]
def loads(way):
    try:
        return way(path)
    except Exception as error:
        print(type(error).__name__, error)

def as_layer(path):
    import keras
    return keras.layers.TFSMLayer(path, call_endpoint="serve")

assert loads(tf.saved_model.load) is None
assert loads(as_layer) is None
assert "attn_ops" not in sys.modules
if library:
    tf.load_library(library)
else:
    import attn_ops
    attn_ops.load_library()
x = np.load(path + "/x.npy")
loaded, layer = loads(tf.saved_model.load), loads(as_layer)
for result in (loaded.serve(x), layer(x)):
    np.testing.assert_allclose(result, np.load(path + "/expected.npy"), atol=1e-5)
"""


@pytest.mark.wide(4)
@pytest.mark.parametrize("by_path", [False, True], ids=("attn_ops.load_library", "tf.load_library"))
def test_loading_without_the_library_says_what_to_do(tmp_path, by_path):
    model = of_our_layers()
    attn_ops.export(model, tmp_path, ops="fused", verbose=False)
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "expected.npy", model.predict(X, verbose=0))
    arguments = [str(tmp_path), attn_ops.load_library() if by_path else ""]
    done = run(LOADING, *arguments)
    assert done.returncode == 0, done.stderr
    errors = done.stdout.splitlines()
    assert len(errors) == 2
    for error in errors:
        assert "Op type not registered" in error
        assert "import_attn_ops_and_call_attn_ops_load_library" in error and "tf_load_library" in error

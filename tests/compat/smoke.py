"""What must work in every TensorFlow: the operator against the NumPy reference, eager, traced and under XLA; its
gradients; errors; a Keras layer that trains, saves, loads and exports. Needs nothing but the installed package.

The last line is JSON, for run.py."""

import json
import os
import subprocess
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import attn_ops
import keras
import numpy as np
import tensorflow as tf
from attn_ops import kernels, reference

rng = np.random.default_rng(0)


def normal(*shape):
    return rng.normal(size=shape).astype("float32")


q, k, v = normal(2, 70, 4, 16), normal(2, 90, 2, 16), normal(2, 90, 2, 24)
bias, d_out = normal(1, 4, 70, 90), normal(2, 70, 4, 24)
mask = rng.random((2, 1, 70, 90)) < 0.8
options = dict(mask=mask, is_causal=True, key_value_seq_lengths=np.int32([90, 41]), dropout_rate=0.2, dropout_seed=7)


def close(results, references):
    for result, wanted in zip(results, references):
        scale = np.abs(wanted).max(initial=1, where=np.isfinite(wanted))
        np.testing.assert_allclose(result, wanted, rtol=0, atol=2e-5 * scale)


def run(implementation):
    variables = [tf.convert_to_tensor(x) for x in (q, k, v, bias)]
    with tf.GradientTape() as tape:
        tape.watch(variables)
        query, key, value, b = variables
        out, lse = attn_ops.scaled_dot_product_attention(
            query, key, value, bias=b, return_lse=True, implementation=implementation, **options
        )
    return out, lse, *tape.gradient(out, variables, output_gradients=d_out)


def operator_matches_reference():
    wanted = reference.attention(q, k, v, bias=bias, **options)
    wanted += tuple(reference.attention_gradients(q, k, v, bias=bias, d_out=d_out, **options))
    close(run("fused"), wanted)
    close(tf.function(run)("fused"), wanted)
    close(tf.function(run, jit_compile=True)(None), wanted)
    close(run("composite"), wanted)


def compiled_by_xla_whenever_traced():
    before = tf.function(run)
    before(None)
    wanted = run("composite")
    for function in (lambda: run(None), lambda: before(None)):
        close(tf.function(function, jit_compile=True)(), wanted)
    sizes_unknown = tf.function(
        lambda *x: attn_ops.scaled_dot_product_attention(*x, is_causal=True),
        jit_compile=True,
        input_signature=[tf.TensorSpec([None] * 4)] * 3,
    )
    close([sizes_unknown(q, k, v)], [reference.attention(q, k, v, is_causal=True)[0]])


def errors_name_the_rule():
    for call in (kernels.library().attn_ops_forward, tf.function(kernels.library().attn_ops_forward)):
        try:
            call(q[:, :, :3], k, v, *[()] * 12)
        except tf.errors.InvalidArgumentError as error:
            assert "num_heads (3) must be a multiple of num_kv_heads (2)" in str(error), error
        else:
            raise AssertionError("no error")


def small_model():
    inputs = keras.Input((12, 16))
    x = attn_ops.layers.MultiHeadAttention(num_heads=2, key_dim=8)(inputs, inputs, use_causal_mask=True)
    return keras.Model(inputs, keras.layers.Dense(1)(x))


def layer_trains_saves_and_loads():
    x, y = normal(70, 12, 16), normal(70, 12, 1)
    for jit_compile in ("auto", False, True):  # the last batch of 70 has 6
        model = small_model()
        model.compile("adam", "mse", jit_compile=jit_compile)
        losses = model.fit(x, y, epochs=3, verbose=0).history["loss"]
        assert losses[-1] < losses[0], (jit_compile, losses)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "model.keras")
        model.save(path)
        loaded = keras.models.load_model(path)
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)


def exports_hold_what_was_asked_for():
    model, x = small_model(), normal(3, 12, 16)
    wanted = model.predict(x, verbose=0)
    for export, fused in (
        (lambda path: model.export(path, verbose=False), False),
        (lambda path: attn_ops.export(model, path, verbose=False), False),
        (lambda path: attn_ops.export(model, path, ops="fused", verbose=False), True),
        (lambda path: tf.saved_model.save(model, path), False),
    ):
        with tempfile.TemporaryDirectory() as directory:
            export(directory)
            with open(os.path.join(directory, "saved_model.pb"), "rb") as file:
                assert (b"AttnOps>" in file.read()) == fused, (export, fused)
            loaded = tf.saved_model.load(directory)
            [result] = loaded.signatures["serving_default"](tf.constant(x)).values()
            np.testing.assert_allclose(result, wanted, atol=1e-5)
            if fused:
                load = f"import tensorflow as tf; tf.saved_model.load({directory!r})"
                run = subprocess.run([sys.executable, "-c", load], stderr=subprocess.PIPE, text=True)
                assert run.returncode == 1 and "attn_ops_load_library__or_tf_load_library" in run.stderr, run.stderr


def implementation_under_xla():
    chosen = []

    @tf.function(jit_compile=True)
    def traced():
        chosen.append(attn_ops.explain(q, k, v).implementation)
        return 0

    traced()
    return chosen[0]


CHECKS = (
    operator_matches_reference,
    compiled_by_xla_whenever_traced,
    errors_name_the_rule,
    layer_trains_saves_and_loads,
    exports_hold_what_was_asked_for,
)

print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, NumPy {np.__version__}, {attn_ops.__file__}")
assert kernels.unavailable_reason() is None, kernels.unavailable_reason()
assert kernels.core_unavailable_reason() is None, kernels.core_unavailable_reason()
close(kernels.core().forward(q, k, v), reference.attention(q, k, v))
for check in CHECKS:
    check()
    print("  passed:", check.__name__)
versions = {"tensorflow": tf.__version__, "keras": keras.__version__}
print(json.dumps({"result": "passed", **versions, "under_xla": implementation_under_xla()}))

"""TensorFlow's private names live in one module, and a TensorFlow without one of them loses speed, not the op."""

import pathlib
import re

import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from attn_ops.tensorflow import place
from children import run

_PACKAGE = pathlib.Path(attn_ops.__file__).parent


@pytest.fixture(params=sorted(place._WITHOUT))
def hidden(request, monkeypatch):
    """Hides one name, as a TensorFlow that has renamed it would."""
    get = place._get
    monkeypatch.setattr(place, "_get", lambda path: None if path == request.param else get(path))
    monkeypatch.setattr(place, "eager_executor", place.eager_executor.__wrapped__)  # not what was found before
    return request.param


def inputs():
    random = np.random.default_rng(0)
    return [tf.constant(random.standard_normal(shape)) for shape in [(2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4)]]


def values_and_gradients(query, key, value):
    with tf.GradientTape() as tape:
        tape.watch([query, key, value])
        out = attn_ops.scaled_dot_product_attention(query, key, value, is_causal=True)
        loss = tf.reduce_sum(tf.sin(out))
    return [out, *tape.gradient(loss, [query, key, value])]


def expected(query, key, value):
    with tf.GradientTape() as tape:
        tape.watch([query, key, value])
        scores = tf.einsum("bqhd,bkhd->bhqk", query, key) / 2
        hidden = np.arange(key.shape[1]) > np.arange(query.shape[1])[:, None]
        out = tf.einsum("bhqk,bkhd->bqhd", tf.nn.softmax(tf.where(hidden, tf.float64.min, scores)), value)
        loss = tf.reduce_sum(tf.sin(out))
    return [out, *tape.gradient(loss, [query, key, value])]


def compiled_around_a_graph(function):
    graph = tf.function(function, autograph=False)
    graph.get_concrete_function(*inputs())
    return tf.function(lambda *x: graph(*x), jit_compile=True, autograph=False)


FORMS = {
    "eager": lambda function: function,
    "graph": lambda function: tf.function(function, autograph=False),
    "unknown sizes": lambda function: tf.function(
        function, autograph=False, jit_compile=True, input_signature=[tf.TensorSpec([None, None, 2, 4], tf.float64)] * 3
    ),
    "xla": lambda function: tf.function(function, autograph=False, jit_compile=True),
    "xla around a graph": compiled_around_a_graph,
}


@pytest.mark.wide(6)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_works_without(hidden, form):
    for found, right in zip(FORMS[form](values_and_gradients)(*inputs()), expected(*inputs()), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-10, atol=1e-10)


def test_explain_tells_what_is_missing(hidden):
    explanation = attn_ops.explain(*inputs())
    assert len(explanation.notes) == 1 and hidden in explanation.notes[0]
    assert f"note: {explanation.notes[0]}" in str(explanation)


def test_nothing_is_missing_here():
    assert place.missing() == ()
    assert attn_ops.explain(*inputs()).notes == ()


def test_explain_tells_why_xla_gets_the_composite(monkeypatch):
    get = place._get
    monkeypatch.setattr(place, "_get", lambda path: None if path.endswith("call_module") else get(path))
    assert any("call_module" in reason for reason in reasons_in_xla())


def reasons_in_xla():
    reasons = []

    @tf.function(jit_compile=True, autograph=False)
    def explained(*x):
        reasons.extend(attn_ops.can_use_fused(*x).reasons)
        return x[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "in_xla", lambda: True)
        explained.get_concrete_function(*inputs())
    return reasons


def test_private_names_are_in_one_module():
    private = re.compile(r"tensorflow\.(python|core|compiler)\b|tf\.__internal__|\._set_attr\b|skip_input_indices")
    found = {
        str(path.relative_to(_PACKAGE)) for path in _PACKAGE.rglob("*.py") if private.search(path.read_text("utf-8"))
    }
    assert found == {"tensorflow/place.py"}


def test_modules_that_are_gone():
    """Where the modules themselves are missing, which earlier versions imported."""
    result = run("""
import sys
import numpy as np, tensorflow as tf
for name in ("tensorflow.compiler.tf2xla.python.xla", "tensorflow.python.ops.parallel_for.pfor",
             "tensorflow.python.eager.forwardprop_util", "tensorflow.core.framework.attr_value_pb2"):
    sys.modules[name] = None
import attn_ops
x = tf.ones([1, 3, 1, 2])
for jit_compile in (False, True):
    out = tf.function(lambda: attn_ops.scaled_dot_product_attention(x, x, x), jit_compile=jit_compile)()
    np.testing.assert_allclose(out, x)
print(attn_ops.explain(x, x, x))
""")
    assert result.returncode == 0, result.stderr
    assert "tensorflow.compiler.tf2xla.python.xla" in result.stdout


@pytest.mark.parametrize(
    "missing, wanted",
    [("tensorflow", "is not installed"), ("tensorflow.python.somewhere", "the installed tensorflow lacks")],
)
def test_what_is_said_of_a_module_that_is_missing(monkeypatch, missing, wanted):
    def missing_module(name):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(attn_ops.importlib, "import_module", missing_module)
    with pytest.raises(ImportError, match=f"{missing}.*{wanted}|{wanted}"):
        attn_ops._load("tensorflow.attention", "explain")


def test_other_peoples_pfor_is_left_alone():
    from tensorflow.python.ops.parallel_for import pfor

    assert "DeviceIndex" not in pfor._pfor_converter_registry
    x, *_ = inputs()
    stacked = tf.stack([x, 2 * x])

    def attend(x):
        return attn_ops.scaled_dot_product_attention(x, x, x)

    for function in (attend, tf.function(attend)):
        np.testing.assert_allclose(
            tf.vectorized_map(function, stacked), [attend(x), attend(2 * x)], rtol=1e-12, atol=1e-12
        )

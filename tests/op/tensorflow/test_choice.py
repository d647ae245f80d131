"""Which implementation runs, what the user is told about it, and how to force one."""

import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from attn_ops import kernels, masks, scaled_dot_product_attention
from attn_ops.tensorflow import attention, composite, gpu
from attn_ops.tensorflow.forms import plain
from cases import make_inputs
from children import run


def tensors(**sizes):
    return [tf.constant(x) for x in make_inputs("float32", **sizes)[:3]]


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setattr(kernels, "unavailable_reason", lambda: "the library is hidden by a test")


@pytest.fixture
def ran(monkeypatch):
    """The names of the implementations that ran."""
    names = []
    monkeypatch.setattr(plain, "_given", {})  # calls like those of other tests
    for name, function in list(attention.RUN.items()):
        monkeypatch.setitem(attention.RUN, name, lambda call, n=name, f=function: (names.append(n), f(call))[1])
    return names


def test_automatic_choice_is_fused(ran):
    scaled_dot_product_attention(*tensors())
    tf.function(scaled_dot_product_attention)(*tensors())
    tf.function(scaled_dot_product_attention, jit_compile=True)(*tensors())
    assert ran == ["fused", "fused", "fused"]
    explanation = attn_ops.explain(*tensors())
    assert explanation.implementation == "fused" and explanation.reasons == ()
    assert str(explanation) == "implementation: fused (op)"
    support = attn_ops.can_use_fused(*tensors())
    assert support and support.ok and support.reasons == ()


def test_without_library_the_composite_runs_and_says_why(ran, without_library):
    scaled_dot_product_attention(*tensors())
    assert ran == ["composite"]
    explanation = attn_ops.explain(*tensors(), is_causal=True, mask=masks.causal())
    assert explanation.implementation == "composite"
    assert explanation.reasons == ("the library is hidden by a test",)
    assert "not fused, because:\n  - the library is hidden by a test" in str(explanation)
    support = attn_ops.can_use_fused(*tensors())
    assert not support and support.reasons == explanation.reasons


def test_forced_fused_raises_with_all_reasons(without_library, monkeypatch):
    monkeypatch.setattr(gpu, "unsupported_reasons", lambda call, forced: ["a GPU is in use"])
    with pytest.raises(ValueError, match="'fused' cannot run: the library is hidden by a test; .*GPU"):
        scaled_dot_product_attention(*tensors(), implementation="fused")


def test_forced_fused_where_xla_takes_no_custom_call(monkeypatch):
    monkeypatch.setattr(kernels, "xla_unavailable_reason", lambda: "it is hidden by a test")

    @tf.function(jit_compile=True)
    def function(*inputs):
        explanation = attn_ops.explain(*inputs)
        assert explanation.implementation == "composite"
        return scaled_dot_product_attention(*inputs, implementation="fused")

    with pytest.raises(ValueError, match=r"'fused' cannot run: the call is traced for XLA \(jit_compile=True\), and it is"):
        function(*tensors())


def test_every_implementation_can_be_forced(ran):
    results = [scaled_dot_product_attention(*tensors(), implementation=n) for n in ("fused", "composite", "reference")]
    assert ran == ["fused", "composite", "reference"]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-5, atol=1e-6)


def test_explain_tells_what_a_forced_one_would_do():
    assert attn_ops.explain(*tensors(), implementation="reference").implementation == "reference"
    with pytest.raises(ValueError, match="explain: implementation must be None or one of 'fused'"):
        attn_ops.explain(*tensors(), implementation="flash")


def test_explain_takes_specifications():
    spec = tf.TensorSpec([None, 2**17, 64, 128], tf.bfloat16)
    assert attn_ops.explain(spec, spec, spec, is_causal=True).implementation == "fused"
    assert attn_ops.can_use_fused(spec, tf.zeros([1, 3, 8, 128], tf.bfloat16), tf.zeros([1, 3, 8, 128], tf.bfloat16))
    with pytest.raises(ValueError, match="explain: query and key must have the same head_dim, got 128, 64"):
        attn_ops.explain(spec, tf.TensorSpec([None, None, 64, 64], tf.bfloat16), spec)


def test_long_sequences_of_the_composite_are_chunked(monkeypatch, without_library):
    monkeypatch.setattr(composite, "UNCHUNKED_SCORES", 100)
    monkeypatch.setattr(composite, "CHUNK_SCORES", 50)
    inputs = tensors()
    out = scaled_dot_product_attention(*inputs, is_causal=True)
    expected, _ = attn_ops.reference.attention(*[x.numpy() for x in inputs], is_causal=True)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_environment_switches_the_fused_op_off():
    code = (
        "import attn_ops, tensorflow as tf\n"
        "print(attn_ops.explain(*[tf.zeros([1, 2, 3, 4])] * 3))\n"
        "attn_ops.scaled_dot_product_attention(*[tf.zeros([1, 2, 3, 4])] * 3)\n"
    )
    result = run(code, ATTN_OPS_DISABLE="1")
    assert result.returncode == 0, result.stderr
    assert "implementation: composite" in result.stdout and "ATTN_OPS_DISABLE" in result.stdout


@pytest.mark.parametrize("framework", ["tensorflow", "jax"])
def test_a_misspelt_instruction_set_is_a_reason(framework):
    """Not the fused op, and not an error before anybody asked for it."""
    code = {
        "tensorflow": "import attn_ops as a, numpy as np; x = np.ones((1, 3, 2, 8), 'float32')\n",
        "jax": "import attn_ops.jax as a, numpy as np; x = np.ones((1, 3, 2, 8), 'float32')\n",
    }[framework] + "print(a.explain(x, x, x)); print(float(a.scaled_dot_product_attention(x, x, x)[0, 0, 0, 0]))"
    needed = {} if framework == "tensorflow" else {"without": ()}
    result = run(code, ATTN_OPS_ISA="sse9", **needed)
    assert result.returncode == 0, result.stderr
    assert "implementation: composite" in result.stdout and result.stdout.endswith("1.0\n")
    usable = ", ".join(kernels.core().isas())
    assert f"ATTN_OPS_ISA ('sse9') must name an instruction set that is usable here: {usable}" in result.stdout
    good = run(code, ATTN_OPS_ISA="generic", **needed)
    assert "implementation: fused" in good.stdout

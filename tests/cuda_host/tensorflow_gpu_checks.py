"""Run by tensorflow_gpu.py. The device's own operations compute nothing here: inputs come from the host, gradients start
from given cotangents, and what comes back is compared on the host."""

import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from attn_ops import _native, reference
from tensorflow.python.framework import kernels

RNG = np.random.default_rng(0)
SHAPES = {"query": (2, 7, 4, 16), "key": (2, 9, 2, 16), "value": (2, 9, 2, 24)}
MASK = RNG.random((2, 1, 7, 9)) < 0.8
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True, "causal_alignment": "bottom_right"},
    "lengths": {"query_seq_lengths": np.int32([7, 3]), "key_value_seq_lengths": np.int32([4, 9])},
    "mask": {"mask": MASK},
    "bias": {"bias": RNG.normal(size=(1, 4, 7, 9)).astype("float32")},
    "dropout": {"dropout_rate": 0.3, "dropout_seed": np.int64([5, 2**40])},
}


def arrays(dtype="float32"):
    rng = np.random.default_rng(1)
    inputs = [rng.normal(size=shape).astype(dtype) for shape in SHAPES.values()]
    return inputs, rng.normal(size=(2, 7, 4, 24)).astype(dtype), rng.normal(size=(2, 4, 7)).astype("float32")


def step(inputs, d_out, d_lse, options):
    tensors = [tf.constant(x) for x in inputs]
    options = {name: tf.constant(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    watched = tensors + ([options["bias"]] if "bias" in options else [])
    with tf.GradientTape() as tape:
        tape.watch(watched)
        results = attn_ops.scaled_dot_product_attention(*tensors, **options, return_lse=True)
    gradients = tape.gradient(results, watched, output_gradients=[tf.constant(d_out), tf.constant(d_lse)])
    return [*results, *gradients]


def expected(inputs, d_out, d_lse, options):
    wide = [x.astype("float64") for x in inputs]
    results = reference.attention(*wide, **options)
    gradients = reference.attention_gradients(*wide, **options, d_out=d_out.astype("float64"), d_lse=d_lse)
    return [*results, *[x for x in gradients if x is not None]]


def test_there_is_a_gpu():
    assert tf.config.list_logical_devices("GPU")
    registered = kernels.get_registered_kernels_for_op("AttnOps>Forward").kernel
    assert [k.device_type for k in registered].count("GPU") == 3


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "function"])
def test_numbers(name, traced):
    inputs, d_out, d_lse = arrays()
    run = tf.function(lambda: step(inputs, d_out, d_lse, OPTIONS[name])) if traced else None
    results = run() if traced else step(inputs, d_out, d_lse, OPTIONS[name])
    wanted = expected(inputs, d_out, d_lse, OPTIONS[name])
    assert len(results) == len(wanted)
    for result, reference_result in zip(results, wanted):
        assert "GPU:0" in result.device
        np.testing.assert_allclose(result.numpy(), reference_result, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [("float16", 1e-2), ("bfloat16", 8e-2)])
def test_half_precision(dtype, tolerance):
    dtype = tf.as_dtype(dtype).as_numpy_dtype
    inputs, d_out, d_lse = arrays(dtype)
    results = step(inputs, d_out, d_lse, {})
    for result, wanted in zip(results, expected(inputs, d_out, d_lse, {})):
        np.testing.assert_allclose(result.numpy().astype("float64"), wanted, rtol=tolerance, atol=tolerance)


def test_what_explain_says():
    tensors = [tf.constant(x) for x in arrays()[0]]
    assert str(attn_ops.explain(*tensors)) == "implementation: fused (op on the GPU)"
    double = [tf.constant(x.astype("float64")) for x in arrays()[0]]
    explanation = attn_ops.explain(*double)
    assert explanation.implementation == "composite" and "float64" in explanation.reasons[0]
    with tf.device("CPU"):
        assert str(attn_ops.explain(*tensors)) == "implementation: fused (op)"


def test_under_a_cpu_scope_the_cpu_computes():
    inputs, d_out, d_lse = arrays()
    with tf.device("CPU"):
        results = step(inputs, d_out, d_lse, {})
    assert all("CPU:0" in result.device for result in results)


def raw(q):
    return _native.library().attn_ops_forward(q, q, q, [], [], [], [], [])


def test_float64_is_put_on_the_cpu():
    out, _ = _native.library().attn_ops_forward(
        *[tf.constant(x.astype("float64")) for x in arrays()[0]], [], [], [], [], [], Tlse=tf.float64
    )
    assert "CPU:0" in out.device


def test_errors(monkeypatch):
    with pytest.raises(tf.errors.UnimplementedError, match="AttnOps>Forward: head_dim and value_dim must be at most 256"):
        raw(tf.constant(np.zeros((1, 2, 1, 300), "float32")))
    with pytest.raises(tf.errors.InvalidArgumentError, match="AttnOps>Forward: q must have rank 4"):
        raw(tf.constant(np.zeros((2, 3), "float32")))
    # Lengths out of range are not looked at: that would be waiting for the device.
    q = tf.constant(np.zeros((1, 2, 1, 8), "float32"))
    _native.library().attn_ops_forward(q, q, q, [], [], [], [tf.constant(np.int32([2]))], [])


def test_the_libraries_own_errors(monkeypatch):
    import ctypes

    # The environment as C sees it.
    libc = ctypes.CDLL(None)
    libc.setenv(b"ATTN_OPS_TEST_FAIL", b"1", 1)
    try:
        with pytest.raises(tf.errors.InternalError, match="AttnOps>Forward: a test wants an error"):
            raw(tf.constant(np.zeros((1, 2, 1, 8), "float32")))
    finally:
        libc.unsetenv(b"ATTN_OPS_TEST_FAIL")

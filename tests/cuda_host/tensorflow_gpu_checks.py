"""Run by tensorflow_gpu.py. The device's own operations compute nothing here: inputs come from the host, gradients start
from given cotangents, and what comes back is compared on the host."""

import ctypes

import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from attn_ops import reference
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


def step(inputs, cotangents, options):
    watched = [*inputs, *([options["bias"]] if "bias" in options else [])]
    with tf.GradientTape() as tape:
        tape.watch(watched)
        results = attn_ops.scaled_dot_product_attention(*inputs, **options, return_lse=True)
    return [*results, *tape.gradient(results, watched, output_gradients=cotangents)]


def on_device(inputs, d_out, d_lse, options):
    """Arguments of `step`. As tensors from outside: constants of XLA would need the device's code."""
    options = {name: tf.constant(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    return [tf.constant(x) for x in inputs], [tf.constant(d_out), tf.constant(d_lse)], options


def expected(inputs, d_out, d_lse, options):
    wide = [x.astype("float64") for x in inputs]
    results = reference.attention(*wide, **options)
    gradients = reference.attention_gradients(*wide, **options, d_out=d_out.astype("float64"), d_lse=d_lse)
    return [*results, *[x for x in gradients if x is not None]]


def test_there_is_a_gpu():
    assert tf.config.list_logical_devices("GPU")
    registered = kernels.get_registered_kernels_for_op("AttnOps>Forward").kernel
    assert [k.device_type for k in registered].count("GPU") == 3


FORMS = {"eager": step, "function": tf.function(step), "xla": tf.function(step, jit_compile=True)}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_numbers(name, form):
    case = *arrays(), OPTIONS[name]
    results, wanted = FORMS[form](*on_device(*case)), expected(*case)
    assert len(results) == len(wanted)
    for result, reference_result in zip(results, wanted):
        assert "GPU:0" in result.device
        np.testing.assert_allclose(result.numpy(), reference_result, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [("float16", 1e-2), ("bfloat16", 8e-2)])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision(dtype, tolerance, form):
    case = *arrays(tf.as_dtype(dtype).as_numpy_dtype), {}
    for result, wanted in zip(FORMS[form](*on_device(*case)), expected(*case)):
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
    with tf.device("CPU"):
        results = step(*on_device(*arrays(), {}))
    assert all("CPU:0" in result.device for result in results)


def raw(q):
    return kernels.library().attn_ops_forward(q, q, q, *[[]] * 12)


def test_float64_is_put_on_the_cpu():
    out, _ = kernels.library().attn_ops_forward(
        *[tf.constant(x.astype("float64")) for x in arrays()[0]], *[[]] * 12, Tlse=tf.float64
    )
    assert "CPU:0" in out.device


@tf.function(jit_compile=True)
def compiled(q):
    return attn_ops.scaled_dot_product_attention(q, q, q, implementation="fused")


def zeros(*shape):
    return tf.constant(np.zeros(shape, "float32"))


def test_errors():
    too_wide = "head_dim and value_dim must be at most 256"
    with pytest.raises(tf.errors.UnimplementedError, match=f"AttnOps>Forward: {too_wide}"):
        raw(zeros(1, 2, 1, 300))
    with pytest.raises(tf.errors.InvalidArgumentError, match="AttnOps>Forward: q must have rank 4"):
        raw(zeros(2, 3))
    with pytest.raises(ValueError, match=f"'fused' cannot run: a GPU is in use, and {too_wide}"):
        compiled(zeros(1, 2, 1, 300))
    open_dims = compiled.get_concrete_function(tf.TensorSpec([1, 2, 1, None]))
    with pytest.raises(tf.errors.UnimplementedError, match=f"attn_ops.forward: {too_wide}"):
        open_dims(zeros(1, 2, 1, 300))


def test_lengths_out_of_range_are_not_looked_at():
    """That would be waiting for the device. The kernels clamp them."""
    q = zeros(1, 2, 1, 8)
    kernels.library().attn_ops_forward(q, q, q, [], [], [], [tf.constant(np.int32([3]))], *[[]] * 8)


def test_the_libraries_own_errors():
    libc = ctypes.CDLL(None)  # os.environ is read before C's functions see it
    libc.setenv(b"ATTN_OPS_TEST_FAIL", b"1", 1)
    try:
        with pytest.raises(tf.errors.InternalError, match="AttnOps>Forward: a test wants an error"):
            raw(zeros(1, 2, 1, 8))
        with pytest.raises(tf.errors.InternalError, match="attn_ops.forward: a test wants an error"):
            compiled(zeros(1, 2, 1, 8))
    finally:
        libc.unsetenv(b"ATTN_OPS_TEST_FAIL")

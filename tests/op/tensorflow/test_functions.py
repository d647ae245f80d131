"""The op inside TensorFlow: functions of unknown sizes, control flow, tf.data, saved models, strategies."""

import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from attn_ops import reference, scaled_dot_product_attention
from cases import make_inputs
from children import run

both = pytest.mark.parametrize("chosen", ["fused", "composite"])


def tensors(dtype="float64", **sizes):
    """query, key, value as tensors, small."""
    sizes = {"batch": 1, "seqlen_q": 3, "seqlen_k": 4, "num_heads": 2, "num_kv_heads": 1, "head_dim": 3, **sizes}
    return [tf.constant(x) for x in make_inputs(dtype, **sizes)[:3]]


def specs(dtype=tf.float32, rank=4):
    return [tf.TensorSpec([None] * rank, dtype)] * 3


@both
def test_one_trace_serves_all_sizes(chosen):
    traces = []

    @tf.function(input_signature=specs(tf.float64))
    def function(query, key, value):
        traces.append(1)
        out = scaled_dot_product_attention(query, key, value, is_causal=True, implementation=chosen)
        assert out.shape.rank == 4
        return out

    for sizes in (dict(), dict(batch=3, seqlen_q=1), dict(seqlen_k=0), dict(num_heads=6, num_kv_heads=3, head_dim=5)):
        inputs = tensors(**sizes)
        expected, _ = reference.attention(*[x.numpy() for x in inputs], is_causal=True)
        np.testing.assert_allclose(function(*inputs), expected, rtol=1e-12, atol=1e-13)
    assert len(traces) == 1


@both
def test_known_dimensions_reach_the_result(chosen):
    @tf.function
    def function(query, key, value):
        out, lse = scaled_dot_product_attention(query, key, value, return_lse=True, implementation=chosen)
        return out, lse, *tf.gradients([out, lse], [query, key, value])

    shapes = [[None, None, 4, 8], [None, 7, 2, 8], [None, 7, 2, 3]]
    results = function.get_concrete_function(*[tf.TensorSpec(s, tf.float32) for s in shapes]).structured_outputs
    known = [x.shape.as_list() for x in results]
    assert known[:2] == [[None, None, 4, 3], [None, 4, None]]
    assert [s[1:] for s in known[2:]] == [[None, 4, 8], [7, 2, 8], [7, 2, 3]]


@both
@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
def test_what_is_known_beside_an_unknown_batch_reaches_the_results(chosen, layout):
    shape, found = [None, 5, 2, 4] if layout == "BSHD" else [None, 2, 5, 4], []

    @tf.function(input_signature=[tf.TensorSpec(shape)])
    def function(x):
        results = scaled_dot_product_attention(x, x, x, layout=layout, return_lse=True, implementation=chosen)
        found.extend(x.shape.as_list() for x in results)
        return results

    function.get_concrete_function()
    assert found == [shape, [None, 2, 5]]


@both
def test_unknown_rank(chosen):
    @tf.function(input_signature=[tf.TensorSpec(None, tf.float64)] * 4)
    def function(query, key, value, bias):
        with tf.GradientTape() as tape:
            tape.watch(query)
            out = scaled_dot_product_attention(query, key, value, bias=bias, implementation=chosen)
        return out, tape.gradient(out, query)

    inputs = tensors()
    bias = tf.zeros([1, 1, 1, 4], tf.float64)
    out, gradient = function(*inputs, bias)
    np.testing.assert_allclose(out, reference.attention(*[x.numpy() for x in inputs])[0], rtol=1e-12)
    assert gradient.shape == inputs[0].shape


@both
def test_inside_control_flow(chosen):
    inputs = tensors()

    @tf.function
    def function(steps, query, key, value):
        for _ in tf.range(steps):
            if tf.reduce_sum(query) < 1e9:
                query = scaled_dot_product_attention(query, key, value, implementation=chosen)
            else:
                query = -query
        return query

    with tf.GradientTape() as tape:
        tape.watch(inputs)
        out = function(3, *inputs)
    expected = inputs[0].numpy()
    for _ in range(3):
        expected, _ = reference.attention(expected, *[x.numpy() for x in inputs[1:]])
    np.testing.assert_allclose(out, expected, rtol=1e-12)
    assert all(np.isfinite(g).all() for g in tape.gradient(out, inputs))


@both
def test_map_of_a_dataset(chosen):
    inputs = make_inputs("float64", batch=4)[:3]
    dataset = tf.data.Dataset.from_tensor_slices(inputs)

    def attend(*one):
        return scaled_dot_product_attention(*[x[None] for x in one], implementation=chosen)[0]

    found = np.stack(list(dataset.map(attend, num_parallel_calls=2).as_numpy_iterator()))
    np.testing.assert_allclose(found, reference.attention(*inputs)[0], rtol=1e-12)


@both
def test_saved_model_keeps_the_op_and_differentiates(chosen, tmp_path):
    class Model(tf.Module):
        @tf.function(input_signature=specs())
        def attend(self, query, key, value):
            return scaled_dot_product_attention(query, key, value, is_causal=True, implementation=chosen)

    inputs = tensors("float32")
    tf.saved_model.save(Model(), str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path)).attend

    def results(function):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            out = function(*inputs)
        return out, *tape.gradient(out, inputs)

    def direct(*inputs):
        return scaled_dot_product_attention(*inputs, is_causal=True, implementation=chosen)

    for found, expected in zip(results(loaded), results(direct)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    saved = (tmp_path / "saved_model.pb").read_bytes()
    assert (b"AttnOps>Forward" in saved) == (chosen == "fused")


def test_saved_model_loads_in_another_process(tmp_path):
    model = tf.Module()
    model.attend = tf.function(
        lambda *x: scaled_dot_product_attention(*x, implementation="fused"), input_signature=specs()
    )
    # Without its gradients, for which those that the other process has are not to be taken.
    tf.saved_model.save(model, str(tmp_path), options=tf.saved_model.SaveOptions(experimental_custom_gradients=False))
    code = """
import sys, attn_ops, tensorflow as tf
x = [tf.random.stateless_normal([1, 2, 3, 4], [i, 0]) for i in range(3)]
def gradients(function):
    with tf.GradientTape() as tape:
        tape.watch(x)
        out = function(*x)
    return tape.gradient(out, x)
gradients(tf.function(lambda *x: attn_ops.scaled_dot_product_attention(*x, is_causal=True)))
attend = tf.saved_model.load(sys.argv[1]).attend
tf.debugging.assert_near(attend(*x), attn_ops.scaled_dot_product_attention(*x))
try:
    gradients(attend)
except LookupError as error:
    assert "No gradient defined" in str(error), error
else:
    sys.exit("a gradient was found")
"""
    result = run(code, str(tmp_path))
    assert result.returncode == 0, result.stderr


def test_functions_that_autograph_converts():
    @tf.function
    def function(query, key, value, causal):
        if causal:
            return attn_ops.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attn_ops.scaled_dot_product_attention(query, key, value)

    inputs = tensors()
    arrays = [x.numpy() for x in inputs]
    for causal in (True, False):
        expected, _ = reference.attention(*arrays, is_causal=causal)
        np.testing.assert_allclose(function(*inputs, tf.constant(causal)), expected, rtol=1e-12)


@both
def test_numpy_arrays_variables_and_lists_are_tensors(chosen):
    arrays = make_inputs("float64", 1, 3, 4, 2, 1, 3)[:3]
    expected, _ = reference.attention(*arrays)
    for convert in (np.asarray, tf.Variable, np.ndarray.tolist):
        inputs = [convert(x) for x in arrays]
        # Lists of Python floats become float32, as everywhere in TensorFlow.
        rtol = 1e-5 if convert is np.ndarray.tolist else 1e-12
        out = scaled_dot_product_attention(*inputs, implementation=chosen)
        np.testing.assert_allclose(out, expected, rtol=rtol)


def test_variables_get_gradients():
    variables = [tf.Variable(x) for x in make_inputs("float64", 1, 3, 4, 2, 1, 3)[:3]]
    with tf.GradientTape() as tape:
        out = scaled_dot_product_attention(*variables)
    assert all(g is not None for g in tape.gradient(out, variables))


def test_reference_in_a_graph():
    inputs = tensors()

    @tf.function
    def function(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            out = scaled_dot_product_attention(*inputs, is_causal=True, implementation="reference")
        assert out.shape == (1, 3, 2, 3)
        return out, *tape.gradient(out, inputs)

    arrays = [x.numpy() for x in inputs]
    out, _ = reference.attention(*arrays, is_causal=True)
    gradients = reference.attention_gradients(*arrays, d_out=np.ones_like(out), is_causal=True)
    for found, expected in zip(function(*inputs), (out, *gradients)):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


MIRRORED = """
import tensorflow as tf
from attn_ops import scaled_dot_product_attention

cpu, = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    scale = tf.Variable(1.0)

@tf.function
def step(x):
    def replica(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(scaled_dot_product_attention(scale * x, x, x, implementation="fused") ** 2)
        return tape.gradient(loss, scale)
    return strategy.reduce("sum", strategy.run(replica, args=(x,)), axis=None)

x = tf.random.stateless_normal([4, 5, 2, 3], [1, 2])
with tf.GradientTape() as tape:
    loss = tf.reduce_sum(scaled_dot_product_attention(scale * x, x, x) ** 2)
expected = tape.gradient(loss, scale)
data = strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensor_slices(x).batch(4))
tf.debugging.assert_near(step(next(iter(data))), expected, rtol=1e-4)
"""


def test_mirrored_strategy():
    result = run(MIRRORED)
    assert result.returncode == 0, result.stderr

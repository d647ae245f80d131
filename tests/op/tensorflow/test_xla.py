"""Functions that XLA compiles call the kernels, however deep the trace is, and whenever it was made; and never fail."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from attn_ops import (
    attention_weights,
    explain,
    export,
    layers,
    paged_attention,
    reference,
    scaled_dot_product_attention,
)
from cases import make_inputs
from children import run

CALL = 'custom_call_target="attn_ops.'


def tensors():
    return [tf.constant(x) for x in make_inputs("float32", 1, 5, 5, 2, 1, 4)[:3]]


def expected(inputs, **options):
    return reference.attention(*[x.numpy() for x in inputs], **options)[0]


def custom_calls(function, *inputs):
    """Which of our custom calls are in what XLA compiles of a `tf.function`, in order."""
    hlo = function.experimental_get_compiler_ir(*inputs)(stage="hlo")
    return [part[: part.index('"')] for part in hlo.split(CALL)[1:]]


def attend(query, key, value):
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def through_nested_function(*inputs):
    return tf.function(attend)(*inputs)


def through_while(query, key, value):
    _, out = tf.while_loop(lambda i, _: i < 1, lambda i, _: (i + 1, attend(query, key, value)), [0, query])
    return out


def through_cond(query, key, value):
    return tf.cond(query[0, 0, 0, 0] < 1e9, lambda: attend(query, key, value), lambda: query)


def through_switch_case(query, key, value):
    """Of what is added to the result, before it and in it: XLA looks into that for constants."""
    which = tf.cast(query[0, 0, 0, 0] > 1e9, tf.int32)
    out = attend(query, key, value) + query
    return tf.switch_case(which, [lambda: attend(query, key, value) * 3 + out - 3 * (out - query) - query, lambda: out])


def through_function_in_while_in_cond(query, key, value):
    return tf.cond(query[0, 0, 0, 0] < 1e9, lambda: through_while(query, key, value), lambda: query)


def through_custom_gradient(*inputs):
    @tf.custom_gradient
    def function(*x):
        return attend(*x), lambda d: (d, None, None)

    return function(*inputs)


def through_map(query, key, value):
    return tf.map_fn(lambda x: attend(*(y[None] for y in x))[0], (query, key, value), fn_output_signature=tf.float32)


def through_vectorized_map(query, key, value):
    return tf.vectorized_map(lambda x: attend(*(y[None] for y in x))[0], (query, key, value))


# Traced before, outside XLA, as a function that somebody else may compile.
TRACED_BEFORE = tf.function(attend)
TRACED_BEFORE(*tensors())
TRACED_WITHOUT_SHAPES = tf.function(attend, input_signature=[tf.TensorSpec(None)] * 3)
TRACED_WITHOUT_SHAPES.get_concrete_function()


def through_function_traced_before(*inputs):
    return TRACED_BEFORE(*inputs)


def through_function_traced_without_shapes(*inputs):
    return TRACED_WITHOUT_SHAPES(*inputs)


WAYS = [
    attend,
    through_nested_function,
    through_while,
    through_cond,
    through_switch_case,
    through_function_in_while_in_cond,
    through_custom_gradient,
    through_map,
    through_vectorized_map,
    through_function_traced_before,
    through_function_traced_without_shapes,
]


@pytest.mark.parametrize("way", WAYS)
def test_the_kernel_runs_inside(way):
    inputs = tensors()
    function = tf.function(way, jit_compile=True)
    np.testing.assert_allclose(function(*inputs), expected(inputs, is_causal=True), rtol=1e-5, atol=1e-6)
    assert set(custom_calls(function, *inputs)) == {"forward"}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_function_runs_without_xla(way):
    inputs = tensors()
    np.testing.assert_allclose(tf.function(way)(*inputs), expected(inputs, is_causal=True), rtol=1e-5, atol=1e-6)


def loss_and_gradients(function, inputs):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = tf.reduce_sum(function(*inputs) ** 2)
    return [loss, *tape.gradient(loss, inputs)]


def assert_same(results, wanted):
    for a, b in zip(results, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "way", [attend, through_nested_function, through_cond, through_switch_case, through_function_traced_before]
)
def test_gradient_taken_outside_of_the_compiled_function(way):
    inputs = tensors()
    wanted = loss_and_gradients(attend, inputs)
    assert_same(loss_and_gradients(tf.function(way, jit_compile=True), inputs), wanted)


@pytest.mark.parametrize(
    "way",
    [attend, through_nested_function, through_cond, through_function_traced_before, tf.recompute_grad(attend)],
)
def test_gradient_taken_inside(way):
    inputs = tensors()
    compiled = tf.function(lambda *x: loss_and_gradients(way, x), jit_compile=True)
    assert_same(compiled(*inputs), loss_and_gradients(attend, inputs))
    assert "backward" in custom_calls(compiled, *inputs)


def test_gradient_through_a_while_loop():
    inputs = tensors()

    def looped(query, key, value):
        _, out = tf.while_loop(
            lambda i, _: i < 3, lambda i, x: (i + 1, attend(x, key, value)), [0, query], maximum_iterations=3
        )
        return out

    compiled = tf.function(lambda *x: loss_and_gradients(looped, x), jit_compile=True)
    assert_same(compiled(*inputs), loss_and_gradients(lambda q, k, v: attend(attend(attend(q, k, v), k, v), k, v), inputs))


def test_gradient_of_a_function_with_gradient_traced_before():
    inputs = tensors()
    before = tf.function(lambda *x: loss_and_gradients(attend, x))
    wanted = before(*inputs)
    compiled = tf.function(lambda *x: before(*x), jit_compile=True)
    assert_same(compiled(*inputs), wanted)
    assert custom_calls(compiled, *inputs) == ["forward", "backward"]


@pytest.mark.parametrize("ops, calls", [("fused", ["forward"]), ("composite", [])])
def test_export_compiled_after_loading(tmp_path, ops, calls):
    inputs = keras.Input((None, 8))
    exported = keras.Model(inputs, layers.MultiHeadAttention(num_heads=2, key_dim=4)(inputs, inputs))
    export(exported, tmp_path, ops=ops, verbose=False)
    loaded = tf.saved_model.load(tmp_path)
    compiled = tf.function(lambda x: loaded.serve(x), jit_compile=True)
    x = tf.random.stateless_normal([3, 5, 8], seed=[1, 2])
    for function in (compiled, loaded.serve):
        np.testing.assert_allclose(function(x), exported(x), rtol=1e-5, atol=1e-6)
    assert custom_calls(compiled, x) == calls


def test_second_order_inside():
    inputs = tensors()

    def penalty(*inputs):
        with tf.GradientTape() as outer:
            outer.watch(inputs)
            _, *gradients = loss_and_gradients(attend, inputs)
            norm = tf.add_n([tf.reduce_sum(g**2) for g in gradients])
        return outer.gradient(norm, inputs)

    for a, b in zip(tf.function(penalty, jit_compile=True)(*inputs), penalty(*inputs)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("which, wrong", [("query_seq_lengths", 7), ("key_value_seq_lengths", 7), ("key_value_seq_lengths", -1)])
def test_entries_with_lengths_out_of_range_are_nan_in_the_composite(which, wrong):
    """XLA has no assertions. Their neighbours, and the gradients of those, are what they are alone."""

    @tf.function(jit_compile=True)
    def run(x, lengths):
        options = {which: lengths, "implementation": "composite"}
        with tf.GradientTape() as tape:
            tape.watch(x)
            out, lse = scaled_dot_product_attention(x, x, x, return_lse=True, **options)
            loss = tf.reduce_sum(tf.square(out[0]))
        return out, lse, tape.gradient(loss, x), attention_weights(x, x, **options)

    x = tf.random.stateless_normal([2, 5, 2, 4], [1, 2])
    results, right = run(x, tf.constant([3, wrong])), run(x[:1], tf.constant([3]))
    for result, alone in zip(results, right):
        np.testing.assert_allclose(result[0], alone[0], rtol=1e-5, atol=1e-6)
    out, lse, _, weights = results
    assert all(np.isnan(x[1]).all() for x in (out, lse, weights))


def test_pages_that_are_none_are_nan_in_the_composite():
    q, pages = tf.ones([3, 1, 2, 4]), tf.random.stateless_normal([4, 16, 2, 4], [1, 2])

    @tf.function(jit_compile=True)
    def run(table, lengths):
        return paged_attention(q, pages, pages, table, lengths, implementation="composite")

    # An entry that no length reaches may be anything.
    table, lengths = [[1, 9], [1, 9], [2, 3]], [20, 16, 33]
    out = run(tf.constant(table), tf.constant(lengths)).numpy()
    assert np.isfinite(out[1]).all() and np.isnan(out[[0, 2]]).all()


@pytest.mark.parametrize("jit_compile", [False, True])
def test_forward_mode_in_and_around_a_function(jit_compile):
    query, key, value = tensors()
    tangent = tf.random.stateless_normal(query.shape, seed=[3, 4])

    def derivative(function, query):
        with tf.autodiff.ForwardAccumulator(query, tangent) as accumulator:
            out = function(query)
        return accumulator.jvp(out)

    def along(query):
        return attend(query, key, value)

    def inside(query):
        return derivative(along, query)

    wanted = derivative(along, query)
    np.testing.assert_allclose(tf.function(inside, jit_compile=jit_compile)(query), wanted, rtol=1e-4, atol=1e-5)
    compiled = tf.function(along, jit_compile=jit_compile)
    np.testing.assert_allclose(derivative(compiled, query), wanted, rtol=1e-4, atol=1e-5)


def test_clusters_made_by_tensorflow():
    """On CPUs only a flag that is read at the start makes them; TensorFlow's log tells that there was one."""
    program = """
import numpy as np, tensorflow as tf
from attn_ops import scaled_dot_product_attention
x = [tf.constant(np.random.default_rng(i).normal(size=(1, 5, 2, 4)), tf.float32) for i in range(3)]
def gradients(*x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        out = 2 * tf.tanh(scaled_dot_product_attention(*(2 * tf.exp(y) + 1 for y in x), is_causal=True)) + 1
    return [out, *tape.gradient(out, x)]
for result, right in zip(tf.function(gradients)(*x), gradients(*x)):
    np.testing.assert_allclose(result, right, rtol=1e-4, atol=1e-5)
"""
    flags = "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit --tf_xla_min_cluster_size=1"
    done = run(program, TF_XLA_FLAGS=flags, TF_CPP_MIN_LOG_LEVEL="0")
    assert done.returncode == 0, done.stderr
    assert "Compiled cluster using XLA" in done.stderr


def test_fresh_dropout_differs_between_calls():
    inputs = tensors()
    function = tf.function(lambda *x: scaled_dot_product_attention(*x, dropout_rate=0.5), jit_compile=True)
    assert (function(*inputs).numpy() != function(*inputs).numpy()).any()


def test_lengths_of_64_bits():
    inputs = tensors()
    function = tf.function(lambda n, *x: scaled_dot_product_attention(*x, key_value_seq_lengths=n), jit_compile=True)
    out = function(tf.constant([3], tf.int64), *inputs)
    np.testing.assert_allclose(out, expected(inputs, key_value_seq_lengths=np.array([3])), rtol=1e-5, atol=1e-6)


def test_bad_input_known_only_when_it_runs():
    inputs = tensors()
    function = tf.function(lambda n, *x: scaled_dot_product_attention(*x, key_value_seq_lengths=n), jit_compile=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"key_lengths\[0\] \(6\) must be from 0 to seqlen_k \(5\)"):
        function(tf.constant([6]), *inputs)
    unknown = tf.function(attend, jit_compile=True, input_signature=[tf.TensorSpec([None] * 4)] * 3)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"num_heads \(3\) must be a multiple of num_kv_heads \(2\)"):
        unknown(tf.zeros([1, 5, 3, 4]), tf.zeros([1, 5, 2, 4]), tf.zeros([1, 5, 2, 4]))


def test_explanation_tells_the_form():
    found = {}

    def function(query, key, value):
        found["traced"] = explain(query, key, value)
        with pytest.raises(ValueError, match="'reference' cannot run: .*XLA"):
            scaled_dot_product_attention(query, key, value, implementation="reference")
        return scaled_dot_product_attention(query, key, value, implementation="fused")

    tf.function(function, jit_compile=True)(*tensors())
    assert found["traced"].implementation == "fused" and found["traced"].form == "xla"
    in_graph = []
    tf.function(lambda *x: in_graph.append(explain(*x)))(*tensors())
    assert in_graph[0].form == "op or xla"
    assert explain(*tensors()).form == "op"
    assert str(explain(*tensors())) == "implementation: fused (op)"
    assert explain(*tensors(), implementation="composite").form is None


def test_eager_run_of_a_compiled_function_is_no_trace():
    tf.config.run_functions_eagerly(True)
    try:
        explanation = tf.function(explain, jit_compile=True)(*tensors())
    finally:
        tf.config.run_functions_eagerly(False)
    assert explanation.form == "op"


def test_without_the_custom_call_it_is_the_composite():
    """Where XLA does not take the custom call, compiled functions fall back, and so do those that were traced before."""
    program = """
import numpy as np, tensorflow as tf
from attn_ops import explain, scaled_dot_product_attention
x = [tf.constant(np.random.default_rng(i).normal(size=(1, 5, 2, 4)), tf.float32) for i in range(3)]
def gradients(*x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        out = scaled_dot_product_attention(*x, is_causal=True)
    return [out, *tape.gradient(out, x)]
wanted, found = gradients(*x), []
before = tf.function(gradients)
before(*x)
for function in (lambda *x: found.append(explain(*x)) or gradients(*x), lambda *x: before(*x)):
    for result, right in zip(tf.function(function, jit_compile=True)(*x), wanted):
        np.testing.assert_allclose(result, right, rtol=1e-4, atol=1e-5)
in_graph = []
tf.function(lambda *x: in_graph.append(explain(*x)))(*x)
assert in_graph[0].form == "op or composite"
assert found[0].implementation == "composite" and "ATTN_OPS_DISABLE_XLA_FFI" in found[0].reasons[0], found[0]
"""
    done = run(program, ATTN_OPS_DISABLE_XLA_FFI="1")
    assert done.returncode == 0, done.stderr


def model():
    inputs = keras.Input((None, 8))
    x = layers.MultiHeadAttention(num_heads=2, key_dim=4, dropout=0.1)(inputs, inputs, use_causal_mask=True)
    x = layers.GroupedQueryAttention(head_dim=4, num_query_heads=4, num_key_value_heads=2)(x, x)
    return keras.Model(inputs, keras.layers.Dense(1, dtype="float32")(keras.layers.GlobalAveragePooling1D()(x)))


@pytest.mark.wide(9)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("jit_compile", ["auto", True, False])
def test_keras_trains_evaluates_and_predicts(policy, jit_compile):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(22, 6, 8)).astype("float32"), rng.normal(size=(22, 1)).astype("float32")
    keras.config.set_dtype_policy(policy)
    try:
        keras.utils.set_random_seed(1)
        trained = model()
        trained.compile("adam", "mse", jit_compile=jit_compile)
        history = trained.fit(x, y, batch_size=8, epochs=4, verbose=0).history["loss"]  # the last batch has 6
        assert history[-1] < history[0]
        assert np.isfinite(trained.evaluate(x, y, batch_size=8, verbose=0))
        predicted = trained.predict(x, batch_size=8, verbose=0)
        wanted = trained(x).numpy()
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_allclose(predicted, wanted, atol=1e-5 if policy == "float32" else 3e-2)
    if jit_compile is True:
        assert trained.jit_compile, "Keras gave XLA up for this model"


def test_losses_with_and_without_xla_agree():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(22, 6, 8)).astype("float32"), rng.normal(size=(22, 1)).astype("float32")
    losses = []
    for jit_compile in (True, False):
        keras.utils.set_random_seed(1)
        trained = model()
        trained.compile("sgd", "mse", jit_compile=jit_compile)
        losses.append(trained.fit(x, y, batch_size=8, epochs=3, verbose=0).history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-4)

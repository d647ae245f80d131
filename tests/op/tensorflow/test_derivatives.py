"""Derivatives of every kind: first and second order, forward mode, tapes, recomputation, dropout, determinism."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import config

from attn_ops import reference, scaled_dot_product_attention
from cases import make_inputs

both = pytest.mark.parametrize("chosen", ["fused", "composite"])


def tensors(dtype="float64", **sizes):
    """query, key, value as tensors, small."""
    sizes = {"batch": 1, "seqlen_q": 3, "seqlen_k": 4, "num_heads": 2, "num_kv_heads": 1, "head_dim": 3, **sizes}
    return [tf.constant(x) for x in make_inputs(dtype, **sizes)[:3]]


FEATURES = {
    "plain": {},
    "causal": dict(is_causal=True, causal_alignment="bottom_right"),
    "an empty row": dict(mask=np.array([[[[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]]]], bool)),
    "dropout": dict(dropout_rate=0.4, dropout_seed=3),
    "lengths": dict(query_seq_lengths=[2], key_value_seq_lengths=[3], window=(1, 1)),
    "hidden by bias": dict(bias=np.array([[[[0.3, -np.inf, 0.0, 1.0]]]])),
}


@both
@pytest.mark.parametrize("feature", FEATURES)
def test_numeric_gradient(chosen, feature):
    def function(query, key, value):
        out, lse = scaled_dot_product_attention(
            query, key, value, return_lse=True, implementation=chosen, **FEATURES[feature]
        )
        return tf.reduce_sum(out**2), tf.reduce_sum(tf.where(tf.math.is_finite(lse), lse, 0.0) ** 2)

    theoretical, numeric = tf.test.compute_gradient(lambda *x: tf.add_n(function(*x)), tensors(), delta=1e-5)
    for t, n in zip(theoretical, numeric):
        np.testing.assert_allclose(t, n, rtol=1e-7, atol=1e-8)


@both
def test_numeric_gradient_of_bias_and_scale(chosen):
    query, key, value = tensors()

    def function(bias, scale):
        out = scaled_dot_product_attention(query, key, value, bias=bias, scale=scale, implementation=chosen)
        return tf.reduce_sum(out**2)

    bias = tf.constant(np.random.default_rng(0).standard_normal((1, 2, 1, 4)))
    theoretical, numeric = tf.test.compute_gradient(function, [bias, tf.constant(0.7, tf.float64)], delta=1e-5)
    for t, n in zip(theoretical, numeric):
        np.testing.assert_allclose(t, n, rtol=1e-7, atol=1e-8)


def along(inputs, directions, step):
    return [x + step * d for x, d in zip(inputs, directions)]


def assert_second_order(first_order, inputs):
    """The gradient of the scalar ``first_order``, which holds a gradient, against its difference quotient."""
    directions = [tf.constant(np.random.default_rng(i).standard_normal(x.shape)) for i, x in enumerate(inputs)]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        result = first_order(*inputs)
    gradients = tape.gradient(result, inputs)
    slope = tf.add_n([tf.reduce_sum(g * d) for g, d in zip(gradients, directions)])
    step = 1e-5
    quotient = first_order(*along(inputs, directions, step)) - first_order(*along(inputs, directions, -step))
    np.testing.assert_allclose(slope, quotient / (2 * step), rtol=1e-6)


@pytest.mark.wide(4)
@both
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("traced", [False, True])
def test_second_order(chosen, feature, traced):
    weights = [tf.constant(x) for x in make_inputs("float64", 1, 3, 4, 2, 1, 3, seed=7)[:3]]

    def slope(*inputs):
        """The derivative of a scalar along `weights`, by the gradient."""
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            out, lse = scaled_dot_product_attention(
                *inputs, return_lse=True, implementation=chosen, **FEATURES[feature]
            )
            loss = tf.reduce_sum(out**3) + tf.reduce_sum(tf.sin(tf.where(tf.math.is_finite(lse), lse, 0.0)))
        return tf.add_n([tf.reduce_sum(g * w) for g, w in zip(tape.gradient(loss, inputs), weights)])

    assert_second_order(tf.function(slope) if traced else slope, tensors())


def test_second_order_with_bias():
    query, key, value = tensors()

    def penalty(query, bias):
        with tf.GradientTape() as tape:
            tape.watch([query, bias])
            loss = tf.reduce_sum(scaled_dot_product_attention(query, key, value, bias=bias) ** 2)
        return tf.add_n([tf.reduce_sum(g**2) for g in tape.gradient(loss, [query, bias])])

    assert_second_order(penalty, [query, tf.constant(np.random.default_rng(0).standard_normal((1, 1, 3, 4)))])


@pytest.mark.wide(4)
@both
@pytest.mark.parametrize("feature", FEATURES)
def test_forward_mode(chosen, feature):
    inputs = tensors()
    tangents = [tf.constant(x) for x in make_inputs("float64", 1, 3, 4, 2, 1, 3, seed=7)[:3]]

    def function(step):
        return scaled_dot_product_attention(*along(inputs, tangents, step), implementation=chosen, **FEATURES[feature])

    with tf.autodiff.ForwardAccumulator(inputs, tangents) as accumulator:
        out = scaled_dot_product_attention(*inputs, implementation=chosen, **FEATURES[feature])
    jvp = accumulator.jvp(out)
    numeric = (function(1e-5) - function(-1e-5)) / 2e-5
    np.testing.assert_allclose(jvp, numeric, rtol=1e-7, atol=1e-8)


@pytest.mark.wide(3)
@pytest.mark.parametrize("feature", [*FEATURES, "bias", "sinks", "soft cap"])
def test_nested_forward_mode_in_a_graph(feature):
    """Along a line through inputs, and a bias or sinks, against the second difference quotient."""
    more = {"bias": (1, 2, 3, 4), "sinks": (2,)}.get(feature, ())
    more = {feature: tf.constant(np.random.default_rng(5).standard_normal(more))} if more else {}
    inputs, options = [*tensors(), *more.values()], FEATURES.get(feature, {})
    options = {"logits_soft_cap": 1.5} if feature == "soft cap" else options
    tangents = [tf.constant(np.random.default_rng(i).standard_normal(x.shape)) for i, x in enumerate(inputs)]

    def function(*x):
        return scaled_dot_product_attention(*x[:3], **dict(zip(more, x[3:])), **options)

    @tf.function(autograph=False)
    def second(*x):
        with tf.autodiff.ForwardAccumulator(x, tuple(tangents)) as outer:
            with tf.autodiff.ForwardAccumulator(x, tuple(tangents)) as inner:
                out = function(*x)
            first = inner.jvp(out)
        return outer.jvp(first)

    ends = [function(*along(inputs, tangents, step)) for step in (1e-4, 0.0, -1e-4)]
    quotient = (ends[0] - 2 * ends[1] + ends[2]) / 1e-8
    np.testing.assert_allclose(second(*inputs), quotient, rtol=1e-5, atol=1e-5)


# What hides the last key and the last row of `tensors`.
HIDDEN = np.array([[[[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]]]], bool)
HIDING = {
    "lengths and dropout": dict(
        query_seq_lengths=[2], key_value_seq_lengths=[3], dropout_rate=0.3, dropout_seed=5
    ),
    "bias and soft cap": dict(bias=np.where(HIDDEN, 0.5, -np.inf), logits_soft_cap=1.5),
    "mask, slopes and sinks": dict(mask=HIDDEN, alibi_slopes=np.array([0.3, 0.1]), sinks=np.array([0.2, 1.0])),
}


def first_order(loss, *inputs):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        value = loss(*inputs)
    return tape.gradient(value, inputs)


def tape_over_tape(loss, *inputs):
    return first_order(lambda *x: tf.add_n([tf.reduce_sum(g**2) for g in first_order(loss, *x)]), *inputs)


def forward_over_reverse(loss, *inputs):
    with tf.autodiff.ForwardAccumulator(inputs, tuple(map(tf.ones_like, inputs))) as accumulator:
        gradients = first_order(loss, *inputs)
    return accumulator.jvp(gradients)


def forward_over_forward(loss, *inputs):
    along = tuple(map(tf.ones_like, inputs))
    with tf.autodiff.ForwardAccumulator(inputs, along) as outer:
        with tf.autodiff.ForwardAccumulator(inputs, along) as inner:
            value = loss(*inputs)
        derivative = inner.jvp(value)
    return [derivative, outer.jvp(derivative)]


def of_a_vectorized_map(loss, *inputs):
    def total(query, *others):
        return tf.reduce_sum(tf.vectorized_map(lambda factor: loss(factor * query, *others), tf.ones(2, query.dtype)))

    return first_order(total, *inputs)


def of_a_jacobian(loss, *inputs):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        with tf.GradientTape() as inner:
            inner.watch(inputs)
            value = tf.stack([loss(*inputs), tf.sin(loss(*inputs))])
        jacobian = inner.jacobian(value, inputs[1])
        penalty = tf.reduce_sum(jacobian**2)
    return tape.gradient(penalty, inputs)


def hessian_of_queries(loss, *inputs):
    return tf.hessians(loss(*inputs), inputs[0])


@pytest.mark.wide(5)
@pytest.mark.parametrize("feature", HIDING)
@pytest.mark.parametrize(
    "derivative, traced",
    [
        (tape_over_tape, False),
        (tape_over_tape, True),
        (forward_over_reverse, False),
        (forward_over_reverse, True),
        (forward_over_forward, True),
        (of_a_vectorized_map, True),
        (of_a_jacobian, True),
        (hessian_of_queries, True),
    ],
)
@pytest.mark.parametrize("chosen", [None, "composite"])
def test_what_is_hidden_does_not_count_in_other_derivatives(chosen, derivative, traced, feature):
    """They are what they are beside zeros."""
    zeros = tensors()
    zeros[0] *= np.array([1, 1, 0])[:, None, None]
    zeros[1:] = (x * np.array([1, 1, 1, 0])[:, None, None] for x in zeros[1:])
    hidden = [tf.where(x == 0, tf.constant(bad, x.dtype), x) for x, bad in zip(zeros, (np.inf, np.nan, np.nan))]

    def run(*inputs):
        def loss(*x):
            return tf.reduce_sum(tf.sin(scaled_dot_product_attention(*x, implementation=chosen, **HIDING[feature])))

        return derivative(loss, *inputs)

    run = tf.function(run, autograph=False) if traced else run
    for x, y in zip(run(*hidden), run(*zeros), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)


@both
def test_what_counts_and_is_nan_makes_second_derivatives_of_nan(chosen):
    query, key, value = tensors(batch=2)
    key += tf.constant([[0, np.nan, 0, 0], [0] * 4], "float64")[:, :, None, None]

    def loss(*x):
        return tf.reduce_sum(scaled_dot_product_attention(*x, is_causal=True, implementation=chosen))

    for gradient in tape_over_tape(loss, query, key, value):
        assert np.isnan(gradient[0, 1]).all() and np.isfinite(gradient[1]).all()


@both
def test_persistent_and_nested_tapes(chosen):
    query, key, value = tensors()
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([query, key, value])
        with tf.GradientTape() as inner:
            inner.watch(key)
            out, lse = scaled_dot_product_attention(query, key, value, return_lse=True, implementation=chosen)
        first = inner.gradient(out, key)
    np.testing.assert_array_equal(tape.gradient(out, key), first)
    np.testing.assert_array_equal(tape.gradient(out, key), tape.gradient(out, key))
    np.testing.assert_array_equal(tape.gradient(lse, value), np.zeros_like(value))
    assert tape.gradient(out, query) is not None


@both
@pytest.mark.parametrize("vectorised", [False, True])
def test_jacobian(chosen, vectorised):
    query, key, value = tensors()
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(value)
        out = scaled_dot_product_attention(query, key, value, implementation=chosen)
    jacobian = tape.jacobian(out, value, experimental_use_pfor=vectorised)
    # The output is linear in the values: the Jacobian holds the weights.
    weights = reference.attention_weights(query.numpy(), key.numpy())[0]
    np.testing.assert_allclose(jacobian[0, :, :, 0, 0, :, 0, 0], weights.swapaxes(0, 1), rtol=1e-12)


@both
def test_only_the_watched_bias_gets_a_gradient(chosen):
    query, key, value = tensors()
    bias = tf.zeros([1, 2, 3, 4], tf.float64)
    for watched in (query, bias):
        with tf.GradientTape() as tape:
            tape.watch(watched)
            out = scaled_dot_product_attention(query, key, value, bias=bias, implementation=chosen)
        gradient = tape.gradient(out, [query, bias])
        assert [g is not None for g in gradient] == [watched is query, watched is bias]
        assert gradient[watched is bias].shape == watched.shape


@pytest.mark.parametrize("jit_compile", [False, True])
def test_the_gradient_of_a_constant_bias_is_not_computed(jit_compile):
    """In graphs that a tape looks into. Without a tape there, as where a function is differentiated as a whole, all that
    might be asked for is there."""
    query, key, value = tensors("float32")
    given = tf.random.stateless_normal([1, 2, 3, 4], [1, 2])

    def attend(query, bias):
        return tf.reduce_sum(tf.sin(scaled_dot_product_attention(query, key, value, bias=bias)))

    def gradients(query, bias, watched):
        with tf.GradientTape() as tape:
            tape.watch(watched(query, bias))
            loss = attend(query, 2 * bias)
        return tape.gradient(loss, watched(query, bias))

    def computed(watched):
        """Whether a backward gives it; and the gradients."""
        function = tf.function(lambda *x: gradients(*x, watched), jit_compile=jit_compile, autograph=False)
        graph = function.get_concrete_function(query, given).graph.as_graph_def()
        nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
        found = [n.attr["d_bias"].b for n in nodes if n.op == "AttnOps>Backward"]
        found += [b"d_bias = true" in n.attr["module"].s for n in nodes if b"attn_ops.backward" in n.attr["module"].s]
        assert found and len(set(found)) == 1
        return found[0], function(query, given)

    alone, both = computed(lambda query, bias: [query]), computed(lambda query, bias: [query, bias])
    assert (alone[0], both[0]) == (False, True)
    expected = gradients(query, given, lambda *x: list(x))
    for found, right in zip([*alone[1], *both[1]], [expected[0], *expected]):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)
    whole = tf.function(lambda query, bias: attend(query, 2 * bias), jit_compile=jit_compile, autograph=False)
    with tf.GradientTape() as tape:
        tape.watch([query, given])
        loss = whole(query, given)
    for found, right in zip(tape.gradient(loss, [query, given]), expected):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


@both
def test_recompute_grad_drops_the_same(chosen):
    inputs = tensors("float32", seqlen_q=20, seqlen_k=20)
    seed = tf.constant([1, 2], tf.int64)

    def block(*inputs):
        return scaled_dot_product_attention(*inputs, dropout_rate=0.5, dropout_seed=seed, implementation=chosen)

    def gradients(function):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(function(*inputs) ** 2)
        return tape.gradient(loss, inputs)

    for plain, recomputed in zip(gradients(block), gradients(tf.recompute_grad(block))):
        np.testing.assert_allclose(recomputed, plain, rtol=1e-6)


@both
def test_fresh_dropout_each_call_follows_the_global_seed(chosen):
    inputs = tensors("float32", seqlen_q=20, seqlen_k=20)

    def drop():
        return scaled_dot_product_attention(*inputs, dropout_rate=0.5, implementation=chosen).numpy()

    tf.random.set_seed(1)
    first, second = drop(), drop()
    tf.random.set_seed(1)
    assert (first != second).any()
    np.testing.assert_array_equal(first, drop())

    traced = tf.function(lambda: scaled_dot_product_attention(*inputs, dropout_rate=0.5, implementation=chosen))
    assert (traced().numpy() != traced().numpy()).any()


@pytest.mark.parametrize("dtype", [tf.int32, tf.int64, tf.uint32, tf.uint64])
def test_dropout_seed_of_any_integer_type(dtype):
    inputs = tensors("float32", seqlen_q=20, seqlen_k=20)

    def drop(seed):
        return scaled_dot_product_attention(*inputs, dropout_rate=0.5, dropout_seed=seed).numpy()

    np.testing.assert_array_equal(drop(tf.constant([7, 1], dtype)), drop((7, 1)))
    assert (drop(tf.constant([7, 1], dtype)) != drop(tf.constant([7, 2], dtype))).any()


def test_integer_seeds_beyond_int64_keep_their_bits():
    inputs = tensors("float32", seqlen_q=20, seqlen_k=20)
    drop = [
        scaled_dot_product_attention(*inputs, dropout_rate=0.5, dropout_seed=seed).numpy()
        for seed in (2**64 - 1, -1, 2**63 - 1)
    ]
    np.testing.assert_array_equal(drop[0], drop[1])
    assert (drop[0] != drop[2]).any()


def test_determinism_switch():
    inputs = tensors("float32", seqlen_q=100, seqlen_k=90)

    def gradients():
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            out = scaled_dot_product_attention(*inputs, is_causal=True)
        return tape.gradient(out, inputs)

    tf.config.experimental.enable_op_determinism()
    try:
        for a, b in zip(gradients(), gradients()):
            np.testing.assert_array_equal(a, b)
    finally:
        config.disable_op_determinism()  # TensorFlow has no public way back

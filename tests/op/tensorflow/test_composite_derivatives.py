"""Derivatives of the composite beyond the first, against differences of the specification's gradients."""

import numpy as np
import pytest
import tensorflow as tf

from attn_ops import T5RelativeBias, reference, scaled_dot_product_attention
from attn_ops.tensorflow import composite
from composite_calls import compiled, split
from reference_cases import Case, differentiable, every_score

DERIVED = [
    Case("causal", {"is_causal": True}, heads=(4, 2), dims=(3, 2)),
    Case("masked", lambda c: {"mask": c.mask(0, 2, 3), "key_value_seq_lengths": [5, 2]}),
    Case("bias", lambda c: {"bias": c.bias(1, 2, 3)}),
    Case("every score", every_score, heads=(4, 2)),
    Case("buckets", lambda c: {"relative_bias": T5RelativeBias(c.normal(8, 2), max_distance=4), "sinks": c.normal(2)}),
    Case("dropout", {"dropout_rate": 0.4, "dropout_seed": 3}),
]


def loss_of(case, call_of):
    def loss(*inputs):
        out, lse = composite.attention(call_of(*inputs), None)
        lse = tf.where(tf.math.is_finite(lse), lse, 0)
        return tf.reduce_sum(out * case.d_out) + tf.reduce_sum(lse * case.d_lse)

    return loss


def along(case, function, inputs, tangents, step=1e-6):
    """Central difference of a function of arrays `inputs` along `tangents`."""
    above = function([x + step * t for x, t in zip(inputs, tangents)])
    below = function([x - step * t for x, t in zip(inputs, tangents)])
    return [(a - b) / (2 * step) for a, b in zip(above, below)]


def reference_gradients(case):
    inputs, options, of_caller = differentiable(case)

    def gradients(arrays):
        named = of_caller(dict(zip(inputs, arrays)))
        gradients = reference.attention_gradients(**named, **options, d_out=case.d_out, d_lse=case.d_lse)
        return [g for g in gradients if g is not None]

    return gradients


@pytest.mark.wide(6)
@pytest.mark.parametrize("case", DERIVED, ids=repr)
@pytest.mark.parametrize("mode", ["eager", "graph", "unknown shapes", "xla"])
def test_second_order(case, mode):
    """Gradients of a gradient along a direction, against differences of the specification's gradients."""
    inputs, call_of = split(case)
    tangents = [case.normal(*x.shape) for x in inputs]
    loss = loss_of(case, call_of)

    def second(*inputs):
        with tf.GradientTape() as outer:
            outer.watch(inputs)
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                value = loss(*inputs)
            gradients = inner.gradient(value, inputs)
            slope = tf.add_n([tf.reduce_sum(g * t) for g, t in zip(gradients, tangents)])
        return outer.gradient(slope, inputs)

    found = compiled(second, mode, *inputs)(*inputs)
    expected = along(case, reference_gradients(case), [x.numpy() for x in inputs], tangents)
    for x, y in zip(found, expected):
        np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-7)


@pytest.mark.wide(12)
@pytest.mark.parametrize("case", DERIVED, ids=repr)
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_forward_mode(case, mode):
    """jvp of the loss, and of its gradient (forward over reverse)."""
    inputs, call_of = split(case)
    tangents = [tf.constant(case.normal(*x.shape)) for x in inputs]
    loss = loss_of(case, call_of)

    def jvp(*inputs):
        with tf.autodiff.ForwardAccumulator(inputs, tuple(tangents)) as accumulator:
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                value = loss(*inputs)
            gradients = tape.gradient(value, inputs)
        return accumulator.jvp(value), *accumulator.jvp(gradients)

    value, *gradients = compiled(jvp, mode, *inputs)(*inputs)
    slope = sum(np.sum(g * t) for g, t in zip(reference_gradients(case)([x.numpy() for x in inputs]), tangents))
    np.testing.assert_allclose(value, slope, rtol=1e-11)
    expected = along(case, reference_gradients(case), [x.numpy() for x in inputs], [t.numpy() for t in tangents])
    for x, y in zip(gradients, expected):
        np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-7)


def test_recomputation_drops_the_same_weights():
    inputs, call_of = split(Case("dropout", {"dropout_rate": 0.5, "dropout_seed": (1, 2)}))
    results = []

    def attend(*inputs):
        return composite.attention(call_of(*inputs))[0]

    for function in (attend, tf.recompute_grad(attend)):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            out = function(*inputs)
        results.append([out, *tape.gradient(out, inputs)])
    for x, y in zip(*results):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("case", DERIVED[:-1], ids=repr)
def test_gradient_of_attention_weights(case):
    """Through scores and lse together, as a model that uses its scores would have it."""
    inputs, call_of = split(case)
    weigh = case.normal(*case.scores_shape)

    names, options, of_caller = differentiable(case)

    def loss(arrays):
        named = of_caller(dict(zip(names, arrays)))
        del named["value"]
        return [np.sum(weigh * reference.attention_weights(**named, **options))]

    with tf.GradientTape() as tape:
        tape.watch(inputs)
        call = call_of(*inputs)
        value = tf.reduce_sum(weigh * composite.attention_weights(call, composite.attention(call)[1]))
    gradients = tape.gradient(value, inputs, unconnected_gradients="zero")
    tangents = [case.normal(*x.shape) for x in inputs]
    slope = along(case, loss, [x.numpy() for x in inputs], tangents)[0]
    found = sum(np.sum(g * t) for g, t in zip(gradients, tangents))
    np.testing.assert_allclose(found, slope, rtol=1e-7, atol=1e-8)


def test_one_head_of_an_unknown_number():
    """What is summed over chunks keeps the extent 1 that only sinks and tables tell of."""

    def gradients(query, sinks, table):
        with tf.GradientTape() as tape:
            tape.watch([query, sinks, table])
            out = scaled_dot_product_attention(
                query, query, query, sinks=sinks, relative_bias=table, implementation="composite"
            )
        return tape.gradient(out, [query, sinks, table])

    rng = np.random.default_rng(0)
    inputs = [tf.constant(rng.standard_normal(shape)) for shape in [(2, 3, 1, 4), (1,), (3, 1)]]
    unknown = tf.TensorSpec([None] * 4, tf.float64)
    graph = tf.function(gradients, input_signature=[unknown, *(tf.TensorSpec(x.shape, x.dtype) for x in inputs[1:])])
    for found, wanted in zip(graph(*inputs), gradients(*inputs), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)

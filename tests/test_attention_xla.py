"""Calls traced for XLA take the composite and never fail, however deep the trace is."""

import numpy as np
import pytest
import tensorflow as tf

from attn_ops import explain, reference, scaled_dot_product_attention
from cases import make_inputs


def tensors():
    return [tf.constant(x) for x in make_inputs("float32", 1, 5, 5, 2, 1, 4)[:3]]


def expected(inputs, **options):
    return reference.attention(*[x.numpy() for x in inputs], **options)[0]


def attend(query, key, value):
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def through_nested_function(*inputs):
    return tf.function(attend)(*inputs)


def through_while(query, key, value):
    _, out = tf.while_loop(lambda i, _: i < 1, lambda i, _: (i + 1, attend(query, key, value)), [0, query])
    return out


def through_cond(query, key, value):
    return tf.cond(query[0, 0, 0, 0] < 1e9, lambda: attend(query, key, value), lambda: query)


def through_function_in_while_in_cond(query, key, value):
    return tf.cond(query[0, 0, 0, 0] < 1e9, lambda: through_while(query, key, value), lambda: query)


def through_custom_gradient(*inputs):
    @tf.custom_gradient
    def function(*x):
        return attend(*x), lambda d: (d, None, None)

    return function(*inputs)


@pytest.mark.parametrize(
    "function",
    [
        attend,
        through_nested_function,
        through_while,
        through_cond,
        through_function_in_while_in_cond,
        through_custom_gradient,
    ],
)
def test_jit_takes_the_composite(function):
    inputs = tensors()
    out = tf.function(function, jit_compile=True)(*inputs)
    np.testing.assert_allclose(out, expected(inputs, is_causal=True), rtol=1e-5, atol=1e-6)


def test_function_traced_before_needs_the_composite_forced():
    # XLA inlines a function that was traced outside without tracing it anew: what the docstring warns of.
    inputs = tensors()
    inner = tf.function(lambda *x: scaled_dot_product_attention(*x, implementation="composite"))
    inner(*inputs)
    out = tf.function(inner, jit_compile=True)(*inputs)
    np.testing.assert_allclose(out, expected(inputs), rtol=1e-5, atol=1e-6)


def test_gradient_taken_outside_of_the_compiled_function():
    inputs = tensors()
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        loss = tf.reduce_sum(tf.function(attend, jit_compile=True)(*inputs) ** 2)
    with tf.GradientTape() as plain:
        plain.watch(inputs)
        expected_loss = tf.reduce_sum(attend(*inputs) ** 2)
    for a, b in zip(tape.gradient(loss, inputs), plain.gradient(expected_loss, inputs)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_second_order_inside():
    inputs = tensors()

    def penalty(*inputs):
        with tf.GradientTape() as outer:
            outer.watch(inputs)
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                loss = tf.reduce_sum(attend(*inputs) ** 2)
            norm = tf.add_n([tf.reduce_sum(g**2) for g in tape.gradient(loss, inputs)])
        return outer.gradient(norm, inputs)

    for a, b in zip(tf.function(penalty, jit_compile=True)(*inputs), penalty(*inputs)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_fresh_dropout_differs_between_calls():
    inputs = tensors()
    function = tf.function(lambda *x: scaled_dot_product_attention(*x, dropout_rate=0.5), jit_compile=True)
    assert (function(*inputs).numpy() != function(*inputs).numpy()).any()


def test_lengths_of_64_bits():
    inputs = tensors()
    function = tf.function(lambda n, *x: scaled_dot_product_attention(*x, key_value_seq_lengths=n), jit_compile=True)
    out = function(tf.constant([3], tf.int64), *inputs)
    np.testing.assert_allclose(out, expected(inputs, key_value_seq_lengths=np.array([3])), rtol=1e-5, atol=1e-6)


def test_explanation_and_force_inside():
    found = []

    @tf.function(jit_compile=True)
    def function(query, key, value):
        found.append(explain(query, key, value))
        for forced in ("fused", "reference"):
            with pytest.raises(ValueError, match=f"'{forced}' cannot run: .*XLA"):
                scaled_dot_product_attention(query, key, value, implementation=forced)
        return scaled_dot_product_attention(query, key, value, implementation="composite")

    function(*tensors())
    assert found[0].implementation == "composite"
    assert any("XLA" in reason for reason in found[0].reasons)


def test_eager_run_of_a_compiled_function_is_no_trace():
    tf.config.run_functions_eagerly(True)
    try:
        explanation = tf.function(explain, jit_compile=True)(*tensors())
    finally:
        tf.config.run_functions_eagerly(False)
    assert explanation.implementation == "fused"

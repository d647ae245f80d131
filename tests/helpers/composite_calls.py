"""Calls of the composite and of the specification on a `reference_cases.Case`."""

import numpy as np
import tensorflow as tf

from attn_ops import reference
from attn_ops.call.normalize import normalize
from attn_ops.tensorflow import composite, xp
from reference_cases import differentiable

MODES = ("eager", "graph", "unknown shapes", "xla", "xla, unknown shapes")


def compiled(function, mode, *arguments):
    if mode == "eager":
        return function
    unknown = None
    if "unknown" in mode:  # but for tables, of whose buckets the number must be known
        unknown = [tf.TensorSpec([None] * x.shape.rank if x.shape.rank > 2 else x.shape, x.dtype) for x in arguments]
    return tf.function(function, jit_compile=mode.startswith("xla"), input_signature=unknown)


def make_call(query, key, value, **options):
    """The call for these public options."""
    return normalize(xp, "test", query, key, value, return_lse=True, **options)


def split(case):
    """The case's differentiable inputs as float64 tensors, in order, and the function that makes a call of these."""
    inputs, options, of_caller = differentiable(case)

    def call_of(*tensors):
        return make_call(**of_caller(dict(zip(inputs, tensors))), **options)

    return [tf.constant(x) for x in inputs.values()], call_of


def run(case, query_chunk, mode="eager"):
    """out, lse and gradients as arrays."""
    inputs, call_of = split(case)

    def step(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            results = composite.attention(call_of(*inputs), query_chunk)
        return *results, *tape.gradient(results, inputs, [tf.constant(case.d_out), tf.constant(case.d_lse)])

    return [x.numpy() for x in compiled(step, mode, *inputs)(*inputs)]


def specification(case):
    """The same of the reference."""
    results = reference.attention(**case.inputs, **case.options)
    gradients = reference.attention_gradients(**case.inputs, **case.options, d_out=case.d_out, d_lse=case.d_lse)
    return [*results, *(x for x in gradients if x is not None)]


def assert_same(found, expected, atol=1e-13):
    assert len(found) == len(expected)
    for number, (x, y) in enumerate(zip(found, expected)):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=f"result {number}: out, lse, then the gradients")

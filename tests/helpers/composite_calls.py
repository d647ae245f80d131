"""Calls of the composite and of the specification on a `reference_cases.Case`."""

import numpy as np
import tensorflow as tf

from attn_ops import reference
from attn_ops.tensorflow import composite
from attn_ops.call.attention_call import AttentionCall
from reference_cases import take_mask

MODES = ("eager", "graph", "unknown shapes", "xla", "xla, unknown shapes")


def compiled(function, mode, *arguments):
    if mode == "eager":
        return function
    unknown = [tf.TensorSpec([None] * x.shape.rank, x.dtype) for x in arguments] if "unknown" in mode else None
    return tf.function(function, jit_compile=mode.startswith("xla"), input_signature=unknown)


def make_call(query, key, value, bias=None, **options):
    """What arguments.normalize makes of public options, here by hand."""
    mask = take_mask(options)
    lengths = [None if n is None else tf.cast(n, tf.int32) for n in (mask.query_lengths, mask.key_lengths)]
    seed = options.pop("dropout_seed", None)
    if seed is not None:
        seed = tf.constant(seed if np.ndim(seed) else [seed, 0], tf.int64)
    call = AttentionCall(
        query=query,
        key=key,
        value=value,
        bias=bias,
        masks=tuple(map(tf.convert_to_tensor, mask.tensors())),
        scale=options.pop("scale", None),
        window_left=mask.window_left,
        window_right=mask.window_right,
        bottom_right=mask.bottom_right,
        query_lengths=lengths[0],
        key_lengths=lengths[1],
        dropout_rate=options.pop("dropout_rate", 0.0),
        seed=seed,
        layout=options.pop("layout", "BSHD"),
        return_lse=True,
    )
    assert not options, options
    return call


def split(case):
    """The case's differentiable inputs as float64 tensors, in order, and its other options."""
    options = dict(case.options)
    arrays = [*case.inputs.values()] + ([options.pop("bias")] if "bias" in options else [])
    return [tf.constant(x) for x in arrays], options


def run(case, query_chunk, mode="eager"):
    """out, lse and gradients as arrays, None for an absent bias."""
    inputs, options = split(case)

    def step(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            results = composite.attention(make_call(*inputs, **options), query_chunk)
        return *results, *tape.gradient(results, inputs, [tf.constant(case.d_out), tf.constant(case.d_lse)])

    results = [x.numpy() for x in compiled(step, mode, *inputs)(*inputs)]
    return results + [None] * (6 - len(results))


def specification(case):
    results = reference.attention(**case.inputs, **case.options)
    return *results, *reference.attention_gradients(**case.inputs, **case.options, d_out=case.d_out, d_lse=case.d_lse)


def assert_same(found, expected, atol=1e-13):
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv", "dbias"), found, expected):
        assert (x is None) == (y is None), name
        if x is not None:
            np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=name)

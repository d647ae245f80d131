"""The gradient of the fused gradient: that of the composite's, which is made of differentiable operations."""

from __future__ import annotations

import tensorflow as tf

from . import composite
from .arguments import AttentionCall


def gradients(call: AttentionCall, cotangents, incoming):
    """How a function of the gradients of ``call`` changes with its inputs and with the cotangents.

    Args:
        call: The attention.
        cotangents: [d_out] or [d_out, d_lse], from which the first gradients were computed.
        incoming: Gradients with respect to [d_query, d_key, d_value(, d_bias)], as many as were computed; None for what
            nobody used.

    Returns:
        Two lists: for query, key, value (and bias), and for the cotangents. None where nothing depends.
    """
    # Copies: one tensor may be key and value at once, and a tape would give each of them the gradient of both.
    inputs = [tf.identity(x) for x in (call.query, call.key, call.value, *([] if call.bias is None else [call.bias]))]
    call = call._replace(**dict(zip(("query", "key", "value", "bias"), inputs)))
    with tf.GradientTape() as second:
        second.watch(inputs + list(cotangents))
        with tf.GradientTape() as first:
            first.watch(inputs)
            outputs = composite.attention(call, query_chunk=None)
        # Without d_lse only `out` counts.
        results = first.gradient(
            outputs[: len(cotangents)], inputs[: len(incoming)], output_gradients=list(cotangents)
        )
    wanted = [(r, g) for r, g in zip(results, incoming) if r is not None and g is not None]
    d = second.gradient(
        [r for r, _ in wanted], inputs + list(cotangents), output_gradients=[g for _, g in wanted]
    )
    return d[: len(inputs)], d[len(inputs) :]

"""The fused TensorFlow ops: calling them, their gradients, and why a call cannot take them.

`AttnOps>Forward` and `AttnOps>Backward` are registered by the compiled library (csrc/bindings/tensorflow.cc). Their
gradients are registered here rather than through `tf.custom_gradient`: that costs an eager call ten times as much, and
would not survive a SavedModel.
"""

from __future__ import annotations

import tensorflow as tf

from . import _native, composite, saved_models
from .arguments import AttentionCall

_SHARED_ATTRIBUTES = ("scale", "dropout_rate", "window_left", "window_right", "bottom_right", "layout")


def unsupported_reasons(call: AttentionCall) -> list[str]:
    """Why the fused op cannot, or should not, run ``call`` here and now; empty when it can.

    Every `AttentionCall` is within the op's reach, so the reasons are of the place: no library, an XLA trace, a GPU.
    """
    reasons = saved_models.reasons_against_fused()
    missing = _native.unavailable_reason()
    if missing is not None:
        reasons.append(missing)
    if in_xla():
        reasons.append("the call is traced for XLA (jit_compile=True), which cannot compile the fused op")
    if _on_gpu(call.query):
        reasons.append("the fused op has no GPU kernel, and a GPU is in use; under tf.device('CPU') it runs on the CPU")
    return reasons


def in_xla() -> bool:
    """Whether this code is being traced for XLA, at any depth of nested functions and control flow."""
    return not tf.executing_eagerly() and tf.__internal__.get_enclosing_xla_context() is not None


def _on_gpu(query) -> bool:
    """Whether work on ``query`` would go to a GPU, from where TensorFlow would copy it to the CPU and back."""
    if not tf.config.list_logical_devices("GPU") or (tf.executing_eagerly() and "CPU" in query.device):
        return False
    # TensorFlow offers no question for the current device: see where a constant lands. In a graph it is "" when no
    # device scope is open.
    return "CPU" not in tf.constant(0.0).device


def attention(call: AttentionCall):
    """(out, lse) of the fused op, differentiable."""
    saved_models.leave_hint()
    out, lse = _native.library().attn_ops_forward(
        call.query,
        call.key,
        call.value,
        () if call.bias is None else (call.bias,),
        call.masks,
        () if call.query_lengths is None else (call.query_lengths,),
        () if call.key_lengths is None else (call.key_lengths,),
        () if call.seed is None else (call.seed,),
        Tlse=call.lse_dtype,
        # Numbers travel as text: a float attribute would cut a float64 to float32.
        scale="" if call.scale is None else repr(call.scale),
        dropout_rate=repr(call.dropout_rate),
        window_left=call.window_left,
        window_right=call.window_right,
        bottom_right=call.bottom_right,
        layout=call.layout,
    )
    if not tf.executing_eagerly():
        # The op's shape function cannot read attributes, and so not tell the heads from the rows.
        out_shape, lse_shape = call.result_shapes()
        out.set_shape(out_shape)
        lse.set_shape(lse_shape)
    return out, lse


def _split(op, inputs):
    """The optional inputs of either op, which end its input list: bias, masks, lengths and seed as lists."""
    lists, start = [], 0
    for count in ("num_bias", "num_masks", "num_query_lengths", "num_key_lengths", "num_seed"):
        end = start + op.get_attr(count)
        lists.append(list(inputs[start:end]))
        start = end
    return lists


@tf.RegisterGradient("AttnOps>Forward")
def _forward_gradient(op, d_out, d_lse):
    query, key, value = op.inputs[:3]
    out, lse = op.outputs
    bias, masks, query_lengths, key_lengths, seed = _split(op, op.inputs[3:])
    # Eager tapes and those of tf.function tell which inputs nobody watches; a constant bias then costs nothing.
    unwanted = getattr(op, "skip_input_indices", None) or ()
    d_query, d_key, d_value, d_bias = _native.library().attn_ops_backward(
        query,
        key,
        value,
        out,
        lse,
        tf.zeros_like(out) if d_out is None else d_out,
        () if d_lse is None else (d_lse,),
        bias,
        masks,
        query_lengths,
        key_lengths,
        seed,
        d_bias=bool(bias) and 3 not in unwanted,
        **{name: op.get_attr(name) for name in _SHARED_ATTRIBUTES},
    )
    d_bias = [None if 3 in unwanted else d for d in d_bias]
    return [d_query, d_key, d_value, *d_bias] + [None] * (len(op.inputs) - 3 - len(bias))


@tf.RegisterGradient("AttnOps>Backward")
def _backward_gradient(op, *gradients):
    """Second order: the gradient of the composite's gradient.

    `out` and `lse` are inputs of the op but functions of the others; the composite computes them anew, so that the
    whole derivative goes to the others and these two get none.
    """
    query, key, value, _, _, d_out = op.inputs[:6]
    num_d_lse = op.get_attr("num_d_lse")
    d_lse = list(op.inputs[6 : 6 + num_d_lse])
    bias, masks, query_lengths, key_lengths, seed = _split(op, op.inputs[6 + num_d_lse :])
    scale = op.get_attr("scale").decode()
    call = AttentionCall(
        query,
        key,
        value,
        bias[0] if bias else None,
        tuple(masks),
        float(scale) if scale else None,
        op.get_attr("window_left"),
        op.get_attr("window_right"),
        op.get_attr("bottom_right"),
        query_lengths[0] if query_lengths else None,
        key_lengths[0] if key_lengths else None,
        float(op.get_attr("dropout_rate")),
        seed[0] if seed else None,
        op.get_attr("layout").decode(),
    )
    with_bias = bool(bias) and op.get_attr("d_bias")
    inputs = [query, key, value, *(bias if with_bias else ())]
    cotangents = [d_out, *d_lse]
    with tf.GradientTape() as second:
        second.watch(inputs + cotangents)
        with tf.GradientTape() as first:
            first.watch(inputs)
            outputs = composite.attention(call, query_chunk=None)
        # Without d_lse only `out` counts.
        results = first.gradient(outputs[: len(cotangents)], inputs, output_gradients=cotangents)
    wanted = [(r, g) for r, g in zip(results, gradients) if r is not None and g is not None]
    d = second.gradient([r for r, _ in wanted], inputs + cotangents, output_gradients=[g for _, g in wanted])
    d_bias = d[3 : len(inputs)] if with_bias else [None] * len(bias)
    d_cotangents = d[len(inputs) :]
    rest = len(op.inputs) - 6 - num_d_lse - len(bias)
    return [*d[:3], None, None, *d_cotangents, *d_bias] + [None] * rest


# Registers the ops, so that a saved model which holds them can be loaded from here on.
_native.library()

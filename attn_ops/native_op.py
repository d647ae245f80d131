"""The operators `AttnOps>Forward` and `AttnOps>Backward` of the compiled library, as TensorFlow functions.

They are registered by csrc/bindings/tensorflow.cc. Their gradients are registered here rather than through
`tf.custom_gradient`: that costs an eager call ten times as much.
"""

from __future__ import annotations

import tensorflow as tf

from . import _native, place, second_order
from .arguments import AttentionCall

_SHARED_ATTRIBUTES = ("scale", "dropout_rate", "window_left", "window_right", "bottom_right", "layout", "allow_tf32")


def attributes(call: AttentionCall) -> dict:
    """The options of ``call`` as attributes of either operator, and of XLA's custom calls."""
    return {
        # Numbers travel as text: a float attribute would cut a float64 to float32.
        "scale": "" if call.scale is None else repr(call.scale),
        "dropout_rate": repr(call.dropout_rate),
        "window_left": call.window_left,
        "window_right": call.window_right,
        "bottom_right": call.bottom_right,
        "layout": call.layout,
        "allow_tf32": call.allow_tf32,
    }


def optional_inputs(call: AttentionCall) -> dict:
    """The inputs that ``call`` may lack, in the order of either operator: lists by the attribute that counts them."""
    return {
        "num_bias": [] if call.bias is None else [call.bias],
        "num_masks": list(call.masks),
        "num_query_lengths": [] if call.query_lengths is None else [call.query_lengths],
        "num_key_lengths": [] if call.key_lengths is None else [call.key_lengths],
        "num_seed": [] if call.seed is None else [call.seed],
    }


def forward(call: AttentionCall):
    """(out, lse, statistics), differentiable; lse is None unless ``call.return_lse``."""
    out, statistics, lse = _native.library().attn_ops_forward(
        call.query,
        call.key,
        call.value,
        *optional_inputs(call).values(),
        num_lse=int(call.return_lse),
        Tlse=call.lse_dtype,
        **attributes(call),
    )
    lse = lse[0] if call.return_lse else None
    if not tf.executing_eagerly():
        # The op's shape function cannot read attributes, and so not tell the heads from the rows.
        call.set_result_shapes(out, lse, statistics)
    return out, lse, statistics


def backward(call: AttentionCall, out, statistics, d_out, d_lse):
    """[d_query, d_key, d_value], and the gradient of the bias where ``call`` has one; ``d_lse`` may be None."""
    d_query, d_key, d_value, d_bias = _native.library().attn_ops_backward(
        call.query,
        call.key,
        call.value,
        out,
        statistics,
        d_out,
        () if d_lse is None else (d_lse,),
        *optional_inputs(call).values(),
        **attributes(call),
    )
    for gradient in d_bias:  # the op's shape function cannot tell whether it is wanted
        gradient.set_shape(call.bias.shape)
    return [d_query, d_key, d_value, *d_bias]


def _split(op, inputs):
    """The optional inputs of either op, which end its input list: bias, masks, lengths and seed as lists."""
    lists, start = [], 0
    for count in ("num_bias", "num_masks", "num_query_lengths", "num_key_lengths", "num_seed"):
        end = start + op.get_attr(count)
        lists.append(list(inputs[start:end]))
        start = end
    return lists


@tf.RegisterGradient("AttnOps>Forward")
def _forward_gradient(op, d_out, _, *d_lse):
    query, key, value = op.inputs[:3]
    out, statistics = op.outputs[:2]
    bias, masks, query_lengths, key_lengths, seed = _split(op, op.inputs[3:])
    # Eager tapes and those of tf.function tell which inputs nobody watches; a constant bias then costs nothing.
    unwanted = place.unwatched_inputs(op)
    d_query, d_key, d_value, d_bias = _native.library().attn_ops_backward(
        query,
        key,
        value,
        out,
        statistics,
        tf.zeros_like(out) if d_out is None else d_out,
        [d for d in d_lse if d is not None],
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
    """Second order. `out` and `statistics` are inputs of the op but functions of the others, which get it all."""
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
        lse_dtype=op.inputs[4].dtype,
    )
    computed = 4 if bias and op.get_attr("d_bias") else 3  # a gradient of the bias that nobody wanted is empty
    d_inputs, d_cotangents = second_order.gradients(call, [d_out, *d_lse], gradients[:computed])
    rest = len(op.inputs) - 6 - num_d_lse - len(bias)
    d_d_out, *d_d_lse = d_cotangents
    return [*d_inputs[:3], None, None, d_d_out, *d_d_lse, *d_inputs[3:]] + [None] * rest


# Registers the ops, so that a saved model which holds them can be loaded from here on.
_native.library()

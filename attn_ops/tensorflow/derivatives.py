"""The derivatives of the fused attention, to second order, in whatever form the kernels are called.

First derivatives are the kernels' own; those of them are the composite's, which is made of differentiable operations.
Eager calls find the gradients of the operators registered, since `tf.custom_gradient` costs them ten times as much.
"""

from __future__ import annotations

import tensorflow as tf

from attn_ops import kernels
from attn_ops.call.attention_call import AttentionCall, attributes, given_inputs
from attn_ops.tensorflow import composite, place

_NO_CALL = AttentionCall(None, None, None)  # for names


def differentiable(form, call: AttentionCall):
    """(out, lse) of a ``form`` whose operations have no gradient of their own, with gradients up to second order; lse is
    None unless ``call.return_lse``."""
    call = _in_this_graph(call)

    @tf.custom_gradient
    def forward(*inputs):
        own = call.with_differentiable(inputs)
        out, lse, statistics = form.forward(_unwatched(own))
        # What the gradient keeps becomes a result of the function around, which may be asked for its gradient too.
        kept = _unwatched_tensors(out, statistics)

        def gradient(d_out, d_lse=None):
            return _gradients(form, own, *kept, d_out, d_lse)

        return ((out, lse) if call.return_lse else out), gradient

    result = forward(*call.differentiable())
    return result if call.return_lse else (result, None)


def _gradients(form, call, out, statistics, d_out, d_lse):
    call = _in_this_graph(call)
    cotangents = [d_out] if d_lse is None else [d_out, d_lse]
    num_inputs = len(call.differentiable())

    @tf.custom_gradient
    def backward(*arguments):
        own = call.with_differentiable(arguments[:num_inputs])
        d_out, d_lse = (*arguments[num_inputs:], None)[:2]

        def gradient(*incoming):
            d_inputs, d_cotangents = _second_order(own, arguments[num_inputs:], incoming)
            return *d_inputs, *d_cotangents

        return form.backward(_unwatched(own), out, statistics, *_unwatched_tensors(d_out, d_lse)), gradient

    return backward(*call.differentiable(), *cotangents)


def _unwatched(call):
    """``call`` with inputs that no tape of this graph watches.

    A tape that sees the operations of a form would ask for the gradients that they do not have: where tapes are nested
    or persistent, `tf.switch_case` builds the gradient of its branches at once, needed or not.
    """
    return call.with_differentiable(_unwatched_tensors(*call.differentiable()))


def _unwatched_tensors(*tensors):
    return [x if x is None else tf.stop_gradient(x) for x in tensors]


def _in_this_graph(call):
    """``call`` with tensors of the graph that is being made: the gradient of a branch may refer to no others."""
    graph = tf.compat.v1.get_default_graph()

    def own(x):
        return x if getattr(x, "graph", None) is graph else tf.identity(x)

    return call.map_tensors(own)


def composite_gradients(call: AttentionCall, cotangents, wanted=None, **options):
    """The gradients of the composite with respect to query, key, value (and bias); of the first ``wanted`` of them.

    Args:
        call: The attention. Its inputs are `separate`.
        cotangents: [d_out] or [d_out, d_lse].
        **options: Of `composite.attention`.
    """
    inputs = call.differentiable()
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = composite.attention(call, **options)
    return tape.gradient(
        outputs[: len(cotangents)],  # without d_lse only `out` counts
        inputs[:wanted],
        output_gradients=list(cotangents),
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )


def separate(call: AttentionCall):
    """``call`` with copies: one tensor may be key and value at once, and a tape would give each the gradient of both."""
    return call.with_differentiable([tf.identity(x) for x in call.differentiable()])


def _second_order(call, cotangents, incoming):
    """How a function of the gradients of ``call`` changes with its inputs and with the cotangents.

    Args:
        call: The attention.
        cotangents: [d_out] or [d_out, d_lse], from which the first gradients were computed.
        incoming: Gradients with respect to [d_query, d_key, d_value(, d_bias)], as many as were computed; None for what
            nobody used.

    Returns:
        Two lists: for query, key, value (and bias), and for the cotangents. None where nothing depends.
    """
    call = separate(call)
    inputs = call.differentiable()
    with tf.GradientTape() as tape:
        tape.watch(inputs + list(cotangents))
        first = composite_gradients(call, cotangents, len(incoming), query_chunk=None)
    wanted = [(r, g) for r, g in zip(first, incoming) if g is not None]
    d = tape.gradient([r for r, _ in wanted], inputs + list(cotangents), output_gradients=[g for _, g in wanted])
    return d[: len(inputs)], d[len(inputs) :]


def _split(op, inputs):
    """The optional inputs of either op, which end its input list: bias, masks, lengths and seed as lists."""
    lists, start = [], 0
    for count in given_inputs(_NO_CALL):
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
    d_query, d_key, d_value, d_bias = kernels.library().attn_ops_backward(
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
        **{name: op.get_attr(name) for name in attributes(_NO_CALL)},
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
    d_inputs, d_cotangents = _second_order(call, [d_out, *d_lse], gradients[:computed])
    rest = len(op.inputs) - 6 - num_d_lse - len(bias)
    d_d_out, *d_d_lse = d_cotangents
    return [*d_inputs[:3], None, None, d_d_out, *d_d_lse, *d_inputs[3:]] + [None] * rest

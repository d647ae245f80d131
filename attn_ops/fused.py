"""The fused attention in TensorFlow: which of its forms runs where, their gradients, and why a call cannot take them.

Eager calls run the operator (`native_op`). Functions traced for XLA hold a custom call of the same kernels (`xla_op`).
Other graphs hold both (`graph_op`), since XLA may compile them later.
"""

from __future__ import annotations

import tensorflow as tf
from tensorflow.python.eager import forwardprop_util

from . import _native, gpu, graph_op, native_op, saved_models, second_order, xla_op
from .arguments import AttentionCall


_TENSORS = ("query", "key", "value", "bias", "query_lengths", "key_lengths", "seed")


def unsupported_reasons(call: AttentionCall, forced: bool = False) -> list[str]:
    """Why the fused kernels cannot, or should not, run ``call`` here and now; empty when they can.

    Every `AttentionCall` is within the reach of the CPU's kernels, so most reasons are of the place: no library, an XLA
    that takes no custom call, a GPU without kernels for it, an export that is to load without the library unless the
    choice is ``forced``.
    """
    reasons = saved_models.reasons_against_fused(forced)
    missing = _native.unavailable_reason()
    if missing is not None:
        reasons.append(missing)
    elif in_xla() and _native.xla_unavailable_reason():
        reasons.append(f"the call is traced for XLA (jit_compile=True), and {_native.xla_unavailable_reason()}")
    if _in_forward_mode(call):
        reasons.append("a ForwardAccumulator watches the inputs, and in graphs only the composite has forward mode")
    return reasons + gpu.unsupported_reasons(call, forced)


def in_xla() -> bool:
    """Whether this code is being traced for XLA, at any depth of nested functions and control flow."""
    return not tf.executing_eagerly() and tf.__internal__.get_enclosing_xla_context() is not None


def form() -> str:
    """How the fused kernels are called from here; what stands after "or" is for XLA, should it compile this graph."""
    if tf.executing_eagerly():
        return "op"
    if in_xla():
        return "xla"
    return "op or composite" if _native.xla_unavailable_reason() else "op or xla"


def _in_forward_mode(call):
    return not tf.executing_eagerly() and bool(forwardprop_util.pack_tangents(_inputs(call)).indices)


def attention(call: AttentionCall):
    """(out, lse), differentiable; lse is None unless ``call.return_lse``."""
    if tf.executing_eagerly():
        return native_op.forward(call)[:2]
    saved_models.leave_hint()  # again in the branches of `graph_op`: which loader looks where first is its affair
    return _differentiable(xla_op if in_xla() else graph_op, call)


def _differentiable(form, call):
    """The attention of a ``form`` whose operations have no gradient of their own, with gradients up to second order."""

    call = _in_this_graph(call)

    @tf.custom_gradient
    def forward(*inputs):
        own = _with_inputs(call, inputs)
        out, lse, statistics = form.forward(own)

        def gradient(d_out, d_lse=None):
            return _gradients(form, own, out, statistics, d_out, d_lse)

        return ((out, lse) if call.return_lse else out), gradient

    result = forward(*_inputs(call))
    return result if call.return_lse else (result, None)


def _gradients(form, call, out, statistics, d_out, d_lse):
    cotangents = [d_out] if d_lse is None else [d_out, d_lse]
    num_inputs = len(_inputs(call))

    @tf.custom_gradient
    def backward(*arguments):
        own = _with_inputs(call, arguments[:num_inputs])
        d_out, d_lse = (*arguments[num_inputs:], None)[:2]

        def gradient(*incoming):
            d_inputs, d_cotangents = second_order.gradients(
                own, arguments[num_inputs:], incoming, with_bias=own.bias is not None
            )
            return *d_inputs, *d_cotangents

        return form.backward(own, out, statistics, d_out, d_lse), gradient

    return backward(*_inputs(call), *cotangents)


def _in_this_graph(call):
    """``call`` with tensors of the graph that is being made: the gradient of a branch may refer to no others."""
    graph = tf.compat.v1.get_default_graph()

    def own(x):
        return x if not tf.is_tensor(x) or getattr(x, "graph", None) is graph else tf.identity(x)

    tensors = {name: own(getattr(call, name)) for name in _TENSORS}
    return call._replace(masks=tuple(own(x) for x in call.masks), **tensors)


def _inputs(call):
    """The inputs that have a gradient."""
    return [call.query, call.key, call.value, *([] if call.bias is None else [call.bias])]


def _with_inputs(call, inputs):
    query, key, value, *bias = inputs
    return call._replace(query=query, key=key, value=value, bias=bias[0] if bias else None)

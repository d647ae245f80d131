"""The fused attention in TensorFlow: which of its forms runs where, their gradients, and why a call cannot take them.

Eager calls run the operator (`native_op`). Functions traced for XLA hold a custom call of the same kernels
(`bounded_op`). Other graphs hold both (`graph_op`), since XLA may compile them later.
"""

from __future__ import annotations

import tensorflow as tf

from . import _native, bounded_op, gpu, graph_op, native_op, place, saved_models, second_order
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
    elif place.in_xla() and bounded_op.unavailable_reason(call):
        reasons.append(f"the call is traced for XLA (jit_compile=True), and {bounded_op.unavailable_reason(call)}")
    if not tf.executing_eagerly() and place.in_forward_mode(_inputs(call)):
        reasons.append("a ForwardAccumulator watches the inputs, and in graphs only the composite has forward mode")
    return reasons + gpu.unsupported_reasons(call, forced)


def form(call: AttentionCall) -> str:
    """How the fused kernels are called from here; what stands after "or" is for XLA, should it compile this graph."""
    if tf.executing_eagerly():
        return "op"
    if place.in_xla():
        return "xla"
    return "op or composite" if bounded_op.unavailable_reason(call) else "op or xla"


def attention(call: AttentionCall):
    """(out, lse), differentiable; lse is None unless ``call.return_lse``."""
    if tf.executing_eagerly():
        return native_op.forward(call)[:2]
    saved_models.leave_hint()  # again in the branches of `graph_op`: which loader looks where first is its affair
    return _differentiable(bounded_op if place.in_xla() else graph_op, call)


def _differentiable(form, call):
    """The attention of a ``form`` whose operations have no gradient of their own, with gradients up to second order."""

    call = _in_this_graph(call)

    @tf.custom_gradient
    def forward(*inputs):
        own = _with_inputs(call, inputs)
        out, lse, statistics = form.forward(_unwatched(own))
        # What the gradient keeps becomes a result of the function around, which may be asked for its gradient too.
        kept = _unwatched_tensors(out, statistics)

        def gradient(d_out, d_lse=None):
            return _gradients(form, own, *kept, d_out, d_lse)

        return ((out, lse) if call.return_lse else out), gradient

    result = forward(*_inputs(call))
    return result if call.return_lse else (result, None)


def _gradients(form, call, out, statistics, d_out, d_lse):
    call = _in_this_graph(call)
    cotangents = [d_out] if d_lse is None else [d_out, d_lse]
    num_inputs = len(_inputs(call))

    @tf.custom_gradient
    def backward(*arguments):
        own = _with_inputs(call, arguments[:num_inputs])
        d_out, d_lse = (*arguments[num_inputs:], None)[:2]

        def gradient(*incoming):
            d_inputs, d_cotangents = second_order.gradients(own, arguments[num_inputs:], incoming)
            return *d_inputs, *d_cotangents

        return form.backward(_unwatched(own), out, statistics, *_unwatched_tensors(d_out, d_lse)), gradient

    return backward(*_inputs(call), *cotangents)


def _unwatched(call):
    """``call`` with inputs that no tape of this graph watches.

    A tape that sees the operations of a form would ask for the gradients that they do not have: where tapes are nested
    or persistent, `tf.switch_case` builds the gradient of its branches at once, needed or not.
    """
    return _with_inputs(call, _unwatched_tensors(*_inputs(call)))


def _unwatched_tensors(*tensors):
    return [x if x is None else tf.stop_gradient(x) for x in tensors]


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

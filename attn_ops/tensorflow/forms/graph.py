"""The kernels in a graph that XLA may or may not compile later: forward and backward as in eager.py.

A plain `tf.function` does not know whether a function that XLA compiles will call it, and a saved graph even less; XLA
has no kernel for our operator. So the graph holds both, behind `DeviceIndex`: TensorFlow's executors find 0 or 1 there,
XLA a constant 2, and it drops the other branches (TensorFlow's own recurrent layers choose kernels in this way).
"""

from __future__ import annotations

import contextvars
import functools

import tensorflow as tf

from attn_ops.call.attention_call import AttentionCall
from attn_ops.tensorflow import composite, dynamic_sizes, export
from attn_ops.tensorflow.forms import eager, xla

_IN_XLA = 2  # of the functions that `by_device` is given
_decided = contextvars.ContextVar("attn_ops.graph.decided", default=None)


def forward(call: AttentionCall):
    """(out, lse, statistics), without a gradient of their own; lse is None unless ``call.return_lse``."""
    in_xla = _composite_forward if xla.unavailable_reason(call) else xla.forward
    out, statistics, *lse = _native_or(call, lambda: _present(eager.forward(call)), lambda: _present(in_xla(call)))
    lse = lse[0] if lse else None
    call.set_result_shapes(out, lse, statistics)
    return out, lse, statistics


def backward(call: AttentionCall, out, statistics, d_out, d_lse):
    """The gradients of the differentiable inputs of ``call``; ``d_lse`` may be None."""
    in_xla = _composite_backward if xla.unavailable_reason(call) else xla.backward
    arguments = (call, out, statistics, d_out, d_lse)
    return list(_native_or(call, lambda: tuple(eager.backward(*arguments)), lambda: tuple(in_xla(*arguments))))


def _native_or(call, operator, in_xla):
    if dynamic_sizes.any_unknown(call):
        # Some of its operations exist for XLA alone. Inlined, as branches are where they run, they would have to find a place.
        in_xla = tf.function(in_xla, autograph=False, experimental_attributes={"_noinline": True})
    return by_device(operator, operator, in_xla)


def by_device(on_cpu, on_gpu, in_xla):
    """The results of one of three functions: by the device, or whether XLA compiles the graph. The first two may hold
    operators of the library. Inside of such a function it is decided already, and another choice costs nothing."""
    functions = on_cpu, on_gpu, in_xla
    decided = _decided.get()
    if decided is not None:
        return functions[decided]()

    def branch(which):
        def run():
            token = _decided.set(which)
            try:
                if which != _IN_XLA:
                    export.leave_hint()
                return functions[which]()
            finally:
                _decided.reset(token)

        return run

    # Called as a function without state: `DeviceIndex` counts as one that has it, of which `tf.vectorized_map` would
    # want a value for each iteration.
    (device,) = tf.raw_ops.PartitionedCall(args=[], Tout=[tf.int32], f=_device_index())
    return tf.switch_case(device, [branch(which) for which in range(len(functions))])


@functools.cache
def _device_index():
    with tf.init_scope():

        @tf.function(autograph=False)
        def attn_ops_device_index():
            return tf.raw_ops.DeviceIndex(device_names=["CPU", "GPU"])

        return attn_ops_device_index.get_concrete_function()


def _present(results):
    """What a branch of a Case can return: (out, statistics), and lse where there is one."""
    out, lse, statistics = results
    return (out, statistics) if lse is None else (out, statistics, lse)


def _composite_forward(call):
    out, lse = composite.attention(call, in_xla=True)
    # Of the form that the kernels' have; `_composite_backward` computes its own.
    return out, lse if call.return_lse else None, tf.zeros([*tf.unstack(tf.shape(lse)), 2], call.lse_dtype)


def _composite_backward(call, out, statistics, d_out, d_lse):
    del out, statistics  # computed anew
    cotangents = [d_out, *([] if d_lse is None else [d_lse])]
    return composite.gradients(composite.separate(call), cotangents, in_xla=True)

"""The kernels in a graph that XLA may or may not compile later: forward and backward as in `native_op`.

A plain `tf.function` does not know whether a function that XLA compiles will call it, and a saved graph even less; XLA
has no kernel for our operator. So the graph holds both, behind `DeviceIndex`: TensorFlow's executors find 0 or 1 there,
XLA a constant 2, and it drops the other branches (TensorFlow's own recurrent layers choose kernels in this way).
"""

from __future__ import annotations

import tensorflow as tf
from tensorflow.python.ops.parallel_for import pfor

from . import _native, composite, native_op, saved_models, xla_op
from .arguments import AttentionCall


def forward(call: AttentionCall):
    """(out, lse, statistics), without a gradient of their own; lse is None unless ``call.return_lse``."""
    in_xla = _composite_forward if _native.xla_unavailable_reason() else xla_op.forward
    out, statistics, *lse = _native_or(lambda: _present(native_op.forward(call)), lambda: _present(in_xla(call)))
    lse = lse[0] if lse else None
    call.set_result_shapes(out, lse, statistics)
    return out, lse, statistics


def backward(call: AttentionCall, out, statistics, d_out, d_lse):
    """[d_query, d_key, d_value], and the gradient of the bias where ``call`` has one; ``d_lse`` may be None."""
    in_xla = _composite_backward if _native.xla_unavailable_reason() else xla_op.backward
    arguments = (call, out, statistics, d_out, d_lse)
    return list(_native_or(lambda: tuple(native_op.backward(*arguments)), lambda: tuple(in_xla(*arguments))))


@pfor.RegisterPFor("DeviceIndex")
def _device_index_in_vectorized_map(pfor_input):
    """The same for every iteration. Without this `tf.vectorized_map` takes it for a value of each one, and its rule
    for Case fails on branches of several outputs."""
    index = tf.raw_ops.DeviceIndex(device_names=pfor_input.get_attr("device_names"))
    return pfor.wrap(index, is_stacked=False)


def _native_or(operator, in_xla):
    def native():
        saved_models.leave_hint()
        return operator()

    device = tf.raw_ops.DeviceIndex(device_names=["CPU", "GPU"])
    return tf.switch_case(device, [native, native, in_xla])


def _present(results):
    """What a branch of a Case can return: (out, statistics), and lse where there is one."""
    out, lse, statistics = results
    return (out, statistics) if lse is None else (out, statistics, lse)


def _composite_forward(call):
    out, lse = composite.attention(call)
    # Of the form that the kernels' have; `_composite_backward` computes its own.
    return out, lse if call.return_lse else None, tf.zeros([*tf.unstack(tf.shape(lse)), 2], call.lse_dtype)


def _composite_backward(call, out, statistics, d_out, d_lse):
    del out, statistics  # computed anew
    inputs = [call.query, call.key, call.value, *([] if call.bias is None else [call.bias])]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = composite.attention(call)
    cotangents = [d_out, *([] if d_lse is None else [d_lse])]
    return tape.gradient(
        outputs[: len(cotangents)],
        inputs,
        output_gradients=cotangents,
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )

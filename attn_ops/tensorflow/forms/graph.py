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
from attn_ops.tensorflow import composite, dynamic_sizes, export, place
from attn_ops.tensorflow.forms import eager, xla

_IN_XLA = 2  # of the functions that `by_device` is given
_decided = contextvars.ContextVar("attn_ops.graph.decided", default=None)


def forward(call: AttentionCall):
    """(out, lse, statistics), without a gradient of their own; lse is None unless ``call.return_lse``."""
    out, statistics, *lse = _either("forward", call)
    lse = lse[0] if lse else None
    call.set_result_shapes(out, lse, statistics)
    return out, lse, statistics


def backward(call: AttentionCall, out, statistics, d_out, d_lse):
    """The gradients of those inputs of ``call`` that are `asked` for; ``d_lse`` may be None."""
    return _either("backward", call, out, statistics, d_out, *([] if d_lse is None else [d_lse]))


def _either(direction, call, *more):
    """The results of the operator or of what XLA takes, of a ``call`` and the tensors ``more`` that its backward needs."""
    if xla.unavailable_reason(call):
        # Not shared: tapes do not record in the `tf.init_scope` of `_branch`, and the composite has one of its own.
        native, in_xla = (functools.partial(_run, direction, kind, call, *more) for kind in ("native", "composite"))
        return list(by_device(native, native, in_xla))
    decided = _decided.get()
    if decided is not None:
        return _run(direction, "xla" if decided == _IN_XLA else "native", call, *more)
    tensors = []
    like = call.map_tensors(lambda x: tensors.append(x) or _like(x))
    kept_apart = place.exporting()  # whose branches have the hint of `export`
    native, in_xla = (_branch(direction, kind, like, tuple(map(_like, more)), kept_apart) for kind in ("native", "xla"))
    results = tf.raw_ops.Case(
        branch_index=_which_device(),
        input=[*tensors, *more],
        Tout=in_xla.output_dtypes,
        branches=[native, native, in_xla],
        output_shapes=[x.shape for x in in_xla.outputs],
    )
    if place.can_set_attributes():
        place.set_attribute(results[0].op, "_lower_using_switch_merge")  # inlined, as `tf.switch_case` has its branches
    return list(results)  # whoever hands them on makes others of them: of a Case that is inlined no result can be fetched


@functools.lru_cache(maxsize=512)
def _branch(direction, kind, like, more, kept_apart):
    """The function of tensors that a Case has for a call ``like`` this one of `tf.TensorSpec`s, one for all that are
    (``kept_apart`` or not): the layers of a model share it, which halves the time to trace them."""
    flat = []
    like.map_tensors(flat.append)

    def run(*tensors):
        given = iter(tensors)
        call = like.map_tensors(lambda _: next(given))
        if kind == "native":
            export.leave_hint()
        return _run(direction, kind, call, *given)

    with tf.init_scope(), tf.device(None):
        return tf.function(run, autograph=False).get_concrete_function(*flat, *more)


def _run(direction, kind, call, *more):
    run = functools.partial(_RUN[direction, kind], call, *more)
    return _kept_whole(run) if kind != "native" and dynamic_sizes.any_unknown(call) else run()


def _kept_whole(run):
    """The results of ``run()``, some of whose operations exist for XLA alone: inlined, as branches are where they run, they
    would have to find a place. So they are in a Case of one branch. (A call of a function does too, but in a branch XLA forgets
    which sizes of its arguments only the data decide, and takes all their room.) Where TensorFlow's optimizer makes that a call,
    `_noinline` keeps it one."""
    branch = tf.function(run, autograph=False, experimental_attributes={"_noinline": True}).get_concrete_function()
    results = tf.raw_ops.Case(
        branch_index=0,
        input=branch.captured_inputs,
        Tout=branch.output_dtypes,
        branches=[branch],
        output_shapes=[x.shape for x in branch.outputs],
    )
    return tuple(results)


def _like(x):
    return tf.TensorSpec(x.shape, x.dtype)


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

    return tf.switch_case(_which_device(), [branch(which) for which in range(len(functions))])


def _which_device():
    # Called as a function without state: `DeviceIndex` counts as one that has it, of which `tf.vectorized_map` would
    # want a value for each iteration.
    return tf.raw_ops.PartitionedCall(args=[], Tout=[tf.int32], f=_device_index())[0]


@functools.cache
def _device_index():
    with tf.init_scope():

        @tf.function(autograph=False)
        def attn_ops_device_index():
            return tf.raw_ops.DeviceIndex(device_names=["CPU", "GPU"])

        return attn_ops_device_index.get_concrete_function()


def _forward_by(form):
    def forward(call):
        out, lse, statistics = form(call)
        return (out, statistics) if lse is None else (out, statistics, lse)

    return forward


def _backward_by(form):
    def backward(call, out, statistics, d_out, d_lse=None):
        return tuple(form(call, out, statistics, d_out, d_lse))

    return backward


def _composite_forward(call):
    out, lse = composite.attention(call, in_xla=True)
    # Of the form that the kernels' have; `_composite_backward` computes its own.
    return out, lse if call.return_lse else None, tf.zeros([*tf.unstack(tf.shape(lse)), 2], call.lse_dtype)


def _composite_backward(call, out, statistics, d_out, d_lse):
    del out, statistics  # computed anew
    cotangents = [d_out, *([] if d_lse is None else [d_lse])]
    with place.tapes(see=True):  # that of the composite, though others are not to see this
        return composite.gradients(composite.separate(call), cotangents, call.asked(), in_xla=True)


_RUN = {
    ("forward", "native"): _forward_by(eager.forward),
    ("forward", "xla"): _forward_by(xla.forward),
    ("forward", "composite"): _forward_by(_composite_forward),
    ("backward", "native"): _backward_by(eager.backward),
    ("backward", "xla"): _backward_by(xla.backward),
    ("backward", "composite"): _backward_by(_composite_backward),
}

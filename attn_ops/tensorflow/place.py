"""Where a call stands in TensorFlow: traced for XLA, for an export, under a ForwardAccumulator, on which device.

The one module with names that TensorFlow keeps to itself. Each is looked up when it is needed and has a fallback, so
that a TensorFlow without it costs speed at most; `missing` says what is gone and what happens instead, for
`attn_ops.explain`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import operator
import sys

import tensorflow as tf

from attn_ops.call import frames

_supposed = contextvars.ContextVar("attn_ops.place.supposed_export", default=False)
_TANGENTS = "tensorflow.python.eager.forwardprop_util.pack_tangents"
_TAPES = "tensorflow.python.pywrap_tfe.TFE_Py_TapeSet"
_WATCHED = f"{_TAPES}ShouldRecordBackprop"
_RECORD = f"{_TAPES}RecordOperation"
_STOPPED = f"{_TAPES}IsStopped", f"{_TAPES}StopOnThread", f"{_TAPES}RestartOnThread"
_XLA = "tensorflow.compiler.tf2xla.python.xla"
_EXECUTE = "tensorflow.python.pywrap_tfe.TFE_Py_FastPathExecute"
_CONTEXT = "tensorflow.python.eager.context.context"

# The packages of those who trace functions and models to convert them, and Keras's modules that call them.
_LITERT = "tensorflow.lite.python.lite"
_CONVERTERS = "tf2onnx", "openvino.frontend.tensorflow", _LITERT
_KERAS_CONVERTERS = "onnx", "openvino", "litert"

# What is used, by path, and what happens without it.
_WITHOUT = {
    "tf.__internal__.get_enclosing_xla_context": (
        "functions compiled by XLA hold the kernels in both forms, as others do"
    ),
    "tf.__internal__.eager_context.get_device_name": "the device of an eager call is told by where a constant lands",
    _TANGENTS: "a ForwardAccumulator around a function that holds the kernels finds no derivative",
    _EXECUTE: "small eager calls take longer to reach the kernels",
    _CONTEXT: "small eager calls take longer to reach the kernels",
    _WATCHED: "in graphs the gradient of a constant bias is computed, though nobody asks for it",
    **dict.fromkeys((_RECORD, *_STOPPED), "graphs that hold the kernels take longer to trace"),
    "tf.Operation._set_attr": "in graphs the composite takes all query rows at once",
    f"{_XLA}.call_module": "functions compiled by XLA hold the composite",
    f"{_XLA}.optimization_barrier": (
        "XLA ends the process where `tf.switch_case` takes what was added to results of the kernels"
    ),
    f"{_XLA}.remove_dynamic_dimension_size": (
        "functions compiled by XLA hold the composite where the batch or a length is unknown"
    ),
}


def missing() -> tuple[str, ...]:
    """What this TensorFlow lacks of the names above, one sentence each."""
    return tuple(f"this TensorFlow has no {path}: {without}" for path, without in _WITHOUT.items() if not _get(path))


def in_xla() -> bool:
    """Whether this code is being traced for XLA, at any depth of nested functions and control flow.

    False too where that cannot be told; the graph then holds both forms of the kernels, and XLA takes its own.
    """
    if tf.executing_eagerly():
        return False
    enclosing = _get("tf.__internal__.get_enclosing_xla_context")
    return enclosing is not None and enclosing() is not None


def in_forward_mode(tensors) -> bool:
    """Whether a `tf.autodiff.ForwardAccumulator` is at work, or where that cannot be told: whether one watches
    ``tensors`` in the graph that is being made.
    """
    pack = _get(_TANGENTS)
    if pack is not None:
        return bool(pack(list(tensors)).indices)  # one entry for each accumulator, also for those around a function
    # An accumulator, and nothing else, asks for the gradient of an operation as soon as it is made.
    asked = []

    @tf.custom_gradient
    def probe(*inputs):
        def gradient(*d):
            asked.append(True)
            return d

        return [tf.identity(x) for x in inputs], gradient

    probe(*tensors)
    return bool(asked)


def exporting() -> bool:
    """Whether this is the trace of an export.

    Neither Keras nor TensorFlow says so, nor do converters: what is looked for is a function on the stack of the
    modules in which their public exporters live.
    """
    if tf.executing_eagerly():
        return False
    return _supposed.get() or frames.any_of((tf.saved_model.save.__module__, *_keras_exporters(), *_CONVERTERS))


def converting() -> bool:
    """Whether this is the trace of an export to another format than TensorFlow's, which has no operators of libraries."""
    if tf.executing_eagerly():
        return False
    of_keras = [f"{package}.{name}" for package in _keras_exporters() for name in _KERAS_CONVERTERS]
    return frames.any_of((*_CONVERTERS, *of_keras))


def forgets_errors() -> bool:
    """Whether the tracer catches what is raised, and fails later with an error of its own: `TFLiteConverter.from_keras_model`."""
    return frames.any_of((_LITERT,))


@contextlib.contextmanager
def supposed_export():
    """Graphs that are traced meanwhile are for an export."""
    token = _supposed.set(True)
    try:
        yield
    finally:
        _supposed.reset(token)


def _keras_exporters():
    """The package of Keras's exporters, if there is a Keras that has them."""
    archive = getattr(getattr(sys.modules.get("keras"), "export", None), "ExportArchive", None)
    return () if archive is None else (archive.__module__.rpartition(".")[0],)


def device() -> str:
    """The device of what is made here, by TensorFlow's name; "" where TensorFlow chooses."""
    if tf.executing_eagerly():
        name = _get("tf.__internal__.eager_context.get_device_name")
        if name is not None:
            return name() or ""
    # TensorFlow offers no question for the device of a graph: see where a constant lands.
    return tf.constant(0.0).device


@functools.cache
def eager_executor():
    """The function (operator, *inputs, *names and values of attributes) that runs an eager operation as the functions
    that TensorFlow generates do, but with no more attributes than are given; or None."""
    execute, context = _get(_EXECUTE), _get(_CONTEXT)
    if execute is None or context is None:
        return None
    return lambda operator, *arguments: execute(context(), operator, None, *arguments)


def is_watched(tensor) -> bool:
    """Whether a tape that is open now may be asked for the gradient of ``tensor``; True where that cannot be told."""
    watched = _get(_WATCHED)
    return watched is None or bool(watched([tensor]))


def recorder():
    """The function (name, results, inputs, gradient) that tells tapes that ``results`` are made of ``inputs``; None where
    that, or `tapes`, is missing."""
    record, *others = map(_get, (_RECORD, *_STOPPED))
    return None if None in (record, *others) else lambda *operation: record(*operation, None)


@contextlib.contextmanager
def tapes(see: bool):
    """Whether tapes see what is made meanwhile, as far as that can be changed."""
    is_stopped, *switches = map(_get, _STOPPED)
    saw = None in (is_stopped, *switches) or not is_stopped()
    changes = saw != see and None not in switches
    try:
        if changes:
            switches[see]()
        yield
    finally:
        if changes:
            switches[saw]()


def in_vectorization() -> bool:
    """Whether this is traced for `tf.vectorized_map`, or for a Jacobian, which rewrite what they trace for all examples at
    once: the gradients of `tf.custom_gradient` are lost then, and those of what is inside count."""
    return not tf.executing_eagerly() and frames.any_of((tf.vectorized_map.__module__,), "pfor")


def unwatched_inputs(op) -> tuple[int, ...]:
    """The inputs of ``op``, handed to a gradient function, whose gradients nobody wants, as far as tapes tell."""
    return getattr(op, "skip_input_indices", None) or ()


def eager_attributes(op) -> tuple | None:
    """(name, value, name, ..) of an eager ``op``, handed to a gradient function: those that it was given. Else None."""
    attributes = getattr(op, "attrs", None)
    return attributes if isinstance(attributes, tuple) else None


def xla_call():
    """The function that puts a program in StableHLO into a graph, or None."""
    return _get(f"{_XLA}.call_module")


def opaque_to_xla(results):
    """``results`` of an `xla_call`, the same where XLA alone compiles what is made.

    To find constants, `tf.switch_case` has XLA look into all that its branches take. Of a call with several results it makes
    a tuple where an array should be, which an addition of TensorFlow 2.21 does not survive. It gives up at a barrier, which
    costs nothing.
    """
    barrier = _get(f"{_XLA}.optimization_barrier") if in_xla() else None
    return results if barrier is None else barrier(*results)


def xla_call_missing_reason() -> str | None:
    """Why `xla_call` is None; None when it is there."""
    return None if xla_call() else f"this TensorFlow has no {_XLA}.call_module"


def with_static_size():
    """The function (tensor, axis) that, inside XLA, gives an axis of bounded size all its room, or None."""
    return _get(f"{_XLA}.remove_dynamic_dimension_size")


def can_set_attributes() -> bool:
    """Whether `set_attribute` can."""
    return _get("tf.Operation._set_attr") is not None


def set_attribute(op, name) -> None:
    """Gives an operation of a graph the attribute ``name``, true."""
    op._set_attr(name, tf.compat.v1.AttrValue(b=True))


def _get(path):
    """What this path leads to, or None."""
    try:
        if path.startswith("tf."):
            return operator.attrgetter(path.partition(".")[2])(tf)
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None

"""One dropout seed for a run and its recomputation.

`tf.recompute_grad`, and with it `keras.remat` and `keras.RematScope`, runs a function twice: forward without recording,
and again when its gradient is asked for. What draws a random number inside draws another one then, and the gradient is
that of another function, silently. TensorFlow has no public way to ask which of the two runs this is, and no place to
keep something between them: both are recognised by who called, and what the first run drew is kept here.
"""

from __future__ import annotations

import collections
import sys
import threading
import types

import tensorflow as tf

_MARK = "attn_ops.rematerialization"  # an additional name among the locals of TensorFlow's frames: ours alone
_LARGEST_HISTORY = 4096  # rematerialised regions whose gradient may still come

# Keras's function that traces a layer for its shapes alone.
_SHAPES = ("compute_output_spec", "keras.src.backend.")

_drawn = collections.OrderedDict()  # what the first run of a region drew, by the identity of its region
_lock = threading.Lock()


def _code(function, *names):
    """The code of a function that is defined inside ``function``, or None."""
    code = function.__code__
    for name in names:
        inner = [c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name]
        if len(inner) != 1:
            return None
        [code] = inner
    return code


def _codes():
    """The code of the first run of a region and that of its recomputation, or None where TensorFlow's are others."""
    try:
        first = _code(tf.recompute_grad, "inner")
        again = _code(tf.recompute_grad, "inner", "grad_wrapper", "inner_recompute_grad")
    except AttributeError:
        return None, None
    if first is None or again is None or "kwargs" not in first.co_cellvars or "kwargs" not in again.co_freevars:
        return None, None
    return first, again


_FIRST_RUN, _RECOMPUTATION = _codes()


def unavailable_reason() -> str | None:
    """Why recomputations cannot be told from first runs, so that they draw other seeds; None where they can."""
    if _FIRST_RUN is None:
        return f"tf.recompute_grad of TensorFlow {tf.__version__} is not made as expected"
    return None


def same_in_recomputation(draw):
    """``draw()``; in the recomputation of a region of `tf.recompute_grad`, what that gave here in the first run.

    Regions may be nested, and a recomputation may run any number of times.

    Raises:
        ValueError: a `tf.function`, a branch or the body of a loop lies between the region and this call, whose tensors
            cannot be kept for the recomputation; or the recomputation draws what the first run did not.
    """
    if _FIRST_RUN is None:
        return draw()
    first_runs, recomputation = _regions(sys._getframe(1))
    value = draw() if recomputation is None else _again(recomputation)
    for region in first_runs:
        _keep(region, value)
    return value


def _regions(frame):
    """The frames of the regions around ``frame`` that run for the first time, and that of a recomputation or None."""
    first_runs, in_other_graph = [], False
    while frame is not None:
        code = frame.f_code
        if code is _FIRST_RUN or code is _RECOMPUTATION:
            if in_other_graph:
                raise ValueError(
                    "attn_ops: dropout inside tf.recompute_grad (keras.remat), and between the two a tf.function, a "
                    "branch or the body of a loop: the recomputation would drop others than the first run did. Call "
                    "tf.recompute_grad inside of that, or give the op a dropout_seed made outside"
                )
            if code is _RECOMPUTATION:
                return first_runs, frame
            first_runs.append(frame)
        elif _traces_a_graph(frame):
            in_other_graph = True
        elif code.co_name == _SHAPES[0] and frame.f_globals.get("__name__", "").startswith(_SHAPES[1]):
            break  # Keras asks for shapes: nothing runs
        frame = frame.f_back
    return first_runs, None


def _traces_a_graph(frame) -> bool:
    """Whether this frame of the stack is TensorFlow's function that traces a graph inside another; False, where it has
    got another name, so that what that is asked for goes unnoticed."""
    return (
        frame.f_code.co_name == "func_graph_from_py_func"
        and frame.f_globals.get("__name__", "").startswith("tensorflow.")
    )


def _identity(frame):
    # The arguments by keyword of the region's call: a new dictionary for every call, alive as long as its gradient.
    return id(frame.f_locals["kwargs"])


def _keep(frame, value):
    names = frame.f_locals
    if _MARK not in names:  # an entry that is there belongs to a dictionary of the past
        names[_MARK] = True
        with _lock:
            _drawn[_identity(frame)] = []
            while len(_drawn) > _LARGEST_HISTORY:
                _drawn.popitem(last=False)
    _drawn[_identity(frame)].append(value)


def _again(frame):
    names = frame.f_locals
    count = names.get(_MARK, 0)
    names[_MARK] = count + 1
    values = _drawn.get(_identity(frame), ())
    if count >= len(values):
        raise ValueError(
            f"attn_ops: the recomputation of tf.recompute_grad (keras.remat) draws dropout seed {count + 1}, and its "
            f"first run drew {len(values)}: both must run the same Python code"
        )
    return values[count]

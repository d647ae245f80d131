"""Which implementation a call gets, and why."""

from __future__ import annotations

import collections

import tensorflow as tf

from attn_ops import kernels
from attn_ops.call import explanation
from attn_ops.call.attention_call import AttentionCall
from attn_ops.tensorflow import export, gpu, place, vectorization
from attn_ops.tensorflow.forms import xla

IMPLEMENTATIONS = ("fused", "composite", "reference")
# How many calls of scaled_dot_product_attention each has got in this process; in traced functions, how many were traced.
calls: collections.Counter = collections.Counter()


def reasons_against(implementation: str, call: AttentionCall) -> list[str]:
    """Why ``implementation`` cannot run ``call`` here and now."""
    if implementation == "fused":
        return unsupported_reasons(call, forced=True)  # a misspelt instruction set is an error of the op itself
    if implementation == "reference" and place.in_xla():
        return ["the reference is NumPy, which XLA cannot compile"]
    return []


def choose(name: str, call: AttentionCall, implementation: str | None) -> str:
    """The implementation that runs ``call``; the forced one, or ValueError with all the reasons why it cannot run."""
    explanation.check_name(name, implementation, IMPLEMENTATIONS)
    if implementation is None:
        return "composite" if reasons_against_fused(call) else "fused"
    explanation.check_can_run(name, implementation, reasons_against(implementation, call))
    return implementation


def reasons_against_fused(call: AttentionCall) -> list[str]:
    """Why a call that leaves the choice open is not to run fused here and now."""
    isa = kernels.unknown_isa_reason()
    return unsupported_reasons(call) + ([isa] if isa is not None and not gpu.in_use(call) else [])


def unsupported_reasons(call: AttentionCall, forced: bool = False) -> list[str]:
    """Why the fused kernels cannot, or should not, run ``call`` here and now; empty when they can.

    Every `AttentionCall` is within the reach of the CPU's kernels, so most reasons are of the place: no library, an XLA
    that takes no custom call, a GPU without kernels for it, an export that is to load without the library unless the
    choice is ``forced``.
    """
    missing = kernels.unavailable_reason()
    reasons = [] if missing is None else [missing]
    if not tf.executing_eagerly():
        reasons = _reasons_of_graph(call, forced) + reasons
    return reasons + gpu.unsupported_reasons(call, forced)


def _reasons_of_graph(call, forced):
    reasons = export.reasons_against_fused(forced)
    if place.in_xla() and kernels.unavailable_reason() is None and xla.unavailable_reason(call):
        reasons.append(f"the call is traced for XLA (jit_compile=True), and {xla.unavailable_reason(call)}")
    if place.in_forward_mode(call.differentiable()):
        reasons.append("a ForwardAccumulator watches the inputs, and in graphs only the composite has forward mode")
    rewritten = vectorization.reason_against_kernels(call)
    return reasons if rewritten is None else [*reasons, rewritten]


def form(call: AttentionCall) -> str:
    """How the fused kernels are called from here; what stands after "or" is for XLA, should it compile this graph."""
    if tf.executing_eagerly():
        return "op"
    if place.in_xla():
        return "xla"
    return "op or composite" if xla.unavailable_reason(call) else "op or xla"

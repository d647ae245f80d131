"""Which implementation a call gets, and why."""

from __future__ import annotations

import tensorflow as tf

from . import _native, explanation, fused, gpu, place, tensors
from .arguments import AttentionCall, normalize
from .explanation import Explanation, Support

IMPLEMENTATIONS = ("fused", "composite", "reference")


def check_name(name: str, implementation: str | None) -> None:
    """ValueError unless ``implementation`` is None or the name of one."""
    explanation.check_name(name, implementation, IMPLEMENTATIONS)


def reasons_against(implementation: str, call: AttentionCall) -> list[str]:
    """Why ``implementation`` cannot run ``call`` here and now."""
    if implementation == "fused":
        return fused.unsupported_reasons(call, forced=True)  # a misspelt instruction set is an error of the op itself
    if implementation == "reference" and place.in_xla():
        return ["the reference is NumPy, which XLA cannot compile"]
    return []


def choose(name: str, call: AttentionCall, implementation: str | None) -> str:
    """The implementation that runs ``call``; the forced one, or ValueError with all the reasons why it cannot run."""
    check_name(name, implementation)
    if implementation is None:
        return "composite" if _reasons_against_fused(call) else "fused"
    explanation.check_can_run(name, implementation, reasons_against(implementation, call))
    return implementation


def _reasons_against_fused(call: AttentionCall) -> list[str]:
    """Why a call that leaves the choice open is not to run fused here and now."""
    isa = _native.unknown_isa_reason()
    return fused.unsupported_reasons(call) + ([isa] if isa is not None and not gpu.in_use(call) else [])


@tf.autograph.experimental.do_not_convert
def explain(query, key, value, *, implementation=None, **options) -> Explanation:
    """What `scaled_dot_product_attention` would run for these arguments, and why. Nothing is computed.

    Takes the arguments of `scaled_dot_product_attention` and raises the same errors; tensors may be `tf.TensorSpec`
    (or `KerasTensor`) as well. The answer holds for the place of the call: inside a function traced with
    ``jit_compile=True`` it differs from outside.
    """
    call = described("explain", query, key, value, options)
    chosen = choose("explain", call, implementation)
    reasons = tuple(_reasons_against_fused(call))
    notes = place.missing()
    if chosen != "fused":
        return Explanation(chosen, reasons, notes=notes)
    return Explanation(chosen, reasons, fused.form(call), "gpu" if gpu.in_use(call) else "cpu", notes)


@tf.autograph.experimental.do_not_convert
def can_use_fused(query, key, value, **options) -> Support:
    """Whether the fused op can run these arguments of `scaled_dot_product_attention` here, with the reasons if not.

    Bad arguments raise as they do there; `explain` tells which specifications are taken in place of tensors.
    """
    reasons = _reasons_against_fused(described("can_use_fused", query, key, value, options))
    return Support(not reasons, tuple(reasons))


def described(name, query, key, value, options):
    """The normalised call. Where one of the tensors is only a specification, all of them become placeholders."""
    arguments = {"query": query, "key": key, "value": value, **options}
    if not any(_is_specification(x) for x in tf.nest.flatten(arguments)):
        return normalize(tensors, name, **arguments)
    with tf.Graph().as_default():
        return normalize(tensors, name, **tf.nest.map_structure(_placeholder, arguments))


def _is_specification(x):
    """Whether ``x`` describes a dense tensor; other KerasTensors are left for `normalize` to refuse."""
    if type(x).__name__ == "KerasTensor":
        return not (x.sparse or getattr(x, "ragged", False))  # older Keras has no ragged ones
    return isinstance(x, tf.TensorSpec)


def _placeholder(x):
    if _is_specification(x) or isinstance(x, tf.Tensor):
        return tf.compat.v1.placeholder(x.dtype, x.shape)
    return x

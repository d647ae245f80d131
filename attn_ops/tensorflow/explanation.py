"""What a call would run, and why: asked without computing anything."""

from __future__ import annotations

import functools
import sys

import tensorflow as tf

from attn_ops.call import public
from attn_ops.call.explanation import Explanation, Support, asks_of_model
from attn_ops.call.normalize import mask_notes, normalize
from attn_ops.models import keras_tensors
from attn_ops.tensorflow import choice, gpu, place, xp
from attn_ops.tensorflow.as_written import as_written


@as_written
@public.function(implementation=None)
def explain(query, key=None, value=None, **given) -> Explanation:
    """What `scaled_dot_product_attention` would run for these arguments, and why; or what a whole model runs.

    Nothing is computed. Takes the arguments of `scaled_dot_product_attention` and raises the same errors; tensors may be `tf.TensorSpec`
    (or `KerasTensor`) as well. The answer holds for the place of the call: inside a function traced with
    ``jit_compile=True`` it differs from outside.

    Of one Keras layer or model alone it tells what each attention layer in it runs, and what to do about those that do
    not run fused: `attn_ops.models.explanation.ModelExplanation`, a table when printed, `.to_dict()` for programs.
    """
    if asks_of_model(query, key, value, given):
        if _backend_of_keras() == "jax":
            from attn_ops.jax.explanation import explain as on_jax

            return on_jax(query)
        from attn_ops.models.explanation import of_model

        return of_model(query, places)
    implementation = given.pop("implementation", None)
    call = described("explain", query, key, value, given)
    chosen = choice.choose("explain", call, implementation)
    reasons = tuple(choice.reasons_against_fused(call))
    notes = (*place.missing(), *mask_notes(given.get("mask")))
    if chosen != "fused":
        return Explanation(chosen, reasons, notes=notes)
    return Explanation(chosen, reasons, choice.form(call), "gpu" if gpu.in_use(call) else "cpu", notes)


@as_written
@public.function()
def can_use_fused(query, key, value, **given) -> Support:
    """Whether the fused op can run these arguments of `scaled_dot_product_attention` here, with the reasons if not.

    Bad arguments raise as they do there; `explain` tells which specifications are taken in place of tensors.
    """
    reasons = choice.reasons_against_fused(described("can_use_fused", query, key, value, given))
    return Support(not reasons, tuple(reasons))


def places(dtype, implementation) -> tuple[Explanation, ...]:
    """What `explain` answers to an attention of a model in this dtype, in eager calls, graphs, XLA, training and exports."""
    x = tf.TensorSpec([2, 8, 2, 8], dtype)
    asked = None if implementation == "fused" else implementation

    def ask(asked=asked):
        return explain(x, x, x, implementation=asked)

    def traced(ask, jit_compile=False):
        answers = []
        function = tf.function(lambda: answers.append(ask()), jit_compile=jit_compile, autograph=False)
        function.get_concrete_function()
        return answers[0]

    graph = traced(ask)
    forced = implementation == "fused" and graph.implementation == "fused"  # which an export keeps
    with place.supposed_export():
        exported = traced(functools.partial(ask, "fused" if forced else asked))
    return ask(), graph, traced(ask, jit_compile=True), graph, exported


def described(name, query, key, value, given):
    """The normalised call. Where one of the tensors is only a specification, all of them become placeholders."""
    arguments = {"query": query, "key": key, "value": value, **given}
    if not any(_is_specification(x) for x in tf.nest.flatten(arguments)):
        return normalize(xp, name, **arguments)
    with tf.Graph().as_default():
        return normalize(xp, name, **tf.nest.map_structure(_placeholder, arguments))


def _backend_of_keras():
    return sys.modules["keras"].config.backend()


def _is_specification(x):
    """Whether ``x`` describes a dense tensor; other KerasTensors are left for `normalize` to refuse."""
    if type(x).__name__ == "KerasTensor":
        return keras_tensors.storage(x) == "dense"
    return isinstance(x, tf.TensorSpec)


def _placeholder(x):
    if _is_specification(x) or isinstance(x, tf.Tensor):
        return tf.compat.v1.placeholder(x.dtype, x.shape)
    return x

"""scaled_dot_product_attention: normalise the arguments, choose an implementation, call it."""

from __future__ import annotations

import tensorflow as tf

from attn_ops.call import checked_before, listeners, public
from attn_ops.call.normalize import checked_lse, normalize, normalize_weights
from attn_ops.models import keras_tensors
from attn_ops.tensorflow import choice, composite, derivatives, export, place, xp
from attn_ops.tensorflow.as_written import as_written
from attn_ops.tensorflow.forms import eager, graph, plain, reference, xla


@as_written
@public.function(implementation=None)
def scaled_dot_product_attention(query, key, value, **given):
    """softmax(scale * query @ key^T + bias, masked) @ value, without ever storing the scores.

    In this order: scores are scaled, capped (``logits_soft_cap``), biased (``alibi_slopes``, ``relative_bias``, ``bias``)
    and masked; ``sinks`` join the denominator; dropout acts on the probabilities.

    A superset of `keras.ops.dot_product_attention` (same argument names and tensor layout), in the vocabulary of
    `jax.nn.dot_product_attention` for lengths. The algorithm is that of FlashAttention-2 (Dao 2023,
    arXiv:2307.08691). Works eagerly, in `tf.function`, with unknown dimensions, and on `KerasTensor`s. The gradient
    reaches query, key, value, bias, relative_bias, sinks, a tensor ``scale``, and flows through ``lse``; second order and forward mode go
    through the composite.

    Args:
        query: [batch, seqlen_q, num_heads, head_dim]; float16, bfloat16, float32 or float64. Different dtypes of
            query, key and value are promoted to the widest (float16 with bfloat16: float32), as Keras does.
        key: [batch, seqlen_k, num_kv_heads, head_dim]. num_heads must be a multiple of num_kv_heads; query head h
            attends to key head h // (num_heads // num_kv_heads).
        value: [batch, seqlen_k, num_kv_heads, value_dim].
            All three may have rank 3, without the axis of heads, or rank 2, without that of the batch either; so do
            the results then.
        {options}
        implementation: None picks "fused" where it can run and "composite" elsewhere (`attn_ops.explain` tells which
            and why). "fused", "composite" (TensorFlow ops) or "reference" (NumPy in float64, slow, not differentiable
            twice) forces one.

    Returns:
        The output [batch, seqlen_q, num_heads, value_dim] in the common dtype, or (output, lse) with lse [batch,
        num_heads, seqlen_q] in float32 (float64 for float64 inputs), natural logarithm. A row that sees no key has
        output 0, lse -inf (or its sink) and gradients 0. What is masked never counts, even NaN.

    Raises:
        TypeError: not dense tensors, not floating inputs, a mask that is not boolean, lengths or seeds that are not
            integers, a dropout rate that is not a number.
        ValueError: shapes that do not fit each other, or any other value out of its range; an ``implementation`` that
            cannot run here, with all its reasons.
        tf.errors.InvalidArgumentError: the same, where only the running op can know.

    The choice is made where the call is traced. Functions traced for XLA (``jit_compile=True``) call the same kernels
    from inside XLA, with TensorFlow 2.18 or newer; other graphs hold what either needs, so they may be called by
    functions that XLA compiles. What Keras exports holds the composite: see `attn_ops.export`.
    """
    tells = not tf.executing_eagerly() or listeners.listeners  # who listens hears of calls that are normalised
    like = None if tells else checked_before.likeness(xp, (query, key, value), given)
    out = plain.again(like, query, key, value)
    if out is not None:
        choice.calls["fused"] += 1
        return out
    operations = keras_tensors.operations(query, key, value, *given.values())
    if operations is not None:
        return operations.attention(query, key, value, given)
    name = "scaled_dot_product_attention"
    implementation = given.pop("implementation", None)
    call = normalize(xp, name, query, key, value, **given)
    chosen = choice.choose(name, call, implementation)
    choice.calls[chosen] += 1
    out, lse = RUN[chosen](call)
    if chosen == "fused":
        plain.remember(like, (query, key, value), call)
    if call.squeeze:
        out = tf.squeeze(out, call.added_axes(call.heads_axis()))
        lse = tf.squeeze(lse, call.added_axes(1)) if call.return_lse else None
    return (out, lse) if call.return_lse else out


@as_written
@public.function(without=("dropout_rate", "dropout_seed", "return_lse"), lse=None, implementation=None)
def attention_weights(query, key, **given):
    """The probabilities that `scaled_dot_product_attention` weighs the values with, before dropout.

    A dense [batch, num_heads, seqlen_q, seqlen_k] tensor ([batch, seqlen_q, seqlen_k] for rank 3, [seqlen_q, seqlen_k]
    for rank 2), for plots and for looking into a model: this is the memory that the attention itself avoids. Rows that
    see no key are 0. Arguments and errors are those of `scaled_dot_product_attention`, and `KerasTensor`s are taken as
    there; ``lse`` is what that returned for the same arguments, and is not needed. Differentiable.
    """
    operations = keras_tensors.operations(query, key, *given.values())
    if operations is not None:
        return operations.attention_weights(query, key, given)
    name = "attention_weights"
    implementation, lse = given.pop("implementation", None), given.pop("lse", None)
    call = normalize_weights(xp, name, query, key, **given)
    choice.choose(name, call, implementation)  # refuses what cannot run
    weights = composite.attention_weights(call, None if lse is None else checked_lse(xp, name, call, lse))
    return tf.squeeze(weights, call.added_axes(1)) if call.squeeze else weights


def _fused(call):
    """(out, lse), differentiable, of the kernels: of the operator in eager calls; in functions traced for XLA of a custom
    call; and in other graphs, which XLA may compile later, of both."""
    if tf.executing_eagerly():
        return eager.forward(call)[:2]
    export.leave_hint()  # again in the branches of `graph`: which loader looks where first is its affair
    return derivatives.differentiable(xla if place.in_xla() else graph, call)


def _composite(call):
    out, lse = composite.attention(call, exporting=place.exporting(), vectorized=place.in_vectorization())
    if not tf.executing_eagerly():
        call.set_result_shapes(out, lse)  # of which its operations lose a part where an extent is unknown
    return out, lse


RUN = {"fused": _fused, "composite": _composite, "reference": reference.attention}

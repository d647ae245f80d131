"""scaled_dot_product_attention on JAX arrays: normalise the arguments, choose an implementation, call it."""

from __future__ import annotations

import jax

from attn_ops.call import explanation, public
from attn_ops.call.normalize import checked_lse, normalize, normalize_weights
from attn_ops.jax import call as calls
from attn_ops.jax import choice, composite, place, run, xp
from attn_ops.models import keras_tensors


@public.function(implementation=None)
@place.any_ranks
def scaled_dot_product_attention(query, key, value, **given):
    """softmax(scale * query @ key^T + bias, masked) @ value, without ever storing the scores.

    The function of `attn_ops.scaled_dot_product_attention` on JAX arrays: the same arguments, defaults, promotion of
    dtypes and results, also on `KerasTensor`s. Works under `jax.jit`, `jax.vmap`, `jax.lax.scan` and `jax.checkpoint`.
    The gradient reaches query, key, value, bias, relative_bias, sinks and an array ``scale``, and flows through
    ``lse``, to any order, in forward mode (`jax.jvp`, `jax.jacfwd`, `jax.hessian`) too, whose derivative the composite computes.

    Args:
        query: [batch, seqlen_q, num_heads, head_dim]; float16, bfloat16, float32 or float64. Different dtypes of
            query, key and value are promoted to the widest (float16 with bfloat16: float32).
        key: [batch, seqlen_k, num_kv_heads, head_dim]; num_heads must be a multiple of num_kv_heads.
        value: [batch, seqlen_k, num_kv_heads, value_dim].
            All three may have rank 3, without the axis of heads ([batch, seqlen, dim]; `jax.nn` leaves out the batch
            instead), or rank 2, without that of the batch either; so do the results then.
        {options}
        implementation: None takes the kernels on CPUs and on the GPUs that have them, and the composite elsewhere,
            decided when the call is compiled for a device (see `explain`). "fused" or "composite" (JAX operations)
            forces one.

    Returns:
        The output [batch, seqlen_q, num_heads, value_dim] in the common dtype, or (output, lse) with lse [batch,
        num_heads, seqlen_q] in float32 (float64 for float64 inputs), natural logarithm. A row that sees no key has
        output 0, lse -inf (or its sink) and gradients 0. What is masked never counts, even NaN.

    Raises:
        TypeError: not arrays, not floating inputs, a mask that is not boolean, lengths or seeds that are not integers,
            a dropout rate that is not a number.
        ValueError: shapes that do not fit each other, or any other value out of its range; dropout without a seed;
            ``implementation="fused"`` where the kernels are missing or disabled.
        jax.errors.JaxRuntimeError: traced lengths, intervals or offsets out of range, which only the running kernel can
            know. Of the composite, such entries get NaN; kernels of GPUs take the nearest in range.
    """
    operations = keras_tensors.operations(query, key, value, *given.values())
    if operations is not None:
        return operations.attention(query, key, value, given)
    name = "scaled_dot_product_attention"
    implementation = given.pop("implementation", None)
    call = normalize(xp, name, query, key, value, **given)
    out, lse = run.attention(name, call, choice.choose(name, implementation), forced=implementation is not None)
    if call.squeeze:
        out = out.squeeze(call.added_axes(call.heads_axis()))
        lse = lse.squeeze(call.added_axes(1)) if call.return_lse else None
    return (out, lse) if call.return_lse else out


@public.function(without=("dropout_rate", "dropout_seed", "return_lse"), lse=None, implementation=None)
@place.any_ranks
def attention_weights(query, key, **given):
    """The probabilities that `scaled_dot_product_attention` weighs the values with, before dropout.

    A dense [batch, num_heads, seqlen_q, seqlen_k] array ([batch, seqlen_q, seqlen_k] for rank 3, [seqlen_q, seqlen_k]
    for rank 2), for plots and for looking into a model: this is the memory that the attention itself avoids. Rows that
    see no key are 0. Arguments and errors are those of `scaled_dot_product_attention`; ``lse`` is what that returned for
    the same arguments, and is computed when not given. Differentiable.
    """
    operations = keras_tensors.operations(query, key, *given.values())
    if operations is not None:
        return operations.attention_weights(query, key, given)
    name = "attention_weights"
    implementation, lse = given.pop("implementation", None), given.pop("lse", None)
    call = normalize_weights(xp, name, query, key, **given)
    if lse is None:
        _, lse = run.attention(name, call, choice.choose(name, implementation), forced=implementation is not None)
    else:
        explanation.check_name(name, implementation, choice.IMPLEMENTATIONS)
        lse = checked_lse(xp, name, call, lse)
    weights = _weights(*calls.split(call), lse)
    return weights.squeeze(call.added_axes(1)) if call.squeeze else weights


_weights = jax.jit(composite.attention_weights, static_argnums=0)

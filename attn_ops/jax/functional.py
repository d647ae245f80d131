"""scaled_dot_product_attention on JAX arrays: normalise the arguments, choose an implementation, call it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attn_ops import explanation
from attn_ops.arguments import normalize
from attn_ops.explanation import Explanation
from attn_ops.jax import call as calls
from attn_ops.jax import composite, derivatives, fused, tensors

IMPLEMENTATIONS = ("fused", "composite")


def scaled_dot_product_attention(
    query,
    key,
    value,
    *,
    bias=None,
    mask=None,
    scale=None,
    is_causal=False,
    causal_alignment="top_left",
    window=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    dropout_rate=0.0,
    dropout_seed=None,
    layout="BSHD",
    return_lse=False,
    implementation=None,
):
    """softmax(scale * query @ key^T + bias, masked) @ value, without ever storing the scores.

    The function of `attn_ops.scaled_dot_product_attention` on JAX arrays: the same arguments, defaults, promotion of
    dtypes and results. Works under `jax.jit`, `jax.vmap`, `jax.lax.scan` and `jax.checkpoint`. The gradient reaches
    query, key, value, bias, an array ``scale``, and flows through ``lse``, to any order; forward mode (`jax.jvp`,
    `jax.jacfwd`, `jax.hessian`) needs ``implementation="composite"``.

    Args:
        query: [batch, seqlen_q, num_heads, head_dim]; float16, bfloat16, float32 or float64. Different dtypes of
            query, key and value are promoted to the widest (float16 with bfloat16: float32).
        key: [batch, seqlen_k, num_kv_heads, head_dim]; num_heads must be a multiple of num_kv_heads.
        value: [batch, seqlen_k, num_kv_heads, value_dim].
            All three may have rank 3, without the axis of heads; so do the results then.
        bias: added to the scaled scores; broadcastable to [batch, num_heads, seqlen_q, seqlen_k], of rank 4, 3 (no
            num_heads) or 2 (no batch either). -inf hides a key like a mask. Cast to the common dtype.
        mask: True where a query may see a key: a boolean array of the shapes that bias may have, an
            `attn_ops.masks.Mask`, or a list of these, all of which must allow.
        scale: of the scores; None means 1/sqrt(head_dim). A Python number keeps double precision. A scalar array is
            multiplied into the query.
        is_causal: row i sees no key after its own position.
        causal_alignment: "top_left" puts row i at key i, "bottom_right" the last row at the last key.
        window: (left, right), how many keys a row sees before and after its own; None or -1 for all.
        query_seq_lengths: integers [batch]; rows from there on are padding and see nothing.
        key_value_seq_lengths: integers [batch]; keys from there on are padding and are never read.
        dropout_rate: Python number in [0, 1), the share of the probabilities that are dropped.
        dropout_seed: an integer, integers [2] (seed, offset), or a key of `jax.random`: JAX has no hidden random state,
            and with a ``dropout_rate`` above 0 it must be given. Equal integers drop what they drop in TensorFlow.
        layout: "BSHD" as above, or "BHSD": [batch, num_heads, seqlen, head_dim] for query, key, value and the output.
        return_lse: also return the log of the sum of the exponentials of the scores (before dropout).
        implementation: None takes the kernels on CPUs and on the GPUs that have them, and the composite elsewhere,
            decided when the call is compiled for a device (see `explain`). "fused" or "composite" (JAX operations) forces one.

    Returns:
        The output [batch, seqlen_q, num_heads, value_dim] in the common dtype, or (output, lse) with lse [batch,
        num_heads, seqlen_q] in float32 (float64 for float64 inputs), natural logarithm. A row that sees no key has
        output 0, lse -inf and gradients 0. What is masked never counts, even NaN.

    Raises:
        TypeError: not arrays, not floating inputs, a mask that is not boolean, lengths or seeds that are not integers,
            a dropout rate that is not a number.
        ValueError: shapes that do not fit each other, or any other value out of its range; dropout without a seed;
            ``implementation="fused"`` where the kernels are missing or disabled.
        jax.errors.JaxRuntimeError: traced lengths out of range, which only the running kernel can know. The composite
            does not find those.
    """
    name = "scaled_dot_product_attention"
    call = normalize(
        tensors,
        name,
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        window=window,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        dropout_rate=dropout_rate,
        dropout_seed=dropout_seed,
        layout=layout,
        return_lse=return_lse,
    )
    out, lse = _run(name, call, implementation)
    if call.squeeze:
        out = out.squeeze(2 if layout == "BSHD" else 1)
        lse = lse.squeeze(1) if return_lse else None
    return (out, lse) if return_lse else out


def attention_weights(
    query,
    key,
    *,
    bias=None,
    mask=None,
    scale=None,
    is_causal=False,
    causal_alignment="top_left",
    window=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    layout="BSHD",
    lse=None,
    implementation=None,
):
    """The probabilities that `scaled_dot_product_attention` weighs the values with, before dropout.

    A dense [batch, num_heads, seqlen_q, seqlen_k] array ([batch, seqlen_q, seqlen_k] for rank 3), for plots and for
    looking into a model: this is the memory that the attention itself avoids. Rows that see no key are 0. Arguments
    and errors are those of `scaled_dot_product_attention`; ``lse`` is what that returned for the same arguments, and
    is computed when not given. Differentiable.
    """
    name = "attention_weights"
    key = tensors.as_tensor(name, "key", key)
    # One column of anything will do for the values: only lse is wanted.
    call = normalize(
        tensors,
        name,
        query,
        key,
        key[..., :1],
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        window=window,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        layout=layout,
        return_lse=True,
    )
    if lse is None:
        _, lse = _run(name, call, implementation)
    else:
        explanation.check_name(name, implementation, IMPLEMENTATIONS)
        lse = tensors.as_tensor(name, "lse", lse)
        if call.squeeze:
            lse = jnp.expand_dims(lse, 1)
        expected = tuple(call.result_shapes()[1])
        if lse.shape != expected:
            raise ValueError(f"{name}: lse must be what the attention returned, of shape {expected}, got {lse.shape}")
    weights = _weights(*calls.split(call), lse)
    return weights.squeeze(1) if call.squeeze else weights


def explain(query, key, value, *, implementation=None, **options) -> Explanation:
    """What `scaled_dot_product_attention` would run for these arguments on the default device, and why.

    Takes its arguments and raises the same errors; arrays may be `jax.ShapeDtypeStruct` as well. Nothing is computed.
    """
    name = "explain"
    arguments = {"query": query, "key": key, "value": value, **options}
    specifications = {k: x for k, x in arguments.items() if isinstance(x, jax.ShapeDtypeStruct)}
    device = jax.config.jax_default_device or jax.default_backend()
    platform = getattr(device, "platform", device)
    reasons = []

    def look(arrays):
        call = normalize(tensors, name, **{**arguments, **arrays})
        missing = fused.unavailable_reason()
        if missing is None and platform != "cpu":
            missing = fused.cuda_reason(*calls.split(call))
            missing = missing and f"the default device is of the platform {platform}, and {missing}"
        reasons.extend([] if missing is None else [missing])
        return call.query

    jax.eval_shape(look, specifications)
    explanation.check_name(name, implementation, IMPLEMENTATIONS)
    if implementation == "fused":
        explanation.check_can_run(name, implementation, reasons)
    chosen = implementation or ("composite" if reasons else "fused")
    if chosen != "fused":
        return Explanation(chosen, tuple(reasons))
    return Explanation(chosen, tuple(reasons), "xla", "cpu" if platform == "cpu" else "gpu")


_composite = jax.jit(composite.attention, static_argnums=0)
_weights = jax.jit(composite.attention_weights, static_argnums=0)


def _run(name, call, implementation):
    explanation.check_name(name, implementation, IMPLEMENTATIONS)
    options, arrays = calls.split(call)
    if implementation != "composite":
        missing = fused.unavailable_reason()
        if missing is None:
            return derivatives.attention(implementation == "fused", options, arrays)[:2]
        if implementation == "fused":
            explanation.check_can_run(name, implementation, [missing])
    return _composite(options, arrays)

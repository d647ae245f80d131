"""scaled_dot_product_attention: normalise the arguments, choose an implementation, call it."""

from __future__ import annotations

import tensorflow as tf

from . import composite, fused, habits, numpy_op, support, tensors
from .arguments import any_keras_tensor, normalize
from .options import TOP_LEFT

_RUN = {"fused": fused.attention, "composite": composite.attention, "reference": numpy_op.attention}


@tf.autograph.experimental.do_not_convert
@habits.told
def scaled_dot_product_attention(
    query,
    key,
    value,
    *,
    bias=None,
    mask=None,
    scale=None,
    is_causal=False,
    causal_alignment=TOP_LEFT,
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

    A superset of `keras.ops.dot_product_attention` (same argument names and tensor layout), in the vocabulary of
    `jax.nn.dot_product_attention` for lengths. The algorithm is that of FlashAttention-2 (Dao 2023,
    arXiv:2307.08691). Works eagerly, in `tf.function`, with unknown dimensions, and on `KerasTensor`s. The gradient
    reaches query, key, value, bias, a tensor ``scale``, and flows through ``lse``; second order and forward mode go
    through the composite.

    Args:
        query: [batch, seqlen_q, num_heads, head_dim]; float16, bfloat16, float32 or float64. Different dtypes of
            query, key and value are promoted to the widest (float16 with bfloat16: float32), as Keras does.
        key: [batch, seqlen_k, num_kv_heads, head_dim]. num_heads must be a multiple of num_kv_heads; query head h
            attends to key head h // (num_heads // num_kv_heads).
        value: [batch, seqlen_k, num_kv_heads, value_dim].
            All three may have rank 3, without the axis of heads, or rank 2, without that of the batch either; so do
            the results then.
        bias: added to the scaled scores; broadcastable to [batch, num_heads, seqlen_q, seqlen_k], of rank 4, 3 (no
            num_heads) or 2 (no batch either). -inf hides a key like a mask. Cast to the common dtype.
        mask: True where a query may see a key: a boolean tensor of the shapes that bias may have, an
            `attn_ops.masks.Mask`, or a list of these, all of which must allow. Float masks are refused: additive
            values go to ``bias``. Masks stay apart and broadcast, so [batch, 1, 1, seqlen_k] costs only itself. Rank 2
            is [seqlen_q, seqlen_k] even where the batch is as large as seqlen_q: a mask [batch, seqlen_k] of the keys
            goes through `attn_ops.masks.key_padding`.
        scale: of the scores; None means 1/sqrt(head_dim). A Python number keeps double precision. A scalar tensor is
            multiplied into the query.
        is_causal: row i sees no key after its own position.
        causal_alignment: where row i stands among the keys: "top_left" at key i (Keras, PyTorch), "bottom_right" at
            key i + length_k - length_q, so that the last row stands at the last key (FlashAttention, decoding). Where
            one query meets many keys and "top_left" is not said but the default, a warning tells so once.
        window: (left, right), how many keys a row sees before and after its own; None or -1 for all. Keras's
            ``sliding_window=w`` is (w - 1, w - 1).
        query_seq_lengths: integers [batch]; rows from there on are padding and see nothing.
        key_value_seq_lengths: integers [batch]; keys from there on are padding and are never read.
        dropout_rate: Python number in [0, 1), the share of the probabilities that are dropped; the others grow by
            1 / (1 - rate).
        dropout_seed: None for a fresh one at each call, an integer, or an integer tensor [2] (seed, offset). The same
            seed drops the same probabilities in every implementation. Under `tf.recompute_grad` give one, made
            outside: a fresh one would differ in the recomputation.
        layout: "BSHD" as above, or "BHSD": [batch, num_heads, seqlen, head_dim] for query, key, value and the output.
        return_lse: also return the log of the sum of the exponentials of the scores (before dropout).
        implementation: None picks "fused" where it can run and "composite" elsewhere (`attn_ops.explain` tells which
            and why). "fused", "composite" (TensorFlow ops) or "reference" (NumPy in float64, slow, not differentiable
            twice) forces one.

    Returns:
        The output [batch, seqlen_q, num_heads, value_dim] in the common dtype, or (output, lse) with lse [batch,
        num_heads, seqlen_q] in float32 (float64 for float64 inputs), natural logarithm. A row that sees no key has
        output 0, lse -inf and gradients 0. What is masked never counts, even NaN.

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
    if any_keras_tensor(query, key, value, bias, mask, scale, query_seq_lengths, key_value_seq_lengths, dropout_seed):
        from . import symbolic

        return symbolic.attention(
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
            implementation=implementation,
        )
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
    out, lse = _RUN[support.choose(name, call, implementation)](call)
    if call.squeeze:
        out = tf.squeeze(out, call.added_axes(call.heads_axis()))
        lse = tf.squeeze(lse, call.added_axes(1)) if call.return_lse else None
    return (out, lse) if call.return_lse else out


@tf.autograph.experimental.do_not_convert
@habits.told
def attention_weights(
    query,
    key,
    *,
    bias=None,
    mask=None,
    scale=None,
    is_causal=False,
    causal_alignment=TOP_LEFT,
    window=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    layout="BSHD",
    lse=None,
    implementation=None,
):
    """The probabilities that `scaled_dot_product_attention` weighs the values with, before dropout.

    A dense [batch, num_heads, seqlen_q, seqlen_k] tensor ([batch, seqlen_q, seqlen_k] for rank 3, [seqlen_q, seqlen_k]
    for rank 2), for plots and for looking into a model: this is the memory that the attention itself avoids. Rows that
    see no key are 0. Arguments and errors are those of `scaled_dot_product_attention`, and `KerasTensor`s are taken as
    there; ``lse`` is what that returned for the same arguments, and is not needed. Differentiable.
    """
    if any_keras_tensor(query, key, bias, mask, scale, query_seq_lengths, key_value_seq_lengths, lse):
        from . import symbolic

        return symbolic.attention_weights(
            query,
            key,
            bias=bias,
            mask=mask,
            scale=scale,
            is_causal=is_causal,
            causal_alignment=causal_alignment,
            window=window,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            layout=layout,
            lse=lse,
            implementation=implementation,
        )
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
    support.choose(name, call, implementation)  # refuses what cannot run
    if lse is not None:
        lse = tensors.as_tensor(name, "lse", lse)
        for axis in call.added_axes(1) if call.squeeze else ():
            lse = tf.expand_dims(lse, axis)
        _, expected = call.result_shapes()
        if not lse.shape.is_compatible_with(expected):
            raise ValueError(f"{name}: lse must be what the attention returned, of shape {expected}, got {lse.shape}")
    weights = composite.attention_weights(call, lse)
    return tf.squeeze(weights, call.added_axes(1)) if call.squeeze else weights

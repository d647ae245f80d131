"""Attention of sequences of different lengths without padding: packed tokens, and ragged tensors."""

from __future__ import annotations

import tensorflow as tf

import attn_ops
from attn_ops.call import public, varlen
from attn_ops.tensorflow import runtime_checks, xp
from attn_ops.tensorflow.as_written import as_written


@as_written
@public.function(
    without=varlen.WITHOUT, documentation=varlen.OF_PACKED_SCORES, **varlen.OWN, **varlen.OF_FLASH_ATTENTION
)
def varlen_attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, **given
):
    """Attention of sequences that lie one after the other, without padding, as FlashAttention's `flash_attn_varlen_func`.

    The keys that a row sees are those of its own sequence. Its position in it is counted by ``causal_alignment``:
    "bottom_right", the default as in FlashAttention, so that the last row of a sequence stands at its last key, or
    "top_left", the first row at the first key. They differ where a sequence has other lengths in rows and in keys.
    Works as `scaled_dot_product_attention`: eagerly, in `tf.function` with unknown dimensions, with the same gradients.

    Args:
        q: packed tokens [total_q, num_heads, head_dim].
        k: [total_k, num_kv_heads, head_dim].
        v: [total_k, num_kv_heads, value_dim].
        cu_seqlens_q: cumulative lengths, integers [sequences + 1] from 0 to total_q: sequence s has the rows from
            cu_seqlens_q[s] to before cu_seqlens_q[s + 1]. Sequences may be empty.
        cu_seqlens_k: the same of the keys, from 0 to total_k; None: the same as those of the rows.
        max_seqlen_q: not needed; where known it must not be less than the longest sequence has rows.
        max_seqlen_k: the same of keys.
        {options}
        softmax_scale: FlashAttention's name of ``scale``.
        causal: FlashAttention's name of ``is_causal``.
        window_size: FlashAttention's name of ``window``.
        dropout_p: FlashAttention's name of ``dropout_rate``.
        softcap: FlashAttention's name of ``logits_soft_cap``; 0 is none.
        implementation: see `scaled_dot_product_attention`.

    Returns:
        The output [total_q, num_heads, value_dim], or (output, lse) with lse [num_heads, total_q]. Rows past the last
        sequence, which only traced ``cu_seqlens_q`` can leave, have output 0.

    Raises:
        TypeError: what `scaled_dot_product_attention` refuses, cumulative lengths that are not integers, or an option
            under two names.
        ValueError: shapes that do not fit; where known, cumulative lengths that do not start at 0, go back or do not end
            with the number of tokens; alibi_slopes or relative_bias where rows and keys are not known to have the same
            lengths, or beside a query_offset; a mask of batches or of a Python function.
        tf.errors.InvalidArgumentError: traced cumulative lengths or offsets of which that is found when they run (in XLA
            too few are no error, and the composite has NaN instead).
    """
    return _attend("varlen_attention", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, given)


def _attend(name, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, given):
    cu = _checked(name, q, k, cu_seqlens_q, cu_seqlens_k)
    attention = attn_ops.scaled_dot_product_attention
    return varlen.attend(xp, attention, name, q, k, v, *cu, max_seqlen_q, max_seqlen_k, given)


@as_written
@public.function(without=varlen.WITHOUT, **varlen.OWN)
def ragged_attention(query, key, value, **given):
    """Attention of ragged tensors, each sequence by itself, without padding.

    `varlen_attention` of their values, whose row splits are the cumulative lengths. Differentiable with respect to them.

    Args:
        query: `tf.RaggedTensor` [batch, (seqlen_q), num_heads, head_dim].
        key: `tf.RaggedTensor` [batch, (seqlen_k), num_kv_heads, head_dim].
        value: `tf.RaggedTensor` [batch, (seqlen_k), num_kv_heads, value_dim], in rows as long as those of key.
        bias, mask, query_offset: as of `varlen_attention`, by the values of query and key one after the other.
        {options}
        implementation: see `scaled_dot_product_attention`.

    Returns:
        A `tf.RaggedTensor` [batch, (seqlen_q), num_heads, value_dim] in rows as long as those of query, or (output, lse)
        with lse another one, [batch, (seqlen_q), num_heads].

    Raises:
        TypeError: other tensors, or what `varlen_attention` refuses.
        ValueError: more than one ragged dimension, key and value in rows of different lengths, or as `varlen_attention`.
    """
    name = "ragged_attention"
    for what, x in (("query", query), ("key", key), ("value", value)):
        _check_ragged(name, what, x)
    value = runtime_checks.with_rows_of(name, key, value)
    splits, of_keys = query.row_splits, key.row_splits
    of_keys = None if of_keys is splits else of_keys
    result = _attend(name, query.values, key.values, value.values, splits, of_keys, None, None, given)
    out, *lse = result if isinstance(result, tuple) else (result,)
    out = query.with_values(out)
    return (out, query.with_values(tf.transpose(lse[0]))) if lse else out


def _check_ragged(name, what, x):
    if not isinstance(x, tf.RaggedTensor):
        raise TypeError(
            f"{name}: {what} must be a RaggedTensor [batch, (seqlen), num_heads, head_dim], got {type(x).__name__}; "
            "tf.RaggedTensor.from_tensor(x, lengths) makes one of a padded tensor"
        )
    if x.ragged_rank != 1 or x.values.shape.rank not in (None, 3):
        raise ValueError(
            f"{name}: {what} must be [batch, (seqlen), num_heads, head_dim] with one ragged dimension, got shape {x.shape} "
            f"and {x.ragged_rank}; tf.ragged.constant takes ragged_rank=1"
        )


def _checked(name, q, k, cu_seqlens_q, cu_seqlens_k):
    """The cumulative lengths; traced ones wait for what `varlen.arguments` cannot check of them."""
    if tf.executing_eagerly():
        return cu_seqlens_q, cu_seqlens_k
    cu, conditions = [cu_seqlens_q, cu_seqlens_k], []
    for what, x, tokens in zip(("cu_seqlens_q", "cu_seqlens_k"), cu, (q, k)):
        if not tf.is_tensor(x) or tf.get_static_value(x) is not None or x.shape.rank != 1 or not x.dtype.is_integer:
            continue
        total = tf.cast(tf.shape(tokens)[0], x.dtype)
        fits = tf.reduce_all(x[1:] >= x[:-1]) & tf.reduce_all(x[:1] == 0) & tf.reduce_all(x[-1:] == total)
        rule = f"{name}: {what} must start at 0, never go back and end with the number of tokens"
        conditions.append(tf.debugging.Assert(fits, [rule, total, "got", x], summarize=8))
    if tf.is_tensor(cu_seqlens_q) and tf.is_tensor(cu_seqlens_k) and conditions:
        same = tf.equal(tf.size(cu_seqlens_q), tf.size(cu_seqlens_k))
        rule = f"{name}: the numbers of sequences must be the same, got shapes"
        conditions.append(tf.debugging.Assert(same, [rule, tf.shape(cu_seqlens_q), tf.shape(cu_seqlens_k)]))
    if not conditions:
        return cu_seqlens_q, cu_seqlens_k
    with tf.control_dependencies(conditions):
        same = cu_seqlens_k is cu_seqlens_q
        cu = [tf.identity(x) if tf.is_tensor(x) else x for x in cu]
        return (cu[0], cu[0]) if same else tuple(cu)

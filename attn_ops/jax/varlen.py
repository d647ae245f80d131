"""Attention of sequences of different lengths without padding, on packed tokens; tensorflow/varlen.py is its twin."""

from __future__ import annotations

import attn_ops
from attn_ops.call import public, varlen
from attn_ops.jax import place, xp


@public.function(
    without=varlen.WITHOUT, documentation=varlen.OF_PACKED_SCORES, **varlen.OWN, **varlen.OF_FLASH_ATTENTION
)
@place.any_ranks
def varlen_attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, **given
):
    """Attention of sequences that lie one after the other, without padding, as FlashAttention's `flash_attn_varlen_func`.

    The function of `attn_ops.varlen_attention` on JAX arrays, with the same arguments, defaults and results. The
    cumulative lengths may be traced: rows past the last sequence then have output 0, and of lengths that do not start at 0,
    go back or end beyond the tokens all is NaN by the composite, and an error of intervals by the kernels (of CPUs).

    Args:
        q: packed tokens [total_q, num_heads, head_dim].
        k: [total_k, num_kv_heads, head_dim].
        v: [total_k, num_kv_heads, value_dim].
        cu_seqlens_q: cumulative lengths, integers [sequences + 1] from 0 to total_q. Sequences may be empty.
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
        The output [total_q, num_heads, value_dim], or (output, lse) with lse [num_heads, total_q].

    Raises:
        TypeError: what `scaled_dot_product_attention` refuses, cumulative lengths that are not integers, or an option
            under two names.
        ValueError: shapes that do not fit; where known, cumulative lengths that do not start at 0, go back or do not end
            with the number of tokens; alibi_slopes or relative_bias where rows and keys are not known to have the same
            lengths, or beside a query_offset; a mask of batches or of a Python function.
    """
    name = "varlen_attention"
    attention = attn_ops.jax.scaled_dot_product_attention
    return varlen.attend(
        xp, attention, name, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, given
    )

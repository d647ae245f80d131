"""What the attention functions say to arguments that have these names in other libraries.

Python's own TypeError names the argument only. Those that come by habit from PyTorch, Keras, JAX, flash-attn, xformers or
MLX get told what to pass here instead.
"""

from __future__ import annotations

_KEY_PADDING = "mask=attn_ops.masks.key_padding(m), m [batch, seqlen_k] True where a key is no padding"
_WEIGHTS = "attn_ops.attention_weights gives the probabilities"
_PACKED = (
    "packed sequences take mask=attn_ops.masks.segments(q_ids, kv_ids), padded ones query_seq_lengths and "
    "key_value_seq_lengths"
)
_VARLEN = "attn_ops.varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k) for packed tokens [total, num_heads, head_dim]"
_PAGED = "attn_ops.paged_attention(q, k_pages, v_pages, block_table, lengths) for keys in pages"
_CAP = "logits_soft_cap="
_HERE = {
    "attn_mask": "mask= where it is boolean (True = may be seen), bias= where it is added to the scores",
    "attention_mask": "mask=, boolean (True = may be seen) and broadcastable to the scores; for padding " + _KEY_PADDING,
    "key_padding_mask": _KEY_PADDING + " (in PyTorch True is hidden: ~key_padding_mask)",
    "padding_mask": _KEY_PADDING,
    "key_mask": _KEY_PADDING,
    "value_mask": _KEY_PADDING,
    "query_mask": "mask=attn_ops.masks.query_padding(query_mask)",
    "attn_bias": "bias=, or mask= with one of attn_ops.masks",
    "causal": "is_causal=",
    "use_causal_mask": "is_causal=",
    "dropout": "dropout_rate= (0 when not training)",
    "dropout_p": "dropout_rate= (0 when not training)",
    "rate": "dropout_rate=",
    "training": "dropout_rate=, which is 0 when not training",
    "seed": "dropout_seed=",
    "rng": "dropout_seed=",
    "dropout_rng": "dropout_seed=",
    "softmax_scale": "scale=",
    "sm_scale": "scale=",
    "use_scale": "scale=, 1 for none",
    "window_size": "window=(left, right)",
    "local_window_size": "window=(left, right)",
    "sliding_window": "window=(sliding_window - 1, sliding_window - 1)",
    "enable_gqa": "nothing: key and value may have fewer heads than query",
    "flash_attention": 'implementation="fused" for True, "composite" for False',
    "need_weights": _WEIGHTS,
    "return_attention_scores": _WEIGHTS,
    "return_attn_probs": _WEIGHTS,
    "return_softmax_lse": "return_lse=",
    "return_residual": "return_lse=",
    "deterministic": "nothing: it always is",
    "tensor_layout": "layout=",
    "data_format": "layout=",
    "cu_seqlens": _VARLEN,
    "cu_seqlens_q": _VARLEN,
    "cu_seqlens_k": _VARLEN,
    "cu_seqlens_kv": _VARLEN,
    "max_seqlen_q": _VARLEN,
    "max_seqlen_k": _VARLEN,
    "segment_ids": _PACKED,
    "seqused_k": "key_value_seq_lengths=",
    "cache_seqlens": 'key_value_seq_lengths=, with causal_alignment="bottom_right" where is_causal',
    "block_table": _PAGED,
    "block_tables": _PAGED,
    "page_table": _PAGED,
    "page_indices": _PAGED,
    "kv_seq_lengths": "key_value_seq_lengths=",
    "key_seq_lengths": "key_value_seq_lengths=",
    "attn_logits_soft_cap": _CAP,
    "softcap": _CAP,
    "soft_cap": _CAP,
    "logit_cap": _CAP,
    "logits_soft_capping": _CAP,
    "attn_logit_softcapping": _CAP,
    "s_aux": "sinks=",
    "sink": "sinks=",
    "attention_sinks": "sinks=",
    "learnable_sink": "sinks=",
    "q_offset": "query_offset=",
    "cache_position": "query_offset=, the position of the first query row",
    "start_pos": "query_offset=",
    "slopes": "alibi_slopes=",
    "position_bias": "bias= where it is [batch, num_heads, seqlen_q, seqlen_k]; relative_bias= from a table by distance, "
    "attn_ops.T5RelativeBias(table) from T5's buckets",
    "rel_pos_bias": "relative_bias=, a table by distance",
    "relative_attention_bias": "relative_bias=attn_ops.T5RelativeBias(table), table [num_buckets, num_heads]",
    "block_mask": "mask=attn_ops.masks.block_sparse(blocks, block_q, block_k), or attn_ops.masks.from_function(mask_mod)",
    "mask_mod": "mask=attn_ops.masks.from_function(mask_mod)",
    "mask_function": "mask=attn_ops.masks.from_function(mask_function)",
    "score_mod": "bias=, logits_soft_cap=, alibi_slopes=, relative_bias= or mask=, whichever it computes: scores are "
    "capped, then biased, then masked",
}
_SHORT = {"q": "query", "k": "key", "v": "value"}


def message(name, positional, options, args, given) -> str:
    """What to say of a call of the function ``name``, with arguments that are neither ``positional`` nor ``options``."""
    if len(args) > len(positional):
        return (
            f"{name}: takes {len(positional)} arguments by position ({', '.join(positional)}), got {len(args)}; all "
            "others by name: mask= (boolean, True = may be seen), bias= (added to the scores), is_causal=, scale=, ..."
        )
    unknown = next(option for option in given if option not in (*positional, *options))
    known = f"there are {', '.join(options)}"
    if unknown in _SHORT:
        hint = f"it is {_SHORT[unknown]}="
    else:
        hint = f"here it is {_HERE[unknown]}" if unknown in _HERE else known
    return f"{name}: got an unexpected keyword argument {unknown!r}; {hint}"

"""What the attention functions say to arguments that have these names in other libraries.

Python's own TypeError names the argument only. Those that come by habit from PyTorch, Keras, JAX, flash-attn, xformers or
MLX get told what to pass here instead.
"""

from __future__ import annotations

_KEY_PADDING = "mask=attn_ops.masks.key_padding(m), m [batch, seqlen_k] True where a key is no padding"
_WEIGHTS = "attn_ops.attention_weights gives the probabilities"
_PACKED = "packed sequences take mask=attn_ops.masks.segments(q_ids, kv_ids), padded ones query_seq_lengths and key_value_seq_lengths"
_HERE = {
    "attn_mask": "mask= where it is boolean (True = may be seen), bias= where it is added to the scores",
    "attention_mask": "mask=, boolean (True = may be seen) and broadcastable to the scores; for padding " + _KEY_PADDING,
    "key_padding_mask": _KEY_PADDING + " (in PyTorch True is hidden: ~key_padding_mask)",
    "padding_mask": _KEY_PADDING,
    "key_mask": _KEY_PADDING,
    "value_mask": _KEY_PADDING,
    "query_mask": "mask=attn_ops.masks.query_padding(query_mask)",
    "attn_bias": "bias=, or mask= with one of attn_ops.masks",
    "alibi_slopes": "bias=, with the slopes times the distances",
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
    "cu_seqlens": _PACKED,
    "cu_seqlens_q": _PACKED,
    "cu_seqlens_k": _PACKED,
    "segment_ids": _PACKED,
    "seqused_k": "key_value_seq_lengths=",
    "cache_seqlens": 'key_value_seq_lengths=, with causal_alignment="bottom_right" where is_causal',
    "kv_seq_lengths": "key_value_seq_lengths=",
    "key_seq_lengths": "key_value_seq_lengths=",
    "attn_logits_soft_cap": None,
    "logits_soft_cap": None,
    "softcap": None,
    "sinks": None,
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
    if unknown in _HERE and _HERE[unknown] is None:
        hint = "it cannot be done here"
    elif unknown in _SHORT:
        hint = f"it is {_SHORT[unknown]}="
    else:
        hint = f"here it is {_HERE[unknown]}" if unknown in _HERE else known
    return f"{name}: got an unexpected keyword argument {unknown!r}; {hint}"

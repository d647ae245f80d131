"""Public options of the attention as the kernels take them, and what the gradient of a table is from theirs."""

import numpy as np
from attn_ops import T5RelativeBias
from reference_cases import take_mask


def core_options(query, key, options):
    """The keywords of `_core.forward` and `_core.backward` for these public options."""
    options = dict(options)
    structure = take_mask(options)
    seed = options.pop("dropout_seed", None)
    if seed is not None:
        options["dropout_seed"], options["dropout_offset"] = (seed, 0) if np.ndim(seed) == 0 else map(int, seed)
    rows, heads = (1, 2) if options.get("layout", "BSHD") == "BSHD" else (2, 1)
    lse_dtype = np.float64 if query.dtype == np.float64 else np.float32
    offset = options.pop("query_offset", None)
    parts = structure.parts(query.shape[rows], key.shape[rows], offset)
    named = {
        "masks": [np.asarray(m) for m in parts.dense],
        "window_left": structure.window_left,
        "window_right": structure.window_right,
        "bottom_right": structure.bottom_right,
        "query_lengths": structure.query_lengths,
        "key_lengths": structure.key_lengths,
        "intervals": parts.intervals,
        "segments": parts.segments,
        "blocks": parts.blocks,
        "block_q": parts.block_q or None,
        "block_k": parts.block_k or None,
        "query_offset": None if offset is None else np.atleast_1d(np.asarray(offset, np.int32)),
        "soft_cap": options.pop("logits_soft_cap", None),
        "slopes": _accumulated(options.pop("alibi_slopes", None), lse_dtype, 2),
        "relative_bias": options.pop("relative_bias", None),
        "sinks": _accumulated(options.pop("sinks", None), lse_dtype, 1),
    }
    if named["relative_bias"] is not None:
        named["relative_bias"] = expanded_table(named["relative_bias"]).T.astype(lse_dtype)
    return {**options, **{name: x for name, x in named.items() if x is not None}}


def _accumulated(x, dtype, rank):
    if x is None:
        return None
    x = np.asarray(x, dtype)
    return x if x.ndim == rank else x[None]


def expanded_table(table):
    """A relative_bias as its table by distance."""
    return table.table[table.buckets("test", len(table.table))] if isinstance(table, T5RelativeBias) else np.asarray(table)


def table_gradient(table, gradient):
    """The gradient of a relative_bias as the public functions give it, from that of `_core`."""
    gradient = gradient.T
    if not isinstance(table, T5RelativeBias):
        return gradient
    by_bucket = np.zeros(table.table.shape, gradient.dtype)
    np.add.at(by_bucket, table.buckets("test", len(by_bucket)), gradient)
    return by_bucket

"""Attention of packed sequences as one call of the usual function: a batch of 1, and an interval of keys per row.

Nothing is padded: rows and keys stay as they lie, and the intervals, two integers per row, keep each within its sequence.
``xp`` is the framework, tensorflow/xp.py or jax/xp.py.
"""

from __future__ import annotations

import numpy as np

from attn_ops import namespaces
from attn_ops.call import arrays, options
from attn_ops.masks import checks
from attn_ops.masks.mask import Mask
from attn_ops.masks.structure import Packed

# Options of the attention that packed sequences have no use for: they are of batches, or [seqlen_q, seqlen_k].
WITHOUT = ("bias", "mask", "query_seq_lengths", "key_value_seq_lengths", "layout", "query_offset")
# FlashAttention's names and defaults of options, and what they are here.
ALIASES = {
    "softmax_scale": ("scale", None),
    "causal": ("is_causal", False),
    "window_size": ("window", (-1, -1)),
    "dropout_p": ("dropout_rate", 0.0),
    "softcap": ("logits_soft_cap", 0.0),
}
OWN = {"causal_alignment": "bottom_right", "implementation": None}  # options of these functions, and their defaults
OF_FLASH_ATTENTION = {name: default for name, (_, default) in ALIASES.items()}


def with_own_names(name, given):
    """The options ``given``, those under FlashAttention's names under ours."""
    given = dict(given)
    for alias, (ours, default) in ALIASES.items():
        value = given.pop(alias, default)
        if value is default or (not hasattr(value, "shape") and value == default):
            continue
        if ours in given:
            raise TypeError(f"{name}: {alias} and {ours} are the same option, got both: {value!r} and {given[ours]!r}")
        given[ours] = value
    return given


def attend(xp, attention, name, *packed):
    """What the framework's ``attention``, `scaled_dot_product_attention`, gives for packed sequences: the ``packed``
    `arguments`."""
    query, key, value, options = arguments(xp, name, *packed)
    result = attention(query, key, value, **options)
    return (result[0][0], result[1][0]) if isinstance(result, tuple) else result[0]


def arguments(xp, name, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, given):
    """(query, key, value, options) of `scaled_dot_product_attention` for packed sequences; its results are
    [1, total, ...].

    Raises TypeError for a wrong kind or dtype and ValueError for a wrong value or shape.
    """
    given = with_own_names(name, given)
    tokens = {what: xp.as_tensor(name, what, x) for what, x in (("q", q), ("k", k), ("v", v))}
    totals = {}
    for what, x in tokens.items():
        extents = xp.extents(x)
        if extents is not None and len(extents) != 3:
            raise ValueError(
                f"{name}: {what} must be packed tokens [total, num_heads, head_dim], got shape {arrays.shape_text(extents)}"
            )
        totals[what] = None if extents is None else extents[0]
    of_keys = totals["k"] if totals["v"] is None else totals["v"]
    if totals["k"] is not None and totals["k"] != of_keys:
        raise ValueError(f"{name}: k and v must have the same number of tokens, got {totals['k']} and {totals['v']}")
    cu = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    cu = checks.cumulative(name, cu, {"cu_seqlens_q": totals["q"], "cu_seqlens_k": of_keys})
    if cu_seqlens_k is None:
        checks.cumulative(name, {"cu_seqlens_q": cu["cu_seqlens_q"]}, {"cu_seqlens_q": of_keys})
    for what, longest in (("q", max_seqlen_q), ("k", max_seqlen_k)):
        _check_longest(name, f"max_seqlen_{what}", longest, cu[f"cu_seqlens_{what}"], cu["cu_seqlens_q"])
    _check_distances(name, cu, given)
    left, right = options.window(name, given.pop("window", None))
    if options.flag(name, "is_causal", given.pop("is_causal", False)):
        right = 0
    bottom_right = options.bottom_right(name, given.pop("causal_alignment", OWN["causal_alignment"]))
    given["mask"] = Mask(structured=(Packed(*cu.values(), left, right, bottom_right),))
    return *(xp.expand_dims(x, 0) for x in tokens.values()), given


def _check_longest(name, what, longest, cu, cu_of_rows):
    """FlashAttention needs to be told the longest sequence; here it is checked where it is known and not needed."""
    longest, cu = (None if x is None else namespaces.known(x) for x in (longest, cu_of_rows if cu is None else cu))
    if longest is not None and cu is not None and np.diff(cu).max(initial=0) > longest:
        raise ValueError(f"{name}: {what} must be at least the longest sequence, {np.diff(cu).max()}, got {longest}")


def _check_distances(name, cu, given):
    """Slopes and tables count from row to key in the packed order: the same as in the sequences where those are alike."""
    slopes = given.get("alibi_slopes")
    if slopes is not None and len(getattr(slopes, "shape", ())) == 2 and slopes.shape[0] != 1:
        raise ValueError(
            f"{name}: alibi_slopes must be [num_heads], the same for all sequences, got shape {tuple(slopes.shape)}"
        )
    rows, keys = cu.values()
    for what in ("alibi_slopes", "relative_bias"):
        if given.get(what) is None or keys is None or rows is keys:
            continue
        values = [namespaces.known(x) for x in (rows, keys)]
        if any(x is None for x in values) or not np.array_equal(*values):
            told = "are traced" if any(x is None for x in values) else f"are {values[0]} and {values[1]}"
            raise ValueError(
                f"{name}: {what} needs sequences of the same lengths in rows and keys, and cu_seqlens_q and cu_seqlens_k "
                f"{told}; where they are the same leave cu_seqlens_k out"
            )

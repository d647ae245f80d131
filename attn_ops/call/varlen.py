"""Attention of packed sequences as one call of the usual function: a batch of 1, and an interval of keys per row.

Nothing is padded: rows and keys stay as they lie, and the intervals, two integers per row, keep each within its sequence.
``xp`` is the framework, tensorflow/xp.py or jax/xp.py.
"""

from __future__ import annotations

import numpy as np

from attn_ops import namespaces
from attn_ops.call import arrays, options, shapes
from attn_ops.call.normalize import both, split_masks
from attn_ops.masks import checks
from attn_ops.masks.mask import Mask
from attn_ops.masks.structure import Packed, Prefix

# Options of the attention that are of batches, and so others here, or none.
WITHOUT = ("bias", "mask", "query_seq_lengths", "key_value_seq_lengths", "layout", "query_offset")
# FlashAttention's names and defaults of options, and what they are here.
ALIASES = {
    "softmax_scale": ("scale", None),
    "causal": ("is_causal", False),
    "window_size": ("window", (-1, -1)),
    "dropout_p": ("dropout_rate", 0.0),
    "softcap": ("logits_soft_cap", 0.0),
}
OWN = {  # options of these functions, and their defaults
    "bias": None,
    "mask": None,
    "query_offset": None,
    "causal_alignment": options.Unsaid("bottom_right"),
    "implementation": None,
}
# What both `varlen_attention` say of those that stand in the place of options.
OF_PACKED_SCORES = """\
    bias: added to the scaled scores, floating, of the packed scores [num_heads, total_q, total_k] or [total_q, total_k];
        each extent may be 1, and [1, total_k] costs only itself. What it holds between two sequences never counts.
    mask: True where a row may see a key, boolean of the shapes that bias may have; an `attn_ops.masks.Mask`; or a list
        of these. Of a Mask, what goes by positions (causal, window, prefix, chunked) counts in each sequence, and a
        prefix may have a length for each, [sequences]; all else goes by the packed tokens. Lengths and Python
        functions have no place in it.
    query_offset: the key that the first row of a sequence stands at, counted from the sequence's first key, an integer
        or integers [sequences], from 0 to 2^30: for chunks of rows whose earlier keys are cached. Instead of
        causal_alignment.
"""
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
    `arguments`. What it refuses is told under the ``name`` that was called."""
    query, key, value, options = arguments(xp, name, *packed)
    try:
        result = attention(query, key, value, **options)
    except (TypeError, ValueError) as error:
        inner, told = f"{attention.__name__}: ", str(error)
        if not told.startswith(inner):
            raise
        raise type(error)(f"{name}: {told.removeprefix(inner)}") from None
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
                f"{name}: {what} must be packed tokens [total, num_heads, head_dim], got shape {shapes.shape_text(extents)}"
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
    heads = xp.extents(tokens["q"])
    dims = {"num_heads": None if heads is None else heads[1], "total_q": totals["q"], "total_k": of_keys}
    if given.get("bias") is not None:
        bias = arrays.floating_bias(xp, name, given["bias"])
        given["bias"] = _of_scores(xp, name, "bias", bias, dims)
    structure, dense = split_masks(name, given.pop("mask", None))
    dense = [_of_scores(xp, name, "mask", arrays.boolean_array(xp, name, x), dims) for x in dense]
    given["mask"] = [_packed(xp, name, Mask() if structure is None else structure, cu, given), *dense]
    return *(xp.expand_dims(x, 0) for x in tokens.values()), given


def _packed(xp, name, mask, cu, given):
    """The mask of all that says who sees whom: the sequences, a ``mask``, and the options ``given``, which are taken out.

    What counts from where rows stand counts in the sequences, all other parts go by the packed tokens.
    """
    sequences = cu["cu_seqlens_q"].shape[0]
    sequences = None if sequences is None else sequences - 1
    _check_mask(name, mask, sequences)
    offset = given.pop("query_offset", None)
    if offset is not None:
        offset = arrays.query_offset(xp, name, offset, sequences, axis="sequences")
        rule = f"{name}: query_offset must be between 0 and 2^30"
        offset = namespaces.required(offset, lambda x: (x >= 0) & (x <= options.LARGEST_OFFSET), rule)
    alignment = given.pop("causal_alignment", OWN["causal_alignment"])
    options.bottom_right(name, alignment)
    if isinstance(alignment, options.Unsaid) and (offset is not None or mask.is_aligned):
        alignment = mask.causal_alignment
    is_causal = options.flag(name, "is_causal", given.pop("is_causal", False))
    mask = both(name, mask, Mask(is_causal, alignment, options.window(name, given.pop("window", None))))
    options.check_one_position(name, offset, mask.bottom_right)
    inside = tuple(part for part in mask.structured if part.stands)
    packed = Packed(*cu.values(), mask.window_left, mask.window_right, mask.bottom_right, offset, inside)
    others = tuple(part for part in mask.structured if not part.stands)
    return Mask(dense=mask.dense, structured=(packed, *others))


def _check_mask(name, mask, sequences):
    """ValueError for parts of a ``mask`` that say nothing of packed tokens."""
    if mask.query_lengths is not None or mask.key_lengths is not None:
        raise ValueError(
            f"{name}: mask holds lengths, which are of batch entries, and cu_seqlens_q and cu_seqlens_k tell those of packed "
            f"sequences, got {mask!r}"
        )
    for part in mask.structured:
        if part.is_function:
            raise ValueError(
                f"{name}: mask holds a Python function, which does not know of sequences: pass what it is for the packed "
                f"tokens, attn_ops.masks.boolean(mask.materialize(total_q, total_k)), got {mask!r}"
            )
        length = list(getattr(part.length, "shape", ())) if isinstance(part, Prefix) else []
        if length not in ([], [1]) and not shapes.compatible(length, [sequences]):
            raise ValueError(
                f"{name}: length of the prefix mask must be an integer or have shape [sequences={sequences}], got "
                f"{shapes.shape_text(length)}"
            )


def _of_scores(xp, name, what, x, dims):
    """``x``, which is of the packed scores, with rank 4. ``dims`` are the extents of these by axis."""
    extents = xp.extents(x)
    if extents is None:
        return xp.expand_dims(xp.ensure_rank(x, 3, f"{name}_{what}_needs_rank_3"), 0)
    wanted = list(dims.values())[-len(extents) :]
    fits = len(extents) in (2, 3) and all(n == 1 or shapes.compatible([n], [m]) for n, m in zip(extents, wanted))
    if not fits:
        axes = ", ".join(f"{axis}={'?' if n is None else n}" for axis, n in dims.items())
        hint = f"; for the same keys in every row, {what}[None]" if extents == [dims["total_k"]] else ""
        raise ValueError(
            f"{name}: {what} must broadcast to the scores of packed tokens, [{axes}], with rank 2 ([total_q, total_k]) or 3: "
            f"there is no axis of batch, and each extent may be 1; got shape {shapes.shape_text(extents)}{hint}"
        )
    for _ in range(4 - len(extents)):
        x = xp.expand_dims(x, 0)
    return x


def _check_longest(name, what, longest, cu, cu_of_rows):
    """FlashAttention needs to be told the longest sequence; here it is checked where it is known and not needed."""
    if not (longest is None or options.is_integer(longest) or "int" in str(getattr(longest, "dtype", ""))):
        raise TypeError(f"{name}: {what} must be an integer, got {longest!r}")
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
        if given.get(what) is None:
            continue
        if given.get("query_offset") is not None:
            raise ValueError(
                f"{name}: {what} counts from rows and keys that begin together, and query_offset says where else rows stand: "
                "pass bias=, or call scaled_dot_product_attention for each sequence"
            )
        if keys is None or rows is keys:
            continue
        values = [namespaces.known(x) for x in (rows, keys)]
        if any(x is None for x in values) or not np.array_equal(*values):
            told = "are traced" if any(x is None for x in values) else f"are {values[0]} and {values[1]}"
            raise ValueError(
                f"{name}: {what} needs sequences of the same lengths in rows and keys, and cu_seqlens_q and cu_seqlens_k "
                f"{told}; where they are the same leave cu_seqlens_k out"
            )

"""The arguments of the attention functions: checked, promoted and brought to one form.

Everything that can be known about a call without running it is checked here, before any op runs, because TensorFlow
keeps the inputs of failing eager ops alive. Unknown dimensions and ranks pass; the ops check those again.

The rules are the same for TensorFlow and JAX: ``xp`` is the module with the few functions of either that they need,
tensorflow/xp.py or jax/xp.py.
"""

from __future__ import annotations

from attn_ops.call import arrays, checked_before, options, out_of_range, pages, precision, shapes
from attn_ops.call.attention_call import MAX_MASKS, AttentionCall, canonical
from attn_ops.call.listeners import listeners
from attn_ops.call.options import Options
from attn_ops.masks import checks
from attn_ops.masks.mask import Mask, Parts


def normalize(xp, name, query, key, value, **given):
    """The `AttentionCall` for the arguments of the public attention functions: query, key, value and the `Options` given.

    ``xp`` is the framework, ``name`` the function that errors name. Also given may be a ``block_table``, with which key and
    value are pages (pages.py), and ``of_cache``, with which they stay in the dtype that they are kept in, which has been
    checked; ``scales`` are those of both in int8. Raises TypeError for a wrong kind or dtype and ValueError for a wrong
    value or shape.
    """
    tensors = query, key, value
    like = checked_before.likeness(xp, tensors, given)
    call = None if like is None else checked_before.recall(like, tensors)
    if call is None:
        call = _checked(xp, name, query, key, value, **given)
        if like is not None:
            checked_before.remember(like, tensors, call)
    for tell in listeners:
        tell(name, call)
    return call


def _checked(xp, name, query, key, value, *, block_table=None, scales=(), of_cache=False, **given):
    (
        bias,
        mask,
        scale,
        is_causal,
        causal_alignment,
        window,
        query_seq_lengths,
        key_value_seq_lengths,
        dropout_rate,
        dropout_seed,
        layout,
        return_lse,
        query_offset,
        logits_soft_cap,
        alibi_slopes,
        relative_bias,
        sinks,
    ) = Options(**given)
    shapes.check_layout(name, layout)
    query, key, value, squeeze, original, *extents = _inputs(
        xp, name, query, key, value, 2 if layout == "BSHD" else 1, of_cache
    )
    if block_table is not None:
        block_table = pages.checked(xp, name, block_table, query, key, value, layout)
        extents = [extents[0], *(pages.sequence_extents(xp, x, block_table, layout) for x in (key, value))]
    dims = _score_dims(name, layout, *extents, original)
    batch, _, seqlen_q, seqlen_k, _ = dims
    dtype = query.dtype

    window = options.window(name, window)
    is_causal = options.flag(name, "is_causal", is_causal)
    bottom_right = options.bottom_right(name, causal_alignment)
    alignment_is_said = not isinstance(causal_alignment, options.Unsaid)
    places = None  # the offset as masks may know it
    if query_offset is not None:
        given, query_offset = query_offset, arrays.query_offset(xp, name, query_offset, batch)
        known = arrays.known_values(xp, given, query_offset)
        places = query_offset if known is None else known
        alignment_is_said = True
    masks = ()
    structured = _NONE
    if mask is not None:
        structure, masks = split_masks(name, mask)
        if structure is not None:
            counts_distances = alibi_slopes is not None or relative_bias is not None
            if counts_distances and structure.is_aligned:
                options.check_distances(name, causal_alignment, structure.causal_alignment)
            structure = both(
                name,
                structure,
                Mask(
                    is_causal=is_causal,
                    causal_alignment=causal_alignment,
                    window=window,
                    query_lengths=arrays.lengths(xp, name, "query_seq_lengths", query_seq_lengths, batch, seqlen_q),
                    key_lengths=arrays.lengths(
                        xp, name, "key_value_seq_lengths", key_value_seq_lengths, batch, seqlen_k
                    ),
                ),
            )
            if structure.structured:
                # What of it is causal or a window goes to the kernels as such, where nothing else counts distances.
                alone = query_offset is None and not counts_distances
                structure, structured = _structured(
                    xp, name, structure, query, (key, block_table), dims, layout, places, alone
                )
                masks += structured.dense
            else:
                masks += structure.tensors()
            window, is_causal = (structure.window_left, structure.window_right), structure.is_causal
            bottom_right = structure.bottom_right
            alignment_is_said |= bool(structure.structured) or not isinstance(structure.causal_alignment, options.Unsaid)
            query_seq_lengths, key_value_seq_lengths = structure.query_lengths, structure.key_lengths
        masks = _at_most_four(xp, [arrays.boolean(xp, name, m, dims) for m in masks])
    options.check_one_position(name, query_offset, bottom_right)
    window_left, window_right = window
    if is_causal:
        window_right = 0
        if seqlen_q == 1 and isinstance(seqlen_k, int) and seqlen_k > 1 and not (bottom_right or alignment_is_said):
            options.warn_of_top_left(name, seqlen_k)

    if bias is not None:
        bias = arrays.bias(xp, name, bias, dims, dtype)
    if scale is not None and not options.is_number(scale):
        query = arrays.times_tensor(xp, name, query, scale)
        scale = 1.0
    key_lengths = arrays.lengths(xp, name, "key_value_seq_lengths", key_value_seq_lengths, batch, seqlen_k)
    if block_table is not None:
        out_of_range.check_pages(xp, name, block_table, key, key_lengths, layout)
    lse_dtype = xp.float64 if dtype is xp.float64 else xp.float32
    if alibi_slopes is not None:
        alibi_slopes = arrays.alibi_slopes(xp, name, alibi_slopes, batch, dims[1], lse_dtype)
    if relative_bias is not None:
        relative_bias = arrays.relative_bias(xp, name, relative_bias, dims[1], lse_dtype)
    if sinks is not None:
        sinks = arrays.sinks(xp, name, sinks, dims[1], lse_dtype)
    dropout_rate = options.dropout_rate(name, dropout_rate)
    return AttentionCall(
        query,
        key,
        value,
        bias,
        masks,
        options.scale(name, scale),
        window_left,
        window_right,
        bottom_right,
        arrays.lengths(xp, name, "query_seq_lengths", query_seq_lengths, batch, seqlen_q),
        key_lengths,
        dropout_rate,
        arrays.seed(xp, name, dropout_seed) if dropout_rate else None,
        layout,
        squeeze,
        options.flag(name, "return_lse", return_lse),
        lse_dtype,
        precision.allow_tf32(),
        structured.intervals,
        query_offset,
        structured.segments,
        structured.blocks,
        structured.block_q,
        structured.block_k,
        options.logits_soft_cap(name, logits_soft_cap, lse_dtype is xp.float64),
        alibi_slopes,
        relative_bias,
        sinks,
        block_table,
        *(scales or (None, None)),
    )


_NONE = Parts()


def _structured(xp, name, mask, query, keys, dims, layout, offset, windows):
    """A `Mask` of this call (functions in it causal and windows only with ``windows``) and its `Parts` as the kernels take
    them; ``keys`` are the key and the table of its pages."""
    axis = 1 if layout == "BSHD" else 2
    key, block_table = keys
    rows, keys = xp.extent(query, axis), xp.extent(key, axis)
    if block_table is not None:
        keys = keys * xp.extent(block_table, 1)
    try:
        resolved = mask.of_call(*dims[:2], rows, keys, offset, windows=windows)
        parts = resolved.parts(rows, keys, offset, like=(query,))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    try:
        if parts.intervals is not None:
            parts = parts._replace(intervals=arrays.intervals(xp, name, parts.intervals, dims))
        if parts.segments is not None:
            parts = parts._replace(segments=arrays.segments(xp, name, parts.segments, dims))
        if parts.blocks is not None:
            parts = parts._replace(blocks=arrays.blocks(xp, name, parts.blocks, parts.block_q, parts.block_k, dims))
    except ValueError as error:  # of what the parts have become, by names that the caller may not have said
        raise ValueError(f"{error}; the mask is {mask.described()}") from None
    return resolved, parts


def normalize_weights(xp, name, query, key, **given):
    """The `AttentionCall` whose weights are asked for: one column of anything will do for the values."""
    key = xp.as_tensor(name, "key", key)
    return normalize(xp, name, query, key, key[..., :1], **given, return_lse=True)


def checked_lse(xp, name, call, lse):
    """``lse``, which the attention returned for the arguments of ``call``, with rank 3."""
    lse = xp.as_tensor(name, "lse", lse)
    for axis in call.added_axes(1) if call.squeeze else ():
        lse = xp.expand_dims(lse, axis)
    expected = call.result_shapes()[1]
    if not shapes.compatible(xp.extents(lse), expected):
        raise ValueError(f"{name}: lse must be what the attention returned, of shape {expected}, got {lse.shape}")
    return lse


def _inputs(xp, name, query, key, value, heads_axis, of_cache=False):
    """The three inputs with one dtype (unless ``of_cache``) and rank 4, how many axes they lacked, and the extents of each.

    Between the two the text of the extents they came with, None for those of rank 4.
    """
    query = xp.as_tensor(name, "query", query)
    key = xp.as_tensor(name, "key", key)
    value = xp.as_tensor(name, "value", value)
    dtypes = query.dtype, key.dtype, value.dtype
    if not of_cache and (dtypes[0] is not dtypes[1] or dtypes[0] is not dtypes[2] or dtypes[0] not in xp.FLOATS):
        dtype = _promoted(xp, name, dtypes)
        query, key, value = (xp.cast(x, dtype) for x in (query, key, value))
    q, k, v = xp.extents(query), xp.extents(key), xp.extents(value)
    if q and k and v and len(q) == len(k) == len(v) == 4:
        return query, key, value, 0, None, q, k, v
    known = {len(extents) for extents in (q, k, v) if extents is not None}
    if len(known) > 1 or not known <= {2, 3, 4}:
        raise ValueError(
            f"{name}: query, key and value must all have rank 4, or all rank 3 for a single head ([batch, seqlen, dim]), "
            f"or all rank 2 for a single sequence too ([seqlen, dim]), got shapes {_shapes(q, k, v)}"
        )
    rank = known.pop() if known else 4

    def with_heads(x, extents):
        if extents is None:
            x = xp.ensure_rank(x, rank, f"{name}_needs_rank_{rank}")
        if rank == 2:
            x = xp.expand_dims(x, 0)
        return x if rank == 4 else xp.expand_dims(x, heads_axis)

    query, key, value = (with_heads(x, extents) for x, extents in ((query, q), (key, k), (value, v)))
    given = None if rank == 4 else _shapes(q, k, v)
    return query, key, value, 4 - rank, given, *map(xp.extents, (query, key, value))


def _promoted(xp, name, dtypes):
    """The common dtype of Keras's promotion: the wider one, and float32 for float16 with bfloat16."""
    for what, dtype in zip(("query", "key", "value"), dtypes):
        if dtype not in xp.FLOATS:
            hint = f"; cast it: {xp.cast_text(what)}" if xp.is_integer(dtype) or dtype == xp.bool_ else ""
            raise TypeError(f"{name}: {what} must be float16, bfloat16, float32 or float64, got {dtype.name}{hint}")
    if xp.float64 in dtypes:
        return xp.float64
    return dtypes[0] if len(set(dtypes)) == 1 else xp.float32


def _score_dims(name, layout, q, k, v, given):
    """(batch, num_heads, seqlen_q, seqlen_k) of the scores and num_kv_heads, None where unknown.

    The extents are checked against each other. ``given`` is the text of those that the caller's tensors have, if those
    are others.
    """
    batch, num_heads, seqlen_q, head_dim = canonical(q, layout)
    batch_k, num_kv_heads, seqlen_k, head_dim_k = canonical(k, layout)
    batch_v, num_kv_heads_v, seqlen_v, value_dim = canonical(v, layout)

    def where():
        """The end of each message: the shapes, how they were read, and what else they may mean."""
        if given is not None:
            return (
                f"({given}); without heads, rank 3 is [batch, seqlen, dim] and rank 2 [seqlen, dim]: "
                "[seqlen, num_heads, head_dim], as jax.nn takes it, needs an axis for the batch, x[None]"
            )
        other = "BHSD" if layout == "BSHD" else "BSHD"
        hint = f'; they fit as layout="{other}": {shapes.LAYOUTS}' if _fit(other, q, k, v) else ""
        return f"({_shapes(q, k, v)}, layout {layout}){hint}"

    def agree(rule, *extents):
        known = [n for n in extents if n is not None]
        if known and known.count(known[0]) != len(known):
            got = ", ".join("?" if n is None else str(n) for n in extents)
            raise ValueError(f"{name}: {rule}, got {got} {where()}")
        return known[0] if known else None

    if not (batch == batch_k == batch_v and seqlen_k == seqlen_v and num_kv_heads == num_kv_heads_v
            and head_dim == head_dim_k):  # fmt: skip
        batch = agree("query, key and value must have the same batch size", batch, batch_k, batch_v)
        seqlen_k = agree("key and value must have the same length", seqlen_k, seqlen_v)
        num_kv_heads = agree("key and value must have the same number of heads", num_kv_heads, num_kv_heads_v)
        head_dim = agree("query and key must have the same head_dim", head_dim, head_dim_k)
    if head_dim == 0:
        raise ValueError(f"{name}: head_dim must be at least 1, got 0 {where()}")
    if (num_heads != num_kv_heads or num_heads == 0) and num_heads is not None and num_kv_heads is not None:
        if num_kv_heads == 0 or num_heads % num_kv_heads:
            raise ValueError(
                f"{name}: num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads}) {where()}"
            )
    # A dimension of 0 does not save an array whose other dimensions overflow: partial products are taken in any order.
    batch_size, heads, rows, keys, dim = (
        n if isinstance(n, int) and n else 1 for n in (batch, num_heads, seqlen_q, seqlen_k, value_dim)
    )
    if 8 * batch_size * heads * rows * max(keys, dim) >= 2**63:
        raise ValueError(f"{name}: the sizes of output and scores must not overflow 64 bits {where()}")
    return batch, num_heads, seqlen_q, seqlen_k, num_kv_heads


def _fit(layout, q, k, v):
    """Whether these extents would do in ``layout``."""
    (batch, heads, _, dim), (batch_k, heads_k, seqlen_k, dim_k), (batch_v, heads_v, seqlen_v, _) = (
        canonical(x, layout) for x in (q, k, v)
    )

    def same(*extents):
        return len({n for n in extents if n is not None}) <= 1

    multiple = None in (heads, heads_k) or (heads_k != 0 and heads % heads_k == 0)
    return (
        same(batch, batch_k, batch_v)
        and same(seqlen_k, seqlen_v)
        and same(heads_k, heads_v)
        and same(dim, dim_k)
        and dim != 0
        and multiple
    )


def _shapes(q, k, v):
    return f"query {shapes.shape_text(q)}, key {shapes.shape_text(k)}, value {shapes.shape_text(v)}"


def split_masks(name, mask):
    """The structured part of ``mask`` (a Mask or None) and the tuple of boolean arrays beside it."""
    structure, arrays = None, []
    for item in checks.listed(name, mask):
        if isinstance(item, Mask):
            structure = item if structure is None else both(name, structure, item)
        else:
            arrays.append(item)
    return structure, tuple(arrays)


def mask_notes(mask) -> tuple[str, ...]:
    """What the masks with structure are in the option ``mask`` of a call that has been normalised."""
    masks = checks.listed("explain", mask)
    return tuple(f"mask: {m.described()}" for m in masks if isinstance(m, Mask) and m.structured)


def both(name, mask, other):
    """``mask & other``, with ``name`` in what that raises."""
    try:
        return mask & other
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _at_most_four(xp, masks):
    """The masks, with those past the fourth ANDed together into it."""
    first = masks[: MAX_MASKS - 1]
    rest = masks[MAX_MASKS - 1 :]
    while len(rest) > 1:
        rest = [xp.logical_and(rest[0], rest[1]), *rest[2:]]
    return (*first, *rest)

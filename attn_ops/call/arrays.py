"""The arrays beside query, key and value of an attention call, each brought to the dtype and rank of an AttentionCall.

``xp`` is the framework that they belong to: tensorflow/xp.py or jax/xp.py. The rules and
the texts of the errors are the same for both.
"""

from __future__ import annotations

import math

import numpy as np

from attn_ops import namespaces
from attn_ops.call import options
from attn_ops.call.position_bias import T5RelativeBias
from attn_ops.call.shapes import LAYOUTS, compatible, shape_text
from attn_ops.masks import checks

_SCORE_AXES = ("batch", "num_heads", "seqlen_q", "seqlen_k")


def score_shaped(xp, name, what, x, dims):
    """``x`` with rank 4: [seqlen_q, seqlen_k] and [batch, seqlen_q, seqlen_k] get the missing axes.

    ``dims`` are batch, num_heads, seqlen_q and seqlen_k, and num_kv_heads.
    """
    given = xp.extents(x)
    if given is None:
        return xp.ensure_rank(x, 4, f"{name}_{what}_needs_rank_4")
    rank = len(given)
    full = given
    if rank == 3:
        x, full = xp.expand_dims(x, 1), [given[0], 1, *given[1:]]
    elif rank == 2:
        x, full = xp.expand_dims(xp.expand_dims(x, 0), 0), [1, 1, *given]
    elif rank != 4:
        hint = f"; for the same keys in every row, {what}[None]" if rank == 1 and given[0] == dims[3] else ""
        raise ValueError(
            f"{name}: {what} must have rank 4, 3 ([batch, seqlen_q, seqlen_k]) or 2 ([seqlen_q, seqlen_k]), "
            f"got shape {shape_text(given)}{hint}"
        )
    for extent, wanted, axis in zip(full, dims, _SCORE_AXES):
        if not _broadcasts(extent, wanted):
            expected = ", ".join(f"{a}={'?' if n is None else n}" for a, n in zip(_SCORE_AXES, dims))
            shape = shape_text(given)
            raise ValueError(
                f"{name}: {what} of shape {shape} does not broadcast to [{expected}]: its {axis} is {extent}"
                + _what_it_may_be(what, rank, full, dims)
            )
    return x


def _broadcasts(extent, wanted):
    return extent == 1 or extent == wanted or extent is None or wanted is None


def _what_it_may_be(what, rank, full, dims):
    """What a mask or bias of these extents is in other libraries and how to say that here, if it is known."""
    batch, num_heads, seqlen_q, seqlen_k, num_kv_heads = dims
    if full[:2] == [1, 1] and full[2] == batch and full[3] in (seqlen_k, seqlen_q):
        of_keys = full[3] == seqlen_k
        if what == "bias":
            return f"; [batch, seqlen_k] is {what}[:, None, None] here" if of_keys else ""
        side, kind, argument = ("keys", "key", "value") if of_keys else ("queries", "query", "query")
        return (
            f"; the {side} of each batch entry that are no padding, [batch, seqlen], are told by "
            f"mask=attn_ops.masks.{kind}_padding(mask), and to a layer by {argument}_mask="
        )
    if rank == 3 and None not in (batch, num_heads) and full[0] == batch * num_heads:
        return "; reshape [batch * num_heads, seqlen_q, seqlen_k] to rank 4"
    if rank == 3 and full[0] == num_heads:
        return f"; [num_heads, seqlen_q, seqlen_k] is {what}[None] here"
    if all(map(_broadcasts, full, (batch, seqlen_q, num_heads, num_kv_heads))):
        return f"; it fits with heads and positions of query, key and value swapped: {LAYOUTS}"
    return ""


def boolean(xp, name, mask, dims):
    return score_shaped(xp, name, "mask", boolean_array(xp, name, mask), dims)


def boolean_array(xp, name, mask):
    """``mask`` of any shape."""
    if isinstance(mask, str):  # MLX's "causal"
        raise TypeError(checks.not_boolean(name, "mask", "str"))
    if callable(mask) and not hasattr(mask, "dtype"):  # FlexAttention's, or a constructor that was not called
        called = getattr(mask, "__name__", type(mask).__name__)
        raise TypeError(
            f"{name}: mask must be boolean (True = may be seen) or an attn_ops.masks.Mask, got the function {called}; one of "
            "(b, h, q, k) is attn_ops.masks.from_function(mask)"
        )
    mask = xp.as_tensor(name, "mask", mask)
    if mask.dtype != xp.bool_:
        raise TypeError(checks.not_boolean(name, "mask", mask.dtype.name))
    return mask


def bias(xp, name, bias, dims, dtype):
    bias = score_shaped(xp, name, "bias", floating_bias(xp, name, bias), dims)
    if bias.dtype == dtype:
        return bias
    # Beside 16-bit inputs float32 holds any bias as it is: 16 bits would round long ALiBi distances away.
    return xp.cast(bias, dtype if dtype == xp.float64 else xp.float32)


def floating_bias(xp, name, bias):
    """``bias`` of any shape."""
    bias = xp.as_tensor(name, "bias", bias)
    if not xp.is_floating(bias.dtype):
        hint = "; a boolean mask goes to mask=" if bias.dtype == xp.bool_ else f"; cast it: {xp.cast_text('bias')}"
        raise TypeError(f"{name}: bias must be floating, got {bias.dtype.name}{hint}")
    return bias


def known_values(xp, given, x):
    """The values of an argument as NumPy, or None: of what was ``given``, since JAX traces constants too, else of the
    tensor ``x`` that it became."""
    if type(given) in (list, tuple, int, float):  # what only describes a tensor may be a named tuple
        given = namespaces.listed(given)
    return given if isinstance(given, (np.ndarray, np.generic)) else xp.static_value(x)


def lengths(xp, name, what, lengths, batch, limit):
    """``lengths`` as int32 [batch], its values checked when they are known now."""
    if lengths is None:
        return None
    given, lengths = lengths, xp.as_tensor(name, what, lengths)
    if not xp.is_integer(lengths.dtype):
        kind = "key_padding" if what == "key_value_seq_lengths" else "query_padding"
        hint = f"; a mask goes to mask=attn_ops.masks.{kind}(...)" if lengths.dtype == xp.bool_ else "; round and cast them"
        raise TypeError(f"{name}: {what} must hold integers, got {lengths.dtype.name}{hint}")
    if not compatible(xp.extents(lengths), [batch]):
        extents = xp.extents(lengths)
        hint = "; of cumulative lengths (cu_seqlens) pass the differences" if extents == [(batch or 0) + 1] else ""
        raise ValueError(f"{name}: {what} must have shape [batch={batch}], got {shape_text(extents)}{hint}")
    values = known_values(xp, given, lengths)
    if values is not None and values.size:
        low, high = int(values.min()), int(values.max())
        if low < 0 or (isinstance(limit, int) and high > limit):  # one that jax.export leaves open is no int
            bad = low if low < 0 else high
            rule = "not be negative" if limit is None else f"be between 0 and {limit}"
            raise ValueError(f"{name}: {what} must {rule}, got {bad}")
    return xp.as_int32(lengths)


def query_offset(xp, name, offset, batch, axis="batch"):
    """``offset`` as int32 [1] or [batch], an ``axis`` of that name, its values checked when they are known now."""
    if options.is_integer(offset):
        options.check_offset(name, offset, offset)
        return xp.as_tensor(name, "query_offset", np.array([offset], np.int32))
    given, offset = offset, xp.as_tensor(name, "query_offset", offset)
    if not xp.is_integer(offset.dtype):
        raise TypeError(f"{name}: query_offset must hold integers, got {offset.dtype.name}")
    extents = xp.extents(offset)
    if extents == []:
        offset = xp.expand_dims(offset, 0)
    elif not compatible(extents, [batch]):
        raise ValueError(
            f"{name}: query_offset must be an integer or have shape [{axis}={batch}], got {shape_text(extents)}"
        )
    values = known_values(xp, given, offset)
    if values is not None and values.size:
        options.check_offset(name, int(values.min()), int(values.max()))
    return xp.as_int32(offset)


def intervals(xp, name, ends, dims):
    """(key_begin, key_end) of a mask, which has checked their values, as int32 [batch or 1, seqlen_q] each."""
    batch, _, seqlen_q, _, _ = dims
    return tuple(
        _per_token(xp, name, what, x, batch, seqlen_q, "seqlen_q") for what, x in zip(("key_begin", "key_end"), ends)
    )


def segments(xp, name, ids, dims):
    """(ids of the rows, ids of the keys) of a mask as int32 [batch or 1, seqlen] each."""
    batch, _, seqlen_q, seqlen_k, _ = dims
    return (
        _per_token(xp, name, "q_ids", ids[0], batch, seqlen_q, "seqlen_q"),
        _per_token(xp, name, "kv_ids", ids[1], batch, seqlen_k, "seqlen_k"),
    )


def _per_token(xp, name, what, x, batch, seqlen, axis):
    """Integers of a mask as int32 [batch or 1, seqlen]."""
    x = xp.as_tensor(name, what, x)
    extents = xp.extents(x)
    if not (compatible(extents, [batch, seqlen]) or compatible(extents, [1, seqlen])):
        raise ValueError(
            f"{name}: {what} of the mask must have shape [batch={batch} or 1, {axis}={seqlen}], got {shape_text(extents)}"
        )
    return xp.as_int32(x if extents is not None else xp.ensure_rank(x, 2, f"{name}_{what}_needs_rank_2"))


def blocks(xp, name, blocks, block_q, block_k, dims):
    """The blocks of a mask, bool [batch or 1, num_heads or 1, blocks of rows, blocks of keys]."""
    batch, num_heads, seqlen_q, seqlen_k, _ = dims
    blocks = xp.as_tensor(name, "blocks of the mask", blocks)
    extents = xp.extents(blocks)
    counts = [None if n is None else -(-n // size) for n, size in ((seqlen_q, block_q), (seqlen_k, block_k))]
    fits = extents is None or (
        len(extents) == 4
        and all(map(_broadcasts, extents[:2], (batch, num_heads)))
        and compatible(extents[2:], counts)
    )
    if not fits:
        raise ValueError(
            f"{name}: blocks of the mask must have shape [batch={batch} or 1, num_heads={num_heads} or 1, "
            f"{counts[0]}, {counts[1]}] for {seqlen_q} rows in blocks of {block_q} and {seqlen_k} keys in blocks of "
            f"{block_k}, got {shape_text(extents)}"
        )
    blocks = blocks if extents is not None else xp.ensure_rank(blocks, 4, f"{name}_blocks_need_rank_4")
    return blocks if blocks.dtype == xp.bool_ else xp.cast(blocks, xp.bool_)


def alibi_slopes(xp, name, slopes, batch, num_heads, dtype):
    """``slopes`` as constants [1 or batch, num_heads] of this dtype."""
    given, slopes = slopes, _floating(xp, name, "alibi_slopes", slopes)
    extents = xp.extents(slopes)
    if extents is not None and len(extents) == 1 and compatible(extents, [num_heads]):
        slopes = xp.expand_dims(slopes, 0)
    elif extents is None or not compatible(extents, [batch, num_heads]):
        raise ValueError(
            f"{name}: alibi_slopes must have shape [num_heads={num_heads}] or [batch={batch}, num_heads={num_heads}], "
            f"got {shape_text(extents)}; attn_ops.alibi_slopes(num_heads) makes the usual ones"
        )
    values = known_values(xp, given, slopes)
    if values is not None and not (np.abs(values.astype(np.float64)) <= options.LARGEST_SLOPE).all():  # NaN fails too
        raise ValueError(f"{name}: alibi_slopes must be finite numbers from -2^64 to 2^64, got {values.tolist()}")
    return xp.stop_gradient(_cast(xp, slopes, dtype))


def relative_bias(xp, name, table, num_heads, dtype):
    """A table by distance, or by the buckets of T5, as [num_heads, 2 R + 1] of this dtype."""
    of_t5 = isinstance(table, T5RelativeBias)
    what = "relative_bias.table" if of_t5 else "relative_bias"
    x = _floating(xp, name, what, table.table if of_t5 else table)
    extents = xp.extents(x)
    rows = "num_buckets" if of_t5 else "2 R + 1"
    if extents is None or not compatible(extents, [None, num_heads]):
        raise ValueError(f"{name}: {what} must have shape [{rows}, num_heads={num_heads}], got {shape_text(extents)}")
    count = extents[0]
    if of_t5 and count is None:
        raise ValueError(f"{name}: {what} must have a known number of buckets, got shape {shape_text(extents)}")
    if not of_t5 and count is not None and count % 2 == 0:
        raise ValueError(
            f"{name}: {what} must have 2 R + 1 rows, for the distances -R to R, got shape {shape_text(extents)}; a table "
            "of T5's buckets is attn_ops.T5RelativeBias(table)"
        )
    x = xp.transpose(_cast(xp, x, dtype))
    return xp.take_columns(x, table.buckets(name, count)) if of_t5 else x


def sinks(xp, name, sinks, num_heads, dtype):
    """``sinks`` as [num_heads] of this dtype."""
    sinks = _floating(xp, name, "sinks", sinks)
    if not compatible(xp.extents(sinks), [num_heads]):
        raise ValueError(
            f"{name}: sinks must have shape [num_heads={num_heads}], got {shape_text(xp.extents(sinks))}"
        )
    return _cast(xp, sinks, dtype)


def _floating(xp, name, what, x):
    x = xp.as_tensor(name, what, x)
    if not xp.is_floating(x.dtype):
        raise TypeError(f"{name}: {what} must be floating, got {x.dtype.name}; cast it: {xp.cast_text(what)}")
    return x


def _cast(xp, x, dtype):
    return x if x.dtype == dtype else xp.cast(x, dtype)


def times_tensor(xp, name, query, scale):
    """The query times a scale that is a tensor, so that the gradient reaches the scale."""
    given, scale = scale, xp.as_tensor(name, "scale", scale)
    if not xp.is_floating(scale.dtype):
        raise TypeError(f"{name}: scale must be floating, got {scale.dtype.name}; pass a Python number, or cast it")
    if not compatible(xp.extents(scale), []):
        raise ValueError(f"{name}: scale must be a scalar, got shape {shape_text(xp.extents(scale))}")
    value = known_values(xp, given, scale)
    if value is not None:
        options.scale(name, float(value))
    scale = xp.cast(scale, query.dtype)
    # The gradient sums products that are zeros times NaN or infinity where such a row sees no key. One that sees some makes
    # NaN of it all the same.
    finite = xp.where(xp.absolute(query) < math.inf, query, xp.zeros_like(query))
    constant = xp.stop_gradient(scale)
    return query * constant + finite * (scale - constant)


def seed(xp, name, seed):
    """The ``seed`` of an AttentionCall from a ``dropout_seed``."""
    if seed is None:
        return xp.fresh_seed(name)
    if options.is_integer(seed):
        return xp.seed_of_words(options.seed_words(name, seed))
    seed = xp.as_seed_array(name, seed)
    if not xp.is_integer(seed.dtype):
        raise TypeError(f"{name}: dropout_seed must hold integers, got {seed.dtype.name}; int(seed) is one")
    if not compatible(xp.extents(seed), [2]):
        raise ValueError(
            f"{name}: dropout_seed must be an integer or have shape [2] (seed, offset), "
            f"got {shape_text(xp.extents(seed))}"
        )
    return xp.seed_of_array(seed)

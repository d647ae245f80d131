"""The arrays beside query, key and value of an attention call, each brought to the dtype and rank of an AttentionCall.

``xp`` is the framework that they belong to: tensorflow/xp.py or jax/xp.py. The rules and
the texts of the errors are the same for both.
"""

from __future__ import annotations

from attn_ops import masks
from attn_ops.call import options

_SCORE_AXES = ("batch", "num_heads", "seqlen_q", "seqlen_k")
LAYOUTS = "'BSHD' is [batch, seqlen, num_heads, head_dim], 'BHSD' is [batch, num_heads, seqlen, head_dim]"


def shape_text(extents):
    return "<unknown>" if extents is None else str(tuple(extents))


def compatible(extents, expected):
    """Whether extents that may be unknown (None, each or all) can be the ``expected`` ones, which may be so too."""
    if extents is None:
        return True
    if len(extents) != len(expected):
        return False
    return all(a is None or b is None or a == b for a, b in zip(extents, expected))


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
    if isinstance(mask, str):  # MLX's "causal"
        raise TypeError(masks.not_boolean(name, "mask", "str"))
    mask = xp.as_tensor(name, "mask", mask)
    if mask.dtype != xp.bool_:
        raise TypeError(masks.not_boolean(name, "mask", mask.dtype.name))
    return score_shaped(xp, name, "mask", mask, dims)


def bias(xp, name, bias, dims, dtype):
    bias = xp.as_tensor(name, "bias", bias)
    if not xp.is_floating(bias.dtype):
        hint = "; a boolean mask goes to mask=" if bias.dtype == xp.bool_ else f"; cast it: {xp.cast_text('bias')}"
        raise TypeError(f"{name}: bias must be floating, got {bias.dtype.name}{hint}")
    bias = score_shaped(xp, name, "bias", bias, dims)
    if bias.dtype == dtype:
        return bias
    # Beside 16-bit inputs float32 holds any bias as it is: 16 bits would round long ALiBi distances away.
    return xp.cast(bias, dtype if dtype == xp.float64 else xp.float32)


def lengths(xp, name, what, lengths, batch, limit):
    """``lengths`` as int32 [batch], its values checked when they are known now."""
    if lengths is None:
        return None
    lengths = xp.as_tensor(name, what, lengths)
    if not xp.is_integer(lengths.dtype):
        kind = "key_padding" if what == "key_value_seq_lengths" else "query_padding"
        hint = f"; a mask goes to mask=attn_ops.masks.{kind}(...)" if lengths.dtype == xp.bool_ else "; round and cast them"
        raise TypeError(f"{name}: {what} must hold integers, got {lengths.dtype.name}{hint}")
    if not compatible(xp.extents(lengths), [batch]):
        extents = xp.extents(lengths)
        hint = "; of cumulative lengths (cu_seqlens) pass the differences" if extents == [(batch or 0) + 1] else ""
        raise ValueError(f"{name}: {what} must have shape [batch={batch}], got {shape_text(extents)}{hint}")
    values = xp.static_value(lengths)
    if values is not None and values.size:
        low, high = int(values.min()), int(values.max())
        if low < 0 or (limit is not None and high > limit):
            bad = low if low < 0 else high
            rule = "not be negative" if limit is None else f"be between 0 and {limit}"
            raise ValueError(f"{name}: {what} must {rule}, got {bad}")
    return xp.as_int32(lengths)


def times_tensor(xp, name, query, scale):
    """The query times a scale that is a tensor, so that the gradient reaches the scale."""
    scale = xp.as_tensor(name, "scale", scale)
    if not xp.is_floating(scale.dtype):
        raise TypeError(f"{name}: scale must be floating, got {scale.dtype.name}; pass a Python number, or cast it")
    if not compatible(xp.extents(scale), []):
        raise ValueError(f"{name}: scale must be a scalar, got shape {shape_text(xp.extents(scale))}")
    value = xp.static_value(scale)
    if value is not None:
        options.scale(name, float(value))
    return query * xp.cast(scale, query.dtype)


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

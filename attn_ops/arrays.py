"""The arrays beside query, key and value of an attention call, each brought to the dtype and rank of an AttentionCall.

``xp`` is the framework that they belong to: the module `tensors` for TensorFlow, `jax.tensors` for JAX. The rules and
the texts of the errors are the same for both.
"""

from __future__ import annotations

from . import options

_SCORE_AXES = ("batch", "num_heads", "seqlen_q", "seqlen_k")


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
    """``x`` with rank 4: [seqlen_q, seqlen_k] and [batch, seqlen_q, seqlen_k] get the missing axes."""
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
        raise ValueError(
            f"{name}: {what} must have rank 4, 3 ([batch, seqlen_q, seqlen_k]) or 2 ([seqlen_q, seqlen_k]), "
            f"got shape {shape_text(given)}"
        )
    for extent, wanted, axis in zip(full, dims, _SCORE_AXES):
        if extent != 1 and extent != wanted and extent is not None and wanted is not None:
            expected = ", ".join(f"{a}={'?' if n is None else n}" for a, n in zip(_SCORE_AXES, dims))
            shape = shape_text(given)
            raise ValueError(
                f"{name}: {what} of shape {shape} does not broadcast to [{expected}]: its {axis} is {extent}"
            )
    return x


def boolean(xp, name, mask, dims):
    mask = xp.as_tensor(name, "mask", mask)
    if mask.dtype != xp.bool_:
        hint = (
            "; pass values that are added to the scores as bias="
            if xp.is_floating(mask.dtype)
            else "; cast it when its nonzero elements mean visible"
        )
        raise TypeError(f"{name}: mask must be boolean (True = may be seen), got {mask.dtype.name}{hint}")
    return score_shaped(xp, name, "mask", mask, dims)


def bias(xp, name, bias, dims, dtype):
    bias = xp.as_tensor(name, "bias", bias)
    if not xp.is_floating(bias.dtype):
        hint = "; a boolean mask goes to mask=" if bias.dtype == xp.bool_ else ""
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
        raise TypeError(f"{name}: {what} must hold integers, got {lengths.dtype.name}")
    if not compatible(xp.extents(lengths), [batch]):
        raise ValueError(f"{name}: {what} must have shape [batch={batch}], got {shape_text(xp.extents(lengths))}")
    values = xp.static_value(lengths)
    if values is not None and values.size:
        low, high = int(values.min()), int(values.max())
        if low < 0 or (limit is not None and high > limit):
            bad = low if low < 0 else high
            raise ValueError(f"{name}: {what} must be between 0 and {limit}, got {bad}")
    return xp.as_int32(lengths)


def times_tensor(xp, name, query, scale):
    """The query times a scale that is a tensor, so that the gradient reaches the scale."""
    scale = xp.as_tensor(name, "scale", scale)
    if not xp.is_floating(scale.dtype):
        raise TypeError(f"{name}: scale must be floating, got {scale.dtype.name}")
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
        raise TypeError(f"{name}: dropout_seed must hold integers, got {seed.dtype.name}")
    if not compatible(xp.extents(seed), [2]):
        raise ValueError(
            f"{name}: dropout_seed must be an integer or have shape [2] (seed, offset), "
            f"got {shape_text(xp.extents(seed))}"
        )
    return xp.seed_of_array(seed)

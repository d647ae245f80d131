"""How new rows that attend to a cache become a call of the attention.

The rules are the same for TensorFlow and JAX: ``xp`` is tensorflow/xp.py or jax/xp.py.
"""

from __future__ import annotations

import typing

from attn_ops.call import arrays, options, shapes
from attn_ops.call import rotary as rotations
from attn_ops.call.attention_call import canonical
from attn_ops.call.normalize import normalize
from attn_ops.generation import growth
from attn_ops.generation.cache import step
from attn_ops.masks import checks
from attn_ops.masks.mask import Mask

# Options of the attention that the cache decides, or that are for training.
NOT_TAKEN = (
    "causal_alignment",
    "key_value_seq_lengths",
    "dropout_rate",
    "dropout_seed",
    "layout",
    "query_offset",
    "is_causal",
)
_ALONG_KEYS = "bias", "mask"


class Decoding(typing.NamedTuple):
    """What is to be done: a call of the attention, and how the cache grows before that."""

    call: typing.Any  # the `AttentionCall`, on the memory of the cache as it is before: one that is refused leaves it so
    cache: typing.Any
    plan: typing.Any  # `growth.Growth`, or None without new rows
    new: tuple  # the new keys and values

    def grown(self, xp, append):
        """The call on the memory with the new rows, and the cache afterwards."""
        if self.plan is None:
            return self.call, self.cache
        memory, cache = growth.grown(xp, append, self.cache, self.plan, *self.new)
        return with_memory(self.call, memory), cache


def with_memory(call, memory):
    """The `AttentionCall` on other memory of a cache of the same kind."""
    return call._replace(**dict(zip(("key", "value", "key_scales", "value_scales"), memory)))


def prepared(xp, name, q, cache, k_new, v_new, rotary=None, is_causal=True, **given) -> Decoding:
    """The arguments of `decode_attention`, checked: ``q`` is a tensor, ``given`` are options of the attention."""
    cache = growth.checked(xp, name, cache)
    batch, _, _, dim = canonical(xp.extents(cache.key), cache.layout)
    if not xp.is_floating(q.dtype):
        raise TypeError(f"{name}: q must be floating, got {q.dtype.name}; cast it: {xp.cast_text('q')}")
    extents = xp.extents(q)
    rank_4 = extents is not None and len(extents) == 4
    if not rank_4 or not shapes.compatible(canonical(extents, cache.layout), [batch, None, None, dim]):
        wanted = canonical((batch, "num_heads", "rows", dim), cache.layout)
        raise ValueError(
            f"{name}: q must have shape ({', '.join(map(str, wanted))}) for this cache (layout {cache.layout}), got "
            f"{shapes.shape_text(extents)}"
        )
    axis = 1 if cache.layout == "BSHD" else 2
    rows = extents[axis]
    rotary = rotations.from_option(name, rotary)
    is_causal = options.flag(name, "is_causal", is_causal)
    counts = arrays.lengths(xp, name, "query_seq_lengths", given.pop("query_seq_lengths", None), batch, rows)
    window = _window(name, cache, given.pop("window", None), is_causal, given)

    if k_new is None and v_new is None:
        plan, new = None, ()
        memory, first, after = cache.memory, growth.first_kept(xp, cache), cache.lengths
        before = _before(xp, name, cache, q, axis, counts, is_causal)
        if cache.rolls and not (isinstance(rows, int) and rows <= step(cache.window)):
            raise ValueError(
                f"{name}: without new keys, at most {step(cache.window)} rows at once see all that a cache with a window "
                f"of {cache.window} has let them, got {'a number that is unknown' if rows is None else rows}"
            )
        if rotary is not None:
            q = rotations.rotate(xp, name, q, rotary, axis, before)
    else:
        k_new, v_new = growth.checked_rows(xp, name, cache, k_new, v_new)
        k_rows = xp.extents(k_new)[axis]
        if not shapes.compatible([k_rows], [rows]):
            raise ValueError(f"{name}: there must be as many new keys as rows of q, got {k_rows} and {rows}")
        k_new = xp.agreeing(k_new, q, axis, f"{name}: there must be as many new keys as rows of q")
        plan = growth.planned(xp, name, cache, k_new, counts)
        memory, first, before, after = plan.memory, plan.first_after, plan.before, plan.after
        if rotary is not None:
            q, k_new = _turned_together(xp, name, q, k_new, rotary, axis, before)
        new = k_new, v_new
    if first is not None:
        before, after = before - first, after - first
    given = {
        **given,
        "is_causal": is_causal,
        "window": window,
        "layout": cache.layout,
        "key_value_seq_lengths": after,
        "query_offset": before,
        "query_seq_lengths": counts,
    }
    return Decoding(attention_to(xp, name, q, memory, given), cache, plan, new)


def attention_to(xp, name, q, memory, given):
    """The `AttentionCall` of ``q`` on the memory of a cache: keys, values, and in int8 the scales of both.

    Queries attend in their own dtype, unless one of the two is float64, which goes with itself.
    """
    key, value, *scales = memory
    if key.dtype == xp.float64 != q.dtype:
        q = xp.cast(q, xp.float64)
    elif q.dtype == xp.float64 != key.dtype:
        q = xp.cast(q, xp.float32)
    return normalize(xp, name, q, key, value, of_cache=True, scales=scales, **given)


def update(xp, append, name, cache, k, v, lengths):
    """``cache`` with new rows: what `KVCache.update` says."""
    cache = growth.checked(xp, name, cache)
    k, v = growth.checked_rows(xp, name, cache, k, v)
    rows = xp.extents(k)[1 if cache.layout == "BSHD" else 2]
    counts = arrays.lengths(xp, name, "lengths", lengths, xp.extents(k)[0], rows)
    return growth.grown(xp, append, cache, growth.planned(xp, name, cache, k, counts), k, v)[1]


def rewound(xp, name, cache, lengths):
    """``cache`` with fewer positions: what `KVCache.rewind` says."""
    cache = growth.checked(xp, name, cache)
    if cache.rolls:
        raise ValueError(f"{name}: a cache with a window cannot be rewound: what it would have to see again is gone")
    batch = xp.extents(cache.key)[0]
    lengths = xp.as_tensor(name, "lengths", lengths)
    one = xp.extents(lengths) == []
    lengths = arrays.lengths(xp, name, "lengths", xp.expand_dims(lengths, 0) if one else lengths, 1 if one else batch, cache.rows)
    old, new = xp.static_value(cache.lengths), xp.static_value(lengths)
    if old is not None and new is not None and (new > old).any():
        raise ValueError(f"{name}: lengths must not exceed those of the cache, {old.tolist()}, got {new.tolist()}")
    return cache._replace(lengths=xp.maximum(xp.minimum(lengths, cache.lengths), 0))


def _window(name, cache, window, is_causal, given):
    """The window of the call: that of the cache, or a narrower one. Refuses what a cache with a window cannot know."""
    if cache.window is None:
        return window
    if not is_causal:
        raise ValueError(f"{name}: a cache with a window is causal, and is_causal=False is not")
    left, right = options.window(name, window)
    if left >= cache.window:
        raise ValueError(
            f"{name}: the cache keeps {cache.window} keys of a row, its own among them, and window={window!r} wants more"
        )
    if cache.rolls:
        along = [what for what in _ALONG_KEYS if given.get(what) is not None]
        parts = checks.listed(name, given.get("mask"))
        if all(isinstance(part, Mask) and not (part.structured or part.arrays()) for part in parts):
            along = [what for what in along if what != "mask"]  # causal or a window: told by distance alone
        if along:
            raise ValueError(
                f"{name}: {along[0]} goes by the positions of keys, of which a cache with a window keeps the last ones"
            )
    return (cache.window - 1 if left < 0 else left, right)


def _before(xp, name, cache, q, axis, counts, is_causal):
    """How many positions there were before the rows of ``q``, which are the last ones of the cache."""
    rows = xp.extent(q, axis)
    before = cache.lengths - (rows if counts is None else counts)
    known = xp.static_value(before)
    if known is not None and known.size and known.min() < 0 and is_causal:
        raise ValueError(
            f"{name}: without new keys the rows of q are the last ones of the cache, which has "
            f"{xp.static_value(cache.lengths).tolist()} positions, and there are {rows} rows"
        )
    return before if is_causal else xp.maximum(before, 0)


def _turned_together(xp, name, q, k, rotary, axis, start):
    """Both turned by the same angles, which so are computed once."""
    heads_axis = 3 - axis
    heads = xp.extents(q)[heads_axis]
    if q.dtype != k.dtype or heads is None:
        return (rotations.rotate(xp, name, x, rotary, axis, start) for x in (q, k))
    both = rotations.rotate(xp, name, xp.concat([q, k], heads_axis), rotary, axis, start)
    return (both[:, :, :heads], both[:, :, heads:]) if heads_axis == 2 else (both[:, :heads], both[:, heads:])

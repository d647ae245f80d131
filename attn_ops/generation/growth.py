"""How a cache grows: what may be appended to it, where that goes, and what makes way for it.

The rules are the same for TensorFlow and JAX: ``xp`` is tensorflow/xp.py or jax/xp.py.
"""

from __future__ import annotations

import typing

from attn_ops.call import arrays, shapes
from attn_ops.call.attention_call import canonical
from attn_ops.generation.cache import KVCache, step


class Growth(typing.NamedTuple):
    """How a cache will grow by new rows: what `planned` says, and `grown` does.

    ``memory`` is what the new rows go to, as it is before: the `KVCache.memory` of the cache, or longer arrays where a
    cache with a window gets so many rows at once that the first of them see what makes way for the last. They hold the
    positions from ``first`` on, int32 [batch] or None for 0, and from ``first_after`` on once the rows are there.
    ``before`` and ``after`` are the lengths, int32 [batch]; ``counts`` is None or int32 [batch], how many of the new
    rows there are.
    """

    memory: tuple
    first: typing.Any
    first_after: typing.Any
    before: typing.Any
    after: typing.Any
    counts: typing.Any


def checked(xp, name, cache):
    """``cache`` with tensors of ``xp``; TypeError or ValueError where it is none."""
    if not isinstance(cache, KVCache):
        raise TypeError(f"{name}: cache must be an attn_ops.KVCache, got {type(cache).__name__}")
    key, value = xp.as_tensor(name, "cache.key", cache.key), xp.as_tensor(name, "cache.value", cache.value)
    for what, x in (("cache.key", key), ("cache.value", value)):
        extents = xp.extents(x)
        if extents is None or len(extents) != 4:
            raise ValueError(f"{name}: {what} must have rank 4, got shape {shapes.shape_text(extents)}")
        if x.dtype not in xp.FLOATS and not (x.dtype == xp.int8 and len(cache.memory) == 4):
            raise TypeError(
                f"{name}: {what} must be float16, bfloat16, float32 or float64, or int8 of KVCache.create(…, 'int8'), got "
                f"{x.dtype.name}"
            )
    k, v = (canonical(xp.extents(x), cache.layout) for x in (key, value))
    if key.dtype != value.dtype or not shapes.compatible(k[:3], v[:3]):
        raise ValueError(
            f"{name}: keys and values of the cache must have one dtype and, but for the last axis, one shape, got "
            f"{key.dtype.name} {key.shape} and {value.dtype.name} {value.shape}"
        )
    if cache.rows is None and cache.window is not None:  # nobody knows whether it rolls
        raise ValueError(f"{name}: the length of the memory of a cache with a window must be known, got shape {key.shape}")
    lengths = arrays.lengths(xp, name, "cache.lengths", cache.lengths, k[0], None if cache.rolls else cache.rows)
    memory = key, value, *_checked_scales(xp, name, cache, key)
    return cache.with_memory(memory, lengths=lengths)


def _checked_scales(xp, name, cache, key):
    """The scales of a cache in int8, or none."""
    found = []
    for what, x in zip(("cache.key_scale", "cache.value_scale"), cache.memory[2:]):
        x = xp.as_tensor(name, what, x)
        extents = xp.extents(x)
        if extents is None or len(extents) != 3 or not shapes.compatible(extents, xp.extents(key)[:3]):
            raise ValueError(
                f"{name}: {what} must have the shape of the keys without their last axis, {shapes.shape_text(xp.extents(key))}, "
                f"got {shapes.shape_text(extents)}"
            )
        if x.dtype != xp.float32 or key.dtype != xp.int8:
            cast = x.dtype in xp.FLOATS and x.dtype != xp.float32
            hint = "; a layer of Keras casts what it is given, but for one made with autocast=False" if cast else ""
            raise TypeError(
                f"{name}: keys and values in int8 have scales in float32, got {key.dtype.name} and {what} in {x.dtype.name}{hint}"
            )
        found.append(x)
    return found


def checked_rows(xp, name, cache, k_new, v_new):
    """The new rows as tensors; ``cache`` is a checked one."""
    check_both(name, k_new, v_new)
    batch = xp.extents(cache.key)[0]
    found = [
        new_rows(xp, name, what, x, of, cache.layout, batch, None, "for this cache ")
        for what, x, of in (("k_new", k_new, cache.key), ("v_new", v_new, cache.value))
    ]
    axis = _positions_axis(cache)
    k_rows, v_rows = (xp.extents(x)[axis] for x in found)
    if not shapes.compatible([k_rows], [v_rows]):
        raise ValueError(f"{name}: k_new and v_new must have the same number of rows, got {k_rows} and {v_rows}")
    return found


def check_both(name, k_new, v_new):
    """ValueError where there are new keys without values, or values without keys."""
    if (k_new is None) != (v_new is None):
        raise ValueError(f"{name}: k_new and v_new come together, and {'k' if k_new is None else 'v'}_new is None")


def new_rows(xp, name, what, x, of, layout, batch, rows, where=""):
    """``x`` as a tensor of new rows for the memory ``of`` a cache, or of pages: [batch, rows, num_kv_heads, dim] in
    ``layout``; ``rows`` is None for any number. ``where`` tells errors what they are for."""
    x = xp.as_tensor(name, what, x)
    if not xp.is_floating(x.dtype):
        raise TypeError(f"{name}: {what} must be floating, got {x.dtype.name}; cast it: {xp.cast_text(what)}")
    _, heads, _, dim = canonical(xp.extents(of), layout)
    extents = xp.extents(x)
    rank_4 = extents is not None and len(extents) == 4
    if not rank_4 or not shapes.compatible(canonical(extents, layout), [batch, heads, rows, dim]):
        wanted = canonical((batch, heads, "any number" if rows is None else rows, dim), layout)
        raise ValueError(
            f"{name}: {what} must have shape ({', '.join(map(str, wanted))}) {where}(layout {layout}), got "
            f"{shapes.shape_text(extents)}"
        )
    return x


def planned(xp, name, cache, k_new, counts=None) -> Growth:
    """How ``cache`` will grow by as many rows as ``k_new``, of which there are ``counts``, int32 [batch] or None for
    all."""
    axis = _positions_axis(cache)
    new = xp.extent(k_new, axis)
    if xp.static_value(cache.lengths) is not None and isinstance(new, int):
        _check_room(xp, name, cache, new, counts)
    elif not (cache.rolls or cache.rows is None) and isinstance(new, int) and counts is None and new > cache.rows:
        raise ValueError(f"{name}: {new} new rows do not fit a cache for {cache.rows}")
    before = cache.lengths
    after = before + (new if counts is None else counts)
    if not cache.rolls:
        return Growth(cache.memory, None, None, before, after, counts)
    first = _first(xp, cache, before)
    if isinstance(new, int) and new <= step(cache.window):
        return Growth(cache.memory, first, _first(xp, cache, after), before, after, counts)
    memory = tuple(xp.with_more_rows(x, axis, new) for x in cache.memory)
    return Growth(memory, first, first, before, after, counts)


def grown(xp, append, cache, plan, k_new, v_new):
    """The memory of the ``plan`` with the new rows, and the cache afterwards; ``append`` is the framework's, of
    append.py."""
    new = as_kept(xp, cache.key.dtype, (k_new, v_new))
    if not cache.rolls:
        memory, written = append(cache.layout, plan.memory, new, plan.before, plan.counts, None, cache.written)
        return memory, cache.with_memory(memory, lengths=plan.after, written=written)
    at = plan.before - plan.first
    if plan.memory[0] is cache.key:
        dropped = plan.first_after - plan.first
        memory, written = append(cache.layout, plan.memory, new, at, plan.counts, dropped, cache.written)
        return memory, cache.with_memory(memory, lengths=plan.after, written=written)
    memory, _ = append(cache.layout, plan.memory, new, at, plan.counts, None, None)
    axis = _positions_axis(cache)
    kept = (_first(xp, cache, plan.after) - plan.first)[:, None] + xp.arange_like(cache.rows, at)
    kept = xp.minimum(kept, xp.extent(memory[0], axis) - 1)
    written = None if cache.written is None else cache.written * 0 - 1  # nobody's: the next one copies
    return memory, cache.with_memory([xp.take_rows(x, kept, axis) for x in memory], lengths=plan.after, written=written)


def as_kept(xp, dtype, new):
    """New keys and values in the ``dtype`` of the memory that they are for; for int8 both in one that is rounded to it."""
    if dtype == xp.int8:
        k, v = (x.dtype for x in new)
        dtype = k if k == v and k != xp.float64 else xp.float32
    return tuple(x if x.dtype == dtype else xp.cast(x, dtype) for x in new)


def first_kept(xp, cache):
    """The position of a cache's first row, int32 [batch], or None for 0."""
    return _first(xp, cache, cache.lengths) if cache.rolls else None


def _first(xp, cache, lengths):
    """Where the memory of a cache with a window begins when it has these lengths: at a multiple of `step`."""
    by = step(cache.window)
    return xp.maximum(lengths - cache.rows + by - 1, 0) // by * by


def _check_room(xp, name, cache, new, counts):
    lengths = xp.static_value(cache.lengths)
    added = new if counts is None else xp.static_value(counts)
    most = cache.max_length
    if added is None or most is None:
        return
    after = lengths + added
    if after.size and after.max() > most:
        at = int(after.argmax())
        raise ValueError(
            f"{name}: the cache is full: sequence {at} has {lengths[at]} of {most} positions, and "
            f"{new if counts is None else added[at]} more do not fit"
        )


def _positions_axis(cache):
    return 1 if cache.layout == "BSHD" else 2

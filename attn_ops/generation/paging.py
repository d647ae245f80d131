"""How rows that attend to keys in pages become a call of the attention.

The rules are the same for TensorFlow and JAX: ``xp`` is tensorflow/xp.py or jax/xp.py.
"""

from __future__ import annotations

import typing

from attn_ops.call import arrays, options, pages, shapes
from attn_ops.call import rotary as rotations
from attn_ops.call.attention_call import canonical
from attn_ops.generation import decode, growth

# Options of the attention that lengths decide, or that are for training.
NOT_TAKEN = tuple(name for name in decode.NOT_TAKEN if name != "layout")


class Paging(typing.NamedTuple):
    """What is to be done: a call of the attention, and which rows go into the pages before that."""

    call: typing.Any  # the `AttentionCall`, on the pages as they are before
    memory: tuple  # of the pages: keys, values, and in int8 the scales of both
    new: tuple  # the new keys and values, or ()
    before: typing.Any  # int32 [batch]: where the first row stands, and the first new one goes
    counts: typing.Any  # int32 [batch] or None: how many rows there are

    def grown(self, append, in_place):
        """The call on the memory with the new rows, and that memory, () without any; ``append`` is append_to_pages of the
        framework's append.py."""
        if not self.new:
            return self.call, ()
        table, layout = self.call.block_table, self.call.layout
        memory = append(self.memory, self.new, table, self.before, self.counts, layout, in_place)
        return decode.with_memory(self.call, memory), memory


def memory_of(name, k_pages, v_pages):
    """The arrays of pages, which in int8 are pairs of integers and scales: (keys, values) or (keys, values, and the scales of
    both)."""
    pairs = [isinstance(x, (tuple, list)) for x in (k_pages, v_pages)]
    if not any(pairs):
        return k_pages, v_pages
    if not all(pairs) or len(k_pages) != 2 or len(v_pages) != 2:
        raise TypeError(f"{name}: k_pages and v_pages must both be tensors, or both pairs (pages in int8, their scales)")
    return k_pages[0], v_pages[0], k_pages[1], v_pages[1]


def pages_of(memory):
    """The inverse: (k_pages, v_pages)."""
    key, value, *scales = memory
    return ((key, scales[0]), (value, scales[1])) if scales else (key, value)


def results(found, count):
    """What `paged_attention` returns of ``count`` results and the memory of pages behind them, if that has grown."""
    results = *found[:count], *(pages_of(found[count:]) if len(found) > count else ())
    return results if len(results) > 1 else results[0]


def prepared(
    xp, name, q, k_pages, v_pages, block_table, lengths, k_new, v_new, rotary=None, is_causal=True, **given
) -> Paging:
    """The arguments of `paged_attention`, checked: ``q`` is a tensor, ``given`` are options of the attention."""
    layout = given.pop("layout", "BSHD")
    if layout not in ("BSHD", "BHSD"):
        raise ValueError(f"{name}: layout must be 'BSHD' or 'BHSD', got {layout!r}")
    if not xp.is_floating(q.dtype):
        raise TypeError(f"{name}: q must be floating, got {q.dtype.name}; cast it: {xp.cast_text('q')}")
    _check_rank_4(xp, name, "q", q, layout)
    memory = _checked_memory(xp, name, memory_of(name, k_pages, v_pages), layout)
    keys, values = memory[:2]
    axis = 1 if layout == "BSHD" else 2
    batch, rows = xp.extents(q)[0], xp.extents(q)[axis]
    block_table = pages.checked(xp, name, block_table, q, keys, values, layout)
    size, count = xp.extents(keys)[axis], xp.extents(block_table)[1]
    room = None if size is None or count is None else size * count
    lengths = arrays.lengths(xp, name, "lengths", lengths, batch, room)
    if lengths is None:
        raise TypeError(f"{name}: lengths must be integers [batch], got None")
    rotary = rotations.from_option(name, rotary)
    is_causal = options.flag(name, "is_causal", is_causal)
    counts = arrays.lengths(xp, name, "query_seq_lengths", given.pop("query_seq_lengths", None), batch, rows)
    new = _new_rows(xp, name, k_new, v_new, q, keys, values, layout)

    present = xp.extent(q, axis) if counts is None else counts
    if is_causal or new:  # rows are keys as well: a sequence has no more of them
        counts = xp.minimum(lengths, present)
        before = lengths - counts
    else:
        before = xp.maximum(lengths - present, 0)
    if rotary is not None:
        if new:
            new = rotations.rotate(xp, name, new[0], rotary, axis, before), new[1]
        q = rotations.rotate(xp, name, q, rotary, axis, before)
    given = {
        **given,
        "is_causal": is_causal,
        "layout": layout,
        "block_table": block_table,
        "key_value_seq_lengths": lengths,
        "query_offset": before,
        "query_seq_lengths": counts,
    }
    return Paging(decode.attention_to(xp, name, q, memory, given), memory, new, before, counts)


def _checked_memory(xp, name, memory, layout):
    """The arrays of `memory_of`, checked."""
    names = "k_pages", "v_pages", "the scales of k_pages", "the scales of v_pages"
    memory = tuple(xp.as_tensor(name, what, x) for what, x in zip(names, memory))
    keys, values, *scales = memory
    for what, x in zip(names, (keys, values)):
        _check_rank_4(xp, name, what, x, layout)
    if keys.dtype != values.dtype or (keys.dtype not in xp.FLOATS and keys.dtype != xp.int8):
        raise TypeError(
            f"{name}: k_pages and v_pages must be float16, bfloat16, float32, float64 or int8, both the same, got "
            f"{keys.dtype.name} and {values.dtype.name}"
        )
    if bool(scales) != (keys.dtype == xp.int8):
        raise TypeError(
            f"{name}: pages in int8 come with their scales, k_pages=(pages, scales), and others without, got pages in "
            f"{keys.dtype.name}"
        )
    for what, x, of in zip(names[2:], scales, memory):
        if x.dtype != xp.float32 or not shapes.compatible(xp.extents(x), xp.extents(of)[:3]):
            raise ValueError(
                f"{name}: {what} must be float32 of shape {shapes.shape_text(xp.extents(of)[:3])}, got {x.dtype.name} "
                f"{shapes.shape_text(xp.extents(x))}"
            )
    return memory


def _check_rank_4(xp, name, what, x, layout):
    extents = xp.extents(x)
    if extents is None or len(extents) != 4:
        first, length = ("batch", "rows") if what == "q" else ("pages in all", "page_size")
        axes = canonical((first, "heads", length, "dim"), "BHSD" if layout == "BHSD" else "BSHD")
        raise ValueError(
            f"{name}: {what} must have shape [{', '.join(axes)}] (layout {layout}), got {shapes.shape_text(extents)}"
        )


def _new_rows(xp, name, k_new, v_new, q, keys, values, layout):
    """The new keys and values as they go into the pages; or ()."""
    growth.check_both(name, k_new, v_new)
    if k_new is None:
        return ()
    batch, _, rows, _ = canonical(xp.extents(q), layout)
    new = [
        growth.new_rows(xp, name, what, x, of, layout, batch, rows, "for these rows and pages ")
        for what, x, of in (("k_new", k_new, keys), ("v_new", v_new, values))
    ]
    return growth.as_kept(xp, keys.dtype, new)

"""Keys and values in pages: what a table of them must be, and the same keys and values without one.

Pages are [pages in all, page_size, num_kv_heads, dim] (layout "BSHD") or [pages in all, num_kv_heads, page_size, dim]
("BHSD"); the keys of sequence b from n page_size on are the rows of page ``block_table[b, n]``, as far as the length of the
sequence reaches (vLLM, Kwon et al. 2023, arXiv:2309.06180). ``xp`` is tensorflow/xp.py or jax/xp.py.
"""

from __future__ import annotations

from attn_ops.call import shapes
from attn_ops.call.attention_call import PAGE_ROWS, canonical


def checked(xp, name, table, query, key, value, layout):
    """``table`` as int32 [batch, pages] for these pages of rank 4; ValueError or TypeError where they do not fit."""
    table = xp.as_tensor(name, "block_table", table)
    if not xp.is_integer(table.dtype):
        raise TypeError(f"{name}: block_table must hold integers, got {table.dtype.name}")
    batch, extents = xp.extents(query)[0], xp.extents(table)
    if extents is None:
        table = xp.ensure_rank(table, 2, f"{name}_block_table_needs_rank_2")
    elif not shapes.compatible(extents, [batch, None]):
        raise ValueError(f"{name}: block_table must have shape [batch={batch}, pages], got {shapes.shape_text(extents)}")
    k, v = xp.extents(key), xp.extents(value)
    if not shapes.compatible(k[:3], v[:3]):
        raise ValueError(
            f"{name}: the pages of keys and of values must have one shape but for the last axis, got "
            f"{shapes.shape_text(k)} and {shapes.shape_text(v)}"
        )
    if k[0] == 0:
        raise ValueError(f"{name}: there must be pages, got shape {shapes.shape_text(k)}")
    size = canonical(k, layout)[2]
    if isinstance(size, int) and (size < 1 or size % PAGE_ROWS):
        raise ValueError(
            f"{name}: the size of a page must be a multiple of {PAGE_ROWS}, got {size} in pages of shape "
            f"{shapes.shape_text(k)} (layout {layout})"
        )
    return xp.as_int32(table)


def sequence_extents(xp, x, table, layout):
    """The extents that pages ``x`` have as the sequences of ``table``, [batch, ...], None where unknown."""
    _, heads, size, dim = canonical(xp.extents(x), layout)
    batch, count = xp.extents(table)
    rows = None if size is None or count is None else size * count
    return [batch, rows, heads, dim] if layout == "BSHD" else [batch, heads, rows, dim]


def gathered(xp, call, layout=None):
    """``call``, or the arrays of one in this ``layout``, with keys and values copied from their pages, for whoever does not
    read those.

    Entries that are no page, which no length may reach, give the rows of another.
    """
    if call.block_table is None:
        return call
    layout = layout or call.layout
    key, value = (_sequences(xp, x, call.block_table, layout) for x in (call.key, call.value))
    return call._replace(key=key, value=value, block_table=None)


def _sequences(xp, x, table, layout):
    """Pages as the sequences of ``table``."""
    total, heads, size, dim = canonical([xp.extent(x, axis) for axis in range(4)], layout)
    batch, count = (xp.extent(table, axis) for axis in range(2))
    rows = xp.take_entries(x, xp.minimum(xp.maximum(table, 0), total - 1))  # [batch, pages, ...]
    if layout == "BHSD":
        rows = xp.transpose(rows, (0, 2, 1, 3, 4))
        return xp.reshape(rows, (batch, heads, count * size, dim))
    return xp.reshape(rows, (batch, count * size, heads, dim))


def slots(xp, table, positions, counts, rows, size, total):
    """(page, row of it) of new rows, int32 [batch, rows] each, that go to ``positions`` [batch] and on in the sequences of
    ``table``. Those past ``counts`` (int32 [batch] or None), and those whose entry is no page, get page ``total``, which
    is none."""
    batch, count = (xp.extent(table, axis) for axis in range(2))
    new = xp.arange_like(rows, positions)
    at = xp.expand_dims(positions, 1) + xp.expand_dims(new, 0)
    entry = at // size
    page = xp.take_along(table, xp.minimum(xp.maximum(entry, 0), count - 1))
    there = (at >= 0) & (entry < count) & (page >= 0) & (page < total)
    if counts is not None:
        there = there & (xp.expand_dims(new, 0) < xp.expand_dims(counts, 1))
    return xp.where(there, page, total), at % size

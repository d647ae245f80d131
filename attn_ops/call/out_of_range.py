"""Lengths, offsets, intervals and entries of a table of pages that are out of range: an error where they are known, and
NaN where XLA compiles what they are for, which has no errors, and numbers would be taken for right. ``xp`` is
tensorflow/xp.py or jax/xp.py.
"""

from __future__ import annotations

import functools
import operator

import numpy as np

from attn_ops.call.attention_call import canonical
from attn_ops.call.options import LARGEST_OFFSET


def check_pages(xp, name, table, key, lengths, layout):
    """ValueError where an entry that a length (int32 [batch], or None for all) reaches is no page, as far as that is
    known now."""
    entries, ends = xp.static_value(table), None if lengths is None else xp.static_value(lengths)
    total, _, size, _ = canonical(xp.extents(key), layout)
    if entries is None or (ends is None and lengths is not None) or not all(isinstance(n, int) for n in (total, size)):
        return
    wrong = _wrong(entries, np.arange(entries.shape[1]), total, size, None if ends is None else ends[:, None])
    if not wrong.any():
        return
    b, n = (int(i) for i in np.argwhere(wrong)[0])
    keys = entries.shape[1] * size if ends is None else int(ends[b])
    raise ValueError(
        f"{name}: block_table[{b}, {n}] ({entries[b, n]}) must be from 0 to {total - 1}: there are {total} pages, and "
        f"sequence {b} has {keys} keys in pages of {size}"
    )


def no_pages(xp, call, layout=None):
    """Which entries of the table that a length reaches are no page, in the running op. ``call`` may be the arrays of one
    in this ``layout``."""
    total, _, size, _ = canonical([xp.extent(call.key, axis) for axis in range(4)], layout or call.layout)
    table, lengths = call.block_table, call.key_lengths
    numbers = xp.arange_like(xp.extent(table, 1), table)
    return _wrong(table, numbers, total, size, None if lengths is None else xp.expand_dims(lengths, 1))


def _wrong(table, numbers, total, size, ends):
    """``numbers`` are those of the columns, ``ends`` lengths `[batch, 1]`, or None for all."""
    wrong = (table < 0) | (table >= total)
    return wrong if ends is None else wrong & (numbers * size < ends)


def entries(xp, call, layout=None):
    """Which entries of the batch have lengths, offsets, ends of intervals or entries of the table that kernels refuse: bool
    `[batch or 1]`, or None where there are none of these. ``call`` as `no_pages` takes it."""
    layout = layout or call.layout
    seqlen_q, seqlen_k = (canonical([xp.extent(x, i) for i in range(4)], layout)[2] for x in (call.query, call.key))
    found = []
    if call.block_table is not None:
        seqlen_k = seqlen_k * xp.extent(call.block_table, 1)
        found.append(xp.any_true(no_pages(xp, call, layout)))
    numbers = (call.query_lengths, seqlen_q), (call.key_lengths, seqlen_k), (call.query_offset, LARGEST_OFFSET)
    found += [wrong for wrong in [beyond(*numbers)] if wrong is not None]
    for ends in call.intervals or ():
        found += [xp.any_true((ends < 0) | (ends > seqlen_k)), xp.any_true(ends[:, 1:] < ends[:, :-1])]
    return functools.reduce(operator.or_, found) if found else None


def beyond(*pairs):
    """Which entries of the batch have numbers, int32 `[batch or 1]` or None, that are not from 0 to what is beside them:
    bool `[batch or 1]`, or None without any."""
    found = [(numbers < 0) | (numbers > most) for numbers, most in pairs if numbers is not None]
    return functools.reduce(operator.or_, found) if found else None


def told(xp, wrong, x):
    """``x`` `[batch, ...]`, NaN in the entries that are ``wrong``."""
    if wrong is None:
        return x
    # A root instead of a constant that is NaN, of which `tf.debugging.enable_check_numerics` would tell everybody.
    nothing_or_nan = xp.sqrt(-xp.cast(wrong, x.dtype))
    return x + xp.reshape(nothing_or_nan, (-1,) + (1,) * (len(x.shape) - 1))

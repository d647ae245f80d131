"""`key_range()` of csrc/mask.h, the definition of causal, window and length masks, on whole arrays."""

from __future__ import annotations

from attn_ops.call.options import LARGEST_OFFSET


def positions(rows, seqlen_q, seqlen_k, query_lengths, key_lengths, bottom_right, query_offset=None):
    """The key that each row stands at, for the arguments of `interval`."""
    if query_offset is not None:
        return rows + query_offset
    if not bottom_right:
        return rows
    length_q = seqlen_q if query_lengths is None else query_lengths
    return rows + ((seqlen_k if key_lengths is None else key_lengths) - length_q)


def interval(
    rows,
    columns,
    seqlen_q,
    seqlen_k,
    query_lengths,
    key_lengths,
    window_left,
    window_right,
    bottom_right,
    query_offset=None,
):
    """`key_range()` of csrc/mask.h for many rows and keys at once, as a list of conditions to be ANDed.

    They are separate so that each keeps its own small shape; none is there for what restricts nothing.

    Args:
      rows, columns: int64 arrays (in JAX of its default integers) that broadcast against each other: query rows and
        keys.
      seqlen_q, seqlen_k: extents.
      query_lengths, key_lengths: None, or int64 arrays that broadcast against rows and columns.
      window_left, window_right: Python integers, -1 = unbounded.
      bottom_right: whether the last row stands at the last key.
      query_offset: None, or the position of row 0, from 0 to 2^30: an integer or an int64 array that broadcasts against
        rows and columns. Never with bottom_right.
    """
    own = positions(rows, seqlen_q, seqlen_k, query_lengths, key_lengths, bottom_right, query_offset)
    terms = []
    if query_lengths is not None:
        terms.append(rows < query_lengths)
    if key_lengths is not None:
        terms.append(columns < key_lengths)
    # Windows can be as large as INT64_MAX: those that reach everywhere hide nothing, and sums must not overflow.
    known = isinstance(seqlen_q, int) and isinstance(seqlen_k, int)
    everywhere = seqlen_q + seqlen_k if known else 2**62
    if 0 <= window_left < everywhere + (0 if query_offset is None else LARGEST_OFFSET):
        terms.append(columns >= own - window_left)
    if 0 <= window_right < everywhere:
        terms.append(columns <= own + window_right)
    return terms

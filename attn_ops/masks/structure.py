"""What masks are made of beside windows and lengths: parts that stand for a `[seqlen_q, seqlen_k]` array without being one.

Each part is what its constructor was given, and computes from it, when the extents of a call are known,
- `visible`: who sees whom, written down plainly, for `Mask.materialize`;
- its `piece` of what the kernels take, for `Mask.parts`: two ends per row that never move back, or arrays of its own.

Arithmetic is in the framework that the arrays belong to (namespaces.py) and grows with seqlen_q + seqlen_k.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any

import numpy as np

from attn_ops import namespaces
from attn_ops.call.options import LARGEST_OFFSET


class Places(typing.NamedTuple):
    """Where the rows and keys of a call are.

    ``rows`` `[1, seqlen_q]` and ``keys`` `[seqlen_k]` count from 0; ``own`` `[batch or 1, seqlen_q]` is the position of
    each row among the keys. ``query_offset`` is what the call was given.
    """

    rows: Any
    own: Any
    keys: Any
    seqlen_q: Any
    seqlen_k: Any
    query_offset: Any = None

    def by_row(self, x):
        """`[batch, seqlen_q]` as `[batch, 1, seqlen_q, 1]`."""
        return x[:, None, :, None]


class Piece(typing.NamedTuple):
    """What a part asks of the kernels: ends of intervals (integers `[batch or 1, seqlen_q]`), ids or blocks."""

    begin: Any = None
    end: Any = None
    segments: Any = None
    blocks: Any = None


class Part:
    """What `Mask` asks of its structured parts."""

    arrays = ()  # the fields that may hold arrays
    stands = False  # whether it asks where a row stands among the keys
    is_function = False  # whether it has to be evaluated before it can be asked
    inside = ()  # parts of its own

    def held(self):
        """The values of all fields that may hold arrays, those of its own parts too."""
        return [*(getattr(self, name) for name in self.arrays), *(x for part in self.inside for x in part.held())]


@dataclasses.dataclass(frozen=True, eq=False)
class Intervals(Part):
    """Row i sees the keys key_begin <= j < key_end; `[batch or 1, seqlen_q]` each, or None for no end."""

    key_begin: Any
    key_end: Any
    note: str = ""  # what they are known to be

    arrays = ("key_begin", "key_end")

    def piece(self, xp, at):
        for x in (self.key_begin, self.key_end):
            check_extent("intervals", x, 1, "seqlen_q", at.seqlen_q)
        return Piece(*(None if x is None else xp.int64(x) for x in (self.key_begin, self.key_end)))

    def visible(self, xp, at):
        begin, end, *_ = self.piece(xp, at)
        terms = [] if begin is None else [at.keys >= at.by_row(begin)]
        return _all(terms + ([] if end is None else [at.keys < at.by_row(end)]))

    def __repr__(self):
        ends = ", ".join("all" if x is None else extents(x) for x in (self.key_begin, self.key_end))
        return f"{self.note} as intervals" if self.note else f"intervals({ends})"


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix(Part):
    """A row sees the first `length` keys and none after its own position but those."""

    length: Any

    arrays = ("length",)
    stands = True

    def _length(self, xp):
        """As an integer, `[batch, 1]`, or of each row."""
        length = xp.int64(self.length)
        return length[:, None] if len(getattr(length, "shape", ())) == 1 else length

    def piece(self, xp, at):
        return Piece(end=xp.maximum(at.own + 1, self._length(xp)))

    def visible(self, xp, at):
        length = self._length(xp)
        length = at.by_row(length) if len(getattr(length, "shape", ())) == 2 else length
        return (at.keys <= at.by_row(at.own)) | (at.keys < length)

    def __repr__(self):
        return f"prefix({self.length})" if isinstance(self.length, int) else f"prefix{extents(self.length)}"


@dataclasses.dataclass(frozen=True, eq=False)
class Chunked(Part):
    """A row sees the keys of the chunk of `size` keys that it stands in."""

    size: int

    stands = True

    def piece(self, xp, at):
        begin = at.own // self.size * self.size
        return Piece(begin, begin + self.size)

    def visible(self, xp, at):
        return xp.equal(at.by_row(at.own // self.size), at.keys // self.size)

    def __repr__(self):
        return f"chunked({self.size})"


@dataclasses.dataclass(frozen=True, eq=False)
class Packed(Part):
    """A row sees the keys of its own sequence; of a window, around its position in the sequence, where there is one.

    Cumulative lengths `[n + 1]`; `cu_seqlens_k` None: those of the rows. Rows are then counted from the `query_offset` of
    the call. That of the part, an integer or integers `[1 or n]`, is the position of each sequence's first row among its
    keys. The parts `inside` count from the sequence's first key, and what they have `[n]` is of each sequence.
    """

    cu_seqlens_q: Any
    cu_seqlens_k: Any = None
    window_left: int = -1
    window_right: int = -1
    bottom_right: bool = False
    query_offset: Any = None
    inside: tuple = ()

    arrays = ("cu_seqlens_q", "cu_seqlens_k", "query_offset")

    def _checked(self, xp, at):
        """The part with lengths that end within the rows and keys of the call: ValueError where known ones do not, and
        `namespaces.required` of traced ones."""
        checked = {}
        for what, extent in zip(self.arrays, self._last_ends(xp, at)):
            x = getattr(self, what)
            if x is None:
                continue
            values, most = namespaces.known(x), None if extent is None else namespaces.known(extent)
            if values is not None and most is not None and values[-1] > most:
                raise ValueError(f"packed: {what} must end within the {most} tokens of the call, got {values[-1]}")
            if values is None and extent is not None:
                within = functools.partial(lambda xp, extent, x: xp.int64(x[-1:]) <= xp.int64(extent), xp, extent)
                tokens = "tokens" if most is None else f"{most} tokens"
                checked[what] = namespaces.required(x, within, f"packed: {what} must end within the {tokens} of the call")
        return dataclasses.replace(self, **checked)

    def _sequences(self, xp, at):
        """Of each row: its sequence, which may be none; the first and the next one's first key; where it stands; and the
        parts `inside` with the `Places` that they ask."""
        starts_q = xp.int64(self.cu_seqlens_q)
        starts_k = starts_q if self.cu_seqlens_k is None else xp.int64(self.cu_seqlens_k)
        rows = at.own if self.cu_seqlens_k is None else at.rows
        sequence = xp.searchsorted(starts_q, rows, "right") - 1
        count = xp.int64(xp.extent(starts_q, 0)) - 1
        # What is outside of all sequences gets an empty one, at the first key or past the last.
        ends = [xp.minimum(xp.maximum(sequence + next, 0), count) for next in (0, 1)]
        first_row, next_row, first_key, next_key = (xp.take(starts, end) for starts in (starts_q, starts_k) for end in ends)
        entry = xp.maximum(xp.minimum(sequence, count - 1), 0)
        row, shift = rows - first_row, 0
        if self.query_offset is not None:
            shift = _of_entry(xp, self.query_offset, entry)
        elif self.bottom_right:
            shift = (next_key - first_key) - (next_row - first_row)
        places = at._replace(rows=row, own=row + shift, query_offset=self.query_offset)
        parts = [
            dataclasses.replace(part, **{name: _of_entry(xp, getattr(part, name), entry) for name in part.arrays})
            for part in self.inside
        ]
        return sequence, first_key, next_key, first_key + places.own, parts, places

    def piece(self, xp, at):
        _, begin_all, end_all, own, parts, places = self._checked(xp, at)._sequences(xp, at)
        bounds = [(None if x is None else begin_all + x for x in part.piece(xp, places)[:2]) for part in parts]
        # A row may stand far behind its keys: sums stay within 32 bits, which are JAX's.
        left, right = (min(side, LARGEST_OFFSET) for side in (self.window_left, self.window_right))
        bounds.append((own - left if left >= 0 else None, xp.minimum(own, end_all) + right + 1 if right >= 0 else None))
        begin, end = begin_all, end_all
        for low, high in bounds:
            # Ends stay within the sequence where a window is before or after it, so that they do not move back.
            begin = begin if low is None else xp.maximum(begin, xp.minimum(low, end_all))
            end = end if high is None else xp.minimum(end, xp.maximum(high, begin_all))
        for lengths, last in zip((self.cu_seqlens_q, self.cu_seqlens_k), self._last_ends(xp, at)):
            if lengths is not None and namespaces.known(lengths) is None:  # which XLA does not require
                starts = xp.int64(lengths)[None]
                wrong = _goes_back(xp, starts) | ~xp.equal(starts[:, :1], xp.int64(0))
                wrong = wrong if last is None else wrong | (starts[:, -1:] > xp.int64(last))
                end = _refused(xp, at, wrong, end)
        return Piece(begin, end)

    def _last_ends(self, xp, at):
        """The last ends that lengths of rows and of keys may have, None where any may be right."""
        rows, keys = at.seqlen_q, at.seqlen_k
        if self.cu_seqlens_k is not None:
            return rows, keys
        if at.query_offset is not None:  # of more rows and keys than there are
            return None, None
        known = isinstance(rows, int) and isinstance(keys, int)
        return (max(rows, keys) if known else xp.maximum(xp.int64(rows), xp.int64(keys))), None

    def visible(self, xp, at):
        sequence, first_key, next_key, own, parts, places = self._checked(xp, at)._sequences(xp, at)
        starts_k = xp.int64(self.cu_seqlens_q if self.cu_seqlens_k is None else self.cu_seqlens_k)
        count = xp.int64(xp.extent(starts_k, 0)) - 1
        sequence = at.by_row(sequence)
        seen = xp.equal(sequence, xp.searchsorted(starts_k, at.keys, "right") - 1) & (sequence >= 0) & (sequence < count)
        if self.window_left >= 0:
            seen = seen & (at.keys >= at.by_row(own) - min(self.window_left, LARGEST_OFFSET))
        if self.window_right >= 0:
            seen = seen & (at.keys <= at.by_row(xp.minimum(own, next_key)) + min(self.window_right, LARGEST_OFFSET))
        places = places._replace(keys=at.keys - at.by_row(first_key))
        return _all([seen, *(part.visible(xp, places) for part in parts)])

    def __repr__(self):
        given = [extents(x) for x in (self.cu_seqlens_q, self.cu_seqlens_k) if x is not None]
        if self.window_left >= 0 or self.window_right >= 0:
            left, right = ("all" if end < 0 else end for end in (self.window_left, self.window_right))
            given.append(f"left={left}, right={right}{', bottom_right' if self.bottom_right else ''}")
        if self.query_offset is not None:
            given.append(f"query_offset{extents(self.query_offset)}")
        given += map(repr, self.inside)
        return "packed" + (given[0] if len(given) == 1 else f"({', '.join(given)})")


def _of_entry(xp, x, entry):
    """An integer, or of integers `[1 or n]` those of each row's ``entry``."""
    x = xp.int64(x)
    return x if getattr(x, "shape", ()) in ((), (1,)) else xp.take(x, entry)


@dataclasses.dataclass(frozen=True, eq=False)
class Segments(Part):
    """A row sees the keys of equal id: `[batch or 1, seqlen_q]` and `[batch or 1, seqlen_k]`.

    Whether the keys of an id stand together is not asked, it is found: an interval per row, from the first key of its id
    to the last and widened until ends do not move back, holds all it sees (`hull`). Where it holds nothing else, which
    known ids tell, it is all that kernels need; ids that are traced are compared within it. With `contiguous` True the
    caller has promised that neither ids go back: two searches give the intervals. With False ids are compared alone.
    """

    q_ids: Any
    kv_ids: Any
    contiguous: Any = None

    arrays = ("q_ids", "kv_ids")

    def visible(self, xp, at):
        self._check(at)
        q_ids, kv_ids = xp.int64(self.q_ids), xp.int64(self.kv_ids)  # TensorFlow compares what is of one dtype
        return xp.equal(q_ids[:, None, :, None], kv_ids[:, None, None, :])

    def _check(self, at):
        check_extent("segments", self.q_ids, 1, "seqlen_q", at.seqlen_q, "q_ids ")
        check_extent("segments", self.kv_ids, 1, "seqlen_k", at.seqlen_k, "kv_ids ")

    def piece(self, xp, at):
        self._check(at)
        q_ids, kv_ids = xp.int64(self.q_ids), xp.int64(self.kv_ids)
        if (self.contiguous is False and not self._wide()) or not xp.can_search(kv_ids, q_ids):
            return Piece(segments=(xp.int32(q_ids), xp.int32(kv_ids)))
        q_ids, kv_ids = xp.same_batch(q_ids, kv_ids)
        if self.contiguous:
            begin, end = (xp.searchsorted(kv_ids, q_ids, side) for side in ("left", "right"))
            if namespaces.known(kv_ids) is None:  # the search cannot tell that keys go back
                end = _refused(xp, at, _goes_back(xp, kv_ids), end)
            return Piece(begin, end)
        order = xp.argsort(kv_ids)
        ordered = xp.take_along(kv_ids, order)
        left, right = (xp.searchsorted(ordered, q_ids, side) for side in ("left", "right"))
        found = right > left
        ids = q_ids, kv_ids
        if self._wide():  # an id's place among the ordered ones is as good, and has 32 bits
            ids = xp.where(found, left, xp.int64(-1)), xp.searchsorted(ordered, kv_ids, "left")
        ids = tuple(map(xp.int32, ids))
        if self.contiguous is False:
            return Piece(segments=ids)
        order = xp.with_zero(order)  # a place to read for rows without keys
        first = xp.where(found, xp.take_along(order, left), xp.int64(at.seqlen_k))
        last = xp.where(found, xp.take_along(order, xp.maximum(right - 1, 0)), xp.int64(-1))
        begin, end = hull(xp, first, last + 1)
        if namespaces.known(begin) is not None and (np.maximum(end - begin, 0) == right - left).all():
            return Piece(begin, end)
        return Piece(begin, end, ids)

    def _wide(self):
        """Whether ids may not fit 32 bits."""
        for ids in (self.q_ids, self.kv_ids):
            if "64" in str(ids.dtype) or "uint32" in str(ids.dtype):
                values = namespaces.known(ids)
                if values is None or (values.size and (values.min() < -(2**31) or values.max() >= 2**31)):
                    return True
        return False

    def __repr__(self):
        return f"segments({extents(self.q_ids)}, {extents(self.kv_ids)})"


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks(Part):
    """Bool `[batch or 1, num_heads or 1, blocks of block_q rows, blocks of block_k keys]`, true = its pairs are visible."""

    blocks: Any
    block_q: int
    block_k: int

    arrays = ("blocks",)

    def piece(self, xp, at):
        for axis, what, seqlen, block in (
            (2, "seqlen_q", at.seqlen_q, self.block_q),
            (3, "seqlen_k", at.seqlen_k, self.block_k),
        ):
            if isinstance(seqlen, int):
                check_extent("block_sparse", self.blocks, axis, f"ceil({what}={seqlen} / {block})", -(-seqlen // block))
        return Piece(blocks=xp.bool(self.blocks))

    def visible(self, xp, at):
        by_row = xp.take(self.piece(xp, at).blocks, at.rows[0] // self.block_q, 2)
        return xp.take(by_row, at.keys // self.block_k, 3)

    def __repr__(self):
        return f"block_sparse({extents(self.blocks)} of {self.block_q} x {self.block_k})"


@dataclasses.dataclass(frozen=True, eq=False)
class Boolean:
    """A bool array of rank 4 as it is."""

    array: Any
    kind: str = "boolean"  # the constructor's name

    arrays = ("array",)
    inside = ()

    def __repr__(self):
        given = {"query_padding": (0, 2), "key_padding": (0, 3)}.get(self.kind)
        return self.kind + (extents(self.array) if given is None else extents(self.array, given))


_KINDS = {kind.__name__: kind for kind in (Intervals, Prefix, Chunked, Packed, Segments, Blocks)}


def taken_apart(parts):
    """(what JSON can hold of the parts, list of their arrays), for `put_together`."""
    described, arrays = [], []
    for part in parts:
        held = [name for name in part.arrays if hasattr(getattr(part, name), "shape")]
        plain = {field.name: getattr(part, field.name) for field in dataclasses.fields(part) if field.name not in held}
        described.append({"kind": type(part).__name__, "arrays": held, **plain})
        arrays += [getattr(part, name) for name in held]
    return described, arrays


def put_together(described, arrays):
    """The parts that were `taken_apart`, with these arrays."""
    arrays = iter(arrays)
    parts = []
    for plain in described:
        plain = dict(plain)
        kind, held = _KINDS[plain.pop("kind")], plain.pop("arrays")
        parts.append(kind(**plain, **{name: next(arrays) for name in held}))
    return tuple(parts)


def _goes_back(xp, x):
    """Whether integers `[batch, n]` go back somewhere: bool `[batch, 1]`."""
    back = xp.with_zero(xp.int64(xp.running_maximum(x) > x))
    return xp.running_maximum(back)[:, -1:] > 0


def _refused(xp, at, wrong, end):
    """The ``end`` of intervals, which falls where ``wrong``, bool `[batch or 1, 1]`: ends that fall are refused."""
    return xp.where(wrong, xp.int64(at.seqlen_k) - xp.int64(at.rows), xp.int64(end))


def hull(xp, begin, end):
    """The least intervals that hold these, `[..., seqlen_q]`, and never move back along the rows.

    An empty one that asks for nothing begins past every key and ends at 0.
    """
    begin = -xp.running_maximum(-begin[..., ::-1])[..., ::-1]
    return begin, xp.running_maximum(end)


def extents(array, axes=None):
    """The shape as text, of these axes only: `[2, ?, 6]`."""
    shape = getattr(array, "shape", None)
    if shape is None or getattr(shape, "rank", 0) is None:  # a list of Python's, or nothing known
        return "[?]"
    shape = [shape[axis] for axis in range(len(shape)) if axes is None or axis in axes]
    return f"[{', '.join('?' if extent is None else str(extent) for extent in shape)}]"


def check_extent(name, array, axis, what, extent, of=""):
    """ValueError where it is known that ``array`` does not have the ``extent`` along an axis."""
    if array is not None and isinstance(extent, int) and array.shape[axis] not in (None, extent):
        raise ValueError(f"{name}: axis {axis} of {of}shape {tuple(array.shape)} must be {what}, here {extent}")


def _all(terms):
    seen = terms[0]
    for term in terms[1:]:
        seen = seen & term
    return seen

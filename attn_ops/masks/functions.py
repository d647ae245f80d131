"""Masks written as a function of indices: evaluated on the host, and recognised where they are something simpler.

What is found of a function, the first that is exactly it:
1. an interval of keys per row whose ends never move back, and among those by name causal, window, prefix, chunked,
   segments (documents) and causal segments;
2. blocks of a multiple of 16 rows and keys that are visible or hidden as a whole;
3. segments whose keys do not stand together: ids that are equal;
4. blocks within intervals;
5. bits, within intervals where those hide any.
"""

from __future__ import annotations

import dataclasses
import typing

import numpy as np

from attn_ops import namespaces
from attn_ops.call import options
from attn_ops.masks.mask import Mask
from attn_ops.masks.structure import Blocks, Boolean, Chunked, Intervals, Part, Prefix, Segments, hull

_AT_ONCE = 2**22  # pairs that a function is asked for in one call
_ASKED = 2**12  # pairs by which a function of numbers tells what it depends on
_KEPT = 64  # extents and offsets that are remembered
_BLOCKS = (128, 64, 32, 16)  # sizes of blocks that are tried within intervals
_HOST = namespaces.NumPy()


@dataclasses.dataclass(frozen=True, eq=False)
class Function(Part):
    """`fn(b, h, q, k)`, true where row q sees key k; extents of None are those of the call."""

    fn: typing.Callable
    seqlen_q: int | None = None
    seqlen_k: int | None = None
    batch: int | None = None
    num_heads: int | None = None
    _found: dict = dataclasses.field(default_factory=dict, repr=False)

    is_function = True

    def found(self, seqlen_q, seqlen_k, query_offset=None):
        """Two masks that are the function for these extents: as what it is recognised to be, and as one that does not
        ask where rows stand. They only differ where it is causal, a window, a prefix or chunks."""
        seqlen_q, seqlen_k, offset = self._asked_for(seqlen_q, seqlen_k, query_offset)
        key = seqlen_q, seqlen_k, tuple(offset.flat)
        if key not in self._found:
            while len(self._found) >= _KEPT:  # decoding asks for another offset each time
                self._found.pop(next(iter(self._found)))
            with namespaces.untraced():
                self._found[key] = _recognised(_Table(self, seqlen_q, seqlen_k, offset), query_offset is None)
        return self._found[key]

    def check_entries(self, counts, *extents):
        """ValueError where a call with these extents and offset, as `found` takes them, has several batch entries or heads
        (``counts``; None: who knows), nobody said how many, and the function asks which one it is for."""
        called = ("batch", "b", self.batch), ("num_heads", "h", self.num_heads)
        for axis, ((what, index, given), count) in enumerate(zip(called, counts)):
            if given is None and count not in (0, 1) and self._depends(axis, *self._asked_for(*extents)):
                many = "may have several" if count is None else f"has {count}"
                raise ValueError(
                    f"from_function: {self.name}(b, h, q, k) asks for {index}, and the call {many}: give {what}=, how "
                    "many there are"
                )

    @namespaces.untraced()
    def _depends(self, axis, seqlen_q, seqlen_k, offset):
        """Whether the function asks for b (axis 0) or h (axis 1): of two that are the same it makes two all the same."""
        if not (seqlen_q and seqlen_k and offset.size):
            return False
        first = int(offset[0])  # as `_Table` has it for functions of numbers
        index = [np.zeros((1, 1, 1, 1), np.int64)] * 2
        index[axis] = index[axis].repeat(2, axis)
        try:
            values = np.asarray(self.fn(*index, np.full((1, 1, 1, 1), first), np.arange(seqlen_k)[None, None, None]))
            return values.ndim >= 4 - axis and values.shape[axis - 4] == 2
        except Exception:  # a function of numbers, which tells by its values
            pass
        pairs = seqlen_q * seqlen_k
        try:
            for q, k in (divmod(int(pair), seqlen_k) for pair in np.linspace(0, pairs - 1, min(pairs, _ASKED))):
                if bool(self.fn(0, 0, first + q, k)) != bool(self.fn(1 - axis, axis, first + q, k)):
                    return True
        except Exception:  # it has nothing for the second one
            return True
        return False

    def visible(self, xp, at):
        """All of it, as the function says."""
        with namespaces.untraced():
            values = _Table(self, *self._asked_for(at.seqlen_q, at.seqlen_k, at.query_offset)).whole()
        return xp.bool(values)

    def _asked_for(self, seqlen_q, seqlen_k, query_offset):
        """The extents as integers, and the offset as `[1]` or `[batch]`."""
        return self._extent("seqlen_q", seqlen_q), self._extent("seqlen_k", seqlen_k), self._offset(query_offset)

    def _extent(self, what, called):
        own, known = getattr(self, what), namespaces.known(called)
        if own is None and known is None:
            raise ValueError(
                f"from_function: {what} must be known where the attention is called or traced, to evaluate "
                f"{self.name} for it, got {called}; give static shapes, or {what}= if it is always the same"
            )
        if own is not None and known is not None and own != known:
            raise ValueError(f"from_function: {self.name} is given for {what}={own}, and called with {what}={known}")
        return int(known if own is None else own)

    def _offset(self, query_offset):
        offset = np.zeros(1, np.int64) if query_offset is None else namespaces.known(query_offset)
        if offset is None:
            raise ValueError(
                f"from_function: query_offset must be known where the attention is called or traced, to evaluate "
                f"{self.name} for its positions"
            )
        return np.atleast_1d(offset).astype(np.int64)

    @property
    def name(self):
        return getattr(self.fn, "__name__", type(self.fn).__name__)

    def __repr__(self):
        if not self._found:
            return f"from_function({self.name}, evaluated when called)"
        found, _ = list(self._found.values())[-1]
        return f"from_function({self.name}: {found.described()})"


@namespaces.as_written
def from_function(fn, seqlen_q=None, seqlen_k=None, batch=None, num_heads=None):
    """The mask that a function says, as FlexAttention's `mask_mod`: `fn(b, h, q, k)` is true where row q sees key k.

    It is evaluated on the host, once for each pair of extents, and recognised where it is causal, a window, a prefix,
    chunks, segments, another interval per row, or made of blocks; what it is then runs as such, all else as exact bits.
    `repr` tells.

    Args:
      fn: takes NumPy integer arrays that broadcast against each other and gives booleans, elementwise; TensorFlow and JAX
        may compute them, of arrays whose values are known. Where it fails with arrays (`if`, `and`) it is called for each
        pair, which is slow for long sequences. q is the row's own position: counted from a `query_offset` on.
      seqlen_q, seqlen_k: the extents to evaluate it for; None for those of the call, which must be known when it is
        traced.
      batch, num_heads: how many b and h there are, where the mask depends on them; None where it does not.
    Raises:
      TypeError: fn is no function, or gives what is not boolean.
      ValueError: an extent below 0 (1 of batch and num_heads), or what fn raises; from the attention, where fn asks for
        b or h, batch or num_heads is None, and the call has several.
    """
    if not callable(fn):
        raise TypeError(f"from_function: fn must be a function of (b, h, q, k), got {type(fn).__name__}")
    seqlen_q, seqlen_k = (
        x if x is None else options.size(f"from_function: {what}", x, least=0)
        for what, x in (("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k))
    )
    batch, num_heads = (
        x if x is None else options.size(f"from_function: {what}", x)
        for what, x in (("batch", batch), ("num_heads", num_heads))
    )
    function = Function(fn, seqlen_q, seqlen_k, batch, num_heads)
    if seqlen_q is not None and seqlen_k is not None:
        function.found(seqlen_q, seqlen_k)
    return Mask(structured=(function,))


class _Table:
    """The values of a function, `[batch, num_heads, seqlen_q, seqlen_k]`, asked for some rows at a time."""

    def __init__(self, function, seqlen_q, seqlen_k, offset):
        entries, num_heads = function.batch or 1, function.num_heads or 1
        if entries > 1 and offset.size not in (1, entries):
            raise ValueError(f"from_function: query_offset has {offset.size} entries for batch={entries}")
        batch = max(entries, offset.size)
        self._function = function
        self._b = (np.arange(batch) if entries > 1 else np.zeros(batch, np.int64))[:, None, None, None]
        self._h = np.arange(num_heads)[None, :, None, None]
        self._k = np.arange(seqlen_k)
        self._by_element = False
        self.own = np.arange(seqlen_q) + offset[:, None]  # [batch or 1, seqlen_q]
        self.shape = batch, num_heads, seqlen_q, seqlen_k

    def chunks(self):
        """(first row, values of it and the next ones), over all rows."""
        batch, num_heads, seqlen_q, seqlen_k = self.shape
        rows = max(1, _AT_ONCE // max(1, batch * num_heads * seqlen_k))
        for start in range(0, seqlen_q, rows):
            yield start, self._values(self.own[:, start : start + rows])

    def whole(self):
        values = np.zeros(self.shape, bool)
        for start, chunk in self.chunks():
            values[:, :, start : start + chunk.shape[2]] = chunk
        return values

    def _values(self, own):
        shape = (*self.shape[:2], own.shape[1], self.shape[3])
        indices = self._b, self._h, own[:, None, :, None], self._k[None, None, None, :]
        fn, name = self._function.fn, self._function.name
        if not self._by_element:
            try:
                return np.broadcast_to(self._checked(fn(*indices)), shape)
            except Exception:  # a function of numbers, with `if` or `and`, fails with arrays in any way
                self._by_element = True
        try:
            values = np.frompyfunc(lambda *index: self._one(fn(*index)), 4, 1)(*indices)
        except Exception as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            told = str(error) if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: {error}"
            raise kind(f"from_function: {name}(b, h, q, k) cannot be evaluated on integers: {told}") from error
        return np.broadcast_to(values.astype(bool), shape)

    def _checked(self, values):
        values = np.asarray(values)
        if values.dtype != bool:
            raise TypeError(f"what it returns must be boolean (True = may be seen), got {values.dtype.name}")
        return values

    def _one(self, value):
        """What the function returned for one pair, as a bool."""
        value = self._checked(value)
        if value.ndim:
            raise ValueError(f"what it returns must be one boolean for each q and k, got shape {value.shape}")
        return bool(value)


def _recognised(table, may_stand_at_the_end):
    begin, end, count = _ends(table)
    if (count == end - begin).all():
        ends = _settled(_common_head(begin), _common_head(end))
        if ends is not None:
            return _named(*_common_entry(np.stack(ends, 1)).swapaxes(0, 1), table.own, table.shape, may_stand_at_the_end)
    return (_other(table, begin, end),) * 2


def _ends(table):
    """Of each row `[batch, num_heads, seqlen_q]`: the first key that it sees, the one past the last (both 0 without any),
    and how many it sees."""
    batch, num_heads, seqlen_q, seqlen_k = table.shape
    begin, end, count = np.zeros((3, batch, num_heads, seqlen_q), np.int64)
    for start, chunk in table.chunks() if seqlen_k else ():
        rows = np.s_[:, :, start : start + chunk.shape[2]]
        count[rows] = chunk.sum(-1)
        begin[rows] = chunk.argmax(-1)
        end[rows] = np.where(count[rows] > 0, seqlen_k - chunk[..., ::-1].argmax(-1), 0)
    return begin, end, count


def _common_head(x):
    """`[batch, num_heads, ...]` without its heads, or None if they differ."""
    return x[:, 0] if (x == x[:, :1]).all() else None


def _common_entry(x):
    """`[batch, ...]`, or `[1, ...]` where the entries of the batch are the same."""
    return x[:1] if (x == x[:1]).all() else x


def _settled(begin, end):
    """The ends `[batch, seqlen_q]`, those of empty rows put where they do not move back; None if some do."""
    if begin is None or end is None:
        return None
    empty = begin >= end
    past = np.maximum.accumulate(np.where(empty, 0, end), -1)
    begin, end = np.where(empty, past, begin), np.where(empty, past, end)
    never_back = (np.diff(begin) >= 0).all() and (np.diff(end) >= 0).all()
    return (begin, end) if never_back else None


def _named(begin, end, own, shape, may_stand_at_the_end):
    """(mask, mask that does not ask where rows stand) of intervals `[batch or 1, seqlen_q]`."""
    seqlen_q, seqlen_k = shape[2:]
    begin, end, own = np.broadcast_arrays(begin, end, _common_entry(own))

    def are(other_begin, other_end):
        """Whether rows see the same in other intervals."""
        other_begin, other_end = (np.clip(x, 0, seqlen_k) for x in np.broadcast_arrays(other_begin, other_end, begin)[:2])
        empty = begin >= end
        return ((other_begin >= other_end) == empty).all() and (
            empty | ((other_begin == begin) & (other_end == end))
        ).all()

    def as_intervals(note=""):
        return Mask(structured=(Intervals(begin, end, note),))

    if begin.size == 0 or are(0, seqlen_k):
        return (Mask(),) * 2
    rows = begin < end
    windows = []
    for alignment, shift in (("top_left", 0), ("bottom_right", seqlen_k - seqlen_q))[: 2 if may_stand_at_the_end else 1]:
        at = own + shift
        left, right = (np.unique(x[rows & cut]) for x, cut in ((at - begin, begin > 0), (end - 1 - at, end < seqlen_k)))
        if max(left.size, right.size) > 1 or min([0, *left, *right]) < 0:
            continue  # distances of the ends that differ, or that are on the wrong side
        first = at - left if left.size else 0
        if are(first, at + right + 1 if right.size else seqlen_k):
            left, right = (int(x[0]) if x.size else None for x in (left, right))
            windows.append(Mask(right == 0, alignment, (left, None if right == 0 else right)))
    if windows:
        return max(windows, key=lambda mask: mask.is_causal), as_intervals()
    if (begin[rows] == 0).all():
        length = end[:, 0]
        if are(0, np.maximum(own + 1, length[:, None])):
            return Mask(structured=(Prefix(int(length[0]) if length.size == 1 else length),)), as_intervals()
    size = int((end - begin).max())
    if size and are(own // size * size, (own // size + 1) * size):
        return Mask(structured=(Chunked(size),)), as_intervals()
    new = np.diff(begin) > 0  # rows that begin another segment
    note = ""
    if rows.all() and new.any():
        count = f"{1 + new[0].sum()} segments" if begin.shape[0] == 1 else "segments"
        if ((begin[:, 1:] >= end[:, :-1]) == new).all() and ((np.diff(end) > 0) <= new).all():
            note = count
        elif (end == np.minimum(own + 1, seqlen_k)).all() and (begin[:, 1:] == own[:, 1:])[new].all():
            note = f"causal in {count}"
    return (as_intervals(note),) * 2


def _other(table, begin, end):
    """What is no interval: blocks, segments or bits, within intervals."""
    seqlen_q, seqlen_k = table.shape[2:]
    visible = table.whole()
    if (visible == visible[:, :1]).all():
        visible = visible[:, :1]
    visible = _common_entry(visible)
    sizes = [_uniform(visible.swapaxes(2, 3)), _uniform(visible)]
    if all(size % 16 == 0 for size in sizes):
        return Mask(structured=(Blocks(np.ascontiguousarray(visible[:, :, :: sizes[0], :: sizes[1]]), *sizes),))
    ids = _ids(visible)
    if ids is not None:
        return Mask(structured=(Segments(*ids),))
    # The least of the first keys of all heads, for rows that see any.
    empty = begin >= end
    least, most = hull(_HOST, np.where(empty, seqlen_k, begin).min(1), end.max(1))
    least, most = _common_entry(np.stack([least, most], 1)).swapaxes(0, 1)
    hides = least.any() or (most < seqlen_k).any()
    within = (Intervals(least, most),) if hides else ()
    keys = np.arange(seqlen_k)
    inside = ((keys >= least[..., None]) & (keys < most[..., None]))[:, None]
    for size in _BLOCKS:
        blocks = _any_in_blocks(visible, size)
        if blocks.all():
            continue
        everywhere = blocks.repeat(size, 2)[:, :, :seqlen_q].repeat(size, 3)[..., :seqlen_k]
        if (everywhere & inside == visible).all():
            return Mask(structured=(*within, Blocks(blocks, size, size)))
    return Mask(structured=within, dense=(Boolean(visible),))


def _uniform(visible):
    """The largest size of blocks along the last axis in which nothing changes; of no change all, in units of 16."""
    changes = np.flatnonzero((visible[..., 1:] != visible[..., :-1]).any((0, 1, 2))) + 1
    return int(np.gcd.reduce(changes)) if changes.size else -(-visible.shape[-1] // 16) * 16


def _ids(visible):
    """(q_ids, kv_ids) whose equality `[batch, 1, seqlen_q, seqlen_k]` is, or None."""
    if visible.shape[1] != 1:
        return None
    visible = visible[:, 0]
    kv_ids = np.where(visible.any(1), visible.argmax(1), -1)  # the first row that sees the key
    q_ids = np.where(visible.any(2), np.take_along_axis(kv_ids, visible.argmax(2), 1), -2)
    same = (q_ids[:, :, None] == kv_ids[:, None, :]) == visible
    return (q_ids, kv_ids) if same.all() else None


def _any_in_blocks(visible, size):
    batch, num_heads, seqlen_q, seqlen_k = visible.shape
    blocks = -(-seqlen_q // size), -(-seqlen_k // size)
    padded = np.zeros((batch, num_heads, blocks[0] * size, blocks[1] * size), bool)
    padded[:, :, :seqlen_q, :seqlen_k] = visible
    return padded.reshape(batch, num_heads, blocks[0], size, blocks[1], size).any((3, 5))

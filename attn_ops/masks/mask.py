"""The mask of a call: what it is made of, who sees whom, and what kernels take of it."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any, Optional

import numpy as np

from attn_ops import namespaces
from attn_ops.call import options
from attn_ops.call.options import LARGEST_OFFSET
from attn_ops.masks import checks, pictures
from attn_ops.masks.key_range import interval
from attn_ops.masks.structure import Boolean, Places, extents

ALIGNMENTS = ("top_left", "bottom_right")


class Parts(typing.NamedTuple):
    """What the kernels take of a mask beside causal, window and lengths, which it has as attributes; all ANDed.

    Attributes:
      intervals: None or (key_begin, key_end), int32 `[batch or 1, seqlen_q]` each, in [0, seqlen_k]: row i sees the keys
        key_begin <= j < key_end. Neither moves back along the rows.
      segments: None or (q_ids, kv_ids), int32 `[batch or 1, seqlen_q]` and `[batch or 1, seqlen_k]`: equal ones see
        each other.
      blocks: None or bool `[batch or 1, num_heads or 1, ceil(seqlen_q / block_q), ceil(seqlen_k / block_k)]`.
      block_q, block_k: rows and keys of a block; 0 without blocks.
      dense: bool arrays that broadcast to `[batch, num_heads, seqlen_q, seqlen_k]`.
    """

    intervals: Optional[tuple] = None
    segments: Optional[tuple] = None
    blocks: Any = None
    block_q: int = 0
    block_k: int = 0
    dense: tuple = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """Who sees whom. Use the constructors of this module and `&`; the fields are what they set.

    Masks without arrays and functions are equal, and have one hash, where they say the same: as static arguments of traced
    functions they cause no other trace. Others are equal to nothing but themselves.

    Attributes:
      is_causal: a row sees no key after its own position: `window` with right end 0.
      causal_alignment: "top_left": row i stands at key i (Keras, PyTorch). "bottom_right": the last row stands at the
        last key, at i + length_k - length_q (flash-attention, decoding), with the effective lengths of the batch
        entry when lengths are given.
      window: None or (left, right): how many keys before and after its own position a row sees; None or -1 is all.
      query_lengths: None or integers `[batch]`: rows at and past it see nothing.
      key_lengths: None or integers `[batch]`: keys at and past it are not seen.
      dense: tuple of `structure.Boolean`: boolean masks, true = may see.
      structured: tuple of the other parts of structure.py, and of functions.py.
    """

    is_causal: bool = False
    causal_alignment: str = options.TOP_LEFT
    window: Optional[tuple] = None
    query_lengths: Any = None
    key_lengths: Any = None
    dense: tuple = ()
    structured: tuple = ()

    def __post_init__(self):
        if self.causal_alignment not in ALIGNMENTS:
            raise ValueError(f"Mask: causal_alignment must be one of {ALIGNMENTS}, got {self.causal_alignment!r}")
        object.__setattr__(self, "is_causal", bool(self.is_causal))
        object.__setattr__(self, "window", checks.normalized_window(self.window))
        for name in ("query_lengths", "key_lengths"):
            object.__setattr__(self, name, checks.normalized_lengths(name, getattr(self, name)))

    def __eq__(self, other):
        if not isinstance(other, Mask):
            return NotImplemented
        said = self._said()
        return self is other or (said is not None and said == other._said())

    def __hash__(self):
        said = self._said()
        return object.__hash__(self) if said is None else hash(said)

    def _said(self):
        """All that the mask says, hashable; None where it holds arrays or functions."""
        if self.arrays() or any(part.is_function for part in self.structured):
            return None
        parts = [(type(part), *(getattr(part, field.name) for field in dataclasses.fields(part))) for part in self.structured]
        is_said = not isinstance(self.causal_alignment, options.Unsaid)
        return self.is_causal, self.causal_alignment, is_said, self.window, *parts

    def __repr__(self):
        """What the mask is made of, with the shapes of arrays: `<Mask: causal & key_padding[2, 6]>`."""
        return f"<Mask: {self.described()}>"

    def described(self):
        """What the mask is made of, with the shapes of arrays: `causal & key_padding[2, 6]`."""
        alignment = f"({self.causal_alignment})" if self.bottom_right else ""
        parts = [f"causal{alignment}"] if self.is_causal else []
        if self.window:
            left, right = ("all" if end < 0 else end for end in self.window)
            parts.append(f"window(left={left}, right={right}{', ' + self.causal_alignment if self.bottom_right else ''})")
        for name in ("query_lengths", "key_lengths"):
            if getattr(self, name) is not None:
                parts.append(f"{name}{extents(getattr(self, name))}")
        return " & ".join([*parts, *map(repr, self.structured + self.dense)]) or "everything is visible"

    @property
    def window_left(self):
        """Keys seen before the row's own position; -1 = all."""
        return self.window[0] if self.window else -1

    @property
    def window_right(self):
        """Keys seen after the row's own position; -1 = all; causal is 0."""
        right = self.window[1] if self.window else -1
        return 0 if self.is_causal else right

    @property
    def bottom_right(self):
        """Whether rows are aligned with the last key."""
        return self.causal_alignment == "bottom_right"

    @property
    def is_aligned(self):
        """Whether some part asks where rows stand among the keys."""
        return bool(self.is_causal or self.window or any(part.stands for part in self.structured))

    @namespaces.as_written
    def __and__(self, other):
        """A pair is visible if both masks let it be.

        The result describes one attention call with all the parts: lengths given on either side are the effective
        lengths that a bottom-right alignment refers to. Raises ValueError for two windows of different alignment,
        which no single interval can express; other parts that ask where a row stands (prefix, chunked) count as windows.
        A side with no such part has no say in the alignment, unless neither has one. A boolean array is `boolean` of it.
        """
        if not isinstance(other, Mask):
            if not hasattr(other, "dtype"):
                return NotImplemented
            other = boolean(other)
        aligned = [m.causal_alignment for m in (self, other) if m.is_aligned]
        if len(set(aligned)) > 1:
            raise ValueError(
                "Mask &: both sides have a causal, window, prefix or chunked part, with causal_alignment "
                f"{self.causal_alignment!r} and {other.causal_alignment!r}; make one of them dense: "
                "a & masks.boolean(b.materialize(seqlen_q, seqlen_k))"
            )
        window = None
        if self.window or other.window:
            pairs = zip(self.window or (-1, -1), other.window or (-1, -1))
            window = tuple(min(ends) if min(ends) >= 0 else max(ends) for ends in pairs)
        return Mask(
            is_causal=self.is_causal or other.is_causal,
            # Without parts that ask for it, what was said still tells slopes and tables where rows stand.
            causal_alignment=min(
                aligned or [self.causal_alignment, other.causal_alignment], key=lambda a: isinstance(a, options.Unsaid)
            ),
            window=window,
            query_lengths=_minimum(self.query_lengths, other.query_lengths),
            key_lengths=_minimum(self.key_lengths, other.key_lengths),
            dense=self.dense + other.dense,
            structured=self.structured + other.structured,
        )

    __rand__ = __and__
    __array_ufunc__ = None  # NumPy leaves `array & mask` to the mask

    def __bool__(self):
        raise TypeError("Mask: masks combine with &; and, or and not would drop one of them")

    @namespaces.as_written
    def resolved(self, seqlen_q, seqlen_k, query_offset=None, windows=True):
        """The mask with its functions (`from_function`) evaluated for these extents, as what they are found to be.

        With `windows` False they become intervals even where they are causal, windows, a prefix or chunks.
        Raises ValueError where the extents or the offset are not known, and what the functions raise.
        """
        functions = self._functions()
        if not functions:
            return self
        mask = dataclasses.replace(self, structured=tuple(part for part in self.structured if not part.is_function))
        for part in functions:
            found, as_intervals = part.found(seqlen_q, seqlen_k, query_offset)
            clash = mask.is_aligned and found.is_aligned and mask.causal_alignment != found.causal_alignment
            # Lengths would move what stands at the last key; the function has not heard of them.
            clash |= found.bottom_right and not (self.query_lengths is None and self.key_lengths is None)
            mask = mask & (found if windows and not clash else as_intervals)
        return mask

    def of_call(self, batch, num_heads, seqlen_q, seqlen_k, query_offset=None, windows=True):
        """The mask `resolved` for a call of so many batch entries and heads (None where nobody knows).

        Raises ValueError, too, where a function asks which of several entries or heads it is for, and was not told how many
        there are.
        """
        resolved = self.resolved(seqlen_q, seqlen_k, query_offset, windows)
        for part in self._functions():
            part.check_entries((batch, num_heads), seqlen_q, seqlen_k, query_offset)
        return resolved

    def _functions(self):
        return [part for part in self.structured if part.is_function]

    @namespaces.as_written
    def parts(self, seqlen_q, seqlen_k, query_offset=None, like=()):
        """What the kernels take beside the attributes: nothing of seqlen_q * seqlen_k elements that was not given so.

        All intervals become one pair of ends. The first segments and the first blocks stay what they are, further ones
        become dense. Functions are evaluated, with all they tell in the result: who wants their windows as attributes
        asks the `resolved` mask.

        Args:
          seqlen_q, seqlen_k: extents, integers or integer scalars.
          query_offset: None, or the position of row 0: an integer or integers `[batch]`.
          like: arrays of whose framework the results are, where neither the extents nor the mask's arrays tell.
        Returns:
          `Parts`: NumPy where all values are known, else of the framework.
        Raises:
          TypeError: an extent is no integer.
          ValueError: extents that are negative or do not fit, a query_offset beside a bottom-right alignment, or what
            `resolved` raises.
        """
        for what, extent in (("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k)):
            checks.extent(f"Mask.parts: {what}", extent)
        mask = self.resolved(seqlen_q, seqlen_k, query_offset, windows=False)
        if not mask.structured:
            return Parts(dense=mask.tensors())
        places = _CallPlaces(mask, seqlen_q, seqlen_k, query_offset, like)
        begins, ends, segments, blocks, dense = [], [], None, (None, 0, 0), list(mask.tensors())
        for part in mask.structured:
            xp, at = places.of(part)
            piece = part.piece(xp, at)
            begins += [] if piece.begin is None else [piece.begin]
            ends += [] if piece.end is None else [piece.end]
            if piece.segments is not None and segments is None:
                segments = piece.segments
            elif piece.blocks is not None and blocks[0] is None:
                blocks = piece.blocks, part.block_q, part.block_k
            elif piece.segments is not None or piece.blocks is not None:
                dense.append(part.visible(xp, at))
        intervals = places.intervals(begins, ends) if begins or ends else None
        return Parts(intervals, segments, *blocks, tuple(dense))

    @namespaces.as_written
    def materialize(self, seqlen_q, seqlen_k, batch=None, query_offset=None):
        """The mask as one dense array, for tests and pictures: memory grows with seqlen_q * seqlen_k.

        Args:
          seqlen_q, seqlen_k: extents, integers or integer scalars.
          batch: the first extent of the result, or None for 1 where no part depends on the batch entry.
          query_offset: None, or the position of row 0: an integer or integers `[batch]`.
        Returns:
          bool `[batch or 1, num_heads or 1, seqlen_q, seqlen_k]`, true = may see: a TensorFlow tensor or a JAX
          array if an argument or a part is one, else a NumPy array.
        Raises:
          TypeError: an extent is no integer, or something is a tensor of a Keras model that is being made.
          ValueError: an extent is negative, a part does not fit the extents, a length (in NumPy) is outside [0, seqlen], or
            a query_offset stands beside a bottom-right alignment.
        """
        for what, extent in (("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k)):
            checks.extent(f"Mask.materialize: {what}", extent)
        if batch is not None:
            checks.extent("Mask.materialize: batch", batch)
        parts = self.tensors()
        xp = namespaces.of(self.arrays() + (seqlen_q, seqlen_k, batch, query_offset))
        if isinstance(xp, namespaces.Keras):
            raise TypeError(
                "Mask.materialize: a tensor of a Keras model that is being made has no values; hand the mask itself to the "
                f"attention, or materialize it in the call of a layer: {self!r}"
            )
        for name, length, seqlen in (
            ("query_lengths", self.query_lengths, seqlen_q),
            ("key_lengths", self.key_lengths, seqlen_k),
        ):
            if length is not None:
                xp.check_lengths(name, length, seqlen)
        at = _places(xp, self, seqlen_q, seqlen_k, query_offset)
        rows, columns = at.rows[:, None, :, None], at.keys[None, None, None, :]
        lengths = (None if n is None else xp.int64(n)[:, None, None, None] for n in (self.query_lengths, self.key_lengths))
        offset = None if query_offset is None else _by_entry(xp, query_offset, 4)
        extents = (n if isinstance(n, int) else xp.int64(n) for n in (seqlen_q, seqlen_k))
        visible = (rows >= 0) & (columns >= 0)
        for term in interval(
            rows, columns, *extents, *lengths, self.window_left, self.window_right, self.bottom_right, offset
        ):
            visible = visible & term
        for part in self.structured:
            visible = visible & part.visible(xp, at)
        for part in parts:
            _check_fits(part, {2: seqlen_q, 3: seqlen_k})
            visible = visible & xp.bool(part)
        return visible if batch is None else xp.repeat_batch(visible, batch)

    def tensors(self):
        """The dense parts: bool arrays broadcastable to `[batch, num_heads, seqlen_q, seqlen_k]`, to be ANDed."""
        return tuple(part.array for part in self.dense)

    def arrays(self):
        """All arrays that the mask holds, in the order in which `with_arrays` takes them back."""
        return tuple(getattr(owner, name) for owner, name in self._places_of_arrays())

    def with_arrays(self, arrays):
        """The mask with these in the places of `arrays`, such as those of a graph for those of a model's description."""
        given = dict(zip(((id(owner), name) for owner, name in self._places_of_arrays()), arrays))

        def replaced(owner):
            own = {name: given[id(owner), name] for key, name in given if key == id(owner)}
            if owner.inside:
                own["inside"] = tuple(map(replaced, owner.inside))
            return dataclasses.replace(owner, **own) if own else owner

        fields = {name: tuple(map(replaced, getattr(self, name))) for name in ("dense", "structured")}
        own = {name: given[id(self), name] for key, name in given if key == id(self)}
        return dataclasses.replace(self, **fields, **own)

    def _places_of_arrays(self):
        parts = [inner for part in self.dense + self.structured for inner in (part, *part.inside)]
        owners = [(self, ("query_lengths", "key_lengths")), *((part, part.arrays) for part in parts)]
        return [
            (owner, name)
            for owner, names in owners
            for name in names
            if hasattr(getattr(owner, name), "shape") or isinstance(getattr(owner, name), (list, tuple))
        ]

    def show(self, seqlen_q, seqlen_k=None, **options):
        """A picture in text, which `print` shows; see `attn_ops.masks.pictures.text` for its options."""
        return pictures.text(self, seqlen_q, seqlen_k, **options)

    def plot(self, seqlen_q, seqlen_k=None, **options):
        """A picture by matplotlib; see `attn_ops.visualize.plot_mask`."""
        return pictures.plot(self, seqlen_q, seqlen_k, **options)


@namespaces.as_written
def boolean(mask):
    """A bool mask, true = may see: `[seqlen_q, seqlen_k]`, `[batch, seqlen_q, seqlen_k]`, or `[batch, num_heads,
    seqlen_q, seqlen_k]`; every extent may be 1.

    Two axes are always `[seqlen_q, seqlen_k]`: a mask `[batch, seqlen_k]` of the keys goes through `key_padding`.
    Raises TypeError for other dtypes: floats are a `bias`, and integers are ambiguous.
    """
    mask = checks.checked("boolean", mask, (2, 3, 4), "bool")
    rank = len(mask.shape)
    return Mask(dense=(Boolean(mask[None, None] if rank == 2 else mask[:, None] if rank == 3 else mask),))


@namespaces.as_written
def combined(
    mask=None,
    *,
    is_causal=False,
    causal_alignment=options.TOP_LEFT,
    window=None,
    query_lengths=None,
    key_lengths=None,
):
    """One `Mask` from the arguments of an attention call.

    `mask` is None, a `Mask`, a boolean array (see `boolean`), or a list or tuple of those; all are ANDed. Nested lists of
    Python's True and False are one array.
    """
    result = Mask(is_causal, causal_alignment, window, query_lengths, key_lengths)
    for part in checks.listed("combined", mask):
        result = result & (part if isinstance(part, Mask) else boolean(part))
    return result


class _CallPlaces:
    """Where rows and keys are in a call, for parts that compute on the host, whose values are known, and for the others."""

    def __init__(self, mask, seqlen_q, seqlen_k, query_offset, like):
        self._call = mask, seqlen_q, seqlen_k, query_offset
        needed = [seqlen_q, seqlen_k, *([] if query_offset is None else [query_offset])]
        if mask.bottom_right:
            needed += [n for n in (mask.query_lengths, mask.key_lengths) if n is not None]
        self._host = namespaces.NumPy() if all(namespaces.known(x) is not None for x in needed) else None
        self._xp = namespaces.of((*mask.arrays(), seqlen_q, seqlen_k, query_offset, *like))
        self._at = functools.cache(lambda xp: _places(xp, *self._call))

    def of(self, part):
        """The framework for a part, and its `Places`."""
        on_host = self._host is not None and all(x is None or namespaces.known(x) is not None for x in part.held())
        xp = self._host if on_host else self._xp
        return xp, self._at(xp)

    def intervals(self, begins, ends):
        """One pair of ends within the keys: those that hide most."""
        known = all(isinstance(x, np.ndarray) for x in begins + ends) and namespaces.known(self._call[2]) is not None
        xp = self._host if known and self._host is not None else self._xp
        seqlen_k, zero = xp.int64(self._call[2]), xp.int64(0)
        begins, ends = ([xp.int64(x) for x in side] for side in (begins, ends))
        begin = functools.reduce(xp.maximum, begins) if begins else ends[0] * 0
        end = functools.reduce(xp.minimum, ends) if ends else begin * 0 + seqlen_k
        begin, end = (xp.int32(xp.maximum(xp.minimum(x, seqlen_k), zero)) for x in (begin, end))
        return tuple(xp.same_batch(begin, end))


def _places(xp, mask, seqlen_q, seqlen_k, query_offset):
    rows, keys = xp.arange(xp.int64(seqlen_q))[None], xp.arange(xp.int64(seqlen_k))
    own = rows
    if query_offset is not None:
        if mask.bottom_right and mask.is_aligned:
            raise ValueError(
                'Mask: query_offset says where the first row stands, and causal_alignment="bottom_right" where the last '
                "one does: give one of them"
            )
        values = namespaces.known(query_offset)
        if values is not None and values.size and (values.min() < 0 or values.max() > LARGEST_OFFSET):
            raise ValueError(f"Mask: query_offset must be in [0, 2**30], got {values}")
        own = rows + _by_entry(xp, query_offset, 2)
    elif mask.bottom_right:
        length_q, length_k = (
            xp.int64(seqlen) if length is None else xp.int64(length)[:, None]
            for seqlen, length in ((seqlen_q, mask.query_lengths), (seqlen_k, mask.key_lengths))
        )
        own = rows + (length_k - length_q)
    return Places(rows, own, keys, seqlen_q, seqlen_k, query_offset)


def _by_entry(xp, x, rank):
    """An integer, or integers `[batch]` with more axes behind it."""
    x = xp.int64(x)
    return x if len(getattr(x, "shape", ())) == 0 else x[(slice(None), *[None] * (rank - 1))]


def _check_fits(part, seqlens):
    """A boolean part of the wrong extent could broadcast a seqlen of 1; find it where shapes are known."""
    for axis, seqlen in seqlens.items():
        extent = part.shape[axis]
        if extent is not None and isinstance(seqlen, int) and extent not in (1, seqlen):
            raise ValueError(
                f"Mask.materialize: a boolean part of shape {tuple(part.shape)} does not broadcast to "
                f"[batch, num_heads, {seqlens[2]}, {seqlens[3]}]"
            )


def _minimum(a, b):
    if a is None or b is None:
        return b if a is None else a
    xp = namespaces.of((a, b))
    return xp.minimum(xp.int64(a), xp.int64(b))

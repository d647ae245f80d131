"""Mask objects: who sees whom, without a dense [seqlen_q, seqlen_k] array where none is needed.

    from attn_ops import masks
    mask = masks.causal() & masks.key_padding(tokens != 0) & masks.window(left=255)

A `Mask` is, like in the kernels (csrc/mask.h), one interval of keys per query row (causal, window, lengths) plus any
number of boolean arrays that are never combined into one (padding, segments, user masks). Arrays may be NumPy,
TensorFlow or JAX; this module needs TensorFlow or JAX only when it is given their arrays.
"""

import dataclasses
import operator
from typing import Any, Optional

import numpy as np

from attn_ops import namespaces
from attn_ops.call import options

ALIGNMENTS = ("top_left", "bottom_right")
LARGEST_OFFSET = 2**30  # of a query_offset: sums of positions stay within 32 bits


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """Who sees whom. Use the constructors of this module and `&`; the fields are what they set.

    Attributes:
      is_causal: a row sees no key after its own position: `window` with right end 0.
      causal_alignment: "top_left": row i stands at key i (Keras, PyTorch). "bottom_right": the last row stands at the
        last key, at i + length_k - length_q (flash-attention, decoding), with the effective lengths of the batch
        entry when lengths are given.
      window: None or (left, right): how many keys before and after its own position a row sees; None or -1 is all.
      query_lengths: None or integers `[batch]`: rows at and past it see nothing.
      key_lengths: None or integers `[batch]`: keys at and past it are not seen.
      dense: tuple of parts with a `tensor()`: boolean masks, true = may see.
    """

    is_causal: bool = False
    causal_alignment: str = options.TOP_LEFT
    window: Optional[tuple] = None
    query_lengths: Any = None
    key_lengths: Any = None
    dense: tuple = ()

    def __post_init__(self):
        if self.causal_alignment not in ALIGNMENTS:
            raise ValueError(f"Mask: causal_alignment must be one of {ALIGNMENTS}, got {self.causal_alignment!r}")
        object.__setattr__(self, "is_causal", bool(self.is_causal))
        object.__setattr__(self, "window", _normalized_window(self.window))
        for name in ("query_lengths", "key_lengths"):
            object.__setattr__(self, name, _normalized_lengths(name, getattr(self, name)))

    def __repr__(self):
        """What the mask is made of, with the shapes of arrays: `Mask: causal & key_padding[2, 6]`."""
        alignment = f"({self.causal_alignment})" if self.bottom_right else ""
        parts = [f"causal{alignment}"] if self.is_causal else []
        if self.window:
            left, right = ("all" if end < 0 else end for end in self.window)
            parts.append(f"window(left={left}, right={right}{', ' + self.causal_alignment if self.bottom_right else ''})")
        for name in ("query_lengths", "key_lengths"):
            if getattr(self, name) is not None:
                parts.append(f"{name}{_extents(getattr(self, name))}")
        return f"<Mask: {' & '.join([*parts, *map(repr, self.dense)]) or 'everything is visible'}>"

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

    def __and__(self, other):
        """A pair is visible if both masks let it be.

        The result describes one attention call with all the parts: lengths given on either side are the effective
        lengths that a bottom-right alignment refers to. Raises ValueError for two windows of different alignment,
        which no single interval can express.
        """
        if not isinstance(other, Mask):
            return NotImplemented
        alignments = [m.causal_alignment for m in (self, other) if m.is_causal or m.window]
        if len(set(alignments)) > 1:
            raise ValueError(
                "Mask &: both sides have a causal or window part, with causal_alignment "
                f"{self.causal_alignment!r} and {other.causal_alignment!r}; make one of them dense: "
                "a & masks.boolean(b.materialize(seqlen_q, seqlen_k))"
            )
        window = None
        if self.window or other.window:
            pairs = zip(self.window or (-1, -1), other.window or (-1, -1))
            window = tuple(min(ends) if min(ends) >= 0 else max(ends) for ends in pairs)
        return Mask(
            is_causal=self.is_causal or other.is_causal,
            causal_alignment=min(alignments, key=lambda a: isinstance(a, options.Unsaid), default=options.TOP_LEFT),
            window=window,
            query_lengths=_minimum(self.query_lengths, other.query_lengths),
            key_lengths=_minimum(self.key_lengths, other.key_lengths),
            dense=self.dense + other.dense,
        )

    def tensors(self):
        """The dense parts: bool arrays broadcastable to `[batch, num_heads, seqlen_q, seqlen_k]`, to be ANDed."""
        return tuple(part.tensor() for part in self.dense)

    def materialize(self, seqlen_q, seqlen_k, batch=None):
        """The mask as one dense array, for tests and pictures: memory grows with seqlen_q * seqlen_k.

        Args:
          seqlen_q, seqlen_k: extents, integers or integer scalars.
          batch: the first extent of the result, or None for 1 where no part depends on the batch entry.
        Returns:
          bool `[batch or 1, num_heads or 1, seqlen_q, seqlen_k]`, true = may see: a TensorFlow tensor or a JAX
          array if an argument or a part is one, else a NumPy array.
        Raises:
          ValueError: a dense part does not broadcast, or a length (in NumPy) is outside [0, seqlen].
        """
        parts = self.tensors()
        xp = namespaces.of(parts + (seqlen_q, seqlen_k, batch, self.query_lengths, self.key_lengths))
        rows, columns = xp.arange(xp.int64(seqlen_q)), xp.arange(xp.int64(seqlen_k))
        rows, columns = rows[None, None, :, None], columns[None, None, None, :]
        lengths = []
        for name, length, seqlen in (
            ("query_lengths", self.query_lengths, seqlen_q),
            ("key_lengths", self.key_lengths, seqlen_k),
        ):
            if length is not None:
                xp.check_lengths(name, length, seqlen)
                length = xp.int64(length)[:, None, None, None]
            lengths.append(length)
        visible = (rows >= 0) & (columns >= 0)
        for term in interval(
            rows, columns, seqlen_q, seqlen_k, *lengths, self.window_left, self.window_right, self.bottom_right
        ):
            visible = visible & term
        for part in parts:
            _check_fits(part, {2: seqlen_q, 3: seqlen_k})
            visible = visible & xp.bool(part)
        return visible if batch is None else xp.repeat_batch(visible, batch)


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
    intervals=None,
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
      intervals: None, or (key_begin, key_end), arrays that broadcast against rows and columns: the keys from
        key_begin to before key_end.
    """
    own = rows
    if query_offset is not None:
        own = rows + query_offset
    elif bottom_right:
        length_q = seqlen_q if query_lengths is None else query_lengths
        own = rows + ((seqlen_k if key_lengths is None else key_lengths) - length_q)
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
    if intervals is not None:
        begin, end = intervals
        terms += [columns >= begin, columns < end]
    return terms


def causal(alignment=options.TOP_LEFT):
    """A row sees no key after its own position. `alignment`: see `Mask.causal_alignment`."""
    return Mask(is_causal=True, causal_alignment=alignment)


def window(left=None, right=None, alignment=options.TOP_LEFT):
    """A row sees `left` keys before and `right` keys after its own position; None or -1 is all.

    Keras's `sliding_window=w` is `window(w - 1, w - 1)`. `alignment`: see `Mask.causal_alignment`.
    """
    return Mask(window=(left, right), causal_alignment=alignment)


def padding(query_lengths=None, key_lengths=None):
    """Integers `[batch]`: rows at and past `query_lengths` see nothing, keys at and past `key_lengths` are unseen."""
    return Mask(query_lengths=query_lengths, key_lengths=key_lengths)


def query_padding(mask):
    """Bool `[batch, seqlen_q]`, true for real rows, as Keras's `Embedding(mask_zero=True)` makes it."""
    return Mask(dense=(_Boolean(_checked("query_padding", mask, 2, "bool")[:, None, :, None], "query_padding"),))


def key_padding(mask):
    """Bool `[batch, seqlen_k]`, true for real keys, as Keras's `Embedding(mask_zero=True)` makes it.

    PyTorch's `key_padding_mask` is true for the hidden ones: pass `~key_padding_mask`.
    """
    return Mask(dense=(_Boolean(_checked("key_padding", mask, 2, "bool")[:, None, None, :], "key_padding"),))


def segments(q_ids, kv_ids):
    """Integers `[batch, seqlen_q]` and `[batch, seqlen_k]`: rows see the keys of equal id (packed documents)."""
    return Mask(dense=(_Segments(_checked("segments", q_ids, 2, "int"), _checked("segments", kv_ids, 2, "int")),))


def boolean(mask):
    """A bool mask, true = may see: `[seqlen_q, seqlen_k]`, `[batch, seqlen_q, seqlen_k]`, or `[batch, num_heads,
    seqlen_q, seqlen_k]`; every extent may be 1.

    Two axes are always `[seqlen_q, seqlen_k]`: a mask `[batch, seqlen_k]` of the keys goes through `key_padding`.
    Raises TypeError for other dtypes: floats are a `bias`, and integers are ambiguous.
    """
    mask = _checked("boolean", mask, (2, 3, 4), "bool")
    rank = len(mask.shape)
    return Mask(dense=(_Boolean(mask[None, None] if rank == 2 else mask[:, None] if rank == 3 else mask),))


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

    `mask` is None, a `Mask`, a boolean array (see `boolean`), or a list or tuple of those; all are ANDed.
    """
    result = Mask(is_causal, causal_alignment, window, query_lengths, key_lengths)
    for part in mask if isinstance(mask, (list, tuple)) else () if mask is None else (mask,):
        result = result & (part if isinstance(part, Mask) else boolean(part))
    return result


def not_boolean(name, what, dtype, numbers=False):
    """The text of the TypeError for a mask of another dtype, here, in the op and in the layers.

    Args:
      name: of the function that refuses it.
      what: the argument.
      dtype: its name.
      numbers: whether the function would take 0 and 1, so that it refuses what looks added to the scores.
    """
    hint = ""
    if "float" in dtype or numbers:
        hint = (
            "; pass values that are added to the scores as bias= of the attention function, or where those are 0 and a "
            f"large negative number what is visible, {what} > -1"
        )
    elif "int" in dtype:
        hint = f"; cast it when its nonzero elements mean visible: {what} != 0"
    elif dtype.startswith("str"):
        hint = "; a causal mask is is_causal=True, or attn_ops.masks.causal()"
    also = ", or hold only 0 and 1 (an additive mask would be inverted)" if numbers else ""
    return f"{name}: {what} must be boolean (True = may be seen){also}, got {dtype}{hint}"


def tells_visible(mask, dtype):
    """Where a numeric mask of this dtype (its name) can mean "may be seen" and "hidden", elementwise.

    For the layers, which take numbers as Keras does: floats are 0 or 1, integers are hidden at 0 and never negative.
    What is added to scores is 0 where visible, and would be inverted.
    """
    return (mask == 0) | (mask == 1) if "float" in dtype else mask >= 0


@dataclasses.dataclass(frozen=True, eq=False)
class _Boolean:
    array: Any
    kind: str = "boolean"  # the constructor's name

    def tensor(self):
        return self.array

    def __repr__(self):
        extents = _extents(self.array)
        given = {"query_padding": (0, 2), "key_padding": (0, 3)}.get(self.kind)
        return self.kind + (extents if given is None else _extents(self.array, given))


@dataclasses.dataclass(frozen=True, eq=False)
class _Segments:
    q_ids: Any
    kv_ids: Any

    def tensor(self):
        q_ids, kv_ids = self.q_ids[:, None, :, None], self.kv_ids[:, None, None, :]
        return namespaces.of((q_ids, kv_ids)).equal(q_ids, kv_ids)

    def __repr__(self):
        return f"segments({_extents(self.q_ids)}, {_extents(self.kv_ids)})"


def _extents(array, axes=None):
    """The shape as text, of these axes only: `[2, ?, 6]`."""
    shape = getattr(array, "shape", None)
    if shape is None or getattr(shape, "rank", 0) is None:  # a list of Python's, or nothing known
        return "[?]"
    shape = [shape[axis] for axis in range(len(shape)) if axes is None or axis in axes]
    return f"[{', '.join('?' if extent is None else str(extent) for extent in shape)}]"


def _normalized_window(window):
    if window is None:
        return None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(
            f"Mask: window must be a pair (left, right) of integers or None, got {window!r}{options.window_hint(window)}"
        )
    ends = []
    for end in window:
        try:
            ends.append(-1 if end is None else operator.index(end))
        except TypeError:
            raise TypeError(f"Mask: window must be a pair (left, right) of integers or None, got {window!r}") from None
    if min(ends) < -1:
        raise ValueError(f"Mask: window ends must be at least 0, or -1 or None for unbounded, got {window!r}")
    return None if ends == [-1, -1] else tuple(ends)


def _checked(name, array, ranks, kind):
    """`array` with the rank and dtype a constructor takes; Python lists become NumPy arrays."""
    if type(array).__name__ in ("RaggedTensor", "SparseTensor"):
        kind = type(array).__name__.removesuffix("Tensor").lower()
        raise TypeError(f"{name}: {kind} tensors are not supported; make it dense, and pass lengths")
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        array = _array(name, array)
    dtype = getattr(array.dtype, "name", str(array.dtype))
    if kind == "bool" and dtype != "bool":
        raise TypeError(not_boolean(name, "mask", dtype))
    if kind == "int" and "int" not in dtype:
        raise TypeError(f"{name}: dtype must be int, got {dtype}")
    rank = array.shape.rank if hasattr(array.shape, "rank") else len(array.shape)
    ranks = ranks if isinstance(ranks, tuple) else (ranks,)
    if rank not in ranks:
        raise ValueError(f"{name}: rank must be {' or '.join(map(str, ranks))}, got shape {array.shape}")
    return array


def _array(name, sequence):
    try:
        return np.asarray(sequence)
    except ValueError as error:  # lists of different lengths
        raise TypeError(f"{name}: an array is needed, or lists that make one: {error}") from None


def _normalized_lengths(name, lengths):
    return None if lengths is None else _checked(f"Mask: {name}", lengths, 1, "int")


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

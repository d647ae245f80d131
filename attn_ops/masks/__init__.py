"""Mask objects: who sees whom, without a dense [seqlen_q, seqlen_k] array where none is needed.

    from attn_ops import masks
    mask = masks.causal() & masks.packed(cu_seqlens) & masks.window(left=255)
    print(mask.show(64))

A `Mask` is, like in the kernels (csrc/mask.h), one interval of keys per query row (causal, window, lengths, prefix, chunked,
packed, any other), and within it ids to compare, blocks that are visible or not, and any number of boolean arrays that
are never combined into one (padding, user masks). Arrays may be NumPy, TensorFlow or JAX; this package needs TensorFlow
or JAX only when it is given their arrays.
"""

import operator

import numpy as np

from attn_ops import namespaces
from attn_ops.call import options
from attn_ops.masks import checks
from attn_ops.masks.checks import not_boolean, tells_visible
from attn_ops.masks.functions import Function
from attn_ops.masks.mask import ALIGNMENTS, Mask, Parts, interval
from attn_ops.masks.structure import Blocks, Boolean, Chunked, Intervals, Packed, Prefix, Segments

__all__ = [
    "ALIGNMENTS", "Mask", "Parts", "block_sparse", "boolean", "causal", "chunked", "combined", "from_function", "interval",
    "intervals", "key_padding", "not_boolean", "packed", "padding", "prefix", "query_padding", "segments", "tells_visible",
    "window",
]  # fmt: skip


@namespaces.as_written
def causal(alignment=options.TOP_LEFT):
    """A row sees no key after its own position. `alignment`: see `Mask.causal_alignment`."""
    return Mask(is_causal=True, causal_alignment=alignment)


@namespaces.as_written
def window(left=None, right=None, alignment=options.TOP_LEFT):
    """A row sees `left` keys before and `right` keys after its own position; None or -1 is all.

    Keras's `sliding_window=w` is `window(w - 1, w - 1)`. `alignment`: see `Mask.causal_alignment`.
    """
    return Mask(window=(left, right), causal_alignment=alignment)


@namespaces.as_written
def padding(query_lengths=None, key_lengths=None):
    """Integers `[batch]`: rows at and past `query_lengths` see nothing, keys at and past `key_lengths` are unseen."""
    return Mask(query_lengths=query_lengths, key_lengths=key_lengths)


@namespaces.as_written
def query_padding(mask):
    """Bool `[batch, seqlen_q]`, true for real rows, as Keras's `Embedding(mask_zero=True)` makes it."""
    return Mask(dense=(Boolean(checks.checked("query_padding", mask, 2, "bool")[:, None, :, None], "query_padding"),))


@namespaces.as_written
def key_padding(mask):
    """Bool `[batch, seqlen_k]`, true for real keys, as Keras's `Embedding(mask_zero=True)` makes it.

    PyTorch's `key_padding_mask` is true for the hidden ones: pass `~key_padding_mask`.
    """
    return Mask(dense=(Boolean(checks.checked("key_padding", mask, 2, "bool")[:, None, None, :], "key_padding"),))


@namespaces.as_written
def intervals(key_begin=None, key_end=None):
    """Row i sees the keys from key_begin[i] to before key_end[i]: any mask whose ends never move back along the rows.

    Args:
      key_begin, key_end: integers `[seqlen_q]` or `[batch or 1, seqlen_q]`, or None for no end on that side. What is
        before the first key or after the last is cut; a row whose interval is empty sees nothing.
    Raises:
      TypeError: not integers.
      ValueError: another rank, or (where the values are known) an end that moves back.
    """
    ends = {"key_begin": key_begin, "key_end": key_end}
    for what, x in ends.items():
        if x is not None:
            x = ends[what] = _with_batch(checks.checked(f"intervals: {what}", x, (1, 2), "int"))
            values = namespaces.known(x)
            if values is not None:
                checks.never_back(f"intervals: {what} must never move back along the rows", values)
    if key_begin is None and key_end is None:
        return Mask()
    return Mask(structured=(Intervals(**ends),))


@namespaces.as_written
def prefix(length, alignment=options.TOP_LEFT):
    """A prefix language model: every row sees the first `length` keys, and of the others those up to its own position.

    Args:
      length: an integer, or integers `[batch]`, which may be traced.
      alignment: see `Mask.causal_alignment`.
    Raises:
      TypeError: not integers. ValueError: negative, where known.
    """
    if not _is_integer(length):
        length = checks.checked("prefix: length", length, (0, 1), "int")
    values = namespaces.known(length)
    if values is not None and values.size and values.min() < 0:
        raise ValueError(f"prefix: length must not be negative, got {values}")
    return Mask(causal_alignment=alignment, structured=(Prefix(length),))


@namespaces.as_written
def chunked(size, alignment=options.TOP_LEFT):
    """A row sees the keys of its own chunk: those with j // size == i // size, i its own position (Llama 4).

    `size`: a Python integer from 1. `alignment`: see `Mask.causal_alignment`.
    """
    return Mask(causal_alignment=alignment, structured=(Chunked(_size("chunked: size", size)),))


@namespaces.as_written
def segments(q_ids, kv_ids=None, *, contiguous=None):
    """Rows see the keys of equal id (packed documents).

    Args:
      q_ids: integers `[batch or 1, seqlen_q]` or `[seqlen_q]`.
      kv_ids: integers `[batch or 1, seqlen_k]` or `[seqlen_k]`; None: the same.
      contiguous: True promises that ids never go back, so that no two need comparing. None finds out what known ids
        are, and compares traced ones no further than from the first key of an id to its last; False compares all.
    Raises:
      TypeError: not integers.
      ValueError: another rank, or (where known) ids that go back where `contiguous` was promised.
    """
    kv_ids = q_ids if kv_ids is None else kv_ids
    q_ids, kv_ids = (_with_batch(checks.checked("segments", ids, (1, 2), "int")) for ids in (q_ids, kv_ids))
    for what, ids in (("q_ids", q_ids), ("kv_ids", kv_ids)) if contiguous else ():
        values = namespaces.known(ids)
        if values is not None:
            checks.never_back(f"segments: with contiguous=True {what} must never go back", values)
    return Mask(structured=(Segments(q_ids, kv_ids, None if contiguous is None else bool(contiguous)),))


@namespaces.as_written
def packed(cu_seqlens_q, cu_seqlens_k=None):
    """Sequences one after the other: rows see the keys of their own one. Rows and keys past the last one see nothing.

    Args:
      cu_seqlens_q: cumulative lengths, integers `[n + 1]` from 0: sequence s has the rows from cu_seqlens_q[s] to before
        cu_seqlens_q[s + 1]. May be traced.
      cu_seqlens_k: the same of the keys; None: the same, and rows are counted from a `query_offset` on.
    Raises:
      TypeError: not integers.
      ValueError: another rank, different numbers of sequences, or (where known) not from 0, or going back.
    """
    given = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    return Mask(structured=(Packed(**checks.cumulative("packed", given)),))


@namespaces.as_written
def block_sparse(blocks, block_q, block_k):
    """Blocks of `block_q` rows and `block_k` keys, each visible as a whole or not at all (BigBird and the like).

    Args:
      blocks: bool, or integers 0 and 1 of uint8: `[blocks of rows, blocks of keys]`, `[batch or 1, ., .]` or
        `[batch or 1, num_heads or 1, ., .]`. There are ceil(seqlen_q / block_q) and ceil(seqlen_k / block_k).
      block_q, block_k: Python integers from 1. What is a multiple of 16 costs the kernels least.
    Raises:
      TypeError: another dtype. ValueError: another rank, sizes below 1, or (where known) other numbers than 0 and 1.
    """
    blocks = checks.checked("block_sparse", blocks, (2, 3, 4), "bits")
    values = namespaces.known(blocks)
    if values is not None and values.dtype != bool and values.size and values.max() > 1:
        raise ValueError(f"block_sparse: blocks must be boolean, or hold 0 and 1, got {values.max()}")
    rank = len(blocks.shape)
    blocks = blocks[None, None] if rank == 2 else blocks[:, None] if rank == 3 else blocks
    sizes = _size("block_sparse: block_q", block_q), _size("block_sparse: block_k", block_k)
    return Mask(structured=(Blocks(blocks, *sizes),))


@namespaces.as_written
def from_function(fn, seqlen_q=None, seqlen_k=None, batch=1, num_heads=1):
    """The mask that a function says, as FlexAttention's `mask_mod`: `fn(b, h, q, k)` is true where row q sees key k.

    It is evaluated on the host, once for each pair of extents, and recognised where it is causal, a window, a prefix,
    chunks, segments, another interval per row, or made of blocks; what it is then runs as such, all else as exact bits.
    `repr` tells.

    Args:
      fn: takes NumPy integer arrays that broadcast against each other and gives booleans, elementwise. Where it fails
        with arrays (`if`, `and`) it is called for each pair, which is slow for long sequences. q is the row's own
        position: counted from a `query_offset` on.
      seqlen_q, seqlen_k: the extents to evaluate it for; None for those of the call, which must be known when it is
        traced.
      batch, num_heads: how many b and h there are, where the mask depends on them.
    Raises:
      TypeError: fn is no function, or gives what is not boolean.
      ValueError: an extent below 0 (1 of batch and num_heads), or what fn raises.
    """
    if not callable(fn):
        raise TypeError(f"from_function: fn must be a function of (b, h, q, k), got {type(fn).__name__}")
    seqlen_q, seqlen_k = (
        x if x is None else _size(f"from_function: {what}", x, least=0)
        for what, x in (("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k))
    )
    batch, num_heads = _size("from_function: batch", batch), _size("from_function: num_heads", num_heads)
    function = Function(fn, seqlen_q, seqlen_k, batch, num_heads)
    if seqlen_q is not None and seqlen_k is not None:
        function.found(seqlen_q, seqlen_k)
    return Mask(structured=(function,))


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

    `mask` is None, a `Mask`, a boolean array (see `boolean`), or a list or tuple of those; all are ANDed.
    """
    result = Mask(is_causal, causal_alignment, window, query_lengths, key_lengths)
    for part in mask if isinstance(mask, (list, tuple)) else () if mask is None else (mask,):
        result = result & (part if isinstance(part, Mask) else boolean(part))
    return result


def _with_batch(x):
    return x[None] if len(x.shape) == 1 else x


def _is_integer(x):
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def _size(what, x, least=1):
    try:
        size = operator.index(x)
    except TypeError:
        raise TypeError(f"{what} must be a Python integer, got {type(x).__name__}") from None
    if isinstance(x, bool) or not least <= size <= 2**30:
        raise ValueError(f"{what} must be an integer from {least} to 2**30, got {x}")
    return size

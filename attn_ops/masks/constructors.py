"""The masks that are said in arrays and numbers, one function each."""

from __future__ import annotations

import numpy as np

from attn_ops import namespaces
from attn_ops.call import options
from attn_ops.masks import checks
from attn_ops.masks.mask import Mask, boolean  # noqa: F401  boolean: one of them, which `combined` needs
from attn_ops.masks.structure import Blocks, Boolean, Chunked, Intervals, Packed, Prefix, Segments


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
    if _is_integer(length):
        length = min(int(length), 2**31 - 1)  # as long as sequences can be
    else:
        length = checks.checked("prefix: length", length, (0, 1), "int")
    length = namespaces.required(length, lambda x: x >= 0, "prefix: length must not be negative")
    return Mask(causal_alignment=alignment, structured=(Prefix(length),))


@namespaces.as_written
def chunked(size, alignment=options.TOP_LEFT):
    """A row sees the keys of its own chunk: those with j // size == i // size, i its own position (Llama 4).

    `size`: a Python integer from 1. `alignment`: see `Mask.causal_alignment`.
    """
    return Mask(causal_alignment=alignment, structured=(Chunked(options.size("chunked: size", size)),))


@namespaces.as_written
def segments(q_ids, kv_ids=None, *, contiguous=None):
    """Rows see the keys of equal id (packed documents).

    Args:
      q_ids: integers `[batch or 1, seqlen_q]` or `[seqlen_q]`.
      kv_ids: integers `[batch or 1, seqlen_k]` or `[seqlen_k]`; None: the same.
      contiguous: True promises that ids never go back, so that no two need comparing. None finds out what known ids
        are, and compares traced ones no further than from the first key of an id to its last; False compares all.
    Raises:
      TypeError: not integers, or contiguous is no bool.
      ValueError: another rank, or (where known) ids that go back where `contiguous` was promised.
      tf.errors.InvalidArgumentError, jax.errors.JaxRuntimeError: traced ones that do, as the graph runs; in XLA where the
        call is fused and has more than one row.
    """
    contiguous = None if contiguous is None else options.flag("segments", "contiguous", contiguous)
    kv_ids = q_ids if kv_ids is None else kv_ids
    q_ids, kv_ids = (_with_batch(checks.checked("segments", ids, (1, 2), "int")) for ids in (q_ids, kv_ids))
    if contiguous:
        q_ids, kv_ids = (
            checks.ascending(f"segments: with contiguous=True {what} must never go back", ids)
            for what, ids in (("q_ids", q_ids), ("kv_ids", kv_ids))
        )
    return Mask(structured=(Segments(q_ids, kv_ids, contiguous),))


@namespaces.as_written
def packed(cu_seqlens_q, cu_seqlens_k=None):
    """Sequences one after the other: rows see the keys of their own one. Rows and keys past the last one see nothing.

    Args:
      cu_seqlens_q: cumulative lengths, integers `[n + 1]` from 0: sequence s has the rows from cu_seqlens_q[s] to before
        cu_seqlens_q[s + 1]. May be traced.
      cu_seqlens_k: the same of the keys; None: the same, and rows are counted from a `query_offset` on.
    Raises:
      TypeError: not integers.
      ValueError: another rank, different numbers of sequences, or (where known) not from 0, or going back; from the
        attention, where they end past the rows or keys.
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
    if blocks.dtype != bool:
        blocks = namespaces.required(blocks, lambda x: x <= 1, "block_sparse: blocks must be boolean, or hold 0 and 1")
    rank = len(blocks.shape)
    blocks = blocks[None, None] if rank == 2 else blocks[:, None] if rank == 3 else blocks
    sizes = options.size("block_sparse: block_q", block_q), options.size("block_sparse: block_k", block_k)
    return Mask(structured=(Blocks(blocks, *sizes),))


def _with_batch(x):
    return x[None] if len(x.shape) == 1 else x


def _is_integer(x):
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)

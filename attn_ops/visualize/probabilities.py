"""The weights of an `AttentionCall`, some query rows at a time, in NumPy: never a whole matrix.

The equations are those of `reference.py`, in float32 (float64 for float64 inputs). All keys of a row are there at once,
so a row needs nothing of the others.
"""

from __future__ import annotations

import math

import numpy as np

from attn_ops.call.attention_call import canonical
from attn_ops.masks import key_range

CHUNK = 2**21  # scores that are computed at a time, and at least a row of each head


class Probabilities:
    """What an attention call weighs its values with, of any framework whose arrays NumPy reads.

    Attributes:
        shape: (batch, num_heads, seqlen_q, seqlen_k).
        mask_heads: num_heads where masks differ between heads, else 1.
    """

    def __init__(self, call):
        self._call = call
        wide = str(np.asarray(call.query[:0]).dtype) == "float64"
        self._dtype = np.float64 if wide else np.float32
        self._query, self._key = (self._heads_first(x) for x in (call.query, call.key))
        batch, heads, rows, self._head_dim = self._query.shape
        self._kv_heads, keys = self._key.shape[1:3]
        self.shape = batch, heads, rows, keys
        self._bias = None if call.bias is None else np.asarray(call.bias).astype(self._dtype)
        self._masks = [np.asarray(mask) for mask in call.masks]
        self._lengths = [
            None if x is None else np.asarray(x).astype(np.int64) for x in (call.query_lengths, call.key_lengths)
        ]
        self._offset = None if call.query_offset is None else np.asarray(call.query_offset).astype(np.int64)
        self._arrays = {
            name: None if getattr(call, name) is None else np.asarray(getattr(call, name)).astype(self._dtype)
            for name in ("alibi_slopes", "relative_bias", "sinks")
        }
        self._pairs = {
            name: None if getattr(call, name) is None else tuple(map(np.asarray, getattr(call, name)))
            for name in ("intervals", "segments")
        }
        self._blocks = None if call.blocks is None else np.asarray(call.blocks)
        table = self._arrays["relative_bias"]
        by_head = [*self._masks, *(x for x in (self._blocks,) if x is not None)]
        by_head += [
            x for x in (self._bias, None if table is None else table[None]) if x is not None and (x == -np.inf).any()
        ]
        self.mask_heads = heads if any(x.shape[1] > 1 for x in by_head) else 1

    def chunks(self, entry: int, multiple: int = 1):
        """Yields (heads, rows, weights, visible, own) until all of one entry of the batch has been there.

        heads and rows are slices; weights are `[heads, rows, seqlen_k]`, 0 where hidden; visible is bool of that shape,
        or with one head where `mask_heads` is 1; own is the key that each row stands at, int64 `[rows]`. There are
        ``multiple`` rows or a multiple of that, but for the last ones.
        """
        for heads, rows in _pieces(self.shape, multiple):
            yield heads, rows, *self._piece(entry, heads, np.arange(rows.start, rows.stop))

    def visibility(self, entry: int):
        """Which rows of one entry see any key, and which keys are seen by any row, in any head: bool, `[seqlen_q]` and
        `[seqlen_k]`."""
        _, _, seqlen_q, seqlen_k = self.shape
        sees, seen = np.zeros(seqlen_q, bool), np.zeros(seqlen_k, bool)
        for heads, rows in _pieces((1, self.mask_heads, seqlen_q, seqlen_k), 1):
            visible, _ = self._visible(entry, heads, np.arange(rows.start, rows.stop))
            sees[rows] |= visible.any((0, 2))
            seen |= visible.any((0, 1))
        return sees, seen

    def _piece(self, entry, heads, rows):
        call, seqlen_k = self._call, self.shape[3]
        group = self.shape[1] // self._kv_heads
        visible, own = self._visible(entry, heads, rows)
        with np.errstate(invalid="ignore", over="ignore"):
            scale = 1.0 / math.sqrt(self._head_dim) if call.scale is None else call.scale
            query = self._query[entry, heads][:, rows] * self._dtype(scale)
            s = np.stack([q @ self._key[entry, h // group].T for h, q in enumerate(query, heads.start)])
            if call.logits_soft_cap is not None:
                s = call.logits_soft_cap * np.tanh(s / call.logits_soft_cap)
            distances = np.arange(seqlen_k) - own[:, None]
            slopes, table, sinks = self._arrays.values()
            if slopes is not None:
                s = s + self._of_entry(slopes, entry)[heads, None, None] * distances.astype(self._dtype)
            if table is not None:
                reach = table.shape[1] // 2
                s = s + table[heads][:, np.clip(distances, -reach, reach) + reach]
            if self._bias is not None:
                s = s + self._part(self._bias, entry, heads, rows)
            s = np.where(visible, s, -np.inf)
            m = s.max(-1, keepdims=True, initial=-np.inf)
            sink = -np.inf if sinks is None else sinks[heads, None, None]
            m = np.maximum(m, sink)
            m = np.where(m == -np.inf, 0.0, m)
            e = np.exp(s - m)
            total = e.sum(-1, keepdims=True) + np.exp(sink - m)
            weights = np.where(s == -np.inf, 0.0, e / np.where(total == 0, 1.0, total))
        return weights.astype(self._dtype, copy=False), visible, own

    def _visible(self, entry, heads, rows):
        """Who sees whom, bool `[num_heads or 1, rows, seqlen_k]`, and the keys that rows stand at."""
        columns = np.arange(self.shape[3])
        visible, own = self._seen(entry, heads, rows, columns)
        table = self._arrays["relative_bias"]
        if table is not None and (table == -np.inf).any():
            reach = table.shape[1] // 2
            visible = visible & (table[heads][:, np.clip(columns - own[:, None], -reach, reach) + reach] != -np.inf)
        if self._bias is not None:
            visible = visible & (self._part(self._bias, entry, heads, rows) != -np.inf)
        visible = visible if self.mask_heads > 1 else visible[:1]
        of_heads = 1 if self.mask_heads == 1 else heads.stop - heads.start
        return np.broadcast_to(visible, (of_heads, len(rows), len(columns))), own

    def _seen(self, entry, heads, rows, columns):
        """The same by all that is no bias; axes of heads and of keys may be 1."""
        call, (_, _, seqlen_q, seqlen_k) = self._call, self.shape
        query_length, key_length = (None if x is None else int(self._of_entry(x, entry)) for x in self._lengths)
        offset = None if self._offset is None else int(self._of_entry(self._offset, entry))
        place = seqlen_q, seqlen_k, query_length, key_length
        own = key_range.positions(rows, *place, call.bottom_right, offset)
        terms = key_range.interval(
            rows[:, None], columns, *place, call.window_left, call.window_right, call.bottom_right, offset
        )
        intervals, segments = self._pairs.values()
        if intervals is not None:
            begin, end = (self._of_entry(x, entry)[rows, None] for x in intervals)
            terms += [columns >= begin, columns < end]
        if segments is not None:
            of_rows, of_keys = (self._of_entry(x, entry) for x in segments)
            terms.append(of_rows[rows, None] == of_keys)
        visible = np.ones((1, len(rows), 1), bool)
        for term in terms:
            visible = visible & term
        if self._blocks is not None:
            of_blocks = self._part(self._blocks, entry, heads, rows // call.block_q)
            visible = visible & of_blocks[:, :, columns // call.block_k]
        for mask in self._masks:
            visible = visible & self._part(mask, entry, heads, rows)
        return visible, own

    def _heads_first(self, x):
        x = np.asarray(x)
        return np.transpose(x, canonical(range(4), self._call.layout)).astype(self._dtype)

    @staticmethod
    def _of_entry(x, entry):
        return x[entry if x.shape[0] > 1 else 0]

    @classmethod
    def _part(cls, x, entry, heads, rows):
        """Some heads and rows of `[batch or 1, num_heads or 1, seqlen_q or 1, …]`."""
        x = cls._of_entry(x, entry)
        x = x if x.shape[0] == 1 else x[heads]
        return x if x.shape[1] == 1 else x[:, rows]


class Given:
    """The same of weights that are there: of classes of which nothing but their softmax is known, or of the caller.

    Args:
        weights: `[batch, num_heads, seqlen_q, seqlen_k]`.
        visible: bool that broadcasts to that, or None for all.
    """

    def __init__(self, weights, visible=None):
        self._weights = weights
        self.shape = weights.shape
        visible = np.ones((1, 1, 1, 1), bool) if visible is None else visible
        self.mask_heads = visible.shape[1]
        self._visible = np.broadcast_to(visible, (self.shape[0], self.mask_heads, *self.shape[2:]))

    def visibility(self, entry: int):
        """As :meth:`Probabilities.visibility`."""
        return self._visible[entry].any((0, 2)), self._visible[entry].any((0, 1))

    def chunks(self, entry: int, multiple: int = 1):
        """As :meth:`Probabilities.chunks`."""
        for heads, rows in _pieces(self.shape, multiple):
            visible = self._visible[entry, heads if self.mask_heads > 1 else slice(None), rows]
            weights = np.where(visible, self._weights[entry, heads, rows], 0)
            yield heads, rows, weights, visible, np.arange(rows.start, rows.stop)


def _pieces(shape, multiple):
    """Slices of heads and rows, of about `CHUNK` scores: all heads of some rows, or fewer where rows are long."""
    _, num_heads, seqlen_q, seqlen_k = shape
    heads = min(num_heads, max(1, CHUNK // max(1, multiple * seqlen_k)))
    rows = max(1, CHUNK // max(1, heads * seqlen_k * multiple)) * multiple
    for row in range(0, seqlen_q, rows):
        for head in range(0, num_heads, heads):
            yield slice(head, min(head + heads, num_heads)), slice(row, min(row + rows, seqlen_q))

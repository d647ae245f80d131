"""Calls with keys in pages and what they must give: pages gathered by hand, a sequence at a time, by the specification."""

import numpy as np

from attn_ops import T5RelativeBias, masks, reference

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6
NOWHERE = 10**6  # an entry that no length reaches


class Pages:
    """Random pages and sequences of these lengths in them, whose first pages two sequences share. What is nobody's is NaN."""

    def __init__(self, rng, page_size, lengths, rows, spare_entries=1):
        self.page_size, self.lengths, self.rows = page_size, np.array(lengths, np.int32), rows
        counts = -(-self.lengths // page_size)
        total = int(counts.sum()) + 3
        self.table = np.full((len(lengths), int(counts.max(initial=0)) + spare_entries), NOWHERE, np.int32)
        free = list(rng.permutation(total))
        shared = None
        for b, count in enumerate(counts):
            mine = [free.pop() for _ in range(count)]
            if count > 1 and shared is None:
                shared = mine[0]
            elif count > 1:
                mine[0] = shared
            self.table[b, :count] = mine
        self.keys, self.values = (np.full((total, page_size, KV_HEADS, dim), np.nan) for dim in (DIM, VALUE_DIM))
        for b, n in enumerate(self.lengths):
            for j in range(n):
                at = self.table[b, j // page_size], j % page_size
                self.keys[at], self.values[at] = rng.standard_normal((KV_HEADS, DIM)), rng.standard_normal((KV_HEADS, VALUE_DIM))
        self.query = rng.standard_normal((len(lengths), rows, HEADS, DIM))

    @property
    def room(self):
        return self.table.shape[1] * self.page_size

    def sequence(self, x, b):
        """The keys or values of a sequence, [1, length, heads, dim]."""
        rows = [x[self.table[b, j // self.page_size], j % self.page_size] for j in range(self.lengths[b])]
        return np.reshape(rows, (1, len(rows), *x.shape[2:]))

    def right(self, of_sequence=lambda b, rows, keys: {}, counts=None, is_causal=True):
        """(out, lse), by the specification. ``of_sequence`` gives the options for so many rows and keys of a sequence."""
        out = np.zeros((*self.query.shape[:3], VALUE_DIM))
        lse = np.full((len(self.lengths), HEADS, self.rows), -np.inf)
        for b, n in enumerate(self.lengths):
            given = self.rows if counts is None else counts[b]
            rows = min(given, n) if is_causal else given
            if rows == 0 or n == 0:
                continue
            out[b, :rows], lse[b, :, :rows] = (
                x[0]
                for x in reference.attention(
                    self.query[b : b + 1, :rows],
                    self.sequence(self.keys, b),
                    self.sequence(self.values, b),
                    is_causal=is_causal,
                    query_offset=max(n - rows, 0),
                    **of_sequence(b, rows, n),
                )
            )
        return out, lse


def cases(pages, rng):
    """Options of a call, and what they are for so many rows and keys of a sequence, by name."""
    batch, rows, room = len(pages.lengths), pages.rows, pages.room
    bias = rng.standard_normal((1, HEADS, 1, room))
    full_bias = rng.standard_normal((batch, HEADS, rows, room))
    mask = rng.random((batch, 1, 1, room)) < 0.8
    table = rng.standard_normal((7, HEADS))
    ids = rng.integers(0, 2, (batch, rows)), rng.integers(0, 2, (batch, room))
    blocks = rng.random((1, 1, -(-rows // 3), -(-room // 5))) < 0.7
    prefix = pages.lengths // 2

    def same(**options):
        return options, lambda b, r, n: options

    return {
        "plain": same(),
        "scale and cap": same(scale=0.5, logits_soft_cap=2.0),
        "window": same(window=(19, 0)),
        "slopes": same(alibi_slopes=np.linspace(0.1, 0.8, HEADS)),
        "relative bias": same(relative_bias=table),
        "buckets": same(relative_bias=T5RelativeBias(table[:4], False, 9)),
        "sinks": same(sinks=np.linspace(-1.0, 1.0, HEADS)),
        "chunks": same(mask=masks.chunked(24)),
        "bias": ({"bias": bias}, lambda b, r, n: {"bias": bias[..., :n]}),
        "bias of each score": ({"bias": full_bias}, lambda b, r, n: {"bias": full_bias[b : b + 1, :, :r, :n]}),
        "mask": ({"mask": mask}, lambda b, r, n: {"mask": mask[b : b + 1, ..., :n]}),
        "segments": (
            {"mask": masks.segments(*ids)},
            lambda b, r, n: {"mask": masks.segments(ids[0][b : b + 1, :r], ids[1][b : b + 1, :n])},
        ),
        "blocks": (
            {"mask": masks.block_sparse(blocks, 3, 5)},
            lambda b, r, n: {"mask": masks.block_sparse(blocks[:, :, : -(-r // 3), : -(-n // 5)], 3, 5)},
        ),
        "prefix, not causal": (
            {"mask": masks.prefix(prefix), "is_causal": False},
            lambda b, r, n: {"mask": masks.prefix(prefix[b : b + 1])},
        ),
    }

"""PagedKVCache: memory for the keys and values of many sequences that come, share what they begin with, and go."""

from __future__ import annotations

import copy
import importlib

import numpy as np

from attn_ops.call import options
from attn_ops.call.attention_call import PAGE_ROWS, canonical
from attn_ops.generation import growth, paging
from attn_ops.generation.cache import append_module, chosen_framework, extent

_NAME = "PagedKVCache"


class OutOfPages(ValueError):
    """There are fewer free pages than new rows need. Nothing has changed: free a sequence and try again."""


class PagedKVCache:
    """The keys and values of many sequences in pages that they take as they grow, for servers::

        cache = attn_ops.PagedKVCache.create(num_pages, 64, num_kv_heads, head_dim, "bfloat16")
        sequence = cache.allocate()
        cache.append(sequence, k, v)              # [rows, num_kv_heads, head_dim]
        branch = cache.fork(sequence)             # shares the pages
        table, lengths = cache.reserve([sequence, branch], 1)
        out, *pages = attn_ops.paged_attention(q, *cache.pages[0], table, lengths, k_new, v_new, in_place=True)
        cache.pages[0] = pages
        cache.free(sequence)

    Which pages belong to whom is kept here, in Python, outside of compiled functions; these get the pages, a table and
    lengths, as `attn_ops.paged_attention` takes them. A model has pages in each of its layers and one table for them all
    (``num_layers``). To append a row costs a row: pages are written in their memory, in JAX as far as they are donated.
    `fork` copies nothing. Only a page that another sequence has too is copied, when it is written: the last one, where it
    is partly filled.

    Nothing here may be called by two threads at once.

    Attributes:
        pages: a list with the (keys, values) of each layer: [num_pages, page_size, num_kv_heads, dim] (``layout`` "BSHD"),
            or with heads before rows ("BHSD"); in int8 each of the two is a pair (pages, scales). What a compiled function
            returns in their place is to be put back here.
        num_pages, page_size, layout: as created.
        num_free_pages: how many pages no sequence has.
        sequences: the sequences that there are, a tuple of integers.
    """

    OutOfPages = OutOfPages

    def __init__(self, layer_pages, layout, framework):
        """See `create`."""
        self.pages, self.layout = list(layer_pages), layout
        self._use(framework)
        self.num_pages, _, self.page_size, _ = canonical(self._xp.extents(self._memory(0)[0]), layout)
        self._sharers = np.zeros(self.num_pages, np.int32)  # of each page
        self._free = list(range(self.num_pages))[::-1]
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next = 0

    def _use(self, framework):
        self._framework = framework
        self._xp = importlib.import_module(f"attn_ops.{framework}.xp")
        self._append = append_module(framework).append_to_pages

    def __getstate__(self):
        """For `copy` and `pickle`: books of its own. Modules cannot be in them."""
        books = {name: x for name, x in vars(self).items() if name not in ("_xp", "_append", "pages")}
        return copy.deepcopy(books) | {"pages": list(self.pages)}

    def __setstate__(self, state):
        """Pages in memory of their own: what is written in place would be in both, and `copy` shares tensors. One layer
        after the other, so that no more than one is there once too often."""
        vars(self).update(state)
        self._use(self._framework)
        own = append_module(self._framework).owned
        for layer in range(len(self.pages)):
            self.pages[layer] = paging.pages_of(own(self._memory(layer)))

    @classmethod
    def create(
        cls,
        num_pages,
        page_size,
        num_kv_heads,
        head_dim,
        dtype="float32",
        *,
        num_layers=1,
        value_dim=None,
        layout="BSHD",
        framework=None,
    ):
        """A cache without sequences.

        Args:
            num_pages: how many pages there are, in each layer.
            page_size: how many positions a page holds, a multiple of 16. Of a sequence the last page is half empty on
                average; 64 is read as fast as keys that lie together.
            num_kv_heads, head_dim: of the keys and values.
            dtype: float16, bfloat16, float32, float64 or int8, in which rows are rounded as in `attn_ops.KVCache`.
            num_layers: how many layers have pages.
            value_dim: None: head_dim.
            layout: "BSHD" or "BHSD", of the pages, new rows and queries.
            framework: "tensorflow" or "jax"; None: as in `attn_ops.KVCache.create`.

        Raises:
            TypeError: extents that are no integers.
            ValueError: extents below 1, pages whose size is no multiple of 16, or another dtype or layout.
        """
        name = f"{_NAME}.create"
        if layout not in ("BSHD", "BHSD"):
            raise ValueError(f"{name}: layout must be 'BSHD' or 'BHSD', got {layout!r}")
        given = {"num_pages": num_pages, "page_size": page_size, "num_kv_heads": num_kv_heads, "head_dim": head_dim,
                 "value_dim": head_dim if value_dim is None else value_dim, "num_layers": num_layers}  # fmt: skip
        count, size, heads, dim, value_dim, layers = (extent(name, what, x) for what, x in given.items())
        if size % PAGE_ROWS:
            raise ValueError(f"{name}: page_size must be a multiple of {PAGE_ROWS}, got {size}")
        framework = chosen_framework(name, framework, dtype)
        key, value = (
            (count, size, heads, d) if layout == "BSHD" else (count, heads, size, d) for d in (dim, value_dim)
        )
        made = [append_module(framework).zeros(name, key, value, dtype) for _ in range(layers)]
        return cls([paging.pages_of(memory) for memory in made], layout, framework)

    @property
    def num_free_pages(self):
        return len(self._free)

    @property
    def sequences(self):
        return tuple(self._tables)

    def __repr__(self):
        return (
            f"PagedKVCache({len(self._tables)} sequences, {self.num_free_pages} of {self.num_pages} pages of "
            f"{self.page_size} free)"
        )

    def allocate(self):
        """A new sequence without positions: an integer that no other one has had."""
        self._refuse_tracing("allocate")
        self._next += 1
        self._tables[self._next], self._lengths[self._next] = [], 0
        return self._next

    def fork(self, sequence):
        """A new sequence with the positions of this one, in the same pages."""
        self._check("fork", sequence)
        new = self.allocate()
        self._tables[new], self._lengths[new] = list(self._tables[sequence]), self._lengths[sequence]
        self._sharers[self._tables[new]] += 1
        return new

    def free(self, sequence):
        """Ends a sequence. Pages that it alone has are free again."""
        self._check("free", sequence)
        self._release(self._tables.pop(sequence))
        del self._lengths[sequence]

    def truncate(self, sequence, length):
        """Takes back the positions of a sequence from ``length`` on: what was tried and not taken (speculative decoding)."""
        self._check("truncate", sequence)
        if not options.is_integer(length) or not 0 <= length <= self._lengths[sequence]:
            raise ValueError(
                f"{_NAME}.truncate: length must be an integer from 0 to {self._lengths[sequence]}, how many positions "
                f"sequence {sequence} has, got {length!r}"
            )
        table = self._tables[sequence]
        kept = self._pages_for(length)
        self._release(table[kept:])
        del table[kept:]
        self._lengths[sequence] = int(length)

    def reserve(self, sequences, rows):
        """Makes room for new rows behind the positions of sequences, for `paged_attention` to write them there.

        Args:
            sequences: one, or several of which each occurs once.
            rows: how many new rows, an integer or one for each sequence.

        Returns:
            (block_table, lengths), as those of the sequences are then.

        Raises:
            TypeError, ValueError: no such sequences, or another number of rows.
            PagedKVCache.OutOfPages: there are not enough free pages. Nothing has changed.
        """
        sequences = self._known("reserve", sequences)
        self._grow("reserve", sequences, self._counts("reserve", sequences, rows))
        return self.block_table(sequences), self.lengths(sequences)

    def append(self, sequences, k, v, lengths=None):
        """Writes new rows behind the positions of sequences.

        Args:
            sequences: one, or several of which each occurs once.
            k, v: floating [batch, rows, num_kv_heads, dim] (in ``layout``), cast to the dtype of the pages; of one sequence
                also without the batch. Of several layers a list with those of each.
            lengths: None, or how many of the rows each sequence has, where they are padded at their ends.

        Raises:
            TypeError, ValueError: no such sequences, or rows of other shapes. Nothing has changed.
            PagedKVCache.OutOfPages: there are not enough free pages. Nothing has changed.
        """
        name = f"{_NAME}.append"
        one = options.is_integer(sequences)
        sequences = self._known("append", sequences)
        layers = [(k, v)] if len(self.pages) == 1 and not isinstance(k, (list, tuple)) else list(zip(k, v))
        if len(layers) != len(self.pages) or (isinstance(k, (list, tuple)) and len(k) != len(v)):
            raise ValueError(f"{name}: k and v must be lists with the rows of {len(self.pages)} layers, got {len(layers)}")
        layers = [self._checked_rows(name, len(sequences), one, *rows) for rows in layers]
        rows = {canonical(self._xp.extents(x), self.layout)[2] for pair in layers for x in pair}
        if len(rows) > 1:
            raise ValueError(f"{name}: there must be as many rows of keys as of values, in each layer, got {sorted(rows)}")
        [most] = rows
        counts = self._counts("append", sequences, most if lengths is None else lengths)
        if max(counts, default=0) > most:
            raise ValueError(f"{name}: lengths must be from 0 to {most}, the number of new rows, got {counts}")
        before = np.array([self._lengths[s] for s in sequences], np.int32)
        self._grow("append", sequences, counts)
        self._write(layers, self._table(sequences), before, np.array(counts, np.int32))

    def block_table(self, sequences, pages=None):
        """The table of these sequences, or of one, for `paged_attention`, int32 [batch, pages], 0 where they have no page.

        ``pages`` is None for a power of two, so that a function is not traced anew for every page; or how many there are to
        be at least.
        """
        sequences = self._known("block_table", sequences)
        needed = max((len(self._tables[s]) for s in sequences), default=0)
        if pages is not None and (not options.is_integer(pages) or pages < needed):
            raise ValueError(f"{_NAME}.block_table: pages must be at least {needed}, which a sequence has, got {pages!r}")
        return self._xp.as_tensor(_NAME, "block_table", self._table(sequences, pages))

    def lengths(self, sequences):
        """How many positions these sequences, or this one, have, int32 [batch]."""
        sequences = self._known("lengths", sequences)
        lengths = np.array([self._lengths[s] for s in sequences], np.int32)
        return self._xp.as_tensor(_NAME, "lengths", lengths)

    def _pages_for(self, length):
        return -(-int(length) // self.page_size)

    def _known(self, method, sequences):
        """One sequence or several as a list of those that there are."""
        if options.is_integer(sequences):
            sequences = [sequences]
        try:
            sequences = list(sequences)
        except TypeError:  # arrays without axes among them, which are iterable by name alone
            kind = type(sequences).__name__
            raise TypeError(f"{_NAME}.{method}: sequences must be one or several, got {kind}") from None
        self._check(method, *sequences)
        return sequences

    def _check(self, method, *sequences):
        self._refuse_tracing(method)
        for sequence in sequences:
            if not options.is_integer(sequence):
                raise TypeError(
                    f"{_NAME}.{method}: sequences are integers that allocate() gave, got {type(sequence).__name__}"
                )
            if sequence not in self._tables:
                was = "was freed" if 0 < sequence <= self._next else "is unknown"
                raise ValueError(f"{_NAME}.{method}: sequence {sequence} {was}")

    def _refuse_tracing(self, method):
        """ValueError in a function that is being compiled: this would run once, and what it tells stay what it is now."""
        if self._xp.is_tracing():
            raise ValueError(
                f"{_NAME}.{method}: a cache keeps its pages in Python: call it outside of compiled functions, and give them "
                "its pages, block_table and lengths"
            )

    def _counts(self, method, sequences, rows):
        """How many new rows each of the sequences gets, checked."""
        if len(set(sequences)) < len(sequences):
            raise ValueError(f"{_NAME}.{method}: each sequence may occur once, got {list(sequences)}")
        counts = np.asarray(rows)
        if counts.dtype.kind not in "iu":
            raise TypeError(f"{_NAME}.{method}: the numbers of new rows must be integers, got {counts.dtype.name}")
        if counts.shape not in ((), (len(sequences),)) or (counts.size and counts.min() < 0):
            raise ValueError(
                f"{_NAME}.{method}: the numbers of new rows must be one from 0 on, or one for each of {len(sequences)} "
                f"sequences, got {counts.tolist()}"
            )
        return np.broadcast_to(counts, (len(sequences),)).tolist()

    def _grow(self, method, sequences, counts):
        """Gives the sequences pages for so many more positions, and longer lengths."""
        self._refuse_deleted(method)
        owners, copies, fresh = {}, [], 0
        for sequence, count in zip(sequences, counts):
            length, table = self._lengths[sequence], self._tables[sequence]
            fresh += max(self._pages_for(length + count) - len(table), 0)
            at = length // self.page_size  # where the first new row goes
            if count and at < len(table):
                # Of those that share a page and write it now, the last one keeps it.
                left = owners.setdefault(table[at], int(self._sharers[table[at]]))
                if left > 1:
                    owners[table[at]] = left - 1
                    copies.append((sequence, at))
        if fresh + len(copies) > len(self._free):
            raise OutOfPages(
                f"{_NAME}.{method}: {fresh + len(copies)} more pages are needed, and {len(self._free)} of {self.num_pages} "
                "are free; free() sequences"
            )
        old = [self._tables[sequence][at] for sequence, at in copies]
        new = [self._take() for _ in copies]
        if old:
            self._copy(old, new)
        for (sequence, at), page in zip(copies, new):
            self._release([self._tables[sequence][at]])
            self._tables[sequence][at] = page
        for sequence, count in zip(sequences, counts):
            self._lengths[sequence] += count
            table = self._tables[sequence]
            table += [self._take() for _ in range(self._pages_for(self._lengths[sequence]) - len(table))]

    def _refuse_deleted(self, method):
        """ValueError where rows can be written nowhere, before anything has changed."""
        gone = [layer for layer in range(len(self.pages)) if any(map(self._xp.is_deleted, self._memory(layer)))]
        if gone:
            raise ValueError(
                f"{_NAME}.{method}: the pages of layer {gone[0]} were donated: put back what the function returned for them, "
                f"cache.pages[{gone[0]}] = …"
            )

    def _take(self):
        page = self._free.pop()
        self._sharers[page] = 1
        return page

    def _release(self, table):
        for page in table:
            self._sharers[page] -= 1
            if self._sharers[page] == 0:
                self._free.append(page)

    def _table(self, sequences, width=None):
        tables = [self._tables[sequence] for sequence in sequences]
        if width is None:
            width = 1 << (max(map(len, tables), default=0) - 1).bit_length() if any(tables) else 1
        table = np.zeros((len(tables), width), np.int32)
        for row, entries in zip(table, tables):
            row[: len(entries)] = entries
        return table

    def _copy(self, old, new):
        """The rows of the pages ``old`` in the pages ``new``."""
        old = self._xp.as_tensor(_NAME, "pages", np.array(old, np.int32))
        layers = range(len(self.pages))
        rows = [tuple(self._xp.take_entries(x, old) for x in self._memory(layer)) for layer in layers]
        self._write(rows, np.array(new, np.int32)[:, None], np.zeros(len(new), np.int32), None)

    def _write(self, layers, table, positions, counts):
        table, positions, counts = (
            x if x is None else self._xp.as_tensor(_NAME, "rows", x) for x in (table, positions, counts)
        )
        for layer, rows in enumerate(layers):
            memory = self._append(self._memory(layer), rows, table, positions, counts, self.layout, in_place=True)
            self.pages[layer] = paging.pages_of(memory)

    def _memory(self, layer):
        return paging.memory_of(_NAME, *self.pages[layer])

    def _checked_rows(self, name, batch, one, k, v):
        """Keys and values of new rows in the dtype of the pages, of rank 4."""
        xp, memory, found = self._xp, self._memory(0), []
        for what, x, of in zip(("k", "v"), (k, v), memory):
            x = xp.as_tensor(name, what, x)
            if one and len(xp.extents(x)) == 3:
                x = xp.expand_dims(x, 0)
            found.append(growth.new_rows(xp, name, what, x, of, self.layout, batch, None))
        return growth.as_kept(xp, memory[0].dtype, found)

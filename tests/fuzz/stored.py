"""Ways that keep keys and values as caches do: in pages, in int8, in 16 bits, in memory that grows and rolls. Forward only.

What such a memory cannot hold is rounded in the case before, so that the truth is of what it does hold.
"""

import dataclasses
import functools

import ml_dtypes
import numpy as np
from attn_ops import kernels

import int8_rows
from fuzz import frameworks, reductions, ways

PAGE_SIZES = (16, 32, 48, 64, 256)
# What calls with a cache take.
OF_DECODING = ("scale", "window", "logits_soft_cap", "alibi_slopes", "relative_bias", "sinks", "bias", "mask", "layout")


def drawn(case, of):
    """Random numbers of the case that belong to this."""
    return np.random.default_rng([case.seed, case.number, of])


def in_pages(rng, arrays, size, spare=2):
    """(pages, table) of arrays `[batch, seqlen, ...]`: each in pages of `size` rows in any order, what is nobody's NaN (or, of
    integers, what there is in their place)."""
    batch, rows = arrays[0].shape[:2]
    count = -(-rows // size)
    total = batch * count + spare
    table = rng.permutation(total)[: batch * count].reshape(batch, count).astype(np.int32)
    return [_filled(x, table, total, size, count) for x in arrays], table


def _filled(x, table, total, size, count):
    nobody = np.array(99 if x.dtype.kind == "i" else np.nan).astype(x.dtype)
    pages = np.full((total, size, *x.shape[2:]), nobody)
    whole = np.full((len(x), count * size, *x.shape[2:]), nobody)
    whole[:, : x.shape[1]] = x
    pages[table.ravel()] = whole.reshape(len(x) * count, size, *x.shape[2:])
    return pages


def padded(x, axis, length, value=0):
    """`x` with an axis of `length`; what broadcasts along it stays."""
    if x is None or x.shape[axis] == 1:
        return x
    widths = [(0, length - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return np.pad(x, widths, constant_values=value)


# Rows of int8


def meant(x):
    """What int8 makes of rows, in float64."""
    return int8_rows.meant(*int8_rows.quantized(x))


def integers(x):
    """(x8, scales) of what `meant` gave: the largest of a row stands for 127, and 127 scales fit float64. Rows with what is
    no number have a scale of NaN."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scale = np.abs(x).max(-1, initial=0) / 127
        scale = np.where(scale <= np.finfo(np.float32).max, scale, np.nan)
        x8 = np.rint(x / np.where(scale == 0, 1, scale)[..., None])
    return np.where(np.isfinite(x8), x8, 0).astype(np.int8), scale.astype(np.float32)


def before_rounding(x):
    """Rows in float32 that become those that `meant` gave, to the last bit of the scale."""
    x8, scale = integers(x)
    part = np.float32(1) / np.float32(127)
    largest = np.float32(127) * scale
    for step in range(-3, 4):
        with np.errstate(invalid="ignore"):
            other = (np.float32(127) * scale).view(np.int32) + step
            other = other.view(np.float32)
            largest = np.where(other * part == scale, other, largest)
    rows = x8.astype(np.float32) * scale[..., None]
    return np.where(np.abs(x8) == 127, np.sign(x8) * largest[..., None], rows)


def _rounded_to_int8(case):
    if case.dtype == "float64" or case.value.shape[-1] == 0:
        return None
    return dataclasses.replace(case, key=meant(case.key), value=meant(case.value), _seen=None)


def _rounded_to_16_bits(case, dtype):
    if case.dtype != "float32":
        return None
    with np.errstate(over="ignore"):
        key, value = (x.astype(dtype).astype(np.float32) for x in (case.key, case.value))
    if not (np.isfinite(key).all() and np.isfinite(value).all()):
        return None
    return dataclasses.replace(case, key=key, value=value, _seen=None)


def _dtype_of_16_bits(case):
    return np.dtype([np.float16, ml_dtypes.bfloat16][drawn(case, 40).integers(2)])


KINDS = ("float", "int8", "16 bits")


def rounded(case, kind):
    """The case with keys and values that a memory of this kind holds, or None."""
    if kind == "int8":
        return _rounded_to_int8(case)
    return _rounded_to_16_bits(case, _dtype_of_16_bits(case)) if kind == "16 bits" else case


class Stored(ways.Kernels):
    """Kernels on keys and values as they lie in caches: of a kind, in pages or not."""

    differentiates = False
    kinds = KINDS

    def _memory(self, case):
        kind, paged = drawn(case, 41).choice(self.kinds), drawn(case, 42).random() < 0.6
        return str(kind), bool(paged or kind == "float")

    def suited(self, case):
        case = super().suited(case)
        case = case and rounded(case, self._memory(case)[0])
        if case is None or case.options.get("key_value_seq_lengths") is not None:
            return case
        batch, _, _, keys = case.scores_shape  # what a table reaches is for lengths to say
        lengths = np.full(batch, keys, np.int32)
        return dataclasses.replace(case, options={**case.options, "key_value_seq_lengths": lengths}, _seen=None)

    def _given(self, case, turn, threads):
        """Query, keys, values, and the keywords of `_core.forward`."""
        kind, paged = self._memory(case)
        query, key, value, _, _, options = case.arguments(turn)
        named = self.named(case, options, turn, threads)
        with np.errstate(over="ignore"):
            memory = [x.astype(_dtype_of_16_bits(case)) if kind == "16 bits" else x for x in (key, value)]
        if kind == "int8":
            (key8, k_scales), (value8, v_scales) = (integers(x) for x in memory)
            memory = [key8, value8, k_scales, v_scales]
        if paged:
            memory, table = self._paged(case, memory, named)
            named["block_table"] = table
        key, value, *scales = memory
        return query, key, value, named | dict(zip(("k_scales", "v_scales"), scales))

    @staticmethod
    def _paged(case, memory, named):
        rng = drawn(case, 43)
        size = int(rng.choice(PAGE_SIZES))
        by_rows = case.options["layout"] == "BSHD"
        arrays = [x if by_rows else x.swapaxes(1, 2) for x in memory]
        arrays, table = in_pages(rng, arrays, size)
        room = table.shape[1] * size
        named["masks"] = [padded(mask, 3, room, True) for mask in named["masks"]]
        named["bias"] = padded(named["bias"], 3, room)
        if "segments" in named:
            named["segments"] = named["segments"][0], np.pad(named["segments"][1], ((0, 0), (0, room - case.scores_shape[3])))
        if "blocks" in named:
            blocks, wanted = named["blocks"], -(-room // named["block_k"])
            named["blocks"] = np.pad(blocks, ((0, 0),) * 3 + ((0, wanted - blocks.shape[3]),))
        return [np.ascontiguousarray(x if by_rows else x.swapaxes(1, 2)) for x in arrays], table


class CoreStored(Stored, ways.Core):
    """The kernels of one instruction set."""

    share = 0.25

    def __init__(self, isa):
        super().__init__(isa)
        self.name = f"core-stored-{isa}"

    def __call__(self, case, turn=0, threads=None):
        *inputs, named = self._given(case, turn, threads)
        out, lse, statistics = kernels.core().forward(*inputs, **named)
        return {"out": out, "lse": lse, "maximum": statistics[..., 0], "sum": statistics[..., 1]}


# Functions of frameworks


class Decoded(ways.Way):
    """A way that gives the rows of a case as the last ones of its sequences, to keys that were there before and their own."""

    share = 0.1
    differentiates = False
    kinds = KINDS

    def __init__(self, framework):
        self.framework = framework
        self.name = framework.prefix + self.base_name

    def __call__(self, case):
        with self.framework.of(case):
            return {name: np.asarray(x) for name, x in self._computed(case, drawn(case, 49).random() < 0.3).items()}

    def precision(self, case):
        return ways.kernel_precision(case, kernels.core().default_isa())

    def kind(self, case):
        return str(drawn(case, 44).choice(self.kinds))

    def suited(self, case):
        if 0 in case.scores_shape or 0 in (case.query.shape[-1], case.value.shape[-1]):
            return None
        batch, _, rows, keys = case.scores_shape
        given = case.options
        lengths, counts = (
            np.full(batch, extent, np.int32) if given.get(name) is None else given[name].astype(np.int32)
            for name, extent in (("key_value_seq_lengths", keys), ("query_seq_lengths", rows))
        )
        counts = np.minimum(counts, lengths)
        options = {name: x for name, x in given.items() if name in OF_DECODING}
        options |= {"is_causal": self._is_causal(case), "key_value_seq_lengths": lengths, "query_seq_lengths": counts}
        options["query_offset"] = lengths - counts
        return rounded(dataclasses.replace(case, options=options, structure={}, d_lse=None, views={}, _seen=None), self.kind(case))

    def _is_causal(self, case):
        return bool(drawn(case, 45).random() < 0.8)

    def _parts(self, case):
        """Query, keys and values of the sequences before their last rows, those of the last rows, each with heads in the
        third axis; and the options of the call."""
        query, key, value, _, _, options = case.arguments()
        if self.kind(case) == "int8":
            key, value = before_rounding(key), before_rounding(value)
        if options["layout"] == "BHSD":
            query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        counts, offset = options.pop("query_seq_lengths"), options.pop("query_offset")
        at = np.minimum(offset[:, None] + np.arange(query.shape[1]), key.shape[1] - 1)
        own = [np.take_along_axis(x, at[..., None, None], 1) for x in (key, value)]
        return query, (key, value), own, counts, offset, options

    def _laid(self, x, layout):
        """As an array of the framework in this layout."""
        return self.framework.array(x if layout == "BSHD" else np.ascontiguousarray(x.swapaxes(1, 2)))

    def _memory_dtype(self, case):
        kind = self.kind(case)
        return "int8" if kind == "int8" else _dtype_of_16_bits(case).name if kind == "16 bits" else case.dtype


def _along_keys(options, room):
    """bias and mask for keys of a memory that has more of them."""
    masks = [padded(mask != 0, 3, room, True) for mask in options.pop("mask", None) or ()]
    bias = padded(options.pop("bias", None), 3, room)
    return masks, bias


def _of_rows(x, first, last):
    return x if x.shape[2] == 1 else x[:, :, first:last]


class Cached(Decoded):
    """`KVCache` and `decode_attention`: what was before is appended, then the rows in some parts."""

    base_name = "cache"
    least_length = 1

    def _computed(self, case, compiles):
        functions = self.framework.functions
        query, before, own, counts, offset, options = self._parts(case)
        layout, is_causal = options.pop("layout"), options["is_causal"]
        options.pop("key_value_seq_lengths")
        rng = drawn(case, 46)
        _, keys, kv_heads, dim = before[0].shape
        cache = functions.KVCache.create(
            len(query), max(keys + int(rng.integers(0, 4)), self.least_length), kv_heads, dim, self._memory_dtype(case), layout=layout,
            value_dim=before[1].shape[-1], window=self.window(case), framework=self.framework.name,
        )  # fmt: skip
        if cache.window is not None:
            options.pop("window")  # the cache's own
        masks, bias = _along_keys(options, cache.rows)
        for first in range(0, int(offset.max()), self.most_rows(case)):
            rows = [self._laid(x[:, first : first + self.most_rows(case)], layout) for x in before]
            there = rows[0].shape[1 if layout == "BSHD" else 2]
            cache = cache.update(*rows, lengths=np.clip(offset - first, 0, there).astype(np.int32))
        outs, lses = [], []
        for first, last in self._cuts(case, rng, query.shape[1], is_causal):
            q, k, v = (self._laid(x[:, first:last], layout) for x in (query, *own))
            given = dict(options, mask=[_of_rows(mask, first, last) for mask in masks] or None)
            given["bias"] = None if bias is None else _of_rows(bias, first, last)
            there = np.clip(counts - first, 0, last - first).astype(np.int32)
            call = functools.partial(functions.decode_attention, return_lse=True, **given)
            step = self.framework.form(lambda q, cache, k, v, n, call=call: call(q, cache, k, v, query_seq_lengths=n), compiles)
            out, lse, cache = step(q, cache, k, v, there)
            outs.append(out)
            lses.append(lse)
        return {"out": np.concatenate(outs, 1 if layout == "BSHD" else 2), "lse": np.concatenate(lses, 2)}

    def _cuts(self, case, rng, rows, is_causal):
        """Where the rows are cut: never, if one sees those behind it."""
        count = int(rng.integers(0, 4)) if is_causal else 0
        inner = rng.integers(1, rows, count) if rows > 1 else []
        ends = sorted({0, rows, *map(int, inner), *range(0, rows, self.most_rows(case))})
        return list(zip(ends, ends[1:]))

    def most_rows(self, case):
        """How many rows the cache takes at once."""
        return 2**30

    def window(self, case):
        """Of the cache."""
        return None


class Rolling(Cached):
    """A cache with a window, whose older keys make way for new ones."""

    base_name = "rolling"
    share = 0.05
    least_length = 10**6

    def window(self, case):
        return int(drawn(case, 47).choice([1, 2, 5, 17, 40, 200]))

    def most_rows(self, case):
        return max(16, self.window(case) // 8)

    def _is_causal(self, case):
        return True

    def suited(self, case):
        keys = case.scores_shape[3]
        case = super().suited(reductions.sliced(case, keys=slice(max(0, keys - 300), keys)))
        if case is None:
            return None
        options = {name: x for name, x in case.options.items() if name not in ("bias", "mask")}
        return dataclasses.replace(case, options={**options, "window": (self.window(case) - 1, 0)}, _seen=None)


class Paged(Decoded):
    """`paged_attention`, to pages that have the last rows already, or get them by the call."""

    base_name = "pages"

    def _computed(self, case, compiles):
        query, (key, value), own, counts, offset, options = self._parts(case)
        layout, lengths = options.pop("layout"), options.pop("key_value_seq_lengths")
        rng, kind = drawn(case, 48), self.kind(case)
        size = int(rng.choice(PAGE_SIZES))
        appends = rng.random() < 0.5
        if appends:
            key, value = (self._without_last(x, offset) for x in (key, value))
        memory = [key, value]
        if kind == "int8":
            (key8, k_scales), (value8, v_scales) = (int8_rows.quantized(x) for x in memory)
            memory = [key8, value8, k_scales, v_scales]
        elif kind == "16 bits":
            with np.errstate(over="ignore"):
                memory = [x.astype(_dtype_of_16_bits(case)) for x in memory]
        memory, table = in_pages(rng, memory, size)
        memory = [self._laid(x, layout) for x in memory]
        pages = [(memory[0], memory[2]), (memory[1], memory[3])] if kind == "int8" else memory
        masks, bias = _along_keys(options, table.shape[1] * size)
        new = [self._laid(x, layout) for x in own] if appends else [None, None]
        options |= {"layout": layout, "mask": masks or None, "bias": bias, "return_lse": True}
        call = functools.partial(self.framework.functions.paged_attention, **options)
        given = [self._laid(query, layout), *pages, self.framework.array(table), lengths, *new, counts]
        out, lse, *_ = self.framework.form(lambda *x: call(*x[:-1], query_seq_lengths=x[-1]), compiles)(*given)
        return {"out": out, "lse": lse}

    @staticmethod
    def _without_last(x, offset):
        """The rows that the call is to write have what must not be read."""
        there = np.arange(x.shape[1]) < offset[:, None]
        return np.where(there[..., None, None], x, np.array(np.nan, x.dtype))


WAYS = {way.name: way for framework in frameworks.ALL for way in (kind(framework) for kind in (Cached, Rolling, Paged))}

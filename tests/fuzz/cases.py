"""One random attention call from a seed and a number: sizes, options and values, with the corners drawn often."""

import dataclasses

import numpy as np

from attn_ops import T5RelativeBias
from cases import DTYPES
from fuzz import truth

# Around the sizes at which kernels change: vectors, tiles of rows, blocks of keys, splits of keys.
LENGTHS = (
    1,
    2,
    3,
    4,
    7,
    8,
    9,
    15,
    16,
    17,
    23,
    24,
    25,
    31,
    33,
    47,
    48,
    49,
    63,
    64,
    65,
    96,
    97,
    127,
    128,
    129,
    130,
    200,
    257,
)
DIMS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 19, 24, 31, 32, 33, 40, 48, 64, 65, 72, 80, 96, 100, 128, 130, 192, 256)
# Scores times dimensions of most cases; a few have LARGE_FACTOR times that. longdouble has no fast products.
MOST_WORK = {"float64": 1 << 18, "float32": 1 << 20, "float16": 1 << 20, "bfloat16": 1 << 20}
LARGE_FACTOR = 8
GARBAGE = ("nan", "inf", "-inf", "largest", "mixed")
VIEWS = ("fortran", "reversed", "gaps", "permuted", "swapped bytes", "misaligned")


@dataclasses.dataclass
class Case:
    """A call by the arguments of `reference.attention`, and what is done beside it.

    `query`, `key`, `value`, `d_out`, `d_lse` (or None) and the bias in `options` are free of garbage: see `arguments`.
    """

    seed: int
    number: int
    dtype: str
    scores_shape: tuple
    values: str  # how they were drawn
    query: np.ndarray = None
    key: np.ndarray = None
    value: np.ndarray = None
    d_out: np.ndarray = None
    d_lse: np.ndarray = None
    options: dict = dataclasses.field(default_factory=dict)
    structure: dict = dataclasses.field(default_factory=dict)  # of the mask: intervals, segments, and blocks with their sizes
    garbage: tuple = ()  # two kinds that hidden places are filled with, or none
    poison: tuple = ()  # (batch, kv head, key) of a key of NaN, or none
    views: dict = dataclasses.field(default_factory=dict)  # how `_core` is given an array, by name
    threads: tuple = (1, 1)  # of two calls that must give the same bits

    @property
    def accumulator(self):
        """The dtype of sums, lse and statistics."""
        return np.dtype("float64" if self.dtype == "float64" else "float32")

    def __str__(self):
        described = {name: x for name, x in self.options.items() if x is not None and name != "mask"}
        for name in ("bias", "relative_bias", "alibi_slopes"):
            if isinstance(described.get(name), np.ndarray):
                described[name] = f"{described[name].dtype.name}{list(described[name].shape)}"
        masks = self.options.get("mask") or ()
        if masks:
            described["mask"] = [list(mask.shape) for mask in masks]
        if self.structure:
            described["structure"] = {name: [np.shape(x) or x for x in parts] for name, parts in self.structure.items()}
        for name in ("garbage", "poison", "views", "threads"):
            if getattr(self, name):
                described[name] = getattr(self, name)
        shapes = " ".join(f"{name} {list(getattr(self, name).shape)}" for name in ("query", "key", "value"))
        return f"{self.dtype} {self.values} {shapes} d_lse={self.d_lse is not None} {described}"

    def arguments(self, garbage=0):
        """(query, key, value, d_out, d_lse, options) with the garbage of this turn, 0 or 1, in all hidden places."""
        arrays = {name: getattr(self, name) for name in ("query", "key", "value", "d_out", "d_lse")}
        arrays["bias"] = self.options.get("bias")
        arrays["relative_bias"] = truth.table_of(self)
        rng = np.random.default_rng([self.seed, self.number, garbage])
        if self.garbage:
            hidden = self._hidden()
            arrays = {name: _polluted(x, hidden.get(name), self.garbage[garbage], rng) for name, x in arrays.items()}
        if self.poison:
            batch, kv_head, key = self.poison
            arrays["key"] = arrays["key"].copy()
            truth.heads_first(self, arrays["key"])[batch, kv_head, key] = np.nan
        options = dict(self.options)
        if arrays["bias"] is not None:
            options["bias"] = arrays["bias"]
        if arrays["relative_bias"] is not None:
            options["relative_bias"] = self.with_table(arrays["relative_bias"])
        return *(arrays[name] for name in ("query", "key", "value", "d_out", "d_lse")), options

    @property
    def seen(self):
        """Which pairs count, `[batch, num_heads, seqlen_q, seqlen_k]`."""
        if self._seen is None:
            self._seen = truth.visible(self)
        return self._seen

    _seen: np.ndarray = None

    def with_table(self, table):
        """The option relative_bias with these values."""
        given = self.options["relative_bias"]
        return T5RelativeBias(table, given.bidirectional, given.max_distance) if isinstance(given, T5RelativeBias) else table

    def hidden_keys(self):
        """`[batch, num_kv_heads, seqlen_k]`: keys that no row sees."""
        batch, num_heads, seqlen_q, seqlen_k = self.scores_shape
        kv_heads = truth.heads_first(self, self.key).shape[1]
        return ~self.seen.reshape(batch, kv_heads, num_heads // kv_heads * seqlen_q, seqlen_k).any(axis=2)

    def _hidden(self):
        """Which elements of each array are behind masks."""
        rows, keys = ~self.seen.any(axis=-1), self.hidden_keys()
        sinks = self.options.get("sinks")
        hidden = {"d_lse": rows if sinks is None else rows & (sinks == -np.inf)[:, None]}
        for names, places in ((("query", "d_out"), rows), (("key", "value"), keys)):
            for name in names:
                hidden[name] = np.broadcast_to(places[..., None], truth.heads_first(self, getattr(self, name)).shape)
                hidden[name] = truth.heads_first(self, hidden[name])
        bias = self.options.get("bias")
        if bias is not None:
            unbiased = dataclasses.replace(self, options={**self.options, "bias": None}, _seen=None)
            axes = tuple(axis for axis in range(4) if bias.shape[axis] == 1)
            hidden["bias"] = ~unbiased.seen.any(axis=axes, keepdims=True)
        if self.options.get("relative_bias") is not None:
            # Also without the bias: either may hide pairs, and must go on to, while there is garbage in the other.
            none = dict.fromkeys(("bias", "relative_bias"))
            unbiased = dataclasses.replace(self, options={**self.options, **none}, _seen=None)
            hidden["relative_bias"] = ~truth.gathered(self, unbiased.seen, np.logical_or, False)
        return hidden


def _polluted(x, hidden, kind, rng):
    if x is None or hidden is None or not hidden.any():
        return x
    largest = float(_finfo(x.dtype).max)
    kinds = {"nan": [np.nan], "inf": [np.inf], "-inf": [-np.inf], "largest": [largest, -largest]}
    choices = kinds.get(kind) or [np.nan, np.inf, -np.inf, largest, -largest, 1.0]
    return np.where(hidden, rng.choice(choices, x.shape).astype(x.dtype), x)


def _finfo(dtype):
    import ml_dtypes

    return ml_dtypes.finfo(dtype)


def draw(seed, number):
    """The case of this number."""
    rng = np.random.default_rng([seed, number])
    dtype = _pick(rng, {"float32": 5, "float64": 2, "float16": 2, "bfloat16": 2})
    values = _pick(rng, {"normal": 8, "uniform": 2, "far": 2, "huge": 1, "massive": 3, "small": 1, "sharp": 1})
    batch, seqlen_q, seqlen_k, kv_heads, group, head_dim, value_dim = _sizes(rng, dtype)
    num_heads = kv_heads * group
    case = Case(seed, number, dtype, (batch, num_heads, seqlen_q, seqlen_k), values)
    case.options["layout"] = _pick(rng, {"BSHD": 2, "BHSD": 1})
    _draw_options(rng, case, head_dim)
    _draw_structure(np.random.default_rng([seed, number, 16]), case)
    _draw_scores(np.random.default_rng([seed, number, 17]), case)
    shapes = {
        "query": (batch, num_heads, seqlen_q, head_dim),
        "key": (batch, kv_heads, seqlen_k, head_dim),
        "value": (batch, kv_heads, seqlen_k, value_dim),
        "d_out": (batch, num_heads, seqlen_q, value_dim),
    }
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    _draw_values(rng, case, arrays)
    _draw_subnormal(np.random.default_rng([seed, number, 18]), case, arrays)
    for name, x in arrays.items():
        setattr(case, name, np.ascontiguousarray(truth.heads_first(case, x.astype(DTYPES[dtype]))))
    if rng.random() < 0.5:
        case.d_lse = rng.standard_normal(case.scores_shape[:3]).astype(case.accumulator)
    if rng.random() < 0.5:
        case.options["bias"] = _bias(rng, case)
    if rng.random() < 0.4:
        case.garbage = tuple(map(str, rng.choice(GARBAGE, 2)))
    if rng.random() < 0.03 and case.seen.any():
        b, h, _, j = case.seen.nonzero()
        at = rng.integers(b.size)
        case.poison = (int(b[at]), int(h[at]) // group, int(j[at]))
    for name in ("query", "key", "value", "d_out", "out", "mask", "bias"):
        if rng.random() < 0.15:
            case.views[name] = str(rng.choice(VIEWS))
    case.threads = tuple(map(int, rng.integers(1, 5, 2)))
    return case


def _pick(rng, weights):
    names = list(weights)
    shares = np.array([weights[name] for name in names], float)
    return names[rng.choice(len(names), p=shares / shares.sum())]


def _sizes(rng, dtype):
    """batch, seqlen_q, seqlen_k, num_kv_heads, group size, head_dim, value_dim."""
    kind = _pick(rng, {"tiny": 3, "tiles": 6, "decode": 3, "rows": 0.6, "long": 0.2, "empty": 0.6})
    group = int(_pick(rng, {1: 4, 2: 2, 3: 1, 4: 1, 7: 0.5, 8: 0.5}))
    batch, kv_heads = int(rng.integers(1, 4)), int(_pick(rng, {1: 3, 2: 3, 3: 1, 5: 0.5, 17: 0.3}))
    head_dim = int(rng.choice(DIMS))
    value_dim = head_dim if rng.random() < 0.6 else int(rng.choice(DIMS))
    if kind == "tiny":
        seqlen_q, seqlen_k = (int(n) for n in rng.integers(1, 10, 2))
    elif kind == "decode":
        seqlen_q, seqlen_k = int(rng.integers(1, 9)), int(2 ** rng.uniform(0, 11.5))
    elif kind == "rows":
        seqlen_q, seqlen_k = int(rng.integers(400, 1300)), int(rng.integers(1, 60))
        batch, kv_heads, head_dim, value_dim = 1, 1, min(head_dim, 33), min(value_dim, 33)
    elif kind == "long":
        seqlen_q, seqlen_k = int(rng.integers(1, 4)), int(2 ** rng.uniform(12, 17))
        batch, kv_heads, head_dim, value_dim = 1, 1, min(head_dim, 9), min(value_dim, 9)
    else:
        seqlen_q, seqlen_k = (int(n) for n in rng.choice(LENGTHS, 2))
        if rng.random() < 0.3:
            seqlen_q = seqlen_k
    if kind == "empty":
        empty = _pick(rng, {"batch": 1, "seqlen_q": 1, "seqlen_k": 2, "value_dim": 1})
        batch, seqlen_q, seqlen_k, value_dim = (
            0 if name == empty else n
            for name, n in zip(("batch", "seqlen_q", "seqlen_k", "value_dim"), (batch, seqlen_q, seqlen_k, value_dim))
        )
    most = MOST_WORK[dtype] * (LARGE_FACTOR if rng.random() < 0.02 else 1)
    wide = int(rng.choice([16, 128, 512]))  # up to this the dimensions stay, and sequences are halved

    def work():
        return batch * kv_heads * group * seqlen_q * seqlen_k * (head_dim + value_dim)

    while work() > most:
        if batch * kv_heads > 1:
            batch, kv_heads = -(-batch // 2), -(-kv_heads // 2)
        elif group > 1:
            group = -(-group // 2)
        elif head_dim + value_dim > 16 and (head_dim + value_dim > wide or seqlen_q * seqlen_k < 256):
            head_dim, value_dim = -(-head_dim // 2), -(-value_dim // 2)
        elif seqlen_q > seqlen_k:
            seqlen_q = -(-seqlen_q // 2)
        else:
            seqlen_k = -(-seqlen_k // 2)
    return batch, seqlen_q, seqlen_k, kv_heads, group, head_dim, value_dim


def _draw_options(rng, case, head_dim):
    batch, _, seqlen_q, seqlen_k = case.scores_shape
    options = case.options
    if rng.random() < 0.3:
        options["scale"] = float(_pick(rng, {1.0: 2, 0.0: 0.3, -0.4: 1, 1.7 / np.sqrt(head_dim): 2}))
    if rng.random() < 0.35:
        options["is_causal"] = True
    if rng.random() < 0.25:
        options["window"] = tuple(_window_end(rng, seqlen_q + seqlen_k) for _ in range(2))
    if rng.random() < 0.3:
        options["causal_alignment"] = "bottom_right"
    for name, extent in (("query_seq_lengths", seqlen_q), ("key_value_seq_lengths", seqlen_k)):
        if rng.random() < 0.25:
            lengths = rng.integers(0, extent + 1, batch)
            lengths[rng.random(batch) < 0.2] = 0
            lengths[rng.random(batch) < 0.2] = extent
            options[name] = lengths.astype(rng.choice(["int32", "int64"]))
    count = int(_pick(rng, {0: 6, 1: 3, 2: 1, 3: 0.5, 4: 0.5}))
    if count:
        options["mask"] = [_mask(rng, case.scores_shape) for _ in range(count)]
    if rng.random() < 0.2:
        options["dropout_rate"] = float(_pick(rng, {0.1: 1, 0.5: 1, 0.9: 0.5}))
        options["dropout_seed"] = tuple(map(int, rng.integers(-(2**63), 2**63 - 1, 2)))


def _draw_structure(rng, case):
    """Where rows stand, and what of the mask kernels skip by."""
    batch, num_heads, seqlen_q, seqlen_k = case.scores_shape

    def entries():
        return batch if rng.random() < 0.5 else 1

    if rng.random() < 0.25 and case.options.get("causal_alignment") != "bottom_right":
        case.options["query_offset"] = rng.integers(0, _pick(rng, {3: 1, seqlen_k + 2: 2, 2**30: 0.2}), batch).astype(np.int32)
    if rng.random() < 0.2:
        ends = np.sort(rng.integers(0, seqlen_k + 1, (2, entries(), seqlen_q)), axis=-1).astype(np.int32)
        case.structure["intervals"] = ends[0] // int(rng.choice([1, 2, 9])), ends[1]
    if rng.random() < 0.15:
        ids = [rng.integers(0, 4, (entries(), n)).astype(np.int32) for n in (seqlen_q, seqlen_k)]
        case.structure["segments"] = tuple(map(np.sort, ids) if rng.random() < 0.5 else ids)
    if rng.random() < 0.15:
        sizes = [int(n) for n in rng.choice([1, 5, 8, 16, 32, 64], 2)]
        counts = [-(-n // size) for n, size in zip((seqlen_q, seqlen_k), sizes)]
        shape = (entries(), num_heads if rng.random() < 0.5 else 1, *counts)
        case.structure["blocks"] = rng.random(shape) < rng.choice([0.3, 0.8]), *sizes


def _draw_scores(rng, case):
    """What happens to scores beside a bias."""
    batch, num_heads, seqlen_q, seqlen_k = case.scores_shape
    options, dtype = case.options, case.accumulator
    if rng.random() < 0.2:
        options["logits_soft_cap"] = float(_pick(rng, {10 ** rng.uniform(-1, 2): 8, 1e-30: 0.3, 1e30: 0.3}))
    if rng.random() < 0.2:
        shape = (num_heads,) if rng.random() < 0.5 else (batch, num_heads)
        slopes = rng.standard_normal(shape) if rng.random() < 0.5 else 2.0 ** -rng.uniform(0, 8, shape)
        options["alibi_slopes"] = slopes.astype(dtype)
    if rng.random() < 0.25:
        options["relative_bias"] = _table(rng, num_heads, dtype)
    if rng.random() < 0.2:
        sinks = rng.standard_normal(num_heads)
        kind = _pick(rng, {"normal": 4, "far": 2, "ends": 0.5})
        if kind == "far":
            sinks = sinks * 10 ** rng.uniform(0, 3)
        elif kind == "ends":
            sinks = rng.choice([-1, 0, 1], num_heads) * float(_finfo(dtype).max)
        options["sinks"] = np.where(rng.random(num_heads) < 0.1, -np.inf, sinks).astype(dtype)


def _table(rng, num_heads, dtype):
    """By distance, or by T5's buckets; some of it hides."""
    if rng.random() < 0.3:
        bidirectional, rows = bool(rng.random() < 0.5), int(rng.choice([4, 8, 32]))
        table = rng.standard_normal((rows, num_heads)).astype(dtype)
        return T5RelativeBias(table, bidirectional, int(rng.integers(rows, 4 * rows + 100)))
    reach = int(_pick(rng, {0: 0.5, 1: 1, 5: 1, 16: 1, 40: 1, 300: 1}))
    table = rng.standard_normal((2 * reach + 1, num_heads)) * 10 ** rng.uniform(-1, 2)
    if rng.random() < 0.3:
        table = np.where(rng.random(table.shape) < rng.choice([0.1, 0.5]), -np.inf, table)
    return table.astype(dtype)


def _window_end(rng, most):
    kind = _pick(rng, {"all": 2, "near": 3, "some": 3, "far": 0.5})
    ends = {
        "all": -1,
        "near": rng.integers(0, 4),
        "some": rng.integers(0, most + 1),
        "far": 2 ** int(rng.integers(31, 63)) - 1,
    }
    return int(ends[kind])


def _broadcast_shape(rng, shape):
    return tuple(n if rng.random() < 0.6 else 1 for n in shape)


def _mask(rng, scores_shape):
    mask = rng.random(_broadcast_shape(rng, scores_shape)) < _pick(rng, {0.1: 1, 0.5: 2, 0.9: 3, 1.0: 0.3, 0.0: 0.1})
    if rng.random() < 0.3:  # what padding looks like
        mask = np.sort(mask, axis=3)[..., ::-1]
    # True is any byte but 0.
    return np.where(mask, rng.choice([1, 1, 2, 0x80, 0xFE]), 0).astype(np.uint8).view(bool)


def _draw_values(rng, case, arrays):
    """Turns normal `[batch, heads, seqlen, dim]` arrays into those of `case.values`."""
    query, key, value, d_out = (arrays[name] for name in ("query", "key", "value", "d_out"))
    head_dim = query.shape[-1]
    scale = case.options.get("scale", 1 / np.sqrt(head_dim))
    largest = float(_finfo(DTYPES[case.dtype]).max)
    if case.values == "uniform":  # all scores of a row are equal
        which = query if rng.random() < 0.5 else key
        which[...] = 0 if rng.random() < 0.5 else which[:, :, :1]
    elif case.values == "far":  # and so are they nearly, far from zero
        far = 10 ** rng.uniform(1, 4 if case.dtype in ("float32", "bfloat16") else 3 if case.dtype == "float16" else 12)
        query[..., 0] = np.sqrt(far)
        key[..., 0] = rng.choice([-1, 1]) * np.sqrt(far)
    elif case.values == "huge":  # scores up to the ends of the range, their sums just within
        most = 10 ** rng.uniform(0, np.log10(largest) - 0.1)
        for x in (query, key):
            x[...] = np.sqrt(most / max(abs(scale), 1) / head_dim) * rng.uniform(-1, 1, x.shape)
    elif case.values == "massive":  # a channel of one head's keys that is huge, for all tokens or the first
        key = key[:, rng.integers(key.shape[1])]
        tokens = slice(None) if rng.random() < 0.7 else slice(0, 1)
        size = 10 ** rng.uniform(1.5, 3.5)
        key[:, tokens, rng.integers(head_dim)] = -size * (1 + rng.choice([0, 0.01, 0.3]) * rng.standard_normal())
    elif case.values == "small":
        for x in (query, key, value, d_out):
            x *= 10 ** rng.uniform(-6, 0)
    elif case.values == "sharp":
        query *= 10 ** rng.uniform(0, 2)
    if rng.random() < 0.1:
        value *= 10 ** rng.uniform(0, 3)
    if rng.random() < 0.1:
        d_out *= rng.random(d_out.shape) < 0.3


def _draw_subnormal(rng, case, arrays):
    """Of a few cases some arrays are around the smallest number that is normal, in the dtype of the case."""
    if rng.random() < 0.03:
        tiny = float(_finfo(DTYPES[case.dtype]).tiny)
        for x in arrays.values():
            if x.size and rng.random() < 0.6:
                largest = np.abs(x).max()
                x *= tiny * 10 ** rng.uniform(-3, 1) / (largest if largest else 1)
        case.values += ", subnormal"


def _bias(rng, case):
    shape = _broadcast_shape(rng, case.scores_shape)
    dtype = DTYPES[case.dtype]
    if dtype.itemsize == 2 and rng.random() < 0.6:
        dtype = np.dtype("float32")
    largest = float(_finfo(dtype).max)
    bias = rng.standard_normal(shape)
    kind = _pick(rng, {"normal": 4, "distances": 1, "far": 2, "ends": 2, "end": 2, "magnitudes": 1})
    if kind == "distances":  # ALiBi's
        bias = np.broadcast_to(-np.abs(np.arange(shape[2])[:, None] - np.arange(shape[3])) / 3.0, shape).copy()
    elif kind == "far":
        bias += rng.choice([-1, 1]) * 10 ** rng.uniform(1, min(np.log10(largest) - 1, 300))
    elif kind == "end":  # everywhere, or in some rows
        end = rng.choice([-largest, largest])
        bias = np.where(rng.random((*shape[:3], 1)) < rng.choice([0.5, 1]), end, bias)
    elif kind == "ends":
        ends = [-largest, largest, -largest / 2, largest / 2, 0.0, 1.0, -largest * 0.9]
        bias = rng.choice(rng.choice(ends, rng.integers(2, 5)), shape)
    elif kind == "magnitudes":
        exponent = rng.uniform(-3, np.log10(largest), shape)
        bias = rng.choice([-1, 1], shape) * np.power(10.0, exponent)
    if rng.random() < 0.3:
        bias = np.where(rng.random(shape) < rng.choice([0.1, 0.5]), -np.inf, bias)
    with np.errstate(over="ignore"):
        bias = bias.astype(dtype)
    limit = dtype.type(largest)
    return np.where(bias == np.inf, limit, bias)

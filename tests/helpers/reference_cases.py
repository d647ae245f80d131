"""One small case per feature: inputs and options of `reference.attention`."""

import numpy as np

from attn_ops import T5RelativeBias, masks


def take_mask(options):
    """Everything in `options` that says who sees whom, taken out of them, as one mask."""
    return masks.combined(
        options.pop("mask", None),
        is_causal=options.pop("is_causal", False),
        causal_alignment=options.pop("causal_alignment", "top_left"),
        window=options.pop("window", None),
        query_lengths=options.pop("query_seq_lengths", None),
        key_lengths=options.pop("key_value_seq_lengths", None),
    )


class Case:
    """Random inputs of a shape, and the options of one feature."""

    def __init__(self, name, options, batch=2, seqlen_q=4, seqlen_k=5, heads=(2, 2), dims=(3, 3)):
        self.name = name
        self.rng = np.random.default_rng(0)
        num_heads, num_kv_heads = heads
        self.scores_shape = (batch, num_heads, seqlen_q, seqlen_k)
        self.options = options(self) if callable(options) else options
        shapes = {
            "query": (batch, seqlen_q, num_heads, dims[0]),
            "key": (batch, seqlen_k, num_kv_heads, dims[0]),
            "value": (batch, seqlen_k, num_kv_heads, dims[1]),
            "d_out": (batch, seqlen_q, num_heads, dims[1]),
        }
        if self.options.get("layout") == "BHSD":
            shapes = {name: (b, h, n, d) for name, (b, n, h, d) in shapes.items()}
        self.inputs = {name: self.normal(*shape) for name, shape in shapes.items()}
        self.d_out = self.inputs.pop("d_out")
        self.d_lse = self.normal(batch, num_heads, seqlen_q)

    def __repr__(self):
        return self.name

    def normal(self, *shape):
        return self.rng.standard_normal(shape)

    def mask(self, *full):
        """A random mask with the full extent along the given axes and 1 along the others."""
        shape = [n if axis in full else 1 for axis, n in enumerate(self.scores_shape)]
        return self.rng.random(shape) < 0.6

    def bias(self, *full):
        return self.normal(*[n if axis in full else 1 for axis, n in enumerate(self.scores_shape)])


def differentiable(case):
    """The inputs of a case that have a gradient, in the order of the gradients: arrays by name. Then its other options,
    and the function that makes arguments of such arrays, in the place of which others may stand."""
    inputs, options = dict(case.inputs), dict(case.options)
    for name in ("bias", "relative_bias", "sinks"):
        if name in options:
            inputs[name] = options.pop(name)
    buckets = inputs.get("relative_bias")
    if not isinstance(buckets, T5RelativeBias):
        return inputs, options, dict

    def of_caller(inputs):
        table = T5RelativeBias(inputs["relative_bias"], buckets.bidirectional, buckets.max_distance)
        return {**inputs, "relative_bias": table}

    return {**inputs, "relative_bias": buckets.table}, options, of_caller


def hidden_bias(case):
    bias = case.bias(0, 1, 2, 3)
    bias[0, 1, 2] = -np.inf
    bias[1, :, :, 3] = -np.inf
    return {"bias": bias}


def everything(case):
    return {
        "bias": case.bias(1, 2, 3),
        "mask": [case.mask(0, 3), masks.window(left=3), case.mask(1, 2)],
        "scale": -0.3,
        "is_causal": True,
        "causal_alignment": "top_left",
        "query_seq_lengths": np.array([4, 2]),
        "key_value_seq_lengths": np.array([3, 5]),
        "dropout_rate": 0.3,
        "dropout_seed": (5, 6),
        "layout": "BHSD",
    }


def table(case, rows, hidden=()):
    """A table by distance or bucket, -inf in the hidden rows."""
    table = case.normal(rows, case.scores_shape[1])
    table[list(hidden)] = -np.inf
    return table


def every_score(case):
    return {
        "logits_soft_cap": 0.8,
        "alibi_slopes": case.normal(2, 4),
        "relative_bias": table(case, 5),
        "sinks": case.normal(4),
        "bias": case.bias(0, 2, 3),
    }


def every_score_and_mask(case):
    return {
        **every_score(case),
        "query_offset": np.array([1, 2]),
        "is_causal": True,
        "mask": masks.segments([[0, 1, 0, 1]] * 2, [[0, 1, 1, 0, 1], [1, 0, 1, 0, 0]]) & masks.window(left=4),
        "key_value_seq_lengths": [5, 4],
        "query_seq_lengths": [4, 3],
        "scale": 1.3,
        "layout": "BHSD",
        "dropout_rate": 0.3,
        "dropout_seed": 7,
    }


BOTTOM_RIGHT = {"causal_alignment": "bottom_right"}
LENGTHS = {"query_seq_lengths": [4, 3], "key_value_seq_lengths": [2, 5]}
CASES = [
    Case("plain", {}),
    Case("grouped heads", {}, heads=(4, 2)),
    Case("one key head", {}, heads=(3, 1)),
    Case("value_dim differs", {}, dims=(2, 4)),
    Case("scale", {"scale": 1.7}),
    Case("negative scale", {"scale": -0.4, "is_causal": True}),
    Case("causal", {"is_causal": True}),
    Case("causal, more queries", {"is_causal": True}, seqlen_q=6, seqlen_k=3),
    Case("causal bottom_right", {"is_causal": True, **BOTTOM_RIGHT}),
    Case("causal bottom_right, empty rows", {"is_causal": True, **BOTTOM_RIGHT}, seqlen_q=6, seqlen_k=3),
    Case("window", {"window": (1, 1)}),
    Case("window, one side", {"window": (None, 0)}),
    Case("window bottom_right", {"window": (0, 2), **BOTTOM_RIGHT}),
    Case("causal window", {"window": (2, 3), "is_causal": True}),
    Case("mask", lambda c: {"mask": c.mask(0, 1, 2, 3)}),
    Case("key padding", lambda c: {"mask": masks.key_padding(c.rng.random((2, 5)) < 0.5)}),
    Case("query padding", lambda c: {"mask": masks.query_padding(c.rng.random((2, 4)) < 0.5)}),
    Case("segments", {"mask": masks.segments([[0, 0, 1, 2]] * 2, [[0, 1, 1, 2, 2]] * 2)}),
    Case("bias", lambda c: {"bias": c.bias(0, 1, 2, 3)}),
    Case("bias of heads", lambda c: {"bias": c.bias(1, 2, 3)}),
    Case("bias of keys", lambda c: {"bias": c.bias(0, 3)}),
    Case("bias of rows", lambda c: {"bias": c.bias(2)}),
    Case("bias of nothing", lambda c: {"bias": c.bias()}),
    Case("bias of -inf", hidden_bias),
    Case("lengths", LENGTHS),
    Case("lengths, one of 0", {"key_value_seq_lengths": [0, 5]}),
    Case("lengths, causal bottom_right", {**LENGTHS, "is_causal": True, **BOTTOM_RIGHT}),
    Case("dropout", {"dropout_rate": 0.4, "dropout_seed": 11}),
    Case("dropout, grouped heads", {"dropout_rate": 0.4, "dropout_seed": (2, 3)}, heads=(4, 2)),
    Case("BHSD", {"layout": "BHSD", "is_causal": True}, heads=(4, 2), dims=(3, 2)),
    Case("everything", everything, heads=(4, 2), dims=(3, 2)),
    # Scores.
    Case("soft cap", {"logits_soft_cap": 0.7}, heads=(4, 2)),
    Case("soft cap, causal", {"logits_soft_cap": 2, "is_causal": True, "scale": -3.0}),
    Case("slopes", {"alibi_slopes": np.array([0.5, -0.25])}),
    Case("slopes of entries", lambda c: {"alibi_slopes": c.normal(2, 2), "is_causal": True, **LENGTHS, **BOTTOM_RIGHT}),
    Case("table by distance", lambda c: {"relative_bias": table(c, 5)}),
    Case("table of one row", lambda c: {"relative_bias": table(c, 1)}, heads=(4, 2)),
    Case("table beyond all distances", lambda c: {"relative_bias": table(c, 21), **LENGTHS, **BOTTOM_RIGHT}),
    Case("table of -inf", lambda c: {"relative_bias": table(c, 5, (1, 4))}),
    Case("buckets", lambda c: {"relative_bias": T5RelativeBias(table(c, 8), max_distance=4)}, seqlen_q=9, seqlen_k=8),
    Case(
        "buckets of the past",
        lambda c: {"relative_bias": T5RelativeBias(table(c, 6), False, 5), "is_causal": True, "scale": 1.0},
        seqlen_q=9,
        seqlen_k=8,
    ),
    Case("sinks", lambda c: {"sinks": c.normal(4)}, heads=(4, 2)),
    Case("sinks, rows without keys", lambda c: {"sinks": c.normal(2), "is_causal": True, **BOTTOM_RIGHT}, seqlen_q=6),
    Case("sinks of -inf", {"sinks": np.array([-np.inf, 0.3]), "key_value_seq_lengths": [0, 5]}),
    Case("sinks, dropout", lambda c: {"sinks": c.normal(2), "dropout_rate": 0.4, "dropout_seed": 3}),
    Case("every score", every_score, heads=(4, 2)),
    # Where rows stand.
    Case("offset", {"query_offset": 1, "is_causal": True}),
    Case("offsets", {"query_offset": np.array([0, 3]), "window": (1, 1), **LENGTHS}),
    Case("offset, one row", {"query_offset": 4, "window": (2, 0)}, seqlen_q=1),
    Case("offset beyond the keys", {"query_offset": 2**30, "window": (2**30 - 2, 3)}),
    Case("offsets, slopes", {"query_offset": np.array([2, 0]), "alibi_slopes": np.array([0.5, 0.1])}),
    Case("offset, table", lambda c: {"query_offset": 2, "relative_bias": table(c, 7)}),
    # Masks with structure.
    Case("intervals", {"mask": masks.intervals([[0, 0, 2, 4]], [[1, 3, 3, 5], [0, 0, 5, 5]])}),
    Case("intervals, one end", {"mask": masks.intervals(key_end=[1, 2, 2, 5]), "sinks": np.array([0.2, -1.0])}),
    Case("prefix", {"mask": masks.prefix(np.array([2, 0]))}),
    Case("chunked", {"mask": masks.chunked(2) & masks.causal()}),
    Case("chunked, offset", {"mask": masks.chunked(3), "query_offset": np.array([1, 4])}),
    Case("segments, contiguous", {"mask": masks.segments([[0, 0, 1, 2]], [[0, 1, 1, 2, 2]], contiguous=True)}),
    Case("segments, scattered", {"mask": masks.segments([[1, 0, 1, 2]] * 2, [[0, 1, 2, 1, 0], [2, 1, 1, 0, 1]])}),
    Case("segments, wide", {"mask": masks.segments(np.array([[2**40, 1, 2**40, 3]]), np.array([[1, 2**40, 7, 1, 2**40]]))}),
    Case("packed", {"mask": masks.packed([0, 3, 4], [0, 2, 5]) & masks.window(left=1)}),
    Case("blocks", {"mask": masks.block_sparse([[1, 0, 1], [0, 1, 0]] > np.array(0), 2, 2), "is_causal": True}),
    Case(
        "blocks of heads",
        lambda c: {"mask": masks.block_sparse(c.rng.random((2, 2, 3, 3)) < 0.6, 3, 2)},
        seqlen_q=8,
        seqlen_k=6,
    ),
    Case("a function", {"mask": masks.from_function(lambda b, h, q, k: (q - k) % 3 != 1)}),
    Case("a causal function", lambda c: {"mask": masks.from_function(lambda b, h, q, k: q >= k), "sinks": c.normal(2)}),
    Case("every score and mask", every_score_and_mask, heads=(4, 2), dims=(3, 2)),
]

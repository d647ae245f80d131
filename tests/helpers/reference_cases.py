"""One small case per feature: inputs and options of `reference.attention`."""

import numpy as np

from attn_ops import masks


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
]

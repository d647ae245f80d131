"""The rule of ../../op/test_accuracy.py for what was computed here: twice the error of the plain formula."""

import numpy as np
from plain_formula import plain_attention

ULPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
NAMES = ("out", "dq", "dk", "dv")


def errors(found, expected):
    """Largest and root-mean-square error."""
    difference = np.abs(found.astype(np.float64) - expected)
    return np.array([difference.max(), np.sqrt((difference**2).mean())]) / np.abs(expected).max()


def assert_as_accurate_as_plain(found, expected, inputs, visible=None):
    """Results of (query, key, value, d_out), by name. `visible` as plain_attention has it."""
    query, key, value, d_out = inputs
    plain = plain_attention(query, key, value, query.dtype, d_out, visible=visible)
    for name, formula in zip(NAMES, plain, strict=True):
        wanted = getattr(expected, name)
        own = errors(getattr(found, name), wanted)
        limit = np.maximum(2 * errors(formula, wanted), 2 * ULPS[query.dtype.name])
        assert (own <= limit).all(), (name, own, limit)

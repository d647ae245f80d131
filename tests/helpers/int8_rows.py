"""What a cache in int8 keeps, by its definition in NumPy float32, what calls with it must give, and how far that may be from
the same with a float cache."""

import functools

import numpy as np

from attn_ops import reference
from cached_calls import KEY, OPTIONS, QUERY, VALUE

LEAST_SCALE = np.float32(2.0**-100)


def quantized(x):
    """(x8, scale) of [..., dim]."""
    x = np.asarray(x).astype("float32")
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(x).all(-1)
        x = np.where(finite[..., None], x, np.float32(0))
        scale = np.abs(x).max(-1) * (np.float32(1) / np.float32(127))
        scale = np.where(scale < LEAST_SCALE, np.float32(0), scale)
        inverse = np.where(scale > 0, np.float32(1) / np.where(scale > 0, scale, np.float32(1)), np.float32(0))
        return np.rint(x * inverse[..., None]).astype("int8"), np.where(finite, scale, np.float32(np.nan))


def meant(x8, scale):
    """What they stand for, float64."""
    return np.asarray(x8, "float64") * np.asarray(scale, "float64")[..., None]


def error_bound(query, key, value, scale):
    """How far out may be from that of the keys and values before they were rounded, [batch, seqlen, heads, dim].

    An element is off by s/2 at most, s being the scale of its row. So a score is off by e = scale |q|_1 max(s_k)/2, which
    makes e^(±2e) of a weight, and the output is off by that much of the largest value, and by max(s_v)/2. (A part in
    1e4 more, for the rounding of scales.)
    """
    half_k, half_v = (np.abs(x).max(-1).max() / 254 for x in (key, value))
    e = scale * np.abs(query).sum(-1).max() * half_k
    return 1.0001 * (np.expm1(2 * e) * np.abs(value).max() + half_v)


@functools.cache
def whole(name, window=None):
    """`cached_calls.whole` on what the cache keeps of keys and values."""
    options = dict(OPTIONS[name][-1])
    if window is not None:
        options["window"] = (window - 1, 0)
    key, value = (meant(*quantized(x)) for x in (KEY, VALUE))
    return reference.attention(QUERY, key, value, is_causal=True, **options)[0]


def holds(cache, tokens, layout="BSHD"):
    """Asserts that a cache has the first ``tokens`` of `KEY` and `VALUE`, bit by bit."""
    for x, integers, scales in ((KEY, cache.key, cache.key_scale), (VALUE, cache.value, cache.value_scale)):
        integers, scales = (np.asarray(a) if layout == "BSHD" else np.asarray(a).swapaxes(1, 2) for a in (integers, scales))
        right, right_scales = quantized(x[:, :tokens])
        np.testing.assert_array_equal(integers[:, :tokens], right)
        np.testing.assert_array_equal(scales[:, :tokens], right_scales)

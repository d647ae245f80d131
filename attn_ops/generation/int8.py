"""Caches in int8: what a row of keys or values becomes, and what it stands for.

A row x of one position and head is kept as integers x8 and a float32 ``scale``, and stands for scale * x8:

    scale = max |x| / 127        x8 = x / scale, to the nearest integer, ties to even

so that an element is off by half a scale at most. Each division is a product with an inverse, by which all frameworks,
and the kernels (csrc/cpu/quantize.h), get the same bits. A row whose scale would be below 2^-100 becomes zeros, with a
scale of 0. A row with a NaN or an infinity becomes zeros with a scale of NaN: whoever attends to it gets NaN.

``xp`` is tensorflow/xp.py or jax/xp.py.
"""

from __future__ import annotations

import numpy as np

_PART = np.float32(1) / np.float32(127)
_LEAST_SCALE = np.float32(2.0**-100)


def quantized(xp, x):
    """(x8, scale) of floating ``x`` [..., dim]: int8 [..., dim] and float32 [...]."""
    x = xp.cast(x, xp.float32)
    finite = xp.all_finite(x)
    x = xp.where(finite, x, xp.zeros_like(x))
    scale = xp.highest(xp.absolute(x)) * _PART
    kept = scale >= _LEAST_SCALE
    inverse = xp.where(kept, 1.0 / xp.where(kept, scale, xp.ones_like(scale)), xp.zeros_like(scale))
    x8 = xp.cast(xp.rounded(x * inverse), xp.int8)
    scale = xp.where(kept, scale, xp.zeros_like(scale))
    return x8, xp.where(finite, scale, scale * np.float32(np.nan))[..., 0]


def rounded(xp, new):
    """What goes into the memory of a cache for the floating keys and values ``new``: both in int8, and the scales of both."""
    (key, key_scale), (value, value_scale) = (quantized(xp, x) for x in new)
    return key, value, key_scale, value_scale


def dequantized(xp, call):
    """``call`` with keys and values in float32 where they are in int8: what runs where no kernel reads those.

    ``call`` is an `AttentionCall`, or in JAX its arrays.
    """
    if call.key_scales is None:
        return call
    key, value = (
        xp.cast(x, xp.float32) * xp.expand_dims(scales, 3)
        for x, scales in ((call.key, call.key_scales), (call.value, call.value_scales))
    )
    return call._replace(key=key, value=value, key_scales=None, value_scales=None)

"""Numbers as the instructions round them, over arrays."""

import numpy as np

NAN = np.uint32(0x7FFFFFFF)  # what a GPU makes of every NaN


def make_nan_canonical(bits, values, mask=True):
    """In place; `values` are `bits` as float32."""
    nan = np.isnan(values)
    if np.count_nonzero(nan):
        np.copyto(bits, NAN, where=nan & mask)


def to_f16(x):
    """Bits of the nearest half."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def to_bf16(x):
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_tf32(x):
    """Ties go away from zero."""
    rounded = (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(x), NAN, rounded)


def from_bf16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def flush(x):
    """Zeros for what is below the normal numbers."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def exp2(x):
    """ex2.approx.ftz, without its error of up to 2 units in the last place."""
    return flush(np.exp2(flush(x).astype(np.float64)).astype(np.float32))


def log2(x):
    """lg2.approx.ftz, without its error."""
    return np.log2(flush(x).astype(np.float64)).astype(np.float32)


def larger(x, y):
    """max: the number beside a NaN, and +0 beside -0."""
    z = np.fmax(x, y)
    return np.where(x == y, x.view(np.uint32) & y.view(np.uint32), z.view(np.uint32)).view(np.float32)


def smaller(x, y):
    z = np.fmin(x, y)
    return np.where(x == y, x.view(np.uint32) | y.view(np.uint32), z.view(np.uint32)).view(np.float32)

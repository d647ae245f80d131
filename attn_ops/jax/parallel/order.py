"""In which order a sequence is dealt out to devices."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

ORDERS = ("contiguous", "zigzag")


def zigzag(x, count, axis=1):
    """``x`` reordered along ``axis`` so that of ``count`` equal shares each has two of 2 count chunks, n and 2 count -
    1 - n.

    Under a causal mask all shares then cost the same. For the arrays before `jax.shard_map`: query, key, value,
    targets, and the rows of masks and biases. Positions (rotary embeddings) are to be reordered with them.
    """
    return _taken(x, count, axis, _chunks(count))


def unzigzag(x, count, axis=1):
    """The inverse of `zigzag`, for results."""
    return _taken(x, count, axis, np.argsort(_chunks(count)))


def pieces(order, extent, device, count):
    """Where the ``extent`` rows or keys of a device of ``count`` come from: (first, how many) among its own, and which
    of the whole the first is, for each piece whose neighbours in the whole are neighbours here."""
    if order == "contiguous":
        return [(0, extent, device * extent)]
    half = extent // 2
    return [(0, half, device * half), (half, half, (2 * count - 1 - device) * half)]


def _chunks(count):
    """The numbers of the chunks in the order of the shares."""
    return np.array([chunk for n in range(count) for chunk in (n, 2 * count - 1 - n)])


def _taken(x, count, axis, chunks):
    x = jnp.asarray(x)
    axis = axis % x.ndim
    if x.shape[axis] % (2 * count):
        raise ValueError(f"zigzag: an axis of {x.shape[axis]} cannot be cut into 2 * {count} equal chunks")
    cut = x.reshape(*x.shape[:axis], 2 * count, x.shape[axis] // (2 * count), *x.shape[axis + 1 :])
    return jnp.take(cut, chunks, axis=axis).reshape(x.shape)

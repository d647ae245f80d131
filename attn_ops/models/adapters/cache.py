"""The caches of KerasHub: `[batch, 2, max_length, num_kv_heads, head_dim]`, keys and values."""

from __future__ import annotations

from keras import ops


def update(cache, index, key, value):
    """The keys and values to attend to, and the cache, with the new ones written from position ``index`` on.

    Without a cache these are ``key`` and ``value`` themselves, and without an index those of the cache alone.
    """
    if cache is None:
        return key, value, None
    keys, values = cache[:, 0], cache[:, 1]
    if index is None:
        return keys, values, cache
    start = [0, index, 0, 0]
    keys, values = ops.slice_update(keys, start, key), ops.slice_update(values, start, value)
    return keys, values, ops.stack([keys, values], axis=1)

"""The caches of KerasHub: `[batch, 2, max_length, num_kv_heads, head_dim]`, keys and values."""

from __future__ import annotations

from keras import ops

from attn_ops.generation.cache import KVCache
from attn_ops.layers.backend import backend


def update(cache, index, key, value):
    """The keys and values to attend to, and the cache, with the new ones written from position ``index`` on.

    Without a cache these are ``key`` and ``value`` themselves, and without an index those of the cache alone. In loops the new
    rows are written into the memory of the cache.
    """
    if cache is None:
        return key, value, None
    if index is not None:
        cache = backend.append_to_cache(cache, key, value, index)
    return cache[:, 0], cache[:, 1], cache


def attended(query, cache, index, key, value, **options):
    """The attention to a cache, read where it lies, and the cache with the new rows at ``index``.

    Args:
        query, key, value: `[batch, rows, heads, dim]`.
        cache: KerasHub's tensor, or a pair of them, keys and values.
        options: of the attention. The mask is one of ours; what it counts from is the index.
    """
    positions = ops.broadcast_to(ops.cast(index, "int32"), (ops.shape(query)[0],))
    options = {"is_causal": False, **{name: x for name, x in options.items() if name != "query_offset"}}
    if isinstance(cache, tuple):
        cache = backend.expendable(KVCache(*cache, positions))
        out, cache = backend.decode_attention(query, cache, key, value, **options)
        return out, (cache.key, cache.value)
    return backend.attend_stacked(query, cache, key, value, positions, **options)

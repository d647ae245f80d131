"""A cache as an argument of Keras's `Layer.__call__`."""

from __future__ import annotations

import keras

from attn_ops.generation.cache import KVCache


class Kept:
    """A cache on its way through `Layer.__call__`, which would cast a cache of 16 bits to the dtype of the layer."""

    def __init__(self, cache):
        self.cache = cache


def kept(cache):
    """``cache`` as an argument of `Layer.__call__`."""
    own = isinstance(cache, KVCache) and not any(isinstance(x, keras.KerasTensor) for x in cache)
    return Kept(cache) if own else cache

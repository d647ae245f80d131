"""What runs attention to caches: each kind of cache, with new rows, by the implementation that got the call."""

from __future__ import annotations

import importlib.util

import ml_dtypes
import numpy as np

import attn_ops
from attn_ops.cli import frameworks

_BATCH, _HEADS, _KV_HEADS, _DIM, _LENGTH, _PAGE = 2, 4, 2, 8, 32, 16

# The options of `KVCache.create`, or with "pages" of `PagedKVCache.create`, and the dtype of the queries.
CACHES = {
    "KVCache": {},
    "KVCache, layout BHSD": {"layout": "BHSD"},
    "KVCache, float16": {"dtype": "float16", "queries": "float16"},
    "KVCache, bfloat16, queries float32": {"dtype": "bfloat16"},
    "KVCache, float64": {"dtype": "float64", "queries": "float64"},
    "KVCache, int8": {"dtype": "int8"},
    "KVCache, window": {"window": 8},
    "PagedKVCache": {"pages": True},
    "PagedKVCache, bfloat16": {"pages": True, "dtype": "bfloat16", "queries": ml_dtypes.bfloat16},
    "PagedKVCache, int8": {"pages": True, "dtype": "int8"},
}


def implementations() -> dict:
    """By column, and in it by cache: the implementation that ran a step which appends a row and attends."""
    tf = frameworks.tensorflow()

    from attn_ops.tensorflow import choice

    with tf.device("CPU"):
        steps = {cache: step("tensorflow", **options) for cache, options in CACHES.items()}

        def answers():
            return {cache: _ran(choice, run) for cache, run in steps.items()}

        found = {
            "TensorFlow": answers(),
            "tf.function": frameworks.traced(answers),
            "XLA": frameworks.traced(answers, jit_compile=True),
        }
    if importlib.util.find_spec("jax") is not None:
        found["JAX"] = _on_jax()
    return found


def _on_jax():
    from attn_ops.jax import choice

    with frameworks.jax_on_cpu_in_float64():
        return {cache: _ran(choice, step("jax", **options)) for cache, options in CACHES.items()}


def _ran(choice, run):
    before = choice.calls.copy()
    run()
    return ", ".join(choice.calls - before)


def step(framework, dtype="float32", queries="float32", pages=False, **options):
    """A step with such a cache, one row more of two sequences, to be called."""
    functions = attn_ops.jax if framework == "jax" else attn_ops
    q, k, v = rows(queries, options.get("layout", "BSHD"))
    if pages:
        cache = attn_ops.PagedKVCache.create(8, _PAGE, _KV_HEADS, _DIM, dtype, framework=framework)
        table, lengths = cache.reserve([cache.allocate() for _ in range(_BATCH)], 1)
        return lambda: functions.paged_attention(q, *cache.pages[0], table, lengths, k, v)
    cache = attn_ops.KVCache.create(_BATCH, _LENGTH, _KV_HEADS, _DIM, dtype, framework=framework, **options)
    return lambda: functions.decode_attention(q, cache, k, v)


def rows(dtype, layout):
    """The new rows of queries, keys and values, random."""
    rng = np.random.default_rng(0)
    heads = _HEADS, _KV_HEADS, _KV_HEADS
    arrays = (rng.normal(size=(_BATCH, 1, n, _DIM)).astype(dtype) for n in heads)
    return tuple(x.swapaxes(1, 2) if layout == "BHSD" else x for x in arrays)

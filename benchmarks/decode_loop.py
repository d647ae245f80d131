"""What `attn_ops.decode_attention` costs in a `tf.while_loop` above its kernel: microseconds of a layer and token.

    python benchmarks/decode_loop.py                              # 8 heads of 64, 1024 keys, 1 thread
    python benchmarks/decode_loop.py --keys 128 4096 --heads 32 --kv-heads 8 --stacked

A token goes through `--layers` caches one after the other, and each gets a new key. The loop without any layer is
measured too and taken off. "kernel" is the same attention to as many caches, called with NumPy arrays and without the
append: what it costs to be called from Python stays in it. Processor time, medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import numpy as np
from peers.base import set_threads

TOKENS = 64


def loop(layers, keys, arguments):
    """A traced function that generates `TOKENS` tokens, the last of which sees ``keys`` keys."""
    import tensorflow as tf

    import attn_ops
    from attn_ops.tensorflow import decode

    heads, kv_heads, dim = arguments.heads, arguments.kv_heads, arguments.head_dim
    start = keys - TOKENS

    def attend(x, cache, at):
        new = x[:, :, :kv_heads]
        if arguments.stacked:
            return decode.attend_stacked(x, cache, new, new, at)
        return attn_ops.decode_attention(x, cache, new, new)

    @tf.function(autograph=False)
    def run(x, caches):
        def body(i, x, caches):
            grown = []
            for cache in caches:
                x, cache = attend(x, cache, i)
                grown.append(cache)
            return i + 1, x, tuple(grown)

        return tf.while_loop(lambda i, *_: i < keys, body, (start, x, caches), maximum_iterations=TOKENS)[1]

    def new_cache():
        if arguments.stacked:
            return tf.random.normal([1, 2, keys, kv_heads, dim])
        cache = attn_ops.KVCache.create(1, keys, kv_heads, dim)
        rows = tf.random.normal([1, start, kv_heads, dim])
        return cache.update(rows, rows)

    caches = tuple(new_cache() for _ in range(layers))
    x = tf.random.normal([1, 1, heads, dim])
    function = run.get_concrete_function(x, caches)
    return lambda: function(x, *tf.nest.flatten(caches)).numpy()


def kernel(keys, arguments):
    from attn_ops import _core

    rng = np.random.default_rng(0)
    query = rng.normal(size=(1, 1, arguments.heads, arguments.head_dim)).astype("float32")
    shape = 1, keys, arguments.kv_heads, arguments.head_dim
    caches = [[rng.normal(size=shape).astype("float32") for _ in range(2)] for _ in range(arguments.layers)]
    options = {"scale": arguments.head_dim**-0.5, "num_threads": arguments.threads}
    return lambda: [_core.forward(query, *cache, **options) for _ in range(TOKENS) for cache in caches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", nargs="+", type=int, default=(1024,))
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--stacked", action="store_true", help="KerasHub's caches, keys and values in one tensor")
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    set_threads(arguments.threads)
    print("| keys | layer and token, µs | kernel, µs | above it, µs |\n|---:|---:|---:|---:|")
    for keys in arguments.keys:
        steps = {"loop": loop(arguments.layers, keys, arguments), "empty": loop(0, keys, arguments)}
        steps["kernel"] = kernel(keys, arguments)
        times = {name: [] for name in steps}
        for step in steps.values():
            step()
        for _ in range(arguments.rounds):
            for name, step in steps.items():
                begin = time.process_time()
                step()
                times[name].append((time.process_time() - begin) / TOKENS * 1e6)
        whole, empty, one = (statistics.median(times[name]) for name in ("loop", "empty", "kernel"))
        layer, one = (whole - empty) / arguments.layers, one / arguments.layers
        print(f"| {keys} | {layer:.1f} | {one:.1f} | {layer - one:.1f} |", flush=True)


if __name__ == "__main__":
    main()

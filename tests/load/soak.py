"""Calls of every kind, again and again, with memory that stays flat.

    python soak.py core|op|xla|errors [--calls 200000] [--warm-up 5000] [--most 5]

Resident memory after the warm-up and at the end may differ by --most MiB; it is told eight times on the way. errors: calls that are
refused. In a process of its own (test_load.py, thinned there).
"""

import argparse
import gc
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:1] = [str(Path(__file__).resolve().parents[1])]

from load import calls


def refused():
    """Bad calls, in every form that finds it out."""
    import attn_ops
    import numpy as np
    import tensorflow as tf
    from attn_ops import _core

    q, k, v, _ = calls.arrays(False)
    tensors = [tf.constant(x) for x in (q, k, v)]

    def call(error, function):
        def run():
            try:
                function()
            except error:
                return []
            raise AssertionError("believed")

        return run

    lengths = np.array([-1, 3], np.int32)
    return {
        "core": call(ValueError, lambda: _core.forward(q, k[..., :5], v)),
        "eager": call(ValueError, lambda: attn_ops.scaled_dot_product_attention(*tensors, window=(-7, 0))),
        "lengths": call(ValueError, lambda: attn_ops.scaled_dot_product_attention(*tensors, key_value_seq_lengths=lengths)),
    }


def made(what):
    if what == "core":
        return calls.core()
    if what == "op":
        return {**calls.op(), **calls.decoding(), **calls.models(2)}
    return refused() if what == "errors" else {**calls.op(wraps=["xla"]), **calls.jax()}


def resident():
    """In MiB."""
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096 / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["core", "op", "xla", "errors"])
    parser.add_argument("--calls", type=int, default=200_000)
    parser.add_argument("--warm-up", type=int, default=5_000)
    parser.add_argument("--most", type=float, default=5.0, help="MiB that may be more at the end")
    arguments = parser.parse_args()
    repeated = list(made(arguments.what).values())
    for i in range(arguments.warm_up):
        repeated[i % len(repeated)]()
    before, eighth = resident(), max(1, arguments.calls // 8)
    print(f"{before:.1f} MiB after {arguments.warm_up} calls", flush=True)
    for i in range(arguments.calls):
        repeated[i % len(repeated)]()
        if (i + 1) % eighth == 0:
            print(f"{resident() - before:+.2f} MiB after {i + 1} more", flush=True)
    grown = resident() - before
    print(f"{arguments.what}: {grown:+.2f} MiB over {arguments.calls} calls")
    if grown > arguments.most:
        sys.exit(f"memory grew by more than {arguments.most} MiB")
    print("done")


if __name__ == "__main__":
    main()

"""Random calls of `attn_ops._core` on guarded memory, in a process of its own (test_memory_safety.py): they give the same
bits as on ordinary memory, whatever lies around the arrays and in the workspace. A stray access ends the process.

    python calls.py <dtype> <isa> <number of calls> <seed> [bytes that workspaces are too short]
"""

import sys

import guarded
import ml_dtypes  # noqa: F401 - NumPy knows bfloat16 then
import numpy as np
from attn_ops import _core as core

# Below, at and above vectors, groups of 4 keys, blocks of 128 keys, splits of 512 keys and chunks of 512 rows.
QUERIES = (0, 1, 1, 1, 2, 3, 5, 8, 17, 40, 97, 150, 700)
KEYS = (0, 1, 3, 4, 7, 16, 33, 65, 127, 128, 129, 260, 700, 1100)
DIMS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 64)


class Call:
    """Arrays and options; those of the first axis-1 extent, `q_like` and `k_like`, may be laid out anyhow."""

    def __init__(self, rng, dtype, isa):
        batch, kv_heads, group = (int(rng.choice(n)) for n in ((1, 1, 2), (1, 2, 3), (1, 1, 2, 4)))
        queries, keys, dim = (int(rng.choice(n)) for n in (QUERIES, KEYS, DIMS))
        value_dim = int(rng.choice((0, *DIMS, dim, dim)))
        heads = kv_heads * group
        self.layout = str(rng.choice(["BSHD", "BHSD"]))

        def tensor(*shape):
            x = rng.normal(size=shape).astype(dtype)
            return x if self.layout == "BSHD" else x.swapaxes(1, 2)

        self.arrays = {
            "q": tensor(batch, queries, heads, dim),
            "k": tensor(batch, keys, kv_heads, dim),
            "v": tensor(batch, keys, kv_heads, value_dim),
        }
        self.d_out = tensor(batch, queries, heads, value_dim)
        self.d_lse = rng.normal(size=(batch, heads, queries)).astype("float64" if dtype == "float64" else "float32")

        def scores():
            return [int(rng.choice([1, n])) for n in (batch, heads, queries, keys)]

        self.options = {"layout": self.layout, "isa": isa, "num_threads": int(rng.integers(1, 4))}
        if rng.random() < 0.4:
            self.options |= {"window_left": int(rng.integers(-1, 40)), "window_right": int(rng.integers(-1, 9))}
            self.options["bottom_right"] = bool(rng.random() < 0.5)
        if rng.random() < 0.3:
            self.options |= {"dropout_rate": 0.3, "dropout_seed": 5}
        if rng.random() < 0.3:
            self.options["query_lengths"] = rng.integers(0, queries + 1, batch).astype(rng.choice(["i2", "i8"]))
        if rng.random() < 0.4:
            self.options["key_lengths"] = rng.integers(0, keys + 1, batch).astype(rng.choice(["i4", "u8"]))
        self.views = {"masks": [rng.random(scores()) < 0.7 for _ in range(rng.choice((0, 0, 1, 2, 4)))]}
        if rng.random() < 0.4:
            self.views["bias"] = rng.normal(size=scores()).astype(dtype)
        self.kept = str(rng.choice(["int8", "float16", "bfloat16"])) if dtype != "float64" and rng.random() < 0.3 else None
        if self.kept is not None:  # a cache of another dtype than the queries, which has no gradient
            for name in ("k", "v"):
                self.arrays[name] = (self.arrays[name].astype("float32") * 30).clip(-127, 127).astype(self.kept)
            if self.kept == "int8":
                for name in ("k", "v"):
                    self.options[f"{name}_scales"] = rng.random(self.arrays[name].shape[:3]).astype("float32")
        self.seed = int(rng.integers(2**32))

    def __str__(self):
        shapes = {name: x.shape for name, x in self.arrays.items()}
        views = {name: [x.shape for x in (views if name == "masks" else [views])] for name, views in self.views.items()}
        return f"{shapes} {views} {self.options}"

    def ordinary(self):
        return self._run(self._places(whole=True))

    def on_guarded_memory(self, **how):
        with guarded.guarded(**how):
            return self._run(self._places(whole=how.get("before", False)))

    def _places(self, whole):
        """Where the arrays lie: the strides are the same each time. Unless ``whole``, keys never read are not there."""
        rng = np.random.default_rng(self.seed)
        if rng.random() < 0.5:
            return lambda x, rows=None: guarded.copy(np.ascontiguousarray(x))
        return lambda x, rows=None: guarded.scattered(x, rng, rows, whole)

    def _run(self, place):
        arrays = {name: place(x, self._rows(name)) for name, x in self.arrays.items()}
        options = {name: place(x) if isinstance(x, np.ndarray) else x for name, x in self.options.items()}
        options["masks"] = [place(mask) for mask in self.views["masks"]]
        if "bias" in self.views:
            options["bias"] = place(self.views["bias"])
        out, *statistics = core.forward(*arrays.values(), **options)
        if self.kept is not None:
            return [x.tobytes() for x in (out, *statistics)]
        d_out, d_lse = place(self.d_out), place(self.d_lse)
        gradients = core.backward(*arrays.values(), place(out), place(statistics[-1]), d_out, d_lse=d_lse, **options)
        return [x.tobytes() for x in (out, *statistics, *gradients) if x is not None]

    def _rows(self, name):
        """How many keys there really are, where `scattered` can leave the others out."""
        lengths = self.options.get("key_lengths")
        movable = self.layout == "BSHD" and self.arrays["q"].shape[0] == 1
        return int(lengths[0]) if name in ("k", "v") and lengths is not None and movable else None


def main(dtype, isa, number, seed, shortens=0):
    rng = np.random.default_rng(int(seed))
    for i in range(int(number)):
        call = Call(rng, dtype, isa)
        print(i, call, flush=True)
        wanted = call.ordinary()
        for how in ({"poison": 0xFF}, {"poison": 0x7F, "before": True}):
            assert call.on_guarded_memory(**how, shortens=int(shortens)) == wanted, how
    assert guarded.workspaces() >= int(number), "the workspaces were not guarded"
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

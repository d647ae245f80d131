"""Malformed calls of whole graphs and of what generation keeps, like those of malformed.py (test_memory_safety.py):

    python malformed_models.py graph        the operators in a graph whose shapes are known only when it runs
    python malformed_models.py saved        SavedModels whose graph was edited: attributes, types and inputs of the operators
    python malformed_models.py caches       decode_attention, eager and in functions, and KVCache
    python malformed_models.py pages        paged_attention and its pool
"""

import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:1] = [str(Path(__file__).resolve().parents[1])]

import numpy as np

from memory_safety import malformed

BIG = (2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)


def graph_calls():
    """Those of tensorflow_calls that have the dtypes of the good call, through one function: only kernels can refuse them."""
    import tensorflow as tf

    for name, call, arguments, bad in malformed.tensorflow_calls():
        bad = list(bad)
        specs = {key: tf.TensorSpec(None, arguments[key].dtype) for key in bad[0][1]}
        function = tf.function(lambda a, call=call: call(a), input_signature=[specs], autograph=False)

        def run(a, function=function):
            return function({key: tf.constant(a[key]) for key in specs})

        same = ((what, a) for what, a in bad if all(x.dtype == arguments[key].dtype for key, x in a.items()))
        yield f"{name} in a graph", run, arguments, same


def saved_calls():
    """Each edit goes through a file."""
    import attn_ops
    import tensorflow as tf
    from tensorflow.core.protobuf import saved_model_pb2

    rng = np.random.default_rng(0)
    q, k = (tf.constant(rng.standard_normal((2, n, heads, 8)).astype("float32")) for n, heads in ((5, 4), (7, 2)))

    class Model(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec(None, "float32")] * 2)
        def attend(self, q, k):
            return attn_ops.scaled_dot_product_attention(
                q, k, k, is_causal=True, dropout_rate=0.2, dropout_seed=(1, 2), logits_soft_cap=9.0, implementation="fused"
            )

    folder = Path(tempfile.mkdtemp())
    tf.saved_model.save(Model(), str(folder))
    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())

    def nodes(saved):
        graph = saved.meta_graphs[0].graph_def
        all_nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
        return [node for node in all_nodes if node.op == "AttnOps>Forward"]

    assert nodes(saved)

    def call(edit):
        changed = saved_model_pb2.SavedModel()
        changed.CopyFrom(saved)
        for node in nodes(changed):
            edit(node)
        (folder / "saved_model.pb").write_bytes(changed.SerializeToString())
        return tf.saved_model.load(str(folder)).attend(q, k)

    yield "a saved graph", call, lambda node: None, edits(nodes(saved)[0])


def edits(good):
    """(what was changed, a function that changes a node so)."""

    def setting(name, kind, value):
        def edit(node):
            node.attr[name].Clear()
            if kind == "s":
                node.attr[name].s = value.encode("latin1")
            elif kind == "list":
                node.attr[name].list.i.extend(value)
            else:
                setattr(node.attr[name], kind, value)

        return edit

    for name in sorted(good.attr):
        kind = good.attr[name].WhichOneof("value")
        if name.startswith("_"):
            continue
        # A list of 2^31 inputs TensorFlow itself makes room for.
        numbers = [-1, -7, 5] if name.startswith("num_") else [-1, -7, 5, *BIG, -(2**63)]
        others = {"i": numbers, "s": ["", "nan", "inf", "-1.5", "1e999", "SBHD", "\xff\x00", "9" * 5000]}
        legal = {
            "window_left": [-1, 5, *BIG], "window_right": [-1, 5, *BIG], "block_q": [5, *BIG, -1, -7, -(2**63)],
            "block_k": [5, *BIG, -1, -7, -(2**63)], "scale": ["", "-1.5"], "soft_cap": [""], "halves": [],
        }  # fmt: skip - block sizes mean nothing without blocks
        for value in others.get(kind, []):
            if value not in legal.get(name, []):
                yield f"{name}={value!r:.20}", setting(name, kind, value)
        if kind in ("i", "s", "type"):
            yield f"{name} a list", setting(name, "list", [1, 2])
            yield f"{name} a bool", setting(name, "b", True)
        if kind == "type":
            for value in (3, 10, 14, 20, 21, 0, 77):
                yield f"{name}=type {value}", setting(name, "type", value)

    def less(node, at):
        del node.input[at]

    def more(node):
        node.input.append(node.input[0])

    def swapped(node):
        node.input[0], node.input[1] = node.input[1], node.input[0]

    for at in range(4):
        yield f"without input {at}", lambda node, at=at: less(node, at)
    yield "an input more", more
    yield "q and k swapped", swapped
    yield "another operator", lambda node: setattr(node, "op", "AttnOps>Backward")
    yield "no operator", lambda node: setattr(node, "op", "AttnOps>Nothing")


def changed(good, legal=lambda name, x: False):
    """The bad calls of a good one of arrays by name."""
    for name, x in good.items():
        if not isinstance(x, np.ndarray):
            continue
        for what, new in malformed.replaced(name, x):
            if not legal(name, new):
                yield f"{name} {what}", {**good, name: new}


def _forms(name, call, good, bad):
    """Eager, and in a function that knows extents only when it runs."""
    import tensorflow as tf

    def eager(a):
        return call({key: tf.constant(x) if isinstance(x, np.ndarray) else x for key, x in a.items()})

    def graph(a):
        arrays = {key: x for key, x in a.items() if isinstance(x, np.ndarray)}
        memory = ("key", "value", "k_pages", "v_pages")  # whose room must be known
        shapes = {key: (None, *x.shape[1:]) if key in memory and x.ndim else [None] * x.ndim for key, x in arrays.items()}
        specs = {key: tf.TensorSpec(shapes[key], x.dtype) for key, x in arrays.items()}
        function = tf.function(lambda arrays: call({**a, **arrays}), input_signature=[specs], autograph=False)
        return function({key: tf.constant(x) for key, x in arrays.items()})

    bad = list(bad)
    yield f"{name}, eager", eager, good, bad
    yield f"{name}, in a function", graph, good, bad


def cache_calls():
    import attn_ops

    rng = np.random.default_rng(0)
    rows = {name: rng.standard_normal((2, 3, heads, 8)).astype("float32") for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    memory = {name: np.zeros((2, 16, 2, 8), "float32") for name in ("key", "value")}
    good = {**rows, **memory, "lengths": np.int32([4, 13])}

    def attend(a):
        cache = attn_ops.KVCache(a["key"], a["value"], a["lengths"])
        return attn_ops.decode_attention(a["q"], cache, a["k"], a["v"])[0]

    def legal(name, x):
        # Rows are cast to the cache, and queries may have a dtype of their own.
        floats = x.dtype in (np.float16, np.float32, np.float64)
        if name == "q" and floats and x.ndim == 4 and x.shape == (2, 3, x.shape[2], 8):
            return x.shape[2] % 2 == 0  # more heads
        integers = name == "lengths" and x.dtype == np.int8 and x.shape == (2,)
        return integers or (name in ("k", "v") and floats and x.shape == good[name].shape)

    yield from _forms("decode_attention", attend, good, changed(good, legal))

    def create(extents):
        return attn_ops.KVCache.create(*extents[:4], extents[4], framework="tensorflow")

    wrong = [(what, (*args, "float32")) for what, args in _wrong_extents((2, 16, 2, 8))]
    wrong += [(f"dtype {dtype}", (2, 16, 2, 8, dtype)) for dtype in ("int32", "bool", "complex64", "nothing", None, 7)]
    yield "KVCache.create", create, (2, 16, 2, 8, "float32"), wrong


def _wrong_extents(good):
    for axis in range(len(good)):
        for value in (0, -1, 2**31, 2**63, 1.5, "2", None, True):
            yield f"extent {axis}={value!r}", (*good[:axis], value, *good[axis + 1 :])


def page_calls():
    import attn_ops

    rng = np.random.default_rng(0)
    good = {
        "q": rng.standard_normal((2, 1, 4, 8)).astype("float32"),
        "k_pages": np.zeros((5, 16, 2, 8), "float32"),
        "v_pages": np.zeros((5, 16, 2, 8), "float32"),
        "block_table": np.int32([[0, 3], [4, 1]]),
        "lengths": np.int32([20, 32]),
    }

    def attend(a):
        return attn_ops.paged_attention(a["q"], a["k_pages"], a["v_pages"], a["block_table"], a["lengths"])

    def legal(name, x):
        if name == "block_table" and x.dtype == np.int32 and x.ndim == 2 and x.shape[0] == 2 and x.shape[1] >= 2:
            return 0 <= x.min() and x.max() < 5
        floats = x.dtype in (np.float16, np.float32, np.float64)
        if name in ("block_table", "lengths"):
            return x.dtype == np.int8 and x.shape == good[name].shape
        if name == "v_pages":  # a value_dim of its own
            return x.dtype == np.float32 and x.ndim == 4 and x.shape[:3] == (5, 16, 2)
        return name == "q" and floats and x.ndim == 4 and x.shape[::3] == (2, 8) and x.shape[2] % 2 == 0

    yield from _forms("paged_attention", attend, good, changed(good, legal))

    def create(extents):
        return attn_ops.PagedKVCache.create(*extents, framework="tensorflow")

    yield "PagedKVCache.create", create, (4, 16, 2, 8), _wrong_extents((4, 16, 2, 8))


KINDS = {"graph": graph_calls, "saved": saved_calls, "caches": cache_calls, "pages": page_calls}

if __name__ == "__main__":
    malformed.KINDS |= KINDS
    malformed.main(*sys.argv[1:])

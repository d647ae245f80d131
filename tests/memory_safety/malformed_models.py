"""Malformed calls of whole graphs and of what generation keeps, like those of malformed.py (test_memory_safety.py):

    python malformed_models.py op           scaled_dot_product_attention, eager and in functions
    python malformed_models.py graph        the operators in a graph whose shapes, or ranks too, are known only when it runs
    python malformed_models.py saved        SavedModels whose graph was edited: attributes, types and inputs of the operators
    python malformed_models.py caches       decode_attention, eager and in functions, and KVCache
    python malformed_models.py pages        paged_attention and its pool
"""

import functools
import itertools
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:1] = [str(Path(__file__).resolve().parents[1])]

import numpy as np

from memory_safety import malformed

BIG = (2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)


def op_calls():
    """The public function. Its rules are told of in the options' own tests too; here they are broken by generated arrays."""
    import attn_ops

    good = {**malformed.tensors(), **malformed.extras(), "seed": np.int64([3, 4])}
    good = {name: good[name] for name in OP_ARRAYS}
    good["relative_bias"] = good["relative_bias"].T

    def attend(a, laid, layout="BSHD", **more):
        options = {"dropout_rate": 0.2, "layout": layout, "implementation": "fused", **more}
        return attn_ops.scaled_dot_product_attention(
            *(laid(a[name]) for name in "qkv"), bias=a["bias"], mask=a["mask"], query_seq_lengths=a["query_lengths"],
            key_value_seq_lengths=a["key_lengths"], dropout_seed=a["seed"], query_offset=a["query_offset"],
            alibi_slopes=a["slopes"], relative_bias=a["relative_bias"], sinks=a["sinks"], **options,
        )  # fmt: skip

    def legal(name, x):
        if name in malformed.INTEGERS or name == "seed":
            shapes = [good[name].shape, *([()] if name in ("query_offset", "seed") else [])]
            return x.shape in shapes and x.dtype in (np.int8, np.int32, np.int64)
        if name == "v" and x.ndim == 4 and x.shape[:3] == good[name].shape[:3] and x.dtype == np.float32:
            return True  # a value_dim of its own
        if good[name].dtype == np.float32 and x.shape == good[name].shape and x.dtype in (np.float16, np.float64):
            return True  # arrays are cast to a dtype for all
        return name == "relative_bias" and malformed.longer_table(name, x.T)

    for layout in ("BSHD", "BHSD"):
        laid = _laid(layout)
        yield from _forms(f"the op, {layout}", lambda a, n=layout, f=laid: attend(a, f, n), good, changed(good, legal))
    options = [(f"{name}={value!r}", {name: value}) for name, values in WRONG_OPTIONS.items() for value in values]
    yield "the op's options", lambda more: attend(good, _laid("BSHD"), **more), {}, options


OP_ARRAYS = ("q", "k", "v", "bias", "mask", "query_lengths", "key_lengths", "query_offset", "slopes", "relative_bias", "sinks", "seed")
WRONG_OPTIONS = {
    "scale": ("x", [1.0], 1j, np.nan),
    "is_causal": ("yes", 0.5),
    "causal_alignment": ("right", None, 3, ""),
    "window": (3, (1,), (1, 2, 3), (-2, 0), (1.5, 0), ("a", 0), "left"),
    "dropout_rate": (-0.1, 1.0, 2, np.nan, "x", None),
    "layout": ("SBHD", None, 0, "bshd"),
    "logits_soft_cap": (0.0, -1.0, np.nan, np.inf, "x"),
    "return_lse": ("yes", 0.5),
    "implementation": ("fast", 3, ""),
}


def _laid(layout):
    """Puts rank 4 in this layout, from BSHD; what is of another rank stays."""
    import tensorflow as tf

    return lambda x: x if layout == "BSHD" or x.shape.rank != 4 else tf.transpose(x, (0, 2, 1, 3))


def graph_calls():
    """Those of tensorflow_calls that have the dtypes of the good call, through one function: only kernels can refuse them."""
    import tensorflow as tf

    for name, call, arguments, bad in malformed.tensorflow_calls():
        bad = list(bad)
        names = list(bad[0][1])
        same = [(what, a) for what, a in bad if all(x.dtype == arguments[key].dtype for key, x in a.items())]
        ranked = [(what, a) for what, a in same if all(x.ndim == arguments[key].ndim for key, x in a.items())]
        for form, known, wrong in (("of any rank", False, same), ("of known ranks", True, ranked)):
            shapes = {key: [None] * arguments[key].ndim if known else None for key in names}
            specs = {key: tf.TensorSpec(shapes[key], arguments[key].dtype) for key in names}
            function = tf.function(lambda a, call=call: call(a), input_signature=[specs], autograph=False)

            def run(a, function=function):
                return function({key: tf.constant(a[key]) for key in names})

            yield f"{name} in a graph {form}", run, arguments, wrong


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

    yield "a saved graph", call, lambda node: None, [*attribute_edits(nodes(saved)[0]), *INPUT_EDITS, *two_at_once(nodes(saved)[0])]


def two_at_once(good):
    """Every other pair of changes of two attributes."""
    pairs = itertools.combinations(attribute_edits(good), 2)
    pairs = [pair for pair in pairs if len({what.partition("=")[0].partition(" ")[0] for what, _ in pair}) == 2]
    for (what, first), (more, second) in pairs[::2]:
        yield f"{what} and {more}", lambda node, first=first, second=second: (first(node), second(node))


def attribute_edits(good):
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


INPUT_EDITS = [
    *((f"without input {at}", lambda node, at=at: node.input.pop(at)) for at in range(4)),
    ("an input more", lambda node: node.input.append(node.input[0])),
    ("q and k swapped", lambda node: node.input.insert(0, node.input.pop(1))),
    ("another operator", lambda node: setattr(node, "op", "AttnOps>Backward")),
    ("no operator", lambda node: setattr(node, "op", "AttnOps>Nothing")),
]


def changed(good, legal=lambda name, x: False):
    """The bad calls of a good one of arrays by name."""
    for name, x in good.items():
        if not isinstance(x, np.ndarray):
            continue
        for what, new in malformed.replaced(name, x):
            if not legal(name, new):
                yield f"{name} {what}", {**good, name: new}


def _forms(name, call, good, bad, traced=True):
    """Eager, and in a function that knows extents only when it runs."""
    import tensorflow as tf

    def eager(a):
        return call({key: tf.constant(x) if isinstance(x, np.ndarray) else x for key, x in a.items()})

    def graph(a):
        arrays = {key: x for key, x in a.items() if isinstance(x, np.ndarray)}
        memory = ("k_pages", "v_pages")  # whose room must be known
        shapes = {key: (None, *x.shape[1:]) if key in memory and x.ndim else [None] * x.ndim for key, x in arrays.items()}
        specs = {key: tf.TensorSpec(shapes[key], x.dtype) for key, x in arrays.items()}
        function = tf.function(lambda arrays: call({**a, **arrays}), input_signature=[specs], autograph=False)
        return function({key: tf.constant(x) for key, x in arrays.items()})

    bad = list(bad)
    yield f"{name}, eager", eager, good, bad
    if traced:
        yield f"{name}, in a function", graph, good, bad


def cache_calls():
    import attn_ops
    from attn_ops.generation import cache

    rng = np.random.default_rng(0)
    rows = {name: rng.standard_normal((2, 3, heads, 8)).astype("float32") for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    memory = {name: np.zeros((2, 16, 2, 8), "float32") for name in ("key", "value")}
    good = {**rows, **memory, "lengths": np.int32([4, 13])}

    def cache_of(a, layout):
        laid = _laid(layout)
        return cache.kind(layout, None, False)(laid(a["key"]), laid(a["value"]), a["lengths"])

    def attend(a, layout):
        laid = _laid(layout)
        return attn_ops.decode_attention(laid(a["q"]), cache_of(a, layout), laid(a["k"]), laid(a["v"]))[0]

    def update(a):
        return cache_of(a, "BSHD").update(a["k"], a["v"]).key

    def legal(name, x):
        # Rows are cast to the cache, and queries may have a dtype of their own.
        floats = x.dtype in (np.float16, np.float32, np.float64)
        if name == "q" and floats and x.ndim == 4 and x.shape == (2, 3, x.shape[2], 8):
            return x.shape[2] % 2 == 0  # more heads
        integers = name == "lengths" and x.dtype == np.int8 and x.shape == (2,)
        return integers or (name in ("k", "v") and floats and x.shape == good[name].shape)

    for layout in ("BSHD", "BHSD"):
        call = functools.partial(attend, layout=layout)
        yield from _forms(f"decode_attention, {layout}", call, good, changed(good, legal), layout == "BSHD")
    updating = {name: x for name, x in good.items() if name != "q"}
    yield from _forms("KVCache.update", update, updating, changed(updating, legal))

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

    new = {name: rng.standard_normal((2, 1, 2, 8)).astype("float32") for name in ("k", "v")}

    def attend(a, layout):
        laid = _laid(layout)
        own = [laid(a[name]) for name in new if name in a]
        pages = laid(a["k_pages"]), laid(a["v_pages"])
        return attn_ops.paged_attention(laid(a["q"]), *pages, a["block_table"], a["lengths"], *own, layout=layout)

    def legal(name, x):
        if name == "block_table" and x.dtype == np.int32 and x.ndim == 2 and x.shape[0] == 2 and x.shape[1] >= 2:
            return 0 <= x.min() and x.max() < 5
        floats = x.dtype in (np.float16, np.float32, np.float64)
        if name in ("block_table", "lengths"):
            return x.dtype == np.int8 and x.shape == good[name].shape
        if name in new:  # cast to the dtype of the pages
            return floats and x.shape == new[name].shape
        if name == "v_pages":  # a value_dim of its own
            return x.dtype == np.float32 and x.ndim == 4 and x.shape[:3] == (5, 16, 2)
        return name == "q" and floats and x.ndim == 4 and x.shape[::3] == (2, 8) and x.shape[2] % 2 == 0

    def legal_beside_new(name, x):
        return name != "v_pages" and legal(name, x)

    for layout in ("BSHD", "BHSD"):
        call = functools.partial(attend, layout=layout)
        yield from _forms(f"paged_attention, {layout}", call, good, changed(good, legal), layout == "BSHD")
        more = {**good, **new}
        yield from _forms(f"paged_attention of new rows, {layout}", call, more, changed(more, legal_beside_new), layout == "BSHD")

    def create(extents):
        return attn_ops.PagedKVCache.create(*extents, framework="tensorflow")

    yield "PagedKVCache.create", create, (4, 16, 2, 8), _wrong_extents((4, 16, 2, 8))


KINDS = {"op": op_calls, "graph": graph_calls, "saved": saved_calls, "caches": cache_calls, "pages": page_calls}

if __name__ == "__main__":
    malformed.KINDS |= KINDS
    malformed.main(*sys.argv[1:])

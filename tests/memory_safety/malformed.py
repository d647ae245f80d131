"""Malformed calls, in a process of its own (test_memory_safety.py): a good call with one thing changed must end in an
error. One that is believed writes where it may not, and may end the process.

    python malformed.py core         of attn_ops._core
    python malformed.py tensorflow   of the operators
    python malformed.py xla          of the custom calls for XLA, through jax.ffi

The good calls have every kind of array there is. Kinds may be joined by commas. A number behind them makes one of so many of the
calls. Each process has limits of time and memory.
"""

import itertools
import resource
import sys
import zlib

import numpy as np

BATCH, QUERIES, KEYS, HEADS, KV_HEADS, DIM, VALUE_DIM = 2, 5, 7, 4, 2, 8, 3
SHAPES = {
    "q": (BATCH, QUERIES, HEADS, DIM),
    "k": (BATCH, KEYS, KV_HEADS, DIM),
    "v": (BATCH, KEYS, KV_HEADS, VALUE_DIM),
    "d_out": (BATCH, QUERIES, HEADS, VALUE_DIM),
    "d_lse": (BATCH, HEADS, QUERIES),
    "bias": (BATCH, HEADS, QUERIES, KEYS),
}


def tensors():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype("float32") for name, shape in SHAPES.items()}


BLOCK = 4  # rows and keys of the blocks: 7, which others are tried with, gives other counts


def extras():
    return {
        "mask": np.ones((BATCH, 1, 1, KEYS), bool),
        "query_lengths": np.int32([5, 2]),
        "key_lengths": np.int32([7, 3]),
        "key_begin": np.zeros((BATCH, QUERIES), np.int32),
        "key_end": np.full((BATCH, QUERIES), KEYS, np.int32),
        "query_offset": np.int32([0, 3]),
        "query_ids": np.zeros((BATCH, QUERIES), np.int32),
        "key_ids": np.zeros((BATCH, KEYS), np.int32),
        "blocks": np.ones((BATCH, HEADS, -(-QUERIES // BLOCK), -(-KEYS // BLOCK)), bool),
        "slopes": np.float32(np.full((BATCH, HEADS), 0.5)),
        "relative_bias": np.float32(np.full((HEADS, 5), 0.25)),
        "sinks": np.float32(np.full(HEADS, 0.125)),
    }


def replaced(name, x):
    """(what was changed, the array so changed)."""
    dtypes = ["bool", "int32", "int8", "float16", "float32", "float64", "complex64"]
    for dtype in dtypes + ["uint8", "int64"] * (x.dtype.kind == "f"):
        if dtype != x.dtype:
            yield f"as {dtype}", x.astype(dtype)
    yield "of a lower rank", x.reshape(-1) if x.ndim > 1 else x[0]
    yield "of a higher rank", x[None]
    for axis in range(x.ndim):
        shape = list(x.shape)
        for extent in sorted({x.shape[axis] * 3 + 4, x.shape[axis] + 1, x.shape[axis] - 1, 0} - {1}):  # 1 may broadcast
            shape[axis] = extent
            yield f"of shape {shape}", np.zeros(shape, x.dtype)
    if x.dtype == np.int32 and not name.endswith("ids"):  # lengths and positions
        yield "too large", np.full_like(x, 2**31 - 1)
        yield "negative", np.full_like(x, -1)
    if name in ("key_begin", "key_end"):
        yield "moving back", np.broadcast_to(np.arange(x.shape[1], dtype=x.dtype)[::-1], x.shape)
    if name == "slopes":
        yield "of NaN", np.full_like(x, np.nan)
        yield "too steep", np.full_like(x, 1e30)


INTEGERS = [name for name, x in extras().items() if x.dtype == np.int32]


def longer_table(name, x):
    """A table of relative_bias may reach as far as it likes."""
    return name == "relative_bias" and x.dtype == np.float32 and x.ndim == 2 and x.shape[0] == HEADS and x.shape[1] % 2 == 1


def malformed(arrays, legal):
    """(what was changed, the arrays of a call), without those that are `legal(name, array)` all the same."""
    for name, x in arrays.items():
        for what, new in replaced(name, x):
            if not legal(name, new):
                yield f"{name} {what}", {**arrays, name: new}
    floats = {name: x for name, x in arrays.items() if x.dtype == np.float32 and x.ndim == 4 and name != "blocks"}
    yield "every tensor bool", {**arrays, **{name: x.astype(bool) for name, x in floats.items()}}


def core_calls():
    from attn_ops import _core

    def options(a):
        return dict(
            bias=a["bias"], masks=[a["mask"]], query_lengths=a["query_lengths"], key_lengths=a["key_lengths"],
            dropout_rate=0.2, dropout_seed=3, intervals=(a["key_begin"], a["key_end"]), query_offset=a["query_offset"],
            segments=(a["query_ids"], a["key_ids"]), blocks=a["blocks"], block_q=BLOCK, block_k=BLOCK, slopes=a["slopes"],
            relative_bias=a["relative_bias"], sinks=a["sinks"], soft_cap=30.0,
        )  # fmt: skip

    def forward(a):
        return _core.forward(a["q"], a["k"], a["v"], **options(a))

    def backward(a):
        arrays = (a[name] for name in ("q", "k", "v", "out", "statistics", "d_out"))
        return _core.backward(*arrays, d_lse=a["d_lse"], **options(a))

    def of_int8(a):
        return _core.forward(a["q"], a["k"], a["v"], k_scales=a["k_scales"], v_scales=a["v_scales"], **options(a))

    def legal(name, x):
        of_another_width = name in INTEGERS and x.dtype == np.int8 and x.shape == extras()[name].shape
        return of_another_width or longer_table(name, x)

    def legal_beside_int8(name, x):
        of_its_own_dtype = name == "q" and x.dtype == np.float16 and x.shape == SHAPES["q"]
        return legal(name, x) or of_its_own_dtype or (name == "v" and x.ndim == 4 and x.shape[:3] == SHAPES["v"][:3] and x.dtype == "int8")

    yield from _two_calls(forward, backward, extras(), legal, mixes=True)
    arrays = {**tensors(), **extras()}
    arrays |= {f"{name}_scales": np.ones(SHAPES[name][:3], "float32") for name in ("k", "v")}
    arrays |= {name: arrays[name].astype("int8") for name in ("k", "v")}
    read = {name: arrays[name] for name in ("q", "k", "v", "k_scales", "v_scales", "bias", *extras())}
    yield "forward of int8", of_int8, arrays, malformed(read, legal_beside_int8)


def tensorflow_calls():
    import tensorflow as tf
    from attn_ops import kernels

    library = kernels.library()

    def lists(a):
        lone = [[a[name]] for name in ("bias", "mask", "query_lengths", "key_lengths", "seed")]
        pairs = [a["key_begin"], a["key_end"]], [a["query_offset"]], [a["query_ids"], a["key_ids"]]
        return *lone, *pairs, *([a[name]] for name in ("blocks", "slopes", "relative_bias", "sinks"))

    attributes = {"dropout_rate": "0.2", "block_q": BLOCK, "block_k": BLOCK, "soft_cap": "30.0"}

    def forward(a):
        a = {name: tf.convert_to_tensor(x) for name, x in a.items()}  # arrays of NumPy would be cast to each other's type
        return library.attn_ops_forward(a["q"], a["k"], a["v"], *lists(a), num_lse=1, **attributes)

    def backward(a):
        a = {name: tf.convert_to_tensor(x) for name, x in a.items()}
        arrays = (a[name] for name in ("q", "k", "v", "out", "statistics", "d_out"))
        return library.attn_ops_backward(*arrays, [a["d_lse"]], *lists(a), **attributes)

    return _two_calls(forward, backward, {**extras(), "seed": np.int64([3, 4])}, longer_table)


def _two_calls(forward, backward, more, legal, mixes=False):
    """(name, call, arguments) of a good call of each and of every malformed one; those come later. ``mixes``: forward takes
    queries of another dtype."""
    arrays = {**tensors(), **more}
    results = forward(arrays)
    statistics = getattr(results, "statistics", results[-1])  # _core gives a tuple without names
    arrays |= {"out": np.asarray(results[0]), "statistics": np.asarray(statistics)}
    read = {name: arrays[name] for name in ("q", "k", "v", "bias", *more)}

    def legal_forward(name, x):  # only backward has been told of value_dim
        if mixes and name == "q" and x.dtype == np.float16 and x.shape == SHAPES["q"]:
            return True
        return legal(name, x) or (name == "v" and x.ndim == 4 and x.shape[:3] == SHAPES["v"][:3] and x.dtype == "float32")

    yield "forward", forward, arrays, malformed(read, legal_forward)
    yield "backward", backward, arrays, malformed(arrays, legal)


def xla_calls():
    for target, results, operands, attributes in recorded():
        parts = results, operands, attributes

        def call(parts, target=target):
            import jax

            results, operands, attributes = parts
            jax.clear_caches()  # int32(1) would find what was compiled for int64(1)
            kernel = jax.ffi.ffi_call(target, results, vmap_method="sequential")
            return jax.block_until_ready(kernel(*operands, **attributes))

        bad = malformed_custom_calls(*parts)
        yield target, call, parts, (x for x in bad if target != "attn_ops.append" or not x[0].endswith(NO_HARM_TO_APPEND))


def recorded():
    """[(target, results, operands, attributes)]: what attn_ops.jax hands to the kernels."""
    import attn_ops.jax
    import jax
    import jax.numpy as jnp
    from attn_ops import masks
    from attn_ops.jax import forms

    calls, kernel = {}, forms._call

    def record(target, results, operands, attributes, workspace):
        # They were traced, more than once: ones are lengths, a seed and a mask as well.
        calls[target] = (target, results, tuple(np.ones(x.shape, x.dtype) for x in operands), attributes)
        return kernel(target, results, operands, attributes, workspace)

    def attend(q, k, v, bias, slopes, table, sinks):
        more = extras()
        parts = [
            masks.intervals(more["key_begin"], more["key_end"]),
            masks.segments(more["query_ids"], more["key_ids"]),
            masks.block_sparse(more["blocks"], BLOCK, BLOCK),
        ]
        return attn_ops.jax.scaled_dot_product_attention(
            q, k, v, bias=bias, mask=masks.combined([jnp.asarray(more["mask"]), *parts]),
            query_seq_lengths=more["query_lengths"], key_value_seq_lengths=more["key_lengths"],
            query_offset=more["query_offset"], dropout_rate=0.2, dropout_seed=(3, 4), return_lse=True,
            alibi_slopes=slopes, relative_bias=table, sinks=sinks, logits_soft_cap=30.0, implementation="fused",
        )  # fmt: skip

    given = [tensors()[name] for name in ("q", "k", "v", "bias")]
    given += [extras()["slopes"], extras()["relative_bias"].T, extras()["sinks"]]
    forms._call = record
    results, pull = jax.vjp(attend, *map(jnp.asarray, given))
    pull(tuple(map(jnp.ones_like, results)))
    forms._call = kernel
    assert list(calls) == ["attn_ops.forward", "attn_ops.backward"]
    ones = np.ones((2, 3), "int32")
    memory = tuple(np.ones(shape, "float32") for shape in ((5, 16, 2, 4), (2, 3, 2, 4)))
    append = [jax.ShapeDtypeStruct(memory[0].shape, "float32")], (*memory, ones, ones), {"axis": np.int64(1)}
    return [*calls.values(), ("attn_ops.append", *append)]


# What is no place is not written; a call without results is not made.
NO_HARM_TO_APPEND = ("too large", "negative", "result 0 missing")
# Calls saved earlier do not have them, and nothing of this call becomes wrong by that.
MAY_BE_MISSING = ("allow_tf32", "halves", "num_block_table", "num_scales", "soft_cap")


def malformed_custom_calls(results, operands, attributes):
    import jax

    named = {f"operand {i}": x for i, x in enumerate(operands)}
    # JAX makes float32 of float64. A forward call may have a longer table; for a backward one the result would not fit.
    table = lambda x: len(results) < 5 and longer_table("relative_bias", x)
    for what, new in malformed(named, lambda name, x: x.dtype == np.float64 or table(x)):
        as_bool = [jax.ShapeDtypeStruct(x.shape, bool if len(x.shape) == 4 else x.dtype) for x in results]
        yield what, (as_bool if what == "every tensor bool" else results, tuple(new.values()), attributes)
    for i, x in enumerate(operands):
        yield f"operand {i} missing", (results, (*operands[:i], *operands[i + 1 :]), attributes)
        yield f"operand {i} twice", (results, (*operands[:i], x, *operands[i:]), attributes)
    for i, x in enumerate(results):
        others = [(x.shape, "float16"), (x.shape, "bool"), ((int(np.prod(x.shape)),), x.dtype), ((*x.shape, 1), x.dtype)]
        others += [((*x.shape[:axis], n - 1, *x.shape[axis + 1 :]), x.dtype) for axis, n in enumerate(x.shape)]
        yield f"result {i} missing", ((*results[:i], *results[i + 1 :]), operands, attributes)
        yield f"result {i} twice", ((*results[:i], x, *results[i:]), operands, attributes)
        for other in others:
            new = jax.ShapeDtypeStruct(*other)
            if (new.shape, new.dtype) == (x.shape, x.dtype):  # that of one axis, flattened
                continue
            yield f"result {i} as {new}", ((*results[:i], new, *results[i + 1 :]), operands, attributes)
    for name, value in attributes.items():
        rest = {other: v for other, v in attributes.items() if other != name}
        if name not in MAY_BE_MISSING:
            yield f"{name} missing", (results, operands, rest)
        others = ["text", np.int64(7), np.int64(-7), np.int32(1), np.float32(1), np.array([1, 2], "int64")]
        if name.startswith("window"):
            others.remove(np.int64(7))
        if name.startswith("num_"):
            others += [np.int64(2**32 + 1), np.int64(1 - value)]
        for other in others:
            yield f"{name}={other!r}", (results, operands, {**rest, name: other})


def limit_memory():
    """A call that believes an extent would take what there is; so none gets more than 4 GiB beyond what was loaded."""
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**32, resource.RLIM_INFINITY))


KINDS = {"core": core_calls, "tensorflow": tensorflow_calls, "xla": xla_calls}


def main(kinds, every="1"):
    resource.setrlimit(resource.RLIMIT_CPU, (400, 400))
    total = 0
    for target, call, arguments, bad in itertools.chain.from_iterable(KINDS[kind]() for kind in kinds.split(",")):
        call(arguments)
        limit_memory()
        for name, changed in bad:
            total += 1
            if zlib.crc32(f"{target} {name}".encode()) % int(every):
                continue
            print(target, name, flush=True)
            try:
                call(changed)
            except Exception as error:  # noqa: BLE001 - every binding has kinds of its own
                print(" ", type(error).__name__, str(error).split("\n")[0][:200])
            else:
                sys.exit(f"{target}: {name} was believed")
        call(arguments)
    assert total > 20, total
    print(f"{total} calls, of which one in {every} was made")
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

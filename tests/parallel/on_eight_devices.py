"""What test_jax.py runs in a process of its own: JAX and Keras on it, with eight logical devices.

Right values are those of one device, which other tests hold to the specification.
"""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import attn_ops
from attn_ops import masks
from attn_ops.jax import parallel

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import parallel_costs  # noqa: E402

RNG = np.random.default_rng(0)
B, T, H, N, D = 4, 16, 8, 4, 8
attend = attn_ops.jax.scaled_dot_product_attention
DATA, BOTH = P("data"), P("data", None, "model")


def random(*shape):
    return RNG.standard_normal(shape).astype("float32")


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def collectives(text):
    """How many of each there are in the text of a compiled program."""
    names = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    found = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in names}
    return {name: n for name, n in found.items() if n}


def assert_same(found, expected, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=atol, atol=atol), found, expected)


def with_gradients(function, differentiated=(0, 1, 2)):
    """((out, lse), gradients) of it, compiled."""

    def loss(*arguments):
        out, lse = function(*arguments)
        return jnp.sum(jnp.sin(3 * out)) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0)), (out, lse)

    def run(*arguments):
        gradients, results = jax.grad(loss, differentiated, has_aux=True)(*arguments)
        return results, gradients

    return jax.jit(run)


def along_themselves(function, differentiated):
    """The derivative of (out, lse), where that is finite, along the arguments that are differentiated, compiled."""

    def run(*arguments):
        def of(*given):
            out, lse = function(*(dict(zip(differentiated, given)).get(n, x) for n, x in enumerate(arguments)))
            return out, jnp.where(jnp.isfinite(lse), lse, 0)

        given = tuple(arguments[n] for n in differentiated)
        return jax.jvp(of, given, given)[1]

    return jax.jit(run)


def put(mesh, arrays, specs):
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]


def inputs(kv_heads=N, batch=B):
    return [random(batch, T, H, D), random(batch, T, kv_heads, D), random(batch, T, kv_heads, D)]


# name: arrays beyond the three, how they are divided, which have a gradient
EXTRAS = {
    "bias": (random(1, H, T, T), P(None, "model")),
    "relative_bias": (random(5, H), P()),
    "sinks": (random(H), P("model")),
    "alibi_slopes": (random(H), P()),
    "mask": (RNG.random((B, 1, T, T)) > 0.3, DATA),
    "key_value_seq_lengths": (np.array([T, 3, 0, 9], "int32"), DATA),
}
GRADIENTS = ("bias", "relative_bias", "sinks")


def extras_case(**fixed):
    def case(*arguments, **options):
        given = dict(zip(EXTRAS, arguments[3:]))
        return attend(*arguments[:3], return_lse=True, is_causal=True, **given, **fixed, **options)

    arrays = [*inputs(), *(x for x, _ in EXTRAS.values())]
    specs = [BOTH] * 3 + [spec for _, spec in EXTRAS.values()]
    return case, arrays, specs, (0, 1, 2, *(3 + list(EXTRAS).index(name) for name in GRADIENTS))


def plain_case(*arguments, **options):
    return attend(*arguments, return_lse=True, window=(5, 2), **options)


CASES = {
    "everything": extras_case(),
    "dropout": extras_case(dropout_rate=0.3, dropout_seed=(3, 2**40 + 1)),
    "data": (plain_case, inputs(batch=8), [P(("data", "model"))] * 3, (0, 1, 2)),
    "one key head": (plain_case, inputs(1), [BOTH, DATA, DATA], (0, 1, 2)),
    "heads of the query alone": (plain_case, inputs(H), [P(None, None, "model"), P(), P()], (0, 1, 2)),
}


@pytest.mark.wide(10)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shardy", [True, False])
def test_jit(name, shardy):
    """Nothing is gathered, what is divided stays so, and results and gradients are those of one device."""
    if not shardy and not hasattr(jax.config, "jax_use_shardy_partitioner"):
        pytest.skip("this JAX has Shardy alone")
    case, arrays, specs, differentiated = CASES[name]
    expected = with_gradients(case, differentiated)(*arrays)
    before = jax.config.jax_use_shardy_partitioner
    jax.config.update("jax_use_shardy_partitioner", shardy)
    try:
        function, divided = with_gradients(case, differentiated), put(mesh(), arrays, specs)
        compiled = function.lower(*divided).compile()
        found = compiled(*divided)
    finally:
        jax.config.update("jax_use_shardy_partitioner", before)
    assert set(collectives(compiled.as_text())) <= {"all-reduce"}
    assert "attn_ops.forward" in compiled.as_text()
    spec = found[0][0].sharding.spec
    assert tuple(spec)[: len(specs[0])] == tuple(specs[0])
    assert_same(found, expected)


@pytest.mark.wide(2)
@pytest.mark.parametrize("check", [True, False])
def test_shard_map(check):
    case, arrays, specs, differentiated = CASES["everything"]
    specs = [BOTH] * 3 + [P(None, "model"), P(None, "model"), P("model"), P("model"), DATA, DATA]
    divided = jax.shard_map(
        case, mesh=mesh(), in_specs=tuple(specs), out_specs=(BOTH, P("data", "model")), check_vma=check
    )
    expected = with_gradients(case, differentiated)(*arrays)
    function = with_gradients(divided, differentiated)
    assert set(collectives(function.lower(*arrays).compile().as_text())) <= {"all-reduce"}
    assert_same(function(*arrays), expected)


def test_sequences_are_gathered():
    """A sequence that is divided is put together: right, and what `parallel` is for."""
    query, key, value = inputs()
    divided = put(mesh(), (query, key, value), [P(None, "data")] * 3)
    function = jax.jit(lambda *x: attend(*x, is_causal=True))
    assert "all-gather" in collectives(function.lower(*divided).compile().as_text())
    assert_same(function(*divided), attend(query, key, value, is_causal=True, implementation="composite"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode(dtype):
    """A step of generation exchanges nothing."""
    memory = (jnp.asarray(random(B, T, N, D), dtype) for _ in range(2))
    cache = attn_ops.KVCache(*memory, jnp.asarray([0, 3, 7, 15], "int32"))
    query, new = random(B, 1, H, D), random(B, 1, N, D)
    axes = mesh()
    divided = jax.tree.map(lambda x: put(axes, [x], [BOTH if x.ndim == 4 else DATA])[0], cache)
    step = jax.jit(lambda query, cache, new: attn_ops.jax.decode_attention(query, cache, new, new))
    arguments = (*put(axes, [query], [BOTH]), divided, *put(axes, [new], [BOTH]))
    compiled = step.lower(*arguments).compile()
    assert not collectives(compiled.as_text())
    assert_same(compiled(*arguments), attn_ops.jax.decode_attention(query, cache, new, new, implementation="composite"))


def test_vmap_joins_the_batch():
    """One call instead of a loop, also of gradients, and where arguments are shared."""
    queries, (_, key, value), biases = random(3, B, T, H, D), inputs(), random(3, 1, H, T, T)

    def gradients(query, key, value, bias):
        return with_gradients(lambda q, k, v, b: attend(q, k, v, bias=b, return_lse=True), (0, 1, 2, 3))(
            query, key, value, bias
        )

    mapped = jax.jit(jax.vmap(gradients, (0, None, None, 0)))
    text = mapped.lower(queries, key, value, biases).compile().as_text()
    assert "while(" not in text and text.count('"attn_ops.forward"') == 1
    each = [gradients(query, key, value, bias) for query, bias in zip(queries, biases)]
    assert_same(mapped(queries, key, value, biases), jax.tree.map(lambda *x: np.stack(x), *each))
    nested = jax.vmap(jax.vmap(lambda q, k: attend(q, k, k), (0, None)), (None, 0))
    keys = np.stack([key, value])
    assert_same(nested(queries, keys), np.stack([[attend(q, k, k) for q in queries] for k in keys]))


@pytest.mark.wide(2)
@pytest.mark.parametrize("kind", ["DataParallel", "ModelParallel"])
def test_keras(kind):
    """A step of training moves the weights as on one device."""
    x, y = random(8, T, 16), random(8, T, 16)

    def trained():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((T, 16))
        outputs = attn_ops.layers.MultiHeadAttention(4, 4, name="attention")(inputs, inputs, use_causal_mask=True)
        model = keras.Model(inputs, outputs)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(x, y, batch_size=8, epochs=2, verbose=0)
        return model, [np.asarray(w) for w in model.weights]

    expected = trained()[1]
    devices = keras.distribution.list_devices()
    if kind == "DataParallel":
        distribution = keras.distribution.DataParallel(devices=devices)
    else:
        axes = keras.distribution.DeviceMesh((2, 4), ("batch", "model"), devices)
        layout = keras.distribution.LayoutMap(axes)
        layout[".*attention.*(query|key|value).*kernel"] = (None, "model", None)
        layout[".*attention_output.*kernel"] = ("model", None, None)
        distribution = keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    keras.distribution.set_distribution(distribution)
    try:
        model, found = trained()
        assert len(model.weights[0].value.sharding.device_set) == 8
        stateless = jax.jit(lambda weights, x: model.stateless_call(weights, [], x)[0])
        spec = P("batch")
        axes = model.weights[0].value.sharding.mesh
        arguments = [w.value for w in model.trainable_variables], *put(axes, [x], [spec])
        assert "all-gather" not in collectives(stateless.lower(*arguments).compile().as_text())
    finally:
        keras.distribution.set_distribution(None)
    assert_same(found, expected, 1e-5)


def sent(text, count):
    """Bytes that one of ``count`` devices sends in a compiled program, whose loops run as often as its text says."""
    sizes = {"f32": 4, "bf16": 2, "s32": 4}
    share = {  # of the bytes of the result
        "all-gather": (count - 1) / count,
        "all-to-all": (count - 1) / count,
        "collective-permute": 1,
        "reduce-scatter": count - 1,
        "all-reduce": 2 * (count - 1) / count,
    }
    trips = {body: int(n) for body, n in re.findall(r"while\(.*?body=%?([\w.-]+).*?known_trip_count\D*(\d+)", text)}
    total, times = 0, 1
    for line in text.splitlines():
        computation = re.match(r"%?([\w.-]+) .*\{$", line)
        if computation:
            times = trips.get(computation.group(1), 1)
        found = re.search(r"= (.*?) (all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce)\(", line)
        for dtype, extents in re.findall(r"(\w+)\[([\d,]*)\]", found.group(1)) if found else ():
            total += times * share[found.group(2)] * sizes[dtype] * np.prod([int(n) for n in extents.split(",") if n])
    return total


def ring_of(count):
    return Mesh(np.array(jax.devices()[:count]), ("s",))


ROWS = {"bias": 2, "mask": 2, "segment_ids": 1}  # where those have the rows
BLOCK_Q, BLOCK_K = 4, 3  # of blocks in the order in which rows are dealt: some of rows that are no neighbours, some cut


def divided_attention(count, method, order, names=(), **options):
    """(whole, plain): attention of the whole by parts, and by one device."""
    sequence = P(None, "s")

    def local(query, key, value, *others):
        given = dict(zip(names, others))
        if "blocks" in given:
            given["mask"] = masks.block_sparse(given.pop("blocks"), BLOCK_Q, BLOCK_K)
        return parallel.context_parallel(
            query, key, value, axis="s", method=method, order=order, return_lse=True, **given, **options
        )

    rows = {**ROWS, "blocks": 2}
    specs = [P(*[None] * rows[name], "s") if name in rows else P() for name in names]
    function = jax.shard_map(
        local, mesh=ring_of(count), in_specs=(sequence,) * 3 + tuple(specs), out_specs=(sequence, P(None, None, "s"))
    )
    dealt = parallel.zigzag if order == "zigzag" else lambda x, count, axis=1: x
    back = parallel.unzigzag if order == "zigzag" else lambda x, count, axis=1: x

    def whole(query, key, value, *others):
        others = [dealt(x, count, ROWS[name]) if name in ROWS else x for name, x in zip(names, others)]
        out, lse = function(*(dealt(x, count) for x in (query, key, value)), *others)
        return back(out, count), back(lse, count, 2)

    def plain(query, key, value, *others):
        given = dict(zip(names, others))
        if "segment_ids" in given:
            given["mask"] = [masks.segments(given.pop("segment_ids")), *([given["mask"]] if "mask" in given else [])]
        if "blocks" in given:
            blocks = np.repeat(given.pop("blocks"), min(BLOCK_Q, T // count), 2)
            given["mask"] = back(np.repeat(blocks, BLOCK_K, 3)[..., :T], count, 2)
        return attend(query, key, value, return_lse=True, **given, **options)

    return whole, plain


PARTS = {
    "bias": random(1, H, T, T),
    "mask": RNG.random((2, 1, T, T)) > 0.3,
    "sinks": random(H),
    "key_value_seq_lengths": np.array([T, 5], "int32"),
    "query_seq_lengths": np.array([11, T], "int32"),
    "segment_ids": np.sort(RNG.integers(0, 3, (2, T)), 1).astype("int32"),
}
POSITIONS = {"alibi_slopes": random(H), "relative_bias": random(7, H), "sinks": random(H)}
OFFSETS = {**POSITIONS, "query_offset": np.array([9, 1], "int32")}
FUNCTIONS = [
    lambda b, h, q, k: (q >= k) & (q // 5 == k // 5),  # intervals
    lambda b, h, q, k: q % 3 == k % 3,  # segments
    lambda b, h, q, k: (q - k) % 3 != 1,  # bits
]
SEQUENCES = [
    (method, order, arrays, options)
    for method, order in (
        ("ring", "zigzag"),
        ("head_parallel", "contiguous"),
        ("all_gather_kv", "zigzag"),
        ("ring", "contiguous"),
        ("all_gather_kv", "contiguous"),
    )
    for arrays, options in (
        (PARTS, {"is_causal": True}),
        ({}, {"window": (3, 1)}),
        ({}, {"is_causal": True, "dropout_rate": 0.3, "dropout_seed": (5, 2**33)}),
        ({}, {"query_offset": 3, "window": (6, 2), "logits_soft_cap": 2.0}),
        ({}, {"is_causal": True, "causal_alignment": "bottom_right"}),
        ({}, {"mask": masks.prefix([3, 6])}),
        (POSITIONS, {"window": (9, 3)}),
        (POSITIONS, {"logits_soft_cap": 2.0}),
        (OFFSETS, {"window": (20, 1)}),
        ({**PARTS, **POSITIONS}, {"is_causal": True}),
        ({"segment_ids": RNG.integers(0, 3, (2, T)).astype("int32")}, {}),  # ids that go back
        ("blocks", {"is_causal": True}),
        *(({}, {"mask": masks.from_function(function)}) for function in FUNCTIONS),
    )
]


@pytest.mark.wide(50)
@pytest.mark.parametrize("count", [4, 2, 8])
@pytest.mark.parametrize("case", range(len(SEQUENCES)))
def test_sequence(case, count):
    """Results and gradients of a sequence that is divided are those of one device, with the same bits of dropout."""
    method, order, arrays, options = SEQUENCES[case]
    if arrays == "blocks":
        shape = 1, H, count * -(-T // count // BLOCK_Q), -(-T // BLOCK_K)
        arrays = {"blocks": np.random.default_rng(count).random(shape) > 0.5, "sinks": PARTS["sinks"]}
    if order == "zigzag" and T % (2 * count):
        pytest.skip("no equal chunks")
    query, key, value = inputs(batch=2)
    if options.get("causal_alignment"):
        query = query[:, : T // 2] if T // 2 % (2 * count) == 0 else query
    whole, plain = divided_attention(count, method, order, tuple(arrays), **options)
    differentiated = (0, 1, 2, *(3 + n for n, name in enumerate(arrays) if name in GRADIENTS))
    arguments = query, key, value, *arrays.values()
    assert_same(
        with_gradients(whole, differentiated)(*arguments), with_gradients(plain, differentiated)(*arguments), 5e-5
    )
    if method == "ring":  # which has a forward mode of its own
        found, expected = (along_themselves(function, differentiated)(*arguments) for function in (whole, plain))
        assert_same(found, expected, 5e-5)


@pytest.mark.wide(3)
class TestRarer:
    def test_explicit_axes(self):
        """`jax.set_mesh` with axes that are a part of types."""
        case, arrays, specs, differentiated = CASES["heads of the query alone"]
        explicit = mesh(AxisType.Explicit)
        expected = with_gradients(case)(*arrays)
        with jax.set_mesh(explicit):
            divided = put(explicit, arrays, [BOTH] * 3)
            assert jax.typeof(jax.jit(case)(*divided)[0]).sharding.spec[0] == "data"
            assert_same(with_gradients(case)(*divided), expected)

    def test_shard_map_of_some_axes(self):
        """The compiler divides along the others; what it makes of a kernel is right."""
        case, arrays, specs, differentiated = CASES["data"]
        divided = jax.shard_map(
            case, mesh=mesh(), in_specs=(DATA,) * 3, out_specs=(DATA, DATA), axis_names=frozenset(["data"])
        )
        expected = case(*arrays, implementation="composite")
        assert_same(jax.jit(divided)(*put(mesh(), arrays, [BOTH] * 3)), expected)

    def test_pages(self):
        """Heads of pages are divided; new rows of all sequences go to all devices, pages to none."""
        pages, table = random(2 * B, 16, N, D), RNG.permutation(2 * B).reshape(B, 2).astype("int32")
        query, new, lengths = random(B, 1, H, D), random(B, 1, N, D), np.array([1, 9, 17, 32], "int32")

        def step(query, pages, table, lengths, new, **options):
            return attn_ops.jax.paged_attention(query, pages, pages, table, lengths, new, new, **options)

        arrays = query, pages, table, lengths, new
        divided = put(mesh(), arrays, [BOTH, P(None, None, "model"), DATA, DATA, BOTH])
        compiled = jax.jit(step).lower(*divided).compile()
        gathered = re.findall(r"= \w+\[([\d,]*)\][^=]* all-gather", compiled.as_text())
        assert all(np.prod([int(n) for n in shape.split(",") if n]) <= new.size for shape in gathered)
        assert_same(compiled(*divided), step(*arrays, implementation="composite"))

    def test_vmap_of_divided_arrays(self):
        query, key, value = (np.stack([x, x[::-1]]) for x in inputs())
        divided = put(mesh(), (query, key, value), [P(None, *BOTH)] * 3)
        function = jax.jit(jax.vmap(lambda *x: attend(*x, is_causal=True)))
        assert_same(function(*divided), np.stack([attend(*x, is_causal=True) for x in zip(query, key, value)]))

    def test_a_window_skips_steps(self):
        """A ring goes no further than any row sees."""
        arguments = inputs(batch=1)
        trips = {}
        for name, options in {"all": {"is_causal": True}, "window": {"window": (2, 0)}}.items():
            whole, _ = divided_attention(8, "ring", "contiguous", **options)
            loops = re.findall(r"known_trip_count\D*(\d+)", jax.jit(whole).lower(*arguments).compile().as_text())
            trips[name] = [int(n) for n in loops]
        assert sum(trips["all"]) == 7 and sum(trips["window"]) in (0, 1)

    def test_gradients_of_what_devices_share_are_added_up(self):
        """Also where nothing but the batch is divided, and heads do not divide."""
        case, arrays, _, differentiated = CASES["everything"]
        arrays = [
            x[:, :, : x.shape[2] * 3 // 4] if n < 3 else x for n, x in enumerate(arrays)
        ]  # 6 and 3 heads for 2 devices
        arrays = [x[:, :6] if n == 3 else x[..., :6] if n in (4, 5, 6) else x for n, x in enumerate(arrays)]
        expected = with_gradients(case, differentiated)(*arrays)
        divided = put(mesh(), arrays, [BOTH, DATA, DATA, *[P()] * 6])
        assert_same(with_gradients(case, differentiated)(*divided), expected)

    def test_ring_of_sixteen_bits(self):
        """As near to the truth as one device, gradients too."""
        arguments = [x.astype(jnp.bfloat16) for x in inputs(batch=1)]
        whole, plain = divided_attention(4, "ring", "contiguous", is_causal=True)
        truth = with_gradients(plain)(*(x.astype("float32") for x in arguments))
        found, one = (with_gradients(function)(*arguments) for function in (whole, plain))

        def error(results):
            return [
                np.abs(np.asarray(x, "float32") - y).max()
                for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(truth))
            ]

        assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(one)]
        assert all(a <= 2 * b + 1e-6 for a, b in zip(error(found), error(one)))

    @pytest.mark.parametrize("method", parallel_costs.METHODS)
    def test_outside_of_jit(self, method):
        """`jax.shard_map` alone, and what has no derivative says which method has it."""
        arguments = inputs(batch=1)
        whole, plain = divided_attention(2, method, "contiguous", is_causal=True)

        def first(function):
            return jax.grad(lambda query: jnp.sum(jnp.sin(function(query, *arguments[1:])[0])))

        def second(function):
            return jax.grad(lambda query: jnp.sum(first(function)(query) ** 2))

        assert_same(whole(*arguments), plain(*arguments))
        assert_same(first(whole)(arguments[0]), first(plain)(arguments[0]))
        along, expected = (jax.jvp(function, arguments, arguments)[1] for function in (whole, plain))
        assert_same(along, expected)
        if method != "ring":
            assert_same(second(whole)(arguments[0]), second(plain)(arguments[0]), 1e-4)
            return
        with pytest.raises(NotImplementedError, match="first derivatives.*'all_gather_kv' has those of second order"):
            second(whole)(arguments[0])

    def test_ring_keeps_nan(self):
        """A key with NaN makes NaN of the rows that see it, and of no other."""
        query, key, value = inputs(batch=1)
        key[0, 5] = np.nan
        whole, plain = divided_attention(4, "ring", "contiguous", is_causal=True)
        for found, right in zip(jax.jit(whole)(query, key, value), plain(query, key, value)):
            assert np.array_equal(np.isnan(found), np.isnan(right)) and np.isnan(found).any()

    def test_auto(self):
        """Heads where they divide, the ring where they do not, and what has all options where that lacks some."""

        def chosen(heads, **options):
            query = key = random(1, T, heads, D)
            whole, _ = divided_attention(4, "auto", "contiguous", **options)
            return set(collectives(jax.jit(whole).lower(query, key, key).compile().as_text()))

        assert chosen(4) == {"all-to-all"}
        assert chosen(3) == {"collective-permute"}
        assert chosen(3, alibi_slopes=random(3)) == {"collective-permute"}

    def test_heads_are_those_of_one_device(self):
        """Bit for bit."""
        arguments = inputs(batch=2)
        whole, _ = divided_attention(4, "head_parallel", "contiguous", is_causal=True)
        found = jax.jit(whole)(*arguments)
        assert all(np.array_equal(x, y) for x, y in zip(found, attend(*arguments, is_causal=True, return_lse=True)))


@pytest.mark.parametrize(
    "method, options, rule",
    [
        ("head_parallel", {"order": "zigzag"}, "needs order='contiguous'"),
        ("wrong", {}, "method must be one of"),
        ("ring", {"causal_alignment": "bottom_right", "key_value_seq_lengths": np.array([1, 2])}, "pass query_offset"),
    ],
)
def test_what_is_not_there_says_so(method, options, rule):
    options = dict(options)
    order = options.pop("order", "contiguous")
    whole, _ = divided_attention(4, method, order, **options)
    with pytest.raises((NotImplementedError, ValueError), match=rule):
        jax.eval_shape(whole, *inputs(batch=2))


@pytest.mark.wide(3)
@pytest.mark.parametrize("name", ["query_seq_lengths", "key_value_seq_lengths"])
@pytest.mark.parametrize("method, order", sorted({case[:2] for case in SEQUENCES}))
def test_lengths_out_of_range(method, order, name):
    """Entries whose lengths of the whole are out of range get NaN, though those of each share would do."""
    for implementation in ("composite", "fused")[: 2 if method == "ring" else 1]:  # other kernels may refuse them
        whole, _ = divided_attention(2, method, order, (name,), implementation=implementation)
        for wrong in (T + 1, -1):
            found = jax.jit(whole)(*inputs(batch=3), np.array([T, wrong, 0], "int32"))
            assert [[bool(np.isnan(x[entry]).all()) for entry in range(3)] for x in found] == [[False, True, False]] * 2
        assert not any(np.isnan(x).any() for x in jax.jit(whole)(*inputs(batch=3), np.array([T, 3, 0], "int32")))


@pytest.mark.wide(6)
@pytest.mark.parametrize("count", [4, 8])  # of 2, what goes forward and what goes back are merged
@pytest.mark.parametrize("method", parallel_costs.METHODS)
def test_bytes(method, count):
    """What compiled programs send is what the model of costs says."""
    arguments = inputs(batch=2)
    shape = parallel_costs.Shape(T, H, N, D, 2, 4)
    whole, _ = divided_attention(count, method, "contiguous", is_causal=True)
    divided = [jax.device_put(x, NamedSharding(ring_of(count), P(None, "s"))) for x in arguments]

    def loss(*x):
        return jnp.sum(jnp.sin(whole(*x)[0]))

    model = parallel_costs.sent(method, shape, count)
    forward = jax.jit(lambda *x: whole(*x)[0]).lower(*divided).compile().as_text()
    assert sent(forward, count) == model["forward"]
    gradients = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*divided).compile().as_text()
    assert sent(gradients, count) == model["forward"] + model["backward"]


@pytest.mark.wide(2)
@pytest.mark.parametrize("method", ["head_parallel", "ring"])
def test_memory_falls_with_devices(method):
    """What a device holds of a sequence, forward and backward."""
    query, key, value = (jax.ShapeDtypeStruct((1, 1024, 8, 32), "float32") for _ in range(3))
    held = []
    for count in (2, 8):
        whole, _ = divided_attention(count, method, "contiguous", is_causal=True)
        sharding = NamedSharding(ring_of(count), P(None, "s"))
        gradients = jax.grad(lambda *x, whole=whole: whole(*x)[0].sum(), (0, 1, 2))
        compiled = jax.jit(gradients, in_shardings=(sharding,) * 3).lower(query, key, value).compile()
        sizes = compiled.memory_analysis()
        held.append(sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes)
    print(f"{method}: {held[0]} bytes on each of 2 devices, {held[1]} on each of 8")
    assert held[1] < held[0] / 3

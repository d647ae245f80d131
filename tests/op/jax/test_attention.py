"""attn_ops.jax: against the specification, under JAX's transformations, and what it refuses."""

import ctypes
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_ops.jax
from attn_ops import kernels, masks, reference
from attn_ops.call import philox
from attn_ops.call.normalize import normalize
from attn_ops.call.explanation import Explanation
from attn_ops.jax import philox as jax_philox
from attn_ops.jax import attention_weights, call, composite, forms, scaled_dot_product_attention, xp
from reference_cases import CASES, differentiable

both = pytest.mark.parametrize("forced", ["fused", "composite"])


def inputs(*shape, number=3, dtype="float32"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape or (2, 6, 4, 8)), dtype) for _ in range(number)]


def assert_same(found, expected, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=atol, atol=atol), found, expected)


@pytest.mark.wide(5)
@both
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_specification(case, forced):
    inputs, options, of_caller = differentiable(case)
    with jax.enable_x64(True):

        def attend(inputs):
            return scaled_dot_product_attention(
                **of_caller(inputs), **options, return_lse=True, implementation=forced
            )

        results, pull = jax.vjp(attend, jax.tree.map(jnp.asarray, inputs))
        (gradients,) = pull((jnp.asarray(case.d_out), jnp.asarray(case.d_lse)))
    expected = reference.attention(**case.inputs, **case.options)
    slopes = reference.attention_gradients(**case.inputs, **case.options, d_out=case.d_out, d_lse=case.d_lse)
    expected += tuple(x for x in slopes if x is not None)
    for x, y in zip([*results, *(gradients[name] for name in inputs)], expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-13)


@pytest.mark.wide(6)
@pytest.mark.parametrize("chunk_rows", [1, 2, 3])
@pytest.mark.parametrize(
    "name",
    [
        "bias of heads",
        "bias of keys",
        "lengths, causal bottom_right",
        "everything",
        "every score and mask",
        "table beyond all distances",
        "intervals",
        "blocks of heads",
    ],
)
def test_composite_in_chunks(name, chunk_rows):
    results, gradients = chunked(name, chunk_rows)
    expected, expected_gradients = chunked(name, None)
    assert_same(results, expected)
    assert_same(gradients, expected_gradients)


@functools.cache
def chunked(name, chunk_rows):
    """(out, lse) of a case and the gradients of a loss of both."""
    (case,) = (case for case in CASES if case.name == name)
    inputs, options, of_caller = differentiable(case)

    def loss(inputs):
        parts = call.split(normalize(xp, "test", **of_caller(inputs), **options, return_lse=True))
        out, lse = composite.attention(*parts, chunk_rows)
        finite = jnp.isfinite(lse)
        return jnp.sin(out).sum() + jnp.where(finite, lse, 0.0).sum(), (out, lse)

    (_, results), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(jax.tree.map(jnp.asarray, inputs))
    return results, gradients


def loss(implementation, query, key, value, bias, dropout_rate=0.2):
    out, lse = scaled_dot_product_attention(
        query, key, value, bias=bias, is_causal=True, dropout_rate=dropout_rate, dropout_seed=3, return_lse=True,
        implementation=implementation,
    )  # fmt: skip
    return jnp.sin(out).sum() + (lse**2).sum()


def everything():
    return [*inputs(), *inputs(1, 4, 6, 6, number=1)]


def transformed(function):
    """`function(implementation)` of the kernels equals that of the composite."""
    assert_same(function(None), function("composite"), 2e-4)


def test_jit_of_gradients():
    transformed(lambda i: jax.jit(jax.grad(lambda *a: loss(i, *a), argnums=(0, 1, 2, 3)))(*everything()))


# Compiled, since one by one the many operations of higher derivatives would each be compiled for its shapes.


def test_second_order():
    """Of all gradients together, to each of the inputs."""

    def gradient_sum(implementation, *arrays):
        gradients = jax.grad(lambda *a: loss(implementation, *a), argnums=(0, 1, 2, 3))
        return sum(jnp.sin(g).sum() for g in gradients(*arrays))

    transformed(lambda i: jax.jit(jax.grad(lambda *a: gradient_sum(i, *a), argnums=(0, 1, 2, 3)))(*everything()))


def test_third_order():
    query, *rest = everything()

    def derivative(function):
        return lambda x: jnp.cos(jax.grad(function)(x)).sum()

    transformed(lambda i: jax.jit(jax.grad(derivative(derivative(lambda q: loss(i, q, *rest)))))(query))


@both
def test_forward_mode(forced):
    arrays = tuple(everything())
    directions = tuple(map(jnp.cos, arrays))
    of_all = functools.partial(loss, forced)
    along = jax.jit(lambda *arrays: jax.jvp(of_all, arrays, directions)[1])(*arrays)
    gradients = jax.jit(jax.grad(of_all, argnums=(0, 1, 2, 3)))(*arrays)
    assert_same(along, sum(map(jnp.vdot, gradients, directions)), 1e-3)


@functools.cache
def hessian_of_steps(implementation, outer, inner):
    """Of three calls in a loop, one after the other."""
    query, key, value = inputs(1, 3, 2, 4)

    def attended(query):
        def step(query, _):
            return query + scaled_dot_product_attention(query, key, value, is_causal=True, implementation=implementation), None

        return jnp.sin(jax.lax.scan(step, query, None, length=3)[0]).sum()

    return jax.jit(outer(inner(attended)))(query)


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
def test_hessian_in_a_loop(outer, inner):
    assert_same(hessian_of_steps("fused", outer, inner), hessian_of_steps("composite", jax.jacfwd, jax.jacrev), 1e-4)


def test_a_transpose_for_the_value_alone():
    query, key, value = inputs()
    mask, d_out = key[..., 0, :6] > 0, jnp.cos(value)

    def attend(value):
        return scaled_dot_product_attention(query, key, value, mask=mask)

    expected = jax.vjp(attend, value)[1](d_out)
    assert_same(jax.linear_transpose(attend, value)(d_out), expected)
    of_batch = jax.jit(jax.vmap(jax.linear_transpose(attend, value)))(jnp.stack([d_out, 2 * d_out]))
    assert_same(of_batch, jax.tree.map(lambda x: jnp.stack([x, 2 * x]), expected))
    with pytest.raises(NotImplementedError, match="linear in its value alone"):
        jax.linear_transpose(lambda x: scaled_dot_product_attention(x, key, value), query)(d_out)


@both
def test_vmap(forced):
    query, key, value, bias = everything()
    queries = jnp.stack([query, query + 1.0, -query])

    def gradients(query, bias):
        return jax.grad(lambda q, b: loss(forced, q, key, value, b), argnums=(0, 1))(query, bias)

    each = [jax.jit(gradients)(q, bias) for q in queries]
    assert_same(jax.jit(jax.vmap(gradients, (0, None)))(queries, bias), jax.tree.map(lambda *x: jnp.stack(x), *each))
    of_none = jax.vmap(gradients, (0, None))(queries[:0], bias)
    assert [x.shape for x in of_none] == [(0, *query.shape), (0, *bias.shape)]


@both
def test_vmap_of_a_batch_of_1(forced):
    """What is not mapped, but has an element for each entry of the batch, belongs to all examples."""
    query, key, value, _ = (x[:1] for x in everything())
    queries = jnp.stack([query, query + 1.0, -query])
    cache = attn_ops.KVCache.create(1, 48, *key.shape[2:], "int8", value_dim=value.shape[-1], framework="jax").update(key, value)
    pool = attn_ops.PagedKVCache.create(3, 16, *key.shape[2:], value_dim=value.shape[-1], framework="jax")
    sequence = pool.allocate()
    pool.append(sequence, key, value)
    table, lengths, one = pool.block_table(sequence), pool.lengths(sequence), query.shape[1] - 1
    attend, options = attn_ops.jax.scaled_dot_product_attention, {"implementation": forced}
    for door in (
        lambda q: attend(q, key, value, query_seq_lengths=[one], key_value_seq_lengths=[3], **options),
        lambda q: attn_ops.jax.decode_attention(q[:, :2], cache, **options)[0],
        lambda q: attn_ops.jax.paged_attention(q[:, :2], *pool.pages[0], table, lengths, **options),
    ):
        assert_same(jax.vmap(door)(queries), jnp.stack([door(q) for q in queries]), 1e-6)


@both
def test_scan_and_checkpoint(forced):
    query, key, value, _ = everything()

    def step(x):
        return x + scaled_dot_product_attention(x, key, value, is_causal=True, implementation=forced)

    def scanned(x):
        return jax.lax.scan(lambda x, _: (jax.checkpoint(step)(x), None), x, length=3)[0].sum()

    assert_same(jax.jit(jax.grad(scanned))(query), jax.grad(lambda x: step(step(step(x))).sum())(query), 1e-4)


def test_the_gradient_of_a_constant_bias_is_not_computed():
    query, key, value, bias = everything()
    text = str(jax.make_jaxpr(jax.grad(lambda q: loss("fused", q, key, value, bias)))(query))
    assert "('d_bias', False)" in text
    text = str(jax.make_jaxpr(jax.grad(lambda b: loss("fused", query, key, value, b)))(bias))
    assert "('d_bias', True)" in text


def lowered(platform, inputs):
    """The text of the attention for a platform that need not be here, traced anew."""
    function = jax.jit(lambda q, k, v: scaled_dot_product_attention(q, k, v))
    names = "attn_ops.forward", "attn_ops.forward.lent"
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
    exported = jax.export.export(function, platforms=[platform], disabled_checks=unchecked)
    return exported(*inputs).mlir_module()


def test_only_the_platform_of_the_kernels_gets_them():
    assert "attn_ops.forward" in lowered("cpu", inputs())
    assert "attn_ops.forward" not in lowered("cuda", inputs())


@pytest.fixture
def cuda_devices(monkeypatch):
    """CUDA devices that run the kernels, as long as nobody runs anything; a list to put reasons against them into."""
    reasons = []
    monkeypatch.setattr(forms, "cuda_reason", lambda options, arrays: reasons[0] if reasons else None)
    monkeypatch.setattr(kernels, "cuda_workspace_bytes", lambda backward, *sizes, **more: 1000 + backward)
    jax.clear_caches()
    yield reasons
    jax.clear_caches()


def test_cuda_gets_the_kernels_where_they_take_the_call(cuda_devices, monkeypatch):
    arrays = inputs()
    assert "attn_ops.forward" in lowered("cpu", arrays) and "attn_ops.forward" in lowered("cuda", arrays)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attn_ops.jax.explain(*arrays) == Explanation("fused", (), "xla", "gpu")
    cuda_devices.append("its heads are too wide")
    jax.clear_caches()
    assert "attn_ops.forward" in lowered("cpu", arrays) and "attn_ops.forward" not in lowered("cuda", arrays)
    reason = "the default device is of the platform gpu, and its heads are too wide"
    assert attn_ops.jax.explain(*arrays) == Explanation("composite", (reason,))


def test_on_cuda_the_workspace_is_a_result(cuda_devices):
    """Asked for while a call runs, it would keep the call out of CUDA graphs."""
    text = lowered("cuda", inputs())
    assert '@attn_ops.forward.lent' in text and "tensor<1000xui8>" in text
    assert ".lent" not in lowered("cpu", inputs())


def traits(handler) -> int:
    """What a handler says of itself when XLA asks (XLA_FFI_Metadata_Extension of xla/ffi/api/c_api.h)."""

    class Version(ctypes.Structure):
        _fields_ = [("size", ctypes.c_size_t), ("next", ctypes.c_void_p), ("major", ctypes.c_int), ("minor", ctypes.c_int)]

    class Metadata(ctypes.Structure):
        _fields_ = [("size", ctypes.c_size_t), ("version", Version), ("traits", ctypes.c_uint32)]

    class Extension(ctypes.Structure):
        _fields_ = [("size", ctypes.c_size_t), ("type", ctypes.c_int), ("next", ctypes.c_void_p), ("metadata", ctypes.c_void_p)]

    metadata = Metadata(traits=99)
    extension = Extension(type=1, metadata=ctypes.addressof(metadata))
    frame = (ctypes.c_size_t * 64)(0, ctypes.addressof(extension))
    ctypes.pythonapi.PyCapsule_GetPointer.restype = ctypes.c_void_p
    address = ctypes.pythonapi.PyCapsule_GetPointer(ctypes.py_object(handler), None)
    assert ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address)(ctypes.addressof(frame)) is None
    return metadata.traits


def test_calls_that_are_lent_memory_may_be_put_into_cuda_graphs():
    found = {(place, name): traits(x) for place, all in kernels.core().xla_handlers().items() for name, x in all.items()}
    names = "attn_ops.forward", "attn_ops.backward"
    assert found.pop(("Host", "attn_ops.append")) == 0
    assert found == {
        (place, name + lent): int(place == "CUDA" and bool(lent))
        for place in ("Host", "CUDA")
        for name in names
        for lent in ("", ".lent")
    }


@pytest.mark.parametrize("size", [0, 100])
def test_the_workspace_is_no_result_of_the_call(size):
    """On CPUs, which do not use it: the other results are those of the call without."""
    assert forms.unavailable_reason() is None
    options, arrays = call.split(normalize(xp, "test", *inputs()))
    optional, attributes = forms._optional(options, arrays)
    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((2, 6, 4, 8), (2, 4, 6, 2))]

    def run(name, *more):
        function = jax.ffi.ffi_call(name, [*shapes, *more])
        return function(*arrays[:3], *optional, **attributes, num_lse=np.int64(0))

    *found, workspace = run("attn_ops.forward.lent", jax.ShapeDtypeStruct((size,), "uint8"))
    for x, y in zip(found, run("attn_ops.forward"), strict=True):
        np.testing.assert_array_equal(x, y)
    assert workspace.shape == (size,)
    with pytest.raises(Exception, match="the result workspace must be uint8"):
        run("attn_ops.forward.lent")


def test_reasons_against_cuda(monkeypatch):
    options, arrays = call.split(normalize(xp, "test", *inputs(2, 6, 4, 8), layout="BHSD"))
    assert forms.cuda_reason(options, arrays) == "JAX has no CUDA device here"
    sizes = []
    monkeypatch.setattr(forms, "_cuda_device_reason", lambda: None)
    monkeypatch.setattr(kernels, "cuda_unsupported_reason", lambda *given: sizes.extend(given))
    assert forms.platforms(options, arrays) == ("cpu", "cuda")
    assert sizes == ["float32", 2, 4, 4, 6, 6, 8, 8]


def test_tf32_is_an_attribute():
    def text():
        return str(jax.make_jaxpr(jax.grad(lambda q: loss("fused", q, *inputs()[1:], None)))(inputs()[0]))

    assert text().count("('allow_tf32', False)") == 2
    attn_ops.set_allow_tf32(True)
    try:
        assert text().count("('allow_tf32', True)") == 2
    finally:
        attn_ops.set_allow_tf32(False)


@both
def test_seeds(forced):
    def dropped(seed):
        arrays = inputs()
        return scaled_dot_product_attention(*arrays, dropout_rate=0.5, dropout_seed=seed, implementation=forced)

    wide = np.array([2**40 + 3, -5])
    for seed in (wide, jnp.array([7, -2]), jnp.array([7, 2**32 - 1], jnp.uint32)):
        # What JAX holds as int32 stands for the same number in 64 bits.
        expected = reference.attention(*inputs(), dropout_rate=0.5, dropout_seed=np.asarray(seed).astype(np.int64))[0]
        assert_same(dropped(seed), expected)
    assert_same(dropped(2**40 + 3), dropped(np.array([2**40 + 3, 0])), 0)
    assert_same(dropped(jax.random.key(4)), dropped(jax.random.PRNGKey(4)), 0)
    assert np.abs(dropped(jax.random.key(4, impl="rbg")) - dropped(jax.random.key(5, impl="rbg"))).max() > 0.1
    keys = jax.random.split(jax.random.key(0), 3)
    assert_same(jax.vmap(dropped)(keys), jnp.stack([dropped(key) for key in keys]), 1e-6)


def test_philox_bits():
    for seed, offset in ((3, 0), (-1, 2**63 - 1), (2**62 + 12345, -(2**40))):
        bits = jax_philox.keep(xp.seed_of_words([seed, offset]), 2, 3, jnp.arange(1, 5), 7, 0.3)
        np.testing.assert_array_equal(bits, philox.keep(seed, offset, 2, 3, 5, 7, 0.3)[:, :, 1:])


@both
def test_forms(forced):
    options = {"implementation": forced}
    query, key, value = inputs()
    mixed = [x.astype(dtype) for x, dtype in zip((query, key, value), ("bfloat16", "float16", "float16"))]
    assert scaled_dot_product_attention(*mixed, **options).dtype == "float32"
    one = [x[:, :, 0] for x in (query, key, value)]
    out, lse = scaled_dot_product_attention(*one, return_lse=True, **options)
    expected, expected_lse = scaled_dot_product_attention(*(x[:, :, None] for x in one), return_lse=True, **options)
    assert_same((out, lse), (expected[:, :, 0], expected_lse[:, 0]), 0)
    parts = [np.random.default_rng(i).random((6, 6)) < 0.9 for i in range(6)]
    together = masks.causal() & masks.boolean(np.logical_and.reduce(parts))
    apart = [masks.causal(), *map(jnp.asarray, parts)]
    several = scaled_dot_product_attention(query, key, value, mask=apart, **options)
    assert_same(several, scaled_dot_product_attention(query, key, value, mask=together, **options), 0)

    def scaled(scale):
        return scaled_dot_product_attention(query, key, value, scale=scale, **options).sum()

    slope = (scaled(0.31) - scaled(0.29)) / 0.02
    assert_same(jax.grad(scaled)(jnp.float32(0.3)), slope, 2e-2)


def test_attention_weights():
    query, key, value = inputs()
    options = {"mask": masks.padding(key_lengths=jnp.array([0, 5])), "window": (2, 1)}
    out, lse = scaled_dot_product_attention(query, key, value, return_lse=True, **options)
    weights = attention_weights(query, key, **options)
    assert_same(attention_weights(query, key, lse=lse, **options), weights)
    assert_same(jnp.einsum("bhqk,bkhd->bqhd", weights, value), out)
    gradient = jax.grad(lambda q: (attention_weights(q, key, **options) ** 2).sum())(query)
    assert not np.isnan(gradient).any() and (gradient[0] == 0).all() and (gradient[1] != 0).any()


def test_masks_of_jax_arrays():
    mask = masks.padding(jnp.array([3, 2]), np.array([2, 4])) & masks.padding(key_lengths=jnp.array([4, 3]))
    mask &= masks.key_padding(jnp.array([[True, True, False, True]] * 2)) & masks.window(2**40, 1)
    dense = mask.materialize(3, 4)
    assert isinstance(dense, jax.Array)
    by_numpy = masks.padding([3, 2], [2, 3]) & masks.key_padding([[True, True, False, True]] * 2) & masks.window(right=1)
    np.testing.assert_array_equal(dense, by_numpy.materialize(3, 4))


@both
def test_ranks_that_must_not_be_promoted(forced):
    """Of the arrays of whoever calls; what is between them is ours."""
    options = {"alibi_slopes": jnp.ones(4), "key_value_seq_lengths": jnp.array([3, 5]), "implementation": forced}

    def attend(query):
        return called({"query": attn_ops.jax.rotary_embedding(query), "bias": inputs(6, 6)[0]} | options).sum()

    with jax.numpy_rank_promotion("raise"):
        assert np.isfinite(jax.jit(jax.grad(attend))(inputs()[0])).all()


class Parameter:
    """What stands for an array, as JAX's own functions take it: those of Flax, and variables of Keras."""

    def __init__(self, value):
        self.value = value

    def __jax_array__(self):
        return self.value


ARGUMENTS = {
    "query": lambda x: {"query": x(inputs()[0])},
    "bias": lambda x: {"bias": x(inputs(6, 6)[0])},
    "scale": lambda x: {"scale": x(jnp.float32(0.3))},
    "sinks": lambda x: {"sinks": x(jnp.ones(4))},
    "mask": lambda x: {"mask": x(inputs(6, 6)[0] > 0)},
    "lengths": lambda x: {"key_value_seq_lengths": x(jnp.array([3, 5]))},
    "segments": lambda x: {"mask": masks.segments(x(jnp.array([[0, 0, 0, 1, 1, 1]])))},
    "seed": lambda x: {"dropout_rate": 0.5, "dropout_seed": x(jnp.array([3, 4]))},
}


def called(arguments):
    return scaled_dot_product_attention(**dict(zip(("query", "key", "value"), inputs())) | arguments)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_stands_for_an_array(name):
    """Traced, as where a model is trained by its parameters."""
    held = []
    ARGUMENTS[name](lambda x: held.append(x) or x)
    found = jax.jit(lambda x: called(ARGUMENTS[name](lambda _: Parameter(x))))(*held)
    assert_same(found, called(ARGUMENTS[name](lambda x: x)))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_other_order_of_bytes(name):
    def foreign(x):
        return np.asarray(x).astype(np.asarray(x).dtype.newbyteorder())

    assert_same(called(ARGUMENTS[name](foreign)), called(ARGUMENTS[name](lambda x: x)))


@pytest.mark.parametrize(
    "arguments",
    [
        lambda n: {"key_value_seq_lengths": [n, 5]},
        lambda n: {"mask": masks.padding(key_lengths=[5, n])},
        lambda n: {"mask": [masks.causal(), [[n > 1, True, False] * 2] * 6]},
        lambda n: {"sinks": [n + 0.5, 0.0, 0.0, 0.0]},
        lambda n: {"dropout_rate": 0.5, "dropout_seed": [n, 4]},
    ],
)
def test_lists_with_traced_numbers(arguments):
    assert_same(jax.jit(lambda n: called(arguments(n)))(3), called(arguments(3)))


LENGTHS = "query_seq_lengths", "key_value_seq_lengths"


@pytest.mark.parametrize(
    "error, text, arguments",
    [
        (ValueError, "JAX has no hidden random state", {"dropout_rate": 0.1}),
        (ValueError, "dropout_seed must be an integer or have", {"dropout_rate": 0.1, "dropout_seed": np.arange(3)}),
        (TypeError, "dropout_seed must hold integers, got float32", {"dropout_rate": 0.1, "dropout_seed": jnp.ones(2)}),
        (TypeError, "mask must be boolean .*, got float32; pass values", {"mask": jnp.zeros((6, 6))}),
        (TypeError, "bias must be floating, got bool; a boolean mask", {"bias": jnp.zeros((6, 6), bool)}),
        (ValueError, r"mask of shape \(5, 6\) does not broadcast to .*seqlen_q", {"mask": jnp.ones((5, 6), bool)}),
        (ValueError, "key_value_seq_lengths must be between 0 and 6, got 7", {LENGTHS[1]: [3, 7]}),
        (ValueError, "query_seq_lengths must be between 0 and 6, got 8589934593", {LENGTHS[0]: [3, 2**33 + 1]}),
        (ValueError, r"query_seq_lengths must have shape \[batch=2\], got \(3,\)", {LENGTHS[0]: [1, 2, 3]}),
        (TypeError, "query_seq_lengths must hold integers, got float32", {LENGTHS[0]: [1.0, 2.0]}),
        (ValueError, "scale must be finite", {"scale": jnp.float32(np.nan)}),
        (ValueError, "scale must be a scalar", {"scale": jnp.ones(4)}),
        (ValueError, "implementation must be None or one of 'fused', 'composite', got 'reference'",
         {"implementation": "reference"}),
        (ValueError, "query and key must have the same head_dim, got 8, 7", {"key": jnp.ones((2, 6, 4, 7))}),
        (TypeError, "key must be an array, got NoneType: JAX has no arrays of object", {"key": None}),
        (TypeError, "key must be float16, .* or float64, got int32", {"key": jnp.ones((2, 6, 4, 8), int)}),
    ],
)  # fmt: skip
def test_bad_input(error, text, arguments):
    arguments = dict(zip(("query", "key", "value"), inputs())) | arguments
    with pytest.raises(error, match=f"scaled_dot_product_attention: {text}"):
        scaled_dot_product_attention(**arguments)


def test_traced_lengths_out_of_range():
    attend = jax.jit(lambda lengths: scaled_dot_product_attention(*inputs(), key_value_seq_lengths=lengths))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"attn_ops.forward: key_lengths\[1\] \(7\) must be from 0 to"):
        attend(jnp.array([3, 7])).block_until_ready()


@pytest.mark.parametrize("which, wrong", [(LENGTHS[0], 7), (LENGTHS[1], 7), (LENGTHS[1], -1)])
def test_entries_with_traced_lengths_out_of_range_are_nan_in_the_composite(which, wrong):
    """Their neighbours, and the derivatives of those, are what they are alone."""

    def attend(x, lengths):
        given = {which: lengths, "implementation": "composite", "return_lse": True}
        return scaled_dot_product_attention(*(x,) * 3, **given)

    (x,) = inputs(number=1)
    def run(x, lengths):
        gradient = jax.grad(lambda x: jnp.square(attend(x, lengths)[0][0]).sum())
        return *attend(x, lengths), gradient(x)

    results, right = jax.jit(run)(x, jnp.array([3, wrong])), jax.jit(run)(x[:1], jnp.array([3]))
    for result, alone in zip(results, right):
        np.testing.assert_allclose(result[0], alone[0], rtol=1e-6)
    assert np.isnan(results[0][1]).all() and np.isnan(results[1][1]).all()
    weights = functools.partial(attn_ops.jax.attention_weights, implementation="composite")
    found = jax.jit(lambda lengths: weights(x, x, **{which: lengths}))(jnp.array([3, wrong]))
    assert np.isnan(found[1]).all() and np.isfinite(found[0]).all()


@pytest.mark.parametrize(
    "name, values",
    [("offset", [2, -1]), ("offset", [2, 2**30 + 1]), ("ends", [[1, 1, 2, 4, 4, 4], [2, 3, 2, 4, 4, 4]])],
)
def test_entries_with_traced_positions_out_of_range_are_nan_in_the_composite(name, values):
    """Offsets, and intervals that move back."""
    (x,) = inputs(number=1)

    @jax.jit
    def run(x, values):
        given = {"query_offset": values, "is_causal": True} if name == "offset" else {"mask": masks.intervals(None, values)}
        return scaled_dot_product_attention(x, x, x, **given, implementation="composite", return_lse=True)

    values = np.array(values)
    for result, alone in zip(run(x, values), run(x[:1], values[:1])):
        np.testing.assert_allclose(result[0], alone[0], rtol=1e-6)
        assert np.isnan(result[1]).all()


def test_explain():
    shape = jax.ShapeDtypeStruct((1, 4, 2, 8), "float32")
    assert attn_ops.jax.explain(shape, shape, shape, is_causal=True).implementation == "fused"
    assert attn_ops.jax.explain(shape, shape, shape, implementation="composite").implementation == "composite"
    with pytest.raises(ValueError, match="explain: key and value must have the same number of heads, got 3, 2"):
        attn_ops.jax.explain(shape, jax.ShapeDtypeStruct((1, 4, 3, 8), "float32"), shape)


@pytest.mark.parametrize("chosen", [None, "composite"])
def test_an_export_leaves_the_batch_and_the_lengths_open(chosen):
    batch, seqlen = jax.export.symbolic_shape("batch, seqlen")
    allowed = [jax.export.DisabledSafetyCheck.custom_call("attn_ops.forward")]

    def attend(x, **options):
        return scaled_dot_product_attention(x, x, x, is_causal=True, implementation=chosen, **options)

    lengths = jnp.array([3, 4])
    exported = jax.export.export(jax.jit(lambda x: attend(x, key_value_seq_lengths=lengths)), disabled_checks=allowed)(
        jax.ShapeDtypeStruct((2, seqlen, 2, 8), "float32")
    )
    (x,) = inputs(2, 5, 2, 8, number=1)
    assert_same(exported.call(x), attend(x, key_value_seq_lengths=lengths))
    exported = jax.export.export(jax.jit(attend), disabled_checks=allowed)(
        jax.ShapeDtypeStruct((batch, seqlen, 2, 8), "float32")
    )
    for shape in (2, 5, 2, 8), (1, 9, 2, 8):
        x = np.random.default_rng(0).standard_normal(shape).astype("float32")
        expected = attn_ops.reference.attention(x, x, x, is_causal=True)[0]
        np.testing.assert_allclose(exported.call(x), expected, rtol=1e-5, atol=1e-5)


DISABLED = """
import sys
sys.modules["tensorflow"] = None
import jax.numpy as jnp, numpy as np
import attn_ops
x = jnp.ones((1, 3, 2, 4))
np.testing.assert_allclose(attn_ops.jax.scaled_dot_product_attention(x, x, x), x, rtol=1e-6)
explanation = attn_ops.jax.explain(x, x, x)
assert explanation.implementation == "composite" and "ATTN_OPS_DISABLE" in str(explanation), explanation
try:
    attn_ops.jax.scaled_dot_product_attention(x, x, x, implementation="fused")
except ValueError as error:
    assert "implementation 'fused' cannot run: the environment variable ATTN_OPS_DISABLE" in str(error), error
else:
    raise AssertionError
"""


def test_without_tensorflow_and_without_the_kernels():
    subprocess.run([sys.executable, "-c", DISABLED], env={**os.environ, "ATTN_OPS_DISABLE": "1"}, check=True)


def test_without_jax():
    code = "import sys; sys.modules['jax'] = None; import attn_ops; attn_ops.jax"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode and 'attn_ops.jax needs JAX 0.5 or newer' in run.stderr
    assert "jax is not installed: pip install jax" in run.stderr


def test_calls_alike_but_for_what_is_differentiated():
    """Calls of the same shapes of which some have constants for keys, values or bias, as decoders that attend to an encoder
    that is not trained: JAX keeps one backward for them. Keys and values of the others had no gradient."""
    q, k, v, constant = inputs(1, 3, 2, 4, number=4)
    bias = inputs(1, 2, 3, 3, number=1)[0]

    def attention(q, k, v, bias):
        return scaled_dot_product_attention(q, k, v, bias=bias, implementation="fused")

    def by_formula(q, k, v, bias):
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2 + bias)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    def gradients(of, q, k, v, bias):
        held = jax.vjp(of, q, k, v, bias)[1]
        alone = jax.grad(lambda q: of(q, k, v, bias).sum())(q)

        def loss(q, k, v, bias):
            between = of(of(q, k, v, bias), constant, constant, jnp.ones_like(bias))
            return (of(of(between, k, constant, bias), constant, v, bias) * q).sum()

        return held(q), alone, jax.grad(loss, (0, 1, 2, 3))(q, k, v, bias)

    expected = gradients(by_formula, q, k, v, bias)
    assert_same(gradients(attention, q, k, v, bias), expected)
    assert_same(jax.jit(functools.partial(gradients, attention))(q, k, v, bias), expected)

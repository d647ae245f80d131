"""attn_ops.jax: what is added to scores and who sees whom, traced, mapped, and differentiated more than once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_ops.jax
from attn_ops import T5RelativeBias, kernels, masks, reference
from attn_ops.call import attention_call
from attn_ops.call.explanation import Explanation
from attn_ops.call.normalize import normalize
from attn_ops.jax import call, forms, scaled_dot_product_attention, xp
from reference_cases import CASES, differentiable

both = pytest.mark.parametrize("forced", ["fused", "composite"])
ROWS, KEYS = 5, 6


def inputs(seqlen_q=ROWS, seqlen_k=KEYS):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(2, n, 2, 4)).astype("float32") for n in (seqlen_q, seqlen_k, seqlen_k)]


def case_named(name):
    [case] = (case for case in CASES if case.name == name)
    return case


# What may be traced: integers, and the options that they make.
TRACED = {
    "offset": (
        (np.array([1, 3]),),
        lambda x: {"query_offset": x, "is_causal": True, "alibi_slopes": np.array([0.5, -0.2])},
    ),
    "offset of all": ((np.int32(2),), lambda x: {"query_offset": x, "window": (1, 1), "relative_bias": TABLE}),
    "intervals": (
        (np.array([[0, 0, 1, 3, 3]]), np.array([[1, 2, 2, 6, 6], [0, 4, 4, 4, 5]])),
        lambda begin, end: {"mask": masks.intervals(begin, end)},
    ),
    "prefix": ((np.array([2, 0]),), lambda x: {"mask": masks.prefix(x)}),
    "segments": (
        (np.array([[0, 1, 0, 1, 2]] * 2), np.array([[0, 1, 2, 0, 1, 5], [1, 1, 1, 0, 0, 0]])),
        lambda q, k: {"mask": masks.segments(q, k)},
    ),
    "segments in order": (
        (np.array([[0, 0, 1, 4, 4]]), np.array([[0, 1, 1, 2, 4, 4]])),
        lambda q, k: {"mask": masks.segments(q, k, contiguous=True)},
    ),
    "packed": (
        (np.array([0, 2, 5]), np.array([0, 3, 6])),
        lambda q, k: {"mask": masks.packed(q, k) & masks.window(left=1)},
    ),
    "blocks": ((np.array([[1, 0], [0, 1], [1, 1]]) > 0,), lambda x: {"mask": masks.block_sparse(x, 2, 3)}),
}
TABLE = np.random.default_rng(1).normal(size=(5, 2)).astype("float32")
each_traced = pytest.mark.parametrize("name", TRACED)


@both
@each_traced
def test_traced(name, forced):
    arguments, options = TRACED[name]
    arrays = inputs()

    @jax.jit
    def attend(*traced):
        return scaled_dot_product_attention(*arrays, **options(*traced), return_lse=True, implementation=forced)

    for found, expected in zip(attend(*arguments), reference.attention(*arrays, **options(*arguments))):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.wide(8)
@both
@each_traced
def test_vmap(name, forced):
    arguments, options = TRACED[name]
    query, key, value = inputs()
    # Each of the second call is the first one's for another batch entry, or moved as far as all may be moved.
    others = [x[::-1] if x.ndim and x.shape[0] == 2 else x for x in arguments]

    def gradient(query, *traced):
        def loss(query):
            out = scaled_dot_product_attention(query, key, value, **options(*traced), implementation=forced)
            return jnp.sin(out).sum()

        return jax.grad(loss)(query)

    found = jax.jit(jax.vmap(gradient))(np.stack([query, -query]), *map(np.stack, zip(arguments, others)))
    for x, y in zip(found, (gradient(query, *arguments), gradient(-query, *others))):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "text, wrong, options",
    [
        (r"query_offset\[1\] \(-1\) must be from 0 to 2\^30", [0, -1], lambda x: {"query_offset": x}),
        (r"query_offset\[0\] \(1073741825\) must be from 0", [2**30 + 1, 0], lambda x: {"query_offset": x}),
        (r"key_end\[0,2\] \(1\) must not be less than that of the row before \(3\)", [[1, 3, 1, 5, 5]],
         lambda x: {"mask": masks.intervals(key_end=x)}),
        (r"key_end\[0,1\] \(5\) must not be less .* \(6\): .*contiguous=True", [[0, 2, 1, 2, 3, 4]],
         lambda x: {"mask": masks.segments(np.arange(ROWS), x, contiguous=True)}),
    ],
)  # fmt: skip
def test_traced_values_out_of_range(text, wrong, options):
    attend = jax.jit(lambda x: scaled_dot_product_attention(*inputs(), **options(x)))
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"attn_ops.forward: {text}"):
        attend(jnp.array(wrong)).block_until_ready()


CONSTANTS = {
    "lengths": ({"key_value_seq_lengths": [7, 1]}, "key_value_seq_lengths must be between 0 and 6, got 7"),
    "offset": ({"query_offset": np.array([-1, 0])}, r"query_offset must be between 0 and 2\^30, got -1"),
    "slopes": ({"alibi_slopes": np.array([1.0, np.nan])}, "alibi_slopes must be finite numbers"),
    "scale": ({"scale": np.array(np.inf)}, "scale must be finite, got inf"),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_of_traced_functions_are_checked(name):
    """JAX traces what a function makes of Python's and NumPy's values, and the composite tells nothing as it runs."""
    options, text = CONSTANTS[name]
    with pytest.raises(ValueError, match=text):
        jax.jit(lambda *qkv: scaled_dot_product_attention(*qkv, **options, implementation="composite"))(*inputs())


@pytest.mark.parametrize("offset", [2, np.array([1, 3])], ids=str)
def test_functions_of_positions_with_constant_offsets_in_traced_functions(offset):
    mask = masks.from_function(lambda b, h, q, k: (q + k) % 3 != 1)
    found = jax.jit(lambda *qkv: scaled_dot_product_attention(*qkv, mask=mask, query_offset=offset))(*inputs())
    seen = np.asarray(mask.materialize(ROWS, KEYS, query_offset=offset))
    np.testing.assert_allclose(found, scaled_dot_product_attention(*inputs(), mask=seen), atol=1e-6)


SECOND = ["every score and mask", "buckets", "sinks, rows without keys", "soft cap, causal", "hidden"]


def second_order_case(name):
    """The case, and one in which a bias and a table hide."""
    if name != "hidden":
        return differentiable(case_named(name))
    inputs, options, of_caller = differentiable(case_named("table of -inf"))
    inputs["bias"] = case_named("bias of -inf").options["bias"]
    # In the order in which the reference gives the gradients.
    inputs["relative_bias"] = inputs.pop("relative_bias")
    return inputs, {**options, "logits_soft_cap": 0.9}, of_caller


@pytest.mark.wide(8)
@both
@pytest.mark.parametrize("first", ["query", "all"])
@pytest.mark.parametrize("name", SECOND)
def test_second_order(name, first, forced):
    """Also where only the query was varied for the first derivative, and everything is for the second."""
    inputs, options, of_caller = second_order_case(name)
    wanted = ["query"] if first == "query" else list(inputs)

    def outputs(inputs):
        return scaled_dot_product_attention(
            **of_caller(inputs), **options, return_lse=True, implementation=forced
        )

    def slope(inputs):
        def loss(varied):
            out, lse = outputs({**inputs, **varied})
            return jnp.sin(out).sum() + jnp.where(lse == -np.inf, 0.0, lse**2).sum()

        gradients = jax.grad(loss)({name: inputs[name] for name in wanted})
        return sum(jnp.cos(x).sum() for x in jax.tree.leaves(gradients))

    rng = np.random.default_rng(2)
    direction = {name: np.where(x == -np.inf, 0.0, rng.normal(size=x.shape)) for name, x in inputs.items()}

    def expected_slope(step):
        """`slope` by the reference alone."""
        moved = of_caller({name: x + step * direction[name] for name, x in inputs.items()})
        out, lse = reference.attention(**moved, **options)
        d_lse = np.where(lse == -np.inf, 0.0, 2 * lse)
        gradients = reference.attention_gradients(**moved, **options, d_out=np.cos(out), d_lse=d_lse)
        named = dict(zip(inputs, [x for x in gradients if x is not None], strict=True))
        return sum(np.cos(named[name]).sum() for name in wanted)

    with jax.enable_x64(True):
        gradients = jax.jit(jax.grad(slope))(jax.tree.map(jnp.asarray, inputs))
        found = sum(np.vdot(gradients[name], direction[name]) for name in inputs)
    expected = (expected_slope(1e-5) - expected_slope(-1e-5)) / 2e-5
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def looked_at(forced, x, table, sinks):
    key, value = inputs(6, 6)[1:]
    options = {"logits_soft_cap": 2.0, "mask": masks.segments([[0, 1, 0, 1, 0, 0]]), "query_offset": 1}
    return scaled_dot_product_attention(
        x, key, value, relative_bias=table, sinks=sinks, implementation=forced, **options
    )


def test_scan_and_checkpoint():
    query, sinks = inputs(6, 6)[0], jnp.array([0.5, -0.1])
    table = T5RelativeBias(jnp.asarray(TABLE[:4]), max_distance=3)

    def gradients(loop):
        def loss(table, sinks):
            return jnp.sin(loop(lambda x: looked_at("fused", x, table, sinks))).sum()

        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(table, sinks))

    scanned = gradients(lambda step: jax.lax.scan(lambda x, _: (jax.checkpoint(step)(x), None), query, length=2)[0])
    for found, expected in zip(scanned, gradients(lambda step: step(step(query)))):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert np.abs(expected).max() > 1e-3


@both
def test_what_is_hidden_never_counts_even_nan(forced):
    query, key, value = inputs()
    key[:, 4:], value[:, 4:] = np.nan, np.inf
    query[:, 4:] = np.nan
    d_out = np.cos(value[:, :ROWS], where=np.isfinite(value[:, :ROWS]), out=np.full(query.shape, np.nan, "float32"))
    options = {
        "query_seq_lengths": np.array([4, 4]),
        "key_value_seq_lengths": np.array([4, 3]),
        "logits_soft_cap": 1.5,
        "alibi_slopes": np.array([0.5, 0.1]),
    }
    sinks = np.array([0.3, -np.inf], "float32")
    named = {"query": query, "key": key, "value": value, "relative_bias": TABLE, "sinks": sinks}

    def attend(named):
        return scaled_dot_product_attention(**named, **options, return_lse=True, implementation=forced)

    (out, lse), pull = jax.vjp(attend, jax.tree.map(jnp.asarray, named))
    [gradients] = pull((d_out, jnp.ones_like(lse)))
    expected = reference.attention(**named, **options)
    slopes = reference.attention_gradients(**named, **options, d_out=d_out, d_lse=np.ones(lse.shape))
    slopes = [x for x in slopes if x is not None]
    for x, y in zip([out, lse, *(gradients[name] for name in named)], [*expected, *slopes], strict=True):
        assert not np.isnan(x).any()
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)
    assert (gradients["key"][:, 4:] == 0).all() and (lse[:, 0, 4:] == np.float32(0.3)).all()


@both
def test_what_is_hidden_does_not_count_in_other_derivatives(forced):
    """Forward mode, second derivatives and the gradient of a scale were NaN."""
    hidden = inputs()
    for x in hidden:
        x[:, 4:] = np.nan
    options = {"query_seq_lengths": np.array([4, 4]), "key_value_seq_lengths": np.array([4, 3]), "implementation": forced}

    def loss(scale, *qkv):
        return (scaled_dot_product_attention(*qkv, scale=scale, **options) ** 2).sum()

    def derivatives(*qkv):
        scale, along = jnp.float32(0.4), tuple(jnp.full_like(x, 0.3) for x in qkv)
        first = jax.grad(lambda *qkv: loss(0.4, *qkv), (0, 1, 2))
        return [
            jax.grad(loss)(scale, *qkv),
            jax.jvp(lambda *qkv: loss(0.4, *qkv), qkv, along)[1],
            *jax.jvp(first, qkv, along)[1],
            jax.grad(lambda q: sum((g**2).sum() for g in first(q, *qkv[1:])))(qkv[0]),
        ]

    found = jax.jit(derivatives)(*map(jnp.asarray, hidden))
    for x, y in zip(found, jax.jit(derivatives)(*(jnp.nan_to_num(x) for x in hidden))):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_values_of_nan_that_count_make_derivatives_of_nan():
    query, key, value = inputs()
    value[0, 2] = np.nan
    options = {"is_causal": True, "implementation": "composite"}
    gradient = jax.grad(lambda q: scaled_dot_product_attention(q, key, value, **options).sum())(query)
    assert np.isnan(gradient[0, 2:]).all() and np.isfinite(gradient[0, :2]).all() and np.isfinite(gradient[1]).all()


def test_gradients_that_nobody_wants():
    query, key, value = inputs()
    bias, sinks = np.zeros((2, 2, ROWS, KEYS), "float32"), np.zeros(2, "float32")

    def loss(query, bias, sinks):
        return scaled_dot_product_attention(query, key, value, bias=bias, sinks=sinks, relative_bias=TABLE).sum()

    for number, d_bias in ((0, False), (1, True), (2, False)):
        text = str(jax.make_jaxpr(jax.grad(loss, number))(query, bias, sinks))
        assert f"('d_bias', {d_bias})" in text


ON_CUDA = [
    {"mask": masks.prefix(2)},
    {"mask": masks.segments([[1, 0, 1, 0, 1]], [[0, 1, 0, 1, 0, 1]])},
    {"mask": masks.block_sparse(np.eye(3) > 0, 2, 2)},
    {"query_offset": 1, "is_causal": True},
    {"logits_soft_cap": 3.0, "alibi_slopes": np.float32([0.5, 0.1]), "sinks": np.zeros(2)},
    {"relative_bias": TABLE},
]


def test_cuda_leaves_these_to_the_composite(monkeypatch):
    monkeypatch.setattr(forms, "_cuda_device_reason", lambda: None)
    monkeypatch.setattr(kernels, "cuda_unsupported_reason", lambda *given: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    lacks = attention_call.beyond_cuda

    def beyond(arrays):  # relative_bias too, as once it was
        return "its kernels do not have relative_bias" if arrays.relative_bias is not None else lacks(arrays)

    monkeypatch.setattr(attention_call, "beyond_cuda", beyond)
    arrays = inputs()
    assert attn_ops.jax.explain(*arrays).implementation == "fused"
    given = {"relative_bias": TABLE}
    whole = normalize(xp, "test", *arrays, **given)
    key, value = (x.astype("int8") for x in (whole.key, whole.value))
    cache = whole._replace(relative_bias=None, key=key, value=value)
    for what, lacking in (("relative_bias", whole), ("keys of int8", cache)):
        parts = call.split(lacking)
        assert forms.platforms(*parts) == ("cpu",), what
        reason = forms.cuda_reason(*parts)
        assert reason.startswith("its kernels do not have ") and what in reason
    reason = f"the default device is of the platform gpu, and {forms.cuda_reason(*call.split(whole))}"
    assert attn_ops.jax.explain(*arrays, **given) == Explanation("composite", (reason,))
    with pytest.raises(ValueError, match="explain: implementation 'fused' cannot run: .* relative_bias"):
        attn_ops.jax.explain(*arrays, **given, implementation="fused")


@pytest.mark.parametrize("given", ON_CUDA, ids=str)
def test_cuda_has_these(monkeypatch, given):
    monkeypatch.setattr(forms, "_cuda_device_reason", lambda: None)
    monkeypatch.setattr(kernels, "cuda_unsupported_reason", lambda *given: None)
    parts = call.split(normalize(xp, "test", *inputs(), **given))
    assert forms.platforms(*parts) == ("cpu", "cuda")


def test_cuda_reads_narrow_pages(monkeypatch):
    """By a table in which only there, where nobody can look at it, entries that are no page name another."""
    monkeypatch.setattr(forms, "_cuda_device_reason", lambda: None)
    monkeypatch.setattr(kernels, "cuda_unsupported_reason", lambda *given: None)
    monkeypatch.setattr(kernels, "cuda_workspace_bytes", lambda *given, **more: 500)
    pages, table = np.zeros((6, 16, 2, 8), "float16"), np.int32([[5, 9], [-3, 0]])
    function = jax.jit(lambda *x: attn_ops.jax.paged_attention(*x))
    given = np.zeros((2, 1, 2, 8), "float32"), pages, pages, table, np.int32([17, 3])
    names = "attn_ops.forward", "attn_ops.forward.lent"
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
    jax.clear_caches()
    texts = [
        jax.export.export(function, platforms=[platform], disabled_checks=unchecked)(*given).mlir_module()
        for platform in ("cuda", "cpu")
    ]
    jax.clear_caches()
    assert ["@attn_ops.forward.lent" in text and "tensor<500xui8>" in text for text in texts] == [True, False]
    assert ["clip" in text for text in texts] == [True, False] and "@attn_ops.forward" in texts[1]


def test_explain_of_specifications():
    shape = jax.ShapeDtypeStruct((1, 4, 2, 8), "float32")
    table = T5RelativeBias(jax.ShapeDtypeStruct((8, 2), "float32"))
    offset, sinks = jax.ShapeDtypeStruct((1,), "int32"), jax.ShapeDtypeStruct((2,), "float32")
    given = {"relative_bias": table, "sinks": sinks, "query_offset": offset}
    assert attn_ops.jax.explain(shape, shape, shape, **given).implementation == "fused"
    with pytest.raises(ValueError, match=r"explain: relative_bias.table must have shape \[num_buckets, num_heads=2\]"):
        attn_ops.jax.explain(shape, shape, shape, relative_bias=T5RelativeBias(jax.ShapeDtypeStruct((8, 3), "float32")))


@pytest.mark.parametrize(
    "error, text, arguments",
    [
        (ValueError, "logits_soft_cap must be positive and finite, got 0", {"logits_soft_cap": 0}),
        (TypeError, "logits_soft_cap must be a Python number", {"logits_soft_cap": jnp.float32(3)}),
        (ValueError, "query_offset must be between 0 and 2.30, got -1", {"query_offset": jnp.array([0, -1])}),
        (ValueError, "query_offset must be between 0 and 2.30, got 8589934592", {"query_offset": np.array([0, 2**33])}),
        (ValueError, "query_offset tells where",
         {"query_offset": 1, "is_causal": True, "causal_alignment": "bottom_right"}),
        (TypeError, "query_offset must hold integers, got float32", {"query_offset": jnp.zeros(2)}),
        (ValueError, r"alibi_slopes must have shape \[num_heads=2\]", {"alibi_slopes": jnp.zeros(3)}),
        (ValueError, r"relative_bias must have 2 R \+ 1 rows", {"relative_bias": jnp.zeros((4, 2))}),
        (ValueError, "T5RelativeBias needs a table of at least", {"relative_bias": T5RelativeBias(jnp.zeros((2, 2)))}),
        (ValueError, r"sinks must have shape \[num_heads=2\], got \(1,\)", {"sinks": jnp.zeros(1)}),
        (TypeError, "sinks must be floating, got int32", {"sinks": jnp.zeros(2, int)}),
        (ValueError, r"intervals: axis 1 of shape \(1, 4\) must be seqlen_q, here 5",
         {"mask": masks.intervals(key_end=[0] * 4)}),
    ],
)  # fmt: skip
def test_bad_input(error, text, arguments):
    with pytest.raises(error, match=f"scaled_dot_product_attention: {text}"):
        scaled_dot_product_attention(*inputs(), **arguments)

"""The gradient of a bias by the axes along which it was broadcast: its values, and that no bit of it depends on threads.

Right values are NumPy's in float64: ds = p (dp - sum p dp), summed over those axes."""

import itertools

import numpy as np
import pytest
from attn_ops import kernels

core = kernels.core()
# Grouped heads; several chunks of rows; so many heads that sums join doubles on the way, in copies and in chunks of rows; keys
# in several blocks, few rows.
SHAPES = {
    "grouped": (2, 4, 2, 37, 41, 8),
    "chunks": (2, 2, 2, 1030, 24, 4),
    "many heads": (150, 2, 1, 9, 5, 4),
    "many heads in chunks": (20, 1, 1, 600, 5, 4),
    "few rows": (1, 3, 1, 5, 300, 8),
}
BROADCAST = list(itertools.product((False, True), repeat=4))


def arrays(shape, seed=0):
    batch, heads, kv_heads, rows, keys, dim = shape
    rng = np.random.default_rng(seed)
    of = lambda seqlen, n: rng.normal(size=(batch, seqlen, n, dim)).astype("float32")  # noqa: E731
    return of(rows, heads), of(keys, kv_heads), of(keys, kv_heads), of(rows, heads)


def score_gradients(q, k, v, d_out, bias, seen):
    """ds [batch, heads, rows, keys] in float64."""
    q, k, v, d_out = (np.moveaxis(x.astype("float64"), 2, 1) for x in (q, k, v, d_out))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = np.where(seen, q @ np.swapaxes(k, 2, 3) / np.sqrt(q.shape[-1]) + bias.astype("float64"), -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True, initial=-1e9))
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    dp = d_out @ np.swapaxes(v, 2, 3)
    return p * (dp - (p * dp).sum(-1, keepdims=True))


def bias_shape(shape, broadcast):
    return tuple(1 if shared else n for shared, n in zip(broadcast, (*shape[:2], *shape[3:5])))


def gradients(x, bias, **options):
    out, _, statistics = core.forward(*x[:3], bias=bias, **options)
    return core.backward(*x[:3], out, statistics, x[3], bias=bias, **options)[:4]


def check(shape, broadcast, dtype="float32", isa=None, causal=False, hidden_rows=False):
    x = arrays(shape)
    bias = np.random.default_rng(1).normal(size=bias_shape(shape, broadcast)).astype(dtype)
    seen, options = np.ones((1, 1, *shape[3:5]), bool), {"isa": isa} if isa else {}
    if causal:
        seen, options = np.tri(*shape[3:5], dtype=bool)[None, None], {**options, "window_right": 0}
    if hidden_rows:
        mask = np.random.default_rng(2).random((shape[0], 1, *shape[3:5])) < 0.5
        mask[:, :, ::3] = False
        seen, options = seen & mask, {**options, "masks": [mask]}
    found = gradients(x, bias, num_threads=1, **options)
    ds = score_gradients(*x, bias, seen)
    axes = tuple(i for i, n in enumerate(bias.shape) if n == 1)
    wanted, scale = ds.sum(axes, keepdims=True), np.abs(ds).sum(axes, keepdims=True).max()
    tolerance = 2e-3 if dtype == "float16" else 2e-6
    np.testing.assert_allclose(found[3].astype("float64"), wanted, rtol=0, atol=tolerance * scale)
    assert found[3].dtype == bias.dtype
    for again in gradients(x, bias, num_threads=3, **options), gradients(x, bias, num_threads=16, **options):
        for a, b in zip(found, again):
            np.testing.assert_array_equal(a, b)


@pytest.mark.wide(16)
@pytest.mark.parametrize("broadcast", BROADCAST)
@pytest.mark.parametrize("name", SHAPES)
def test_every_broadcast(name, broadcast):
    check(SHAPES[name], broadcast, causal=name == "chunks", hidden_rows=name != "few rows")


@pytest.mark.parametrize("name", ["many heads", "many heads in chunks"])
def test_sums_that_join_doubles_on_the_way(name):
    check(SHAPES[name], (True, True, False, False), hidden_rows=True)


@pytest.mark.parametrize("isa", core.isas())
@pytest.mark.parametrize("broadcast", [(True, False, False, False), (True, True, True, False), (False, True, False, True)])
def test_each_kind_on_every_instruction_set(isa, broadcast):
    check(SHAPES["grouped"], broadcast, isa=isa, causal=True)


@pytest.mark.parametrize("broadcast", [BROADCAST[0], (True, True, False, False), (True, True, True, False)])
def test_a_bias_of_16_bits(broadcast):
    x = [a.astype("float16") for a in arrays(SHAPES["grouped"])]
    bias = np.random.default_rng(1).normal(size=bias_shape(SHAPES["grouped"], broadcast)).astype("float16")
    ds = score_gradients(*x, bias, np.ones((1, 1, 1, 1), bool))
    axes = tuple(i for i, n in enumerate(bias.shape) if n == 1)
    found = gradients(x, bias)[3]
    assert found.dtype == np.float16
    wanted = ds.sum(axes, keepdims=True)
    np.testing.assert_allclose(found.astype("float64"), wanted, rtol=0, atol=2e-3 * np.abs(ds).sum(axes).max())


def test_the_other_gradients_are_the_same_without_it():
    x, bias = arrays(SHAPES["grouped"]), np.ones((1, 1, 37, 41), "float32")
    out, _, statistics = core.forward(*x[:3], bias=bias)
    with_it, without = (
        core.backward(*x[:3], out, statistics, x[3], bias=bias, no_d_bias=skip) for skip in (False, True)
    )
    assert with_it[3] is not None and without[3] is None
    for a, b in zip(with_it[:3], without[:3]):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 8, 1), (1, 1, 1, 16), (1, 1, 8, 16)])
def test_many_equal_terms_keep_their_digits(shape):
    """64 heads of equal terms each: one chain of float32 would lose digits with their number."""
    batch, heads, rows, keys = 64, 4, 8, 16
    q = np.zeros((batch, rows, heads, 4), "float32")
    k, d_out = np.zeros((batch, keys, heads, 4), "float32"), np.zeros_like(q)
    v = np.zeros_like(k)
    d_out[..., 0] = 0.3
    v[:, 0, :, 0] = 0.7  # ds of the first key is one number everywhere, that of the others another one
    # A bias that hides nothing and is the same everywhere; the sum over all keys is 0, over half of them is not.
    mask = np.ones((1, 1, rows, keys), bool)
    bias = np.zeros(shape, "float32")
    out, _, statistics = core.forward(q, k, v, bias=bias, masks=[mask])
    d_lse = np.full((batch, heads, rows), 0.1, "float32")
    found = core.backward(q, k, v, out, statistics, d_out, bias=bias, masks=[mask], d_lse=d_lse)[3]
    p, dp = 1 / keys, np.zeros(keys)
    dp[0] = float(np.float32(0.3)) * float(np.float32(0.7))
    ds = p * (dp - dp.sum() * p + float(np.float32(0.1)))
    full = np.broadcast_to(ds, (batch, heads, rows, keys))
    wanted = full.sum(tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)
    np.testing.assert_allclose(found, wanted, rtol=2e-6)

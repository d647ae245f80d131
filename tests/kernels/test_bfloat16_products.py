"""Kernels that multiply pairs of bfloat16 natively: which calls they take, and what their rounding may change."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from attn_ops import kernels

core = kernels.core()
BESIDE = {"amxbf16": "avx512", "avx512bf16": "avx512", "neonbf16": "neon"}  # whose kernels take all other calls
NATIVE = [isa for isa in core.isas() if isa in BESIDE]
NONE = pytest.param("", marks=pytest.mark.skip("this processor has no products of bfloat16"))
pytestmark = pytest.mark.parametrize("isa", NATIVE or [NONE])
BFLOAT16 = ml_dtypes.bfloat16


def run(inputs, isa, **options):
    """out, lse, dq, dk, dv."""
    query, key, value, d_out = inputs
    out, lse, statistics = core.forward(query, key, value, isa=isa, **options)
    gradients = core.backward(query, key, value, out, statistics, d_out, isa=isa, **options)
    return out, lse, *gradients[:3]


def arrays(seqlen_q=70, seqlen_k=45, head_dim=32, value_dim=16, dtype=BFLOAT16, heads=2):
    rng = np.random.default_rng(3)
    shapes = [(2, seqlen_q, heads, head_dim), (2, seqlen_k, heads, head_dim), (2, seqlen_k, heads, value_dim)]
    return [rng.standard_normal(shape).astype(dtype) for shape in (*shapes, (2, seqlen_q, heads, value_dim))]


def strided(x):
    """The same numbers, 4 bytes apart."""
    return np.repeat(x, 2, axis=-1)[..., ::2]


def widened(inputs, isa, **options):
    return run(inputs, BESIDE[isa], **options)


def equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "inputs",
    [
        arrays(head_dim=31),
        arrays(value_dim=15),
        arrays(dtype=np.float16),
        arrays(dtype=np.float32),
        [strided(x) for x in arrays()],
    ],
    ids=["odd head_dim", "odd value_dim", "float16", "float32", "strided"],
)
def test_other_calls_are_those_of_the_set_beside(isa, inputs):
    assert equal(run(inputs, isa), widened(inputs, isa))


def test_bfloat16_calls_are_its_own(isa):
    assert not equal(run(arrays(), isa), widened(arrays(), isa))


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(70, 45), (9, 1), (48, 128), (33, 257), (300, 130)])
@pytest.mark.parametrize("options", [{}, {"window_right": 0}, {"window_left": 6, "window_right": 3}])
def test_only_weights_are_rounded(isa, seqlen_q, seqlen_k, options):
    """Scores are sums in float32 of exact products: lse is as good as of float32 inputs, and dq as its rounding."""
    inputs = arrays(seqlen_q, seqlen_k)
    out, lse, dq, dk, dv = run(inputs, isa, **options)
    expected = run([x.astype(np.float64) for x in inputs], isa, **options)
    sees = np.isfinite(expected[1])
    assert np.array_equal(np.isfinite(lse), sees) and np.abs(lse[sees] - expected[1][sees]).max() < 2e-6
    named = zip(("out", "dq", "dk", "dv"), (out, dq, dk, dv), (expected[0], *expected[2:]), (2, 1, 3, 2), strict=True)
    for name, found, wanted, roundings in named:
        error = np.abs(found.astype(np.float64) - wanted).max()
        assert error <= roundings * 2.0**-8 * np.abs(wanted).max(), name


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 3e38])
def test_an_odd_key_at_the_end_brings_no_neighbour(isa, garbage):
    """Keys go in pairs: what lies beside the last one a row sees, hidden or of another sequence, must not be seen."""
    clean = arrays(seqlen_k=47)
    for end, options in ((45, {"key_lengths": np.array([45, 45])}), (1, {"window_left": 0, "window_right": 0})):
        dirty = [x.copy() for x in clean]
        for x in dirty[1:3]:
            x[:, end if "key_lengths" in options else 46 :] = garbage
        found, wanted = (run(x, isa, **options) for x in (dirty, clean))
        rows = slice(None) if "key_lengths" in options else slice(0, 46)
        assert all(np.array_equal(a[:, rows], b[:, rows]) for a, b in zip((found[0], found[2]), (wanted[0], wanted[2])))
        assert all(np.array_equal(a[:, :end], b[:, :end]) for a, b in zip(found[3:], wanted[3:]))


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
@pytest.mark.parametrize("begin, end", [(0, 70), (37, 70), (32, 96), (5, 131), (130, 150), (255, 300)])
def test_keys_beside_those_that_are_seen(isa, begin, end, garbage):
    """Products of tiles take 32 keys at a time: those of them that no row sees have no weight, whatever they hold."""
    clean = arrays(60, 300, 18, 10)
    intervals = tuple(np.full((1, 60), of, np.int32) for of in (begin, end))
    dirty = [x.copy() for x in clean]
    for x in dirty[1:3]:
        x[:, :begin] = x[:, end:] = garbage
    found, wanted = (run(x, isa, intervals=intervals) for x in (dirty, clean))
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not any(np.any(gradient[:, :begin]) or np.any(gradient[:, end:]) for gradient in found[3:])
    short = (clean[0], *(x[:, begin:end] for x in clean[1:3]), clean[3])
    expected = run([x.astype(np.float64) for x in short], isa)
    for a, b in zip((*found[:3], found[3][:, begin:end], found[4][:, begin:end]), expected, strict=True):
        assert np.abs(a.astype(np.float64) - b).max() <= 2.0**-6 * np.abs(b).max()


@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (5, 1)])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(7, 40), (50, 260), (200, 33)])
def test_rows_beside_those_of_a_tile(isa, heads, kv_heads, seqlen_q, seqlen_k):
    """Sums over rows take 32 at a time, queries of several heads in one list: NaN in one is nobody else's."""
    rng = np.random.default_rng(5)
    lengths = [(seqlen_q, heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads), (seqlen_q, heads)]
    shapes = [(1, *of, 34) for of in lengths]
    inputs = [rng.standard_normal(shape).astype(BFLOAT16) for shape in shapes]
    found = run(inputs, isa, window_right=0)
    for a, b in zip(found, run([x.astype(np.float64) for x in inputs], isa, window_right=0), strict=True):
        sees = np.isfinite(b)
        assert np.abs(a.astype(np.float64)[sees] - b[sees]).max() <= 2.0**-6 * np.abs(b[sees]).max()
    inputs[0][:, -1], inputs[3][:, -1] = np.nan, np.nan
    dirty = run(inputs, isa, window_right=0)
    for clean, beside in zip((found[0], found[2]), (dirty[0], dirty[2]), strict=True):
        assert np.array_equal(clean[:, :-1], beside[:, :-1])
    if seqlen_k > seqlen_q:  # keys that none but the last row sees, and those that no row does
        for x in dirty[3:]:
            assert np.isnan(x[:, :seqlen_q].astype(np.float64)).any() and not np.any(x[:, seqlen_q:])


@pytest.mark.parametrize("scale", [0.3, -1.7, 2.0**-3, 1e-30, 0.0])
def test_scales(isa, scale):
    inputs = arrays()
    out, lse, *_ = run(inputs, isa, scale=scale)
    expected = run([x.astype(np.float64) for x in inputs], isa, scale=scale)
    assert np.abs(lse - expected[1]).max() < 2e-6 * max(1, np.abs(expected[1]).max())
    assert np.abs(out.astype(np.float64) - expected[0]).max() <= 2.0**-7 * np.abs(expected[0]).max()


def test_nothing_is_out_of_range_with_a_scale_of_nothing(isa):
    query, key, value, d_out = arrays(8, 12, 64)
    query[:], key[:] = 3e38, 3e38
    out, lse, *_ = run((query, key, value, d_out), isa, scale=0.0)
    mean = value.astype(np.float64).mean(axis=1, keepdims=True)
    assert np.abs(out.astype(np.float64) - mean).max() <= 2.0**-7 * np.abs(mean).max()
    assert np.allclose(lse, np.log(12))


def test_scores_in_range_only_once_scaled(isa):
    """q k is 2.6e39, past the end of float32, and times the scale it is not."""
    query, key, value, d_out = arrays(8, 12, 64)
    query[:], key[:] = 2.0**66, 2.0**59
    key[:, 1::2] = -key[:, 1::2]
    out, lse, *_ = run((query, key, value, d_out), isa, scale=2.0**-7)
    assert np.allclose(out.astype(np.float64), value[:, ::2].astype(np.float64).mean(axis=1, keepdims=True), atol=2e-2)
    assert np.all(lse == np.float32(2.0**124))


ROUNDED = """
import sys
import numpy as np
from kernels.test_bfloat16_products import BFLOAT16, arrays, equal, run, strided

isa, dtype = sys.argv[1:]
cases = [((70, 45, 32, 16), {}), ((200, 300, 18, 100), {"window_right": 0}), ((33, 257, 128, 66), {"window_left": 40})]
for extents, options in cases:
    inputs = arrays(*extents, dtype=np.dtype(dtype))
    found = run(inputs, isa, **options)
    wanted = run([x.astype(BFLOAT16) for x in inputs], isa, **options)
    assert all(x.dtype == np.dtype(dtype) for x in (found[0], *found[2:]))
    assert np.array_equal(found[1], wanted[1]), "lse"
    for name, a, b in zip(("out", "dq", "dk", "dv"), (found[0], *found[2:]), (wanted[0], *wanted[2:])):
        apart = np.abs(a.astype(np.float32) - b.astype(np.float32)).max()  # but for the rounding of results
        assert apart <= 2.0**-8 * np.abs(b.astype(np.float32)).max(), (name, apart)
    one_row = [x[:, :1] if i in (0, 3) else x for i, x in enumerate(inputs)]
    doubles = [x.astype(np.float64) for x in one_row]
    apart = np.abs(run(one_row, isa)[0] - run(doubles, isa)[0]).max()
    assert apart < (2e-6 if dtype == "float32" else 2e-3), "few rows"
    apart = [strided(x) for x in inputs]
    assert np.abs(run(apart, isa)[1] - run([x.astype(np.float64) for x in inputs], isa)[1]).max() < 2e-6, "strided"
"""


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_floats_that_may_be_rounded(isa, dtype):
    """With ATTN_OPS_ALLOW_BFLOAT16 calls of floats and halves are those of their roundings, but for their results."""
    environment = {**os.environ, "ATTN_OPS_ALLOW_BFLOAT16": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ROUNDED, isa, dtype]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_garbage_in_hidden_rows_changes_no_subnormal(isa, garbage):
    """Weights so small that products are subnormal, which such instructions take for 0: then where garbage has kernels leave
    out what is hidden as well."""
    query, key, value, d_out = arrays(seqlen_q=40, seqlen_k=147)
    bias = np.linspace(-100, 0, 147, dtype=np.float32).reshape(1, 1, 1, 147)
    options = {"query_lengths": np.array([33, 40], np.int32), "key_lengths": np.array([147, 131], np.int32), "bias": bias}
    clean = run((query, key, value, d_out), isa, **options)
    smallest = float(ml_dtypes.finfo(BFLOAT16).smallest_normal)
    sizes = np.abs(clean[4].astype(np.float64))
    assert ((sizes > 0) & (sizes < 10 * smallest)).any(), "no weight is as small"
    for x in (query, d_out):
        x[0, 33:] = garbage
    for x in (key, value):
        x[1, 131:] = garbage
    assert equal(clean, run((query, key, value, d_out), isa, **options))

"""Keys and values that are narrower than the queries, as caches keep them: in int8 with scales, and in 16 bits."""

import ml_dtypes
import numpy as np
import pytest
from attn_ops import kernels, reference

import int8_rows

core = kernels.core()
each_isa = pytest.mark.parametrize("isa", core.isas())
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


def tensors(rng, batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim, value_dim):
    shapes = ((seqlen_q, num_heads, head_dim), (seqlen_k, num_kv_heads, head_dim), (seqlen_k, num_kv_heads, value_dim))
    return [rng.normal(size=(batch, *shape)).astype("float32") for shape in shapes]


def check(isa, q, k, v, options=None, **reference_options):
    """Compares with the reference on what the int8 rows of k and v stand for; returns out."""
    (k8, k_scales), (v8, v_scales) = int8_rows.quantized(k), int8_rows.quantized(v)
    out, lse, _ = core.forward(q, k8, v8, k_scales=k_scales, v_scales=v_scales, isa=isa, **(options or {}))
    assert out.dtype == q.dtype and lse.dtype == np.float32
    right = [int8_rows.meant(k8, k_scales), int8_rows.meant(v8, v_scales)]
    expected, expected_lse = reference.attention(q.astype("float64"), *right, **reference_options)
    np.testing.assert_allclose(out.astype("float64"), expected, rtol=0, atol=TOLERANCE[q.dtype.name])
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)
    return out


@pytest.mark.wide(2)
@pytest.mark.parametrize("dtype", ("float32", "float16", ml_dtypes.bfloat16), ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("dim", (1, 3, 8, 19, 64, 100))
@each_isa
def test_rounding(rng, dim, dtype, isa):
    """The bits of NumPy's float32: half ways, rows of zeros, of what is next to nothing, NaN and infinity among them."""
    x = rng.normal(size=(3, 9, dim)) * 10.0 ** rng.integers(-6, 5, (3, 9, 1))
    x[1, 1] = 0
    x[1, 2] = np.arange(dim) - 0.5  # halves, where the scale is a power of two
    x[1, 2, 0] = 127
    x[1, 3, -1], x[1, 4, 0], x[1, 5, dim // 2] = np.nan, np.inf, -np.inf
    x = x.astype(dtype)
    if dtype != "float16":
        x[2, 0], x[2, 1], x[2, 2] = 1e-30, 1e-39, 3e38
    integers, scales = core.quantize(x, isa=isa)
    right, right_scales = int8_rows.quantized(x)
    np.testing.assert_array_equal(integers, right)
    np.testing.assert_array_equal(scales.view("int32")[~np.isnan(scales)], right_scales.view("int32")[~np.isnan(right_scales)])
    assert np.isnan(scales).sum() == 3 and np.isnan(scales[1, 3:6]).all()
    off = np.abs(int8_rows.meant(integers, scales) - x.astype("float64"))[~np.isnan(scales)]
    assert (off <= 0.5001 * scales[~np.isnan(scales)][:, None] + 127 * 2.0**-100).all()


@pytest.mark.wide(3)
@pytest.mark.parametrize("dtype", ("float32", "float16", ml_dtypes.bfloat16), ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("rows", (1, 2, 3, 4, 5, 8, 11))  # few, and a tile
@each_isa
def test_rows(rng, rows, dtype, isa):
    q, k, v = tensors(rng, 2, 1, 37, 2 * rows, 2, 19, 13)
    check(isa, q.astype(dtype), k, v)


@pytest.mark.wide(4)
@pytest.mark.parametrize("head_dim, value_dim", [(1, 1), (8, 16), (16, 8), (33, 65), (64, 100), (128, 128), (257, 3)])
@pytest.mark.parametrize("rows", (3, 40))
@each_isa
def test_widths(rng, rows, head_dim, value_dim, isa):
    check(isa, *tensors(rng, 1, rows, 21, 2, 2, head_dim, value_dim))


@pytest.mark.wide(3)
@pytest.mark.parametrize("layout", ("BSHD", "BHSD"))
@pytest.mark.parametrize("seqlen_k", (1, 15, 16, 17, 255, 1000, 5000))
@each_isa
def test_splits_and_layouts(rng, seqlen_k, layout, isa):
    q, k, v = tensors(rng, 1, 1, seqlen_k, 6, 3, 16, 8)
    if layout == "BHSD":
        q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v))
    one = check(isa, q, k, v, {"layout": layout, "num_threads": 1}, layout=layout)
    np.testing.assert_array_equal(one, check(isa, q, k, v, {"layout": layout, "num_threads": 3}, layout=layout))


@pytest.mark.parametrize("rows", (1, 30))
@each_isa
def test_options(rng, rows, isa):
    """A cap, a bias and lengths, all at once; the scale of a key comes before them."""
    q, k, v = tensors(rng, 2, rows, 50, 4, 2, 24, 16)
    bias = rng.normal(size=(1, 4, 1, 50)).astype("float32")
    options = {"bias": bias, "key_lengths": np.array([50, 33]), "soft_cap": 1.5, "query_offset": np.array([3])}
    check(isa, q, k, v, {**options, "window_right": 20}, bias=bias, key_value_seq_lengths=[50, 33], logits_soft_cap=1.5,
          query_offset=3, window=(-1, 20))  # fmt: skip


@pytest.mark.parametrize("rows", (1, 30))
@each_isa
def test_dropout(rng, rows, isa):
    q, k, v = tensors(rng, 2, rows, 50, 2, 1, 24, 16)
    check(isa, q, k, v, {"dropout_rate": 0.3, "dropout_seed": 7}, dropout_rate=0.3, dropout_seed=(7, 0))


@pytest.mark.parametrize("rows", (1, 3))
@each_isa
def test_pages(rng, rows, isa):
    """Pages in another order, of which the scales have their own."""
    q, k, v = tensors(rng, 2, rows, 64, 4, 2, 24, 16)
    table = np.array([[5, 0, 3, 6], [1, 7, 2, 4]])
    inverse = np.argsort(table.reshape(-1))
    whole = [part for x in (k, v) for part in int8_rows.quantized(x)]
    k8, k_scales, v8, v_scales = (x.reshape(8, 16, *x.shape[2:])[inverse] for x in whole)
    lengths = np.array([64, 37])
    out, lse, _ = core.forward(q, k8, v8, k_scales=k_scales, v_scales=v_scales, block_table=table, key_lengths=lengths, isa=isa)
    k8, k_scales, v8, v_scales = whole
    right = core.forward(q, k8, v8, k_scales=k_scales, v_scales=v_scales, key_lengths=lengths, isa=isa)
    np.testing.assert_allclose(out, right[0], rtol=0, atol=1e-6)  # a block of keys ends with a page
    np.testing.assert_allclose(lse, right[1], rtol=1e-6)


@pytest.mark.parametrize("rows", (1, 30))
@each_isa
def test_a_row_that_is_no_number(rng, rows, isa):
    """Whoever sees a row with a NaN or an infinity gets NaN, also where a float cache would have called it -inf; hidden,
    it is not there."""
    q, k, v = tensors(rng, 1, rows, 40, 2, 1, 24, 24)
    k[:, 7, :, 3], v[:, 20, :, 5] = np.nan, -np.inf
    mask = np.ones((1, 2, 1, 40), bool)
    mask[:, :, :, [7, 20]] = False
    out = check(isa, q, k, v, {"masks": (mask,)}, mask=mask)
    assert np.isfinite(out).all()
    for seen in (7, 20):
        mask[:, 1, :, seen] = True
        (k8, k_scales), (v8, v_scales) = int8_rows.quantized(k), int8_rows.quantized(v)
        out, _, _ = core.forward(q, k8, v8, k_scales=k_scales, v_scales=v_scales, masks=(mask,), isa=isa)
        assert np.isnan(out[:, :, 1]).all() and np.isfinite(out[:, :, 0]).all()
        mask[:, 1, :, seen] = False


@pytest.mark.parametrize("rows", (1, 30))
@each_isa
def test_error_of_rounding(rng, rows, isa):
    """Against the keys and values themselves: within the bound of the definition, but no zero."""
    q, k, v = tensors(rng, 2, rows, 300, 4, 2, 64, 64)
    out = check(isa, 0.2 * q, k, v)
    exact, _ = reference.attention(0.2 * q, k, v)
    off = np.abs(out - exact).max()
    assert 0 < off <= int8_rows.error_bound(0.2 * q, k, v, 1 / 8)


@pytest.mark.wide(2)
@pytest.mark.parametrize("kept", ("float16", ml_dtypes.bfloat16, "float32"), ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("dtype", ("float32", "float16", ml_dtypes.bfloat16), ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("rows", (1, 5, 30))
@each_isa
def test_queries_of_another_dtype(rng, rows, dtype, kept, isa):
    """Neither side is rounded to the other's dtype."""
    q, k, v = tensors(rng, 2, rows, 37, 4, 2, 19, 13)
    q, k, v = q.astype(dtype), k.astype(kept), v.astype(kept)
    out, lse, _ = core.forward(q, k, v, isa=isa)
    right, right_lse = reference.attention(*(x.astype("float64") for x in (q, k, v)))
    assert out.dtype == q.dtype
    np.testing.assert_allclose(out.astype("float64"), right, rtol=0, atol=TOLERANCE[q.dtype.name])
    np.testing.assert_allclose(lse, right_lse, rtol=1e-5, atol=1e-5)


BAD = {
    "no scales": ({"k_scales": None, "v_scales": None}, "keys and values in int8 need scales"),
    "one": ({"v_scales": None}, "keys and values in int8 need scales"),
    "float keys": ({"k": "float32", "v": "float32"}, "scales are for keys and values in int8"),
    "another dtype of values": ({"v": "float32"}, "v must be int8, the dtype of k, got float32"),
    "float64 queries": ({"q": "float64"}, "k must be float64, the dtype of q, got int8"),
    "int8 queries": ({"q": "int8"}, "q must be float32, float64, float16 or bfloat16, got int8"),
    "float64 scales": ({"k_scales": "float64"}, "k_scales must be float32, of which int8 keys and values are multiples, got float64"),
    "other scales": ({"v_scales": np.ones((1, 5, 2), "float32")}, r"v_scales must have the shape \[1,6,2\] of k without its last axis, got \[1,5,2\]"),
    "another rank": ({"k_scales": np.ones((1, 6, 2, 1), "float32")}, r"k_scales must have the shape \[1,6,2\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name):
    changed, message = BAD[name]
    given = {"q": np.ones((1, 1, 2, 4), "float32"), "k": np.ones((1, 6, 2, 4), "int8"), "v": np.ones((1, 6, 2, 4), "int8")}
    given.update(k_scales=np.ones((1, 6, 2), "float32"), v_scales=np.ones((1, 6, 2), "float32"))
    for what, x in changed.items():
        given[what] = given[what].astype(x) if isinstance(x, str) else x
    with pytest.raises(ValueError, match=message):
        core.forward(**given)


def test_there_is_no_backward():
    q, k = np.ones((1, 1, 2, 4), "float32"), np.ones((1, 6, 2, 4), "float16")
    out, _, statistics = core.forward(q, k, k)
    with pytest.raises(ValueError, match="k must be float32, the dtype of q, got float16"):
        core.backward(q, k, k, out, statistics, out)


def test_what_is_not_rounded():
    for rows, error, message in (
        (np.ones((2, 3)), ValueError, "rows must be float32, float16 or bfloat16, got float64"),
        (np.ones((2, 3), "int8"), ValueError, "got int8"),
        (np.float32(1), ValueError, "rows must have rank 1 to 4, got 0"),
        (np.ones((2, 3), "float32"), TypeError, "unknown keyword 'axis'"),
    ):
        with pytest.raises(error, match=message):
            core.quantize(rows, **({"axis": 1} if error is TypeError else {}))

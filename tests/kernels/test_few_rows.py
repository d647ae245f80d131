"""Few query rows (a decode step) run by a kernel of their own, with the head dimension in the lanes: its limits, where it
hands over to the row tiles, and what only it does. The features themselves are checked in op/."""

import ml_dtypes
import numpy as np
import pytest
from attn_ops import kernels, reference

core = kernels.core()
pytestmark = pytest.mark.parametrize("isa", core.isas())

TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "float16": 4e-3, "bfloat16": 3e-2}


def tensors(rng, batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim, value_dim, dtype="float32"):
    shapes = (
        (batch, seqlen_q, num_heads, head_dim),
        (batch, seqlen_k, num_kv_heads, head_dim),
        (batch, seqlen_k, num_kv_heads, value_dim),
    )
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def check(isa, q, k, v, options=None, **reference_options):
    """Compares with the reference; returns out."""
    out, lse, _ = core.forward(q, k, v, isa=isa, **(options or {}))
    wide = (x.astype("float64") for x in (q, k, v))
    expected_out, expected_lse = reference.attention(*wide, **reference_options)
    tolerance = TOLERANCE[q.dtype.name]
    np.testing.assert_allclose(out.astype("float64"), expected_out, rtol=0, atol=tolerance)
    np.testing.assert_allclose(lse, expected_lse, rtol=tolerance, atol=tolerance)
    return out


@pytest.mark.parametrize("dtype", ("float32", "float64", "float16", ml_dtypes.bfloat16), ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("rows", range(1, 11))
def test_every_number_of_rows(rng, rows, dtype, isa):
    check(isa, *tensors(rng, 2, 1, 37, 2 * rows, 2, 19, 13, dtype))


@pytest.mark.parametrize("head_dim, value_dim", [(1, 1), (8, 16), (16, 8), (33, 65), (64, 100), (128, 128), (257, 3)])
def test_every_width(rng, head_dim, value_dim, isa):
    check(isa, *tensors(rng, 1, 3, 21, 2, 2, head_dim, value_dim))


@pytest.mark.wide(2)
@pytest.mark.parametrize("dtype", ("float32", "float16", ml_dtypes.bfloat16), ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("head_dim, value_dim", [(2, 34), (16, 6), (64, 64), (100, 72), (128, 160)])
@pytest.mark.parametrize("num_kv_heads", (1, 3, 16))
def test_blocks_of_keys(rng, num_kv_heads, head_dim, value_dim, dtype, isa):
    """Of tasks with few heads and with many, which have other blocks; lengths at and beside their ends. Columns in pairs."""
    for seqlen_k in (1, 2, 15, 17, 32, 63, 65, 127):
        for rows in (1, 2, 3, 8):
            check(isa, *tensors(rng, 1, 1, seqlen_k, rows * num_kv_heads, num_kv_heads, head_dim, value_dim, dtype))


@pytest.mark.parametrize("dtype", ("float32", ml_dtypes.bfloat16), ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("rows", (1, 4))
def test_what_is_hidden_in_a_block_may_be_anything(rng, rows, dtype, isa):
    """Beside keys that are seen, at even places and at odd ones; and past the length."""
    q, k, v = tensors(rng, 2, 1, 81, 2 * rows, 2, 64, 64, dtype)
    mask = rng.random((2, 1, 1, 81)) < 0.6
    mask[:, :, :, 77:] = False
    options = {"masks": [mask]}
    wanted = check(isa, q, k, v, options, mask=mask)
    for x in (k, v):
        x[~mask[:, 0, 0]] = np.nan
    np.testing.assert_array_equal(core.forward(q, k, v, isa=isa, **options)[0], wanted)


@pytest.mark.parametrize("num_kv_heads", (1, 15, 16, 17, 40))
def test_heads_of_a_task(rng, num_kv_heads, isa):
    """Heads are taken together, 16 at most."""
    check(isa, *tensors(rng, 2, 1, 50, 2 * num_kv_heads, num_kv_heads, 8, 8))


@pytest.mark.parametrize("layout", ("BSHD", "BHSD"))
@pytest.mark.parametrize("seqlen_k", (1, 15, 16, 17, 255, 256, 1000, 5000))
def test_key_splits(rng, seqlen_k, layout, isa):
    q, k, v = tensors(rng, 1, 1, seqlen_k, 6, 3, 16, 8)
    if layout == "BHSD":
        q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v))
    options = {"layout": layout}
    one = check(isa, q, k, v, {**options, "num_threads": 1}, **options)
    three = check(isa, q, k, v, {**options, "num_threads": 3}, **options)
    np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize("dtype", ("float32", "float16"))
def test_hidden_keys_hide_nan_from_each_row(rng, dtype, isa):
    """Every head of a group sees other keys; what one does not see is NaN, and must not reach it."""
    q, k, v = tensors(rng, 1, 1, 40, 4, 1, 24, 24, dtype)
    mask = rng.random((1, 4, 1, 40)) < 0.5
    mask[:, 3] = False  # a row that sees nothing
    mask[..., 7] = mask[..., 33] = False
    k[:, 7] = v[:, 7] = np.nan
    v[:, 33] = np.inf
    out = check(isa, q, k, v, {"masks": (mask,)}, mask=mask)
    assert not out[:, :, 3].any()

    mask[:, 1, :, 7] = True  # one row sees the NaN
    out, _, _ = core.forward(q, k, v, masks=(mask,), isa=isa)
    assert np.isnan(out[:, :, 1]).all()
    assert np.isfinite(out[:, :, [0, 2, 3]].astype("float32")).all()


def test_padding_is_never_read(rng, isa):
    q, k, v = tensors(rng, 2, 1, 300, 8, 2, 32, 32)
    lengths = np.array([0, 130], np.int32)
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = np.nan
    check(isa, q, k, v, {"key_lengths": lengths}, key_value_seq_lengths=lengths)


def test_bias_window_and_dropout(rng, isa):
    q, k, v = tensors(rng, 2, 2, 90, 4, 2, 16, 16)
    bias = rng.normal(size=(2, 4, 2, 90)).astype("float32")
    check(
        isa,
        q,
        k,
        v,
        {"bias": bias, "window_left": 33, "bottom_right": True, "dropout_rate": 0.3, "dropout_seed": 5},
        bias=bias,
        window=(33, None),
        causal_alignment="bottom_right",
        dropout_rate=0.3,
        dropout_seed=(5, 0),
    )


def test_strided_columns_take_the_tiles(rng, isa):
    q, k, v = tensors(rng, 1, 1, 30, 2, 2, 32, 32)
    check(isa, q[..., ::2], k[..., ::2], v[..., ::2])

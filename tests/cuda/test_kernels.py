"""The CUDA kernels beside the features that every implementation is tested for: strides, head dimensions, splits, bits.

On the stand-in driver, or with `pytest -m gpu` on a device. Shapes are small because the stand-in is slow.
"""

import numpy as np
import pytest
from attn_ops import reference
from attn_ops.call import philox
from attn_ops.kernels import cuda, cuda_types

import cuda_run
from cases import DTYPES, TOLERANCES, assert_close, check, make_inputs
from cuda_arrays import Array
from implementations import Cuda, Result, specification

KINDS = ("float32", "float16", "bfloat16")
SMALL = dict(batch=1, num_heads=2, num_kv_heads=1)


@pytest.fixture(params=(True, False), ids=("", "without-decode"))
def attend(cuda, on_device, request):
    return Cuda(on_device, request.param)


# ------------------------------------------------------------------------------------------------------ numbers


def test_runs_are_bitwise_equal(attend):
    inputs = make_inputs("bfloat16", 1, 40, 90, 4, 2, 64)
    bias = np.zeros((1, 4, 1, 90), DTYPES["bfloat16"])
    table = np.zeros((9, 4), np.float32)
    options = {"bias": bias, "relative_bias": table, "is_causal": True, "dropout_rate": 0.1, "dropout_seed": 3}
    runs = [attend(*inputs, **options) for _ in range(3)]
    for run in runs[1:]:
        for (name, array), (_, again) in zip(runs[0].items(), run.items(), strict=True):
            np.testing.assert_array_equal(*(np.ascontiguousarray(x).view(np.uint8) for x in (array, again)), name)


@pytest.mark.parametrize("options", [{}, {"logits_soft_cap": 5.0}], ids=["plain", "cap"])
def test_heads_have_the_same_gradients_among_few_and_among_many(attend, options):
    """Of few, all gradients are made by one launch (joins_gradients of plan.h)."""
    *inputs, d_lse = make_inputs("float32", 1, 20, 30, 70, 70, 40)
    few = attend(*(x[:, :, :2] for x in inputs), d_lse[:, :2], is_causal=True, **options)
    many = attend(*inputs, d_lse, is_causal=True, **options)
    for name in ("dq", "dk", "dv"):
        np.testing.assert_array_equal(getattr(few, name), getattr(many, name)[:, :, :2], name)


@pytest.mark.parametrize("dim", [17, 18, 20, 64, 72, 80, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("dtype", KINDS)
def test_head_dims_in_and_between_the_kernels(attend, dtype, dim):
    check(attend, dtype, seqlen_q=20, seqlen_k=24, head_dim=dim, is_causal=True, **SMALL)


@pytest.mark.parametrize("head_dim, value_dim", [(64, 128), (192, 128), (40, 200)])
def test_the_larger_of_two_dims_counts(attend, head_dim, value_dim):
    check(attend, "bfloat16", seqlen_q=20, seqlen_k=24, head_dim=head_dim, value_dim=value_dim, **SMALL)


@pytest.mark.parametrize("num_heads, num_kv_heads", [(3, 1), (8, 2), (20, 1), (5, 5)])
def test_groups(attend, num_heads, num_kv_heads):
    check(attend, "float16", seqlen_q=7, seqlen_k=20, num_heads=num_heads, num_kv_heads=num_kv_heads)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 700), (3, 1100)])
def test_few_rows_and_long_keys_are_split(attend, dtype, seqlen_q, seqlen_k):
    lengths = np.array([seqlen_k, 130], np.int32)
    options = {"is_causal": True, "causal_alignment": "bottom_right", "key_value_seq_lengths": lengths}
    check(attend, dtype, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=64, **options)


@pytest.mark.parametrize(
    "num_heads, seqlen_k, head_dim, value_dim",
    [(4, 2200, 128, 128), (1, 1500, 64, 33), (16, 500, 16, 256), (3, 500, 16, 3), (2, 500, 16, 0)],
    ids=["17 parts", "threads share an output", "passes over outputs", "less than four columns", "no columns"],
)
def test_parts_of_the_keys_are_put_together(cuda, on_device, num_heads, seqlen_k, head_dim, value_dim):
    query, key, value, d_out, _ = make_inputs("float16", 1, 1, seqlen_k, num_heads, 1, head_dim, value_dim)
    key[:, : seqlen_k // 2] *= 4  # parts of different weight
    found = Cuda(on_device, True)(query, key, value, d_out)
    expected = specification(query, key, value, d_out)
    np.testing.assert_allclose(found.out.astype(np.float64), expected.out, atol=2e-3)
    np.testing.assert_allclose(found.lse, expected.lse, rtol=1e-5)


def test_splits_in_which_nothing_is_seen(attend):
    mask = np.zeros((1, 1, 1, 900), bool)
    mask[..., 512:520] = True
    check(attend, "float16", seqlen_q=1, seqlen_k=900, head_dim=64, mask=mask, **SMALL)


def test_dropout_keeps_what_philox_keeps(attend):
    # Equal logits, and values that pick single keys out: the output shows which weights are left.
    batch, rows, keys, heads, rate = 2, 21, 37, 3, 0.4
    zeros = np.zeros((batch, rows, heads, 40), np.float32)
    key = np.zeros((batch, keys, heads, 40), np.float32)
    value = np.broadcast_to(np.eye(keys, dtype=np.float32)[None, :, None], (batch, keys, heads, keys)).copy()
    seed, offset = (7 << 40) + 5, (1 << 33) + 9
    d_out = np.zeros((batch, rows, heads, keys), np.float32)
    out = attend(zeros, key, value, d_out, dropout_rate=rate, dropout_seed=np.array([seed, offset])).out
    keep = philox.keep(seed, offset, batch, heads, rows, keys, rate)
    np.testing.assert_array_equal(out.swapaxes(1, 2) != 0, keep)


@pytest.mark.parametrize("dtype", KINDS)
def test_nan_that_nobody_may_see(attend, dtype):
    query, key, value, d_out, d_lse = make_inputs(dtype, 2, 20, 75, 2, 2, 24)
    lengths = np.array([70, 33], np.int32)
    for row, length in enumerate(lengths):
        key[row, length:] = value[row, length:] = np.nan
    check(attend, dtype, inputs=(query, key, value, d_out, d_lse), key_value_seq_lengths=lengths)
    few = tuple(x[:, :1] for x in (query, d_out))
    inputs = few[0], key, value, few[1], d_lse[:, :, :1].copy()
    check(attend, dtype, inputs=inputs, key_value_seq_lengths=lengths)


def test_tf32_is_less_exact_than_the_default(attend):
    inputs = make_inputs("float32", 1, 80, 50, 2, 2, 64)  # few rows are decoded, always exactly
    expected = specification(*inputs)
    errors = {}
    for allow_tf32 in (False, True):
        result = Result(**cuda_run.run(*inputs, {}, allow_tf32=allow_tf32))
        errors[allow_tf32] = np.abs(result.out - expected.out).max()
        assert_close(result, expected, 1e-2 if allow_tf32 else TOLERANCES["float32"], f"allow_tf32={allow_tf32}")
    assert errors[True] > 4 * errors[False]


# ------------------------------------------------------------------------------------------------------ memory


def strided(x, how):
    """`x` in device memory, and a description of it with other strides."""
    if how == "heads before rows":
        array = Array(np.ascontiguousarray(x.swapaxes(1, 2)))
        return array, array.part(lambda values: values.swapaxes(1, 2))
    if how == "unaligned":
        array = Array(x, offset=1)
        return array, array.view
    if how == "slices":
        wide = np.full((x.shape[0], x.shape[1] + 2, x.shape[2] + 1, x.shape[3] + 3), np.nan, x.dtype)
        inner = (slice(None), slice(1, -1), slice(1, None), slice(1, -2))
        wide[inner] = x
        array = Array(wide)
        return array, array.part(lambda values: values[inner])
    wide = np.full((*x.shape[:3], 2 * x.shape[3]), np.nan, x.dtype)  # every other element
    wide[..., ::2] = x
    array = Array(wide)
    return array, array.part(lambda values: values[..., ::2])


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("seqlen_q", [1, 20])
@pytest.mark.parametrize("how", ["heads before rows", "unaligned", "slices", "every other"])
@pytest.mark.parametrize("dtype", KINDS)
def test_strides(dtype, how, seqlen_q):
    inputs = make_inputs(dtype, 1, seqlen_q, 30, 4, 2, 16)
    query, key, value, d_out, d_lse = inputs
    made = {name: strided(x, how) for name, x in zip(("q", "k", "v", "d_out"), inputs[:4])}
    made |= {name: strided(np.full_like(x, np.nan), how) for name, x in (("out", d_out), ("dq", query))}
    made |= {name: strided(np.full_like(x, np.nan), how) for name, x in (("dk", key), ("dv", value))}
    views = {name: view for name, (_, view) in made.items()}
    lse, d_lse_there = Array.unwritten(d_lse.shape, "float32"), Array(d_lse)
    statistics = Array.unwritten((*d_lse.shape, 2), "float32")
    qkv = views["q"], views["k"], views["v"]
    kept = [cuda_run.launch(cuda.Forward(*qkv, views["out"], statistics.view, lse=lse.view))]
    written = (views[name] for name in ("dq", "dk", "dv"))
    call = cuda.Backward(*qkv, views["out"], statistics.view, views["d_out"], *written, d_lse=d_lse_there.view)
    kept.append(cuda_run.launch(call))
    found = {name: read(*made[name]) for name in ("out", "dq", "dk", "dv")}
    expected = specification(*inputs)
    assert_close(Result(lse=lse.numpy(), **found), expected, TOLERANCES[dtype], f"{dtype}, {how}")
    for name in ("out", "dq", "dk", "dv"):
        values = made[name][0].numpy()
        assert np.isfinite(values.astype(np.float64)).sum() == found[name].size, f"{name}: written beside the view"


def read(array, view):
    values = array.numpy()
    start = (view.pointer - array.view.pointer) // values.itemsize
    strides = [stride * values.itemsize for stride in view.strides]
    return np.lib.stride_tricks.as_strided(values.reshape(-1)[start:], view.shape, strides).copy()


def test_lengths_beyond_the_arrays_are_clamped(attend):
    inputs = make_inputs()
    beyond = {"query_seq_lengths": np.array([9999, 5]), "key_value_seq_lengths": np.array([2**31 - 1, 4])}
    within = {"query_seq_lengths": np.array([13, 5]), "key_value_seq_lengths": np.array([17, 4])}
    found = attend(*inputs, **beyond)
    assert_close(found, specification(*inputs, **within), TOLERANCES["float32"], "clamped")


@pytest.mark.usefixtures("cuda")
def test_a_workspace_that_is_too_small_is_refused():
    inputs = [Array(x) for x in make_inputs("float16", 1, 20, 30, 2, 2, 16)[:4]]
    out, statistics = Array.unwritten((1, 20, 2, 16), "float16"), Array.unwritten((1, 2, 20, 2), "float32")
    q, k, v, d_out = (x.view for x in inputs)
    gradients = [Array.unwritten(x._values.shape, "float16") for x in inputs[:3]]
    call = cuda.Backward(q, k, v, out.view, statistics.view, d_out, *(x.view for x in gradients))
    assert call.workspace_bytes() > 0
    with pytest.raises(cuda.CudaError, match="workspace"):
        call(None)


@pytest.mark.usefixtures("cuda")
def test_a_head_dim_that_no_kernel_has_is_explained():
    call = cuda.Forward(*described("float16", head_dim=264))
    assert "264" in call.unsupported_reason()
    assert cuda.Forward(*described("float16", head_dim=256)).unsupported_reason() is None


# ------------------------------------------------------------------------------------- arguments: nothing is launched


def described(dtype="float32", batch=2, seqlen_q=3, seqlen_k=5, num_heads=4, num_kv_heads=2, head_dim=8):
    """q, k, v, out, statistics that are nowhere."""
    query, keys = (batch, seqlen_q, num_heads, head_dim), (batch, seqlen_k, num_kv_heads, head_dim)
    arrays = [nowhere(shape, dtype) for shape in (query, keys, keys, query)]
    return [*arrays, nowhere((batch, num_heads, seqlen_q, 2), "float32")]


def nowhere(shape, dtype="float32", strides=None):
    return cuda.DeviceArray(4096, dtype, shape, strides or cuda_types.contiguous_strides(shape))


def test_views_have_the_strides_that_were_given():
    q, k, v, out, statistics = described()
    swapped = [nowhere((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype) for x in (q, k, v, out)]
    masked = {"bias": nowhere((4, 1, 5)), "masks": [nowhere((5,), "bool")]}
    params = cuda.Forward(*swapped, statistics, layout="BHSD", **masked)._params
    assert (params.batch, params.seqlen_q, params.num_heads, params.head_dim) == q.shape
    assert list(params.q.stride) == [96, 8, 24, 1]
    assert list(params.bias.stride) == [0, 5, 0, 1] and params.bias.data == 4096
    assert list(params.masks[0].stride) == [0, 0, 0, 1] and params.num_masks == 1
    assert params.scale == pytest.approx(8**-0.5) and params.mask.window_left == params.mask.window_right == -1


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"q": nowhere((2, 3, 4))}, ValueError, "q must have 4 dimensions"),
        ({"k": nowhere((2, 5, 2, 9))}, ValueError, r"k must have the extents \(2, 5, 2, 8\)"),
        ({"v": nowhere((2, 5, 2, 8), "float16")}, TypeError, "v must be float32, not float16"),
        ({"q": nowhere((2, 3, 3, 8))}, ValueError, r"num_heads \(3\) must be a multiple of num_kv_heads \(2\)"),
        ({"statistics": nowhere((2, 4, 3))}, ValueError, "statistics must have the extents"),
        ({"statistics": nowhere((2, 4, 3, 2), strides=(48, 12, 4, 2))}, ValueError, "statistics must be contiguous"),
        ({"lse": nowhere((2, 4, 3))}, None, None),
        ({"lse": nowhere((2, 3, 4))}, ValueError, "lse must have the extents"),
        ({"lse": nowhere((2, 4, 3), strides=(24, 6, 2))}, ValueError, "lse must be contiguous"),
        ({"bias": nowhere((3, 5))}, None, None),
        ({"bias": nowhere((2, 5))}, ValueError, "bias must broadcast to"),
        ({"bias": nowhere((3, 5), "float16")}, TypeError, "bias must be float32, not float16"),
        ({"masks": [nowhere((5,), "uint8")]}, TypeError, r"masks\[0\] must be bool"),
        ({"masks": [nowhere((5,), "bool")] * 5}, ValueError, "there may be 4, got 5"),
        ({"key_lengths": nowhere((2,), "int32")}, None, None),
        ({"key_lengths": nowhere((2,), "uint64")}, TypeError, "key_lengths must be int32"),
        ({"dropout_rate": 0.5}, ValueError, "needs dropout_words"),
        ({"dropout_rate": 1.0}, ValueError, "less than 1"),
        ({"scale": float("nan")}, ValueError, "must be finite"),
        ({"slopes": nowhere((1, 4))}, None, None),
        ({"slopes": nowhere((2, 3))}, ValueError, r"slopes must have the extents \(2, 4\)"),
        ({"slopes": nowhere((2, 4), "float16")}, TypeError, "slopes must be float32"),
        ({"sinks": nowhere((4,))}, None, None),
        ({"sinks": nowhere((2,))}, ValueError, r"sinks must have the extents \(4,\)"),
        ({"soft_cap": 0}, ValueError, r"soft_cap \(0\) must be more than 0"),
        ({"window_left": -2}, ValueError, "must be -1 or more"),
        ({"layout": "SBHD"}, ValueError, "layout must be"),
        ({"q": np.zeros((2, 3, 4, 8))}, TypeError, "q must be an array in device memory, .* numpy.ndarray"),
    ],
)
def test_arguments(changes, error, message):
    arguments = dict(zip(("q", "k", "v", "out", "statistics"), described())) | changes
    if error is None:
        cuda.Forward(**arguments)
        return
    with pytest.raises(error, match=message):
        cuda.Forward(**arguments)


def test_gradient_of_a_bias_has_its_shape():
    q, k, v, out, statistics = described()
    arguments = (q, k, v, out, statistics, out, q, k, v)
    params = cuda.Backward(*arguments, bias=nowhere((4, 1, 5)), d_bias=nowhere((4, 1, 5)))._params
    assert list(params.d_bias_shape) == [1, 4, 1, 5]
    with pytest.raises(ValueError, match="d_bias must have the extents"):
        cuda.Backward(*arguments, bias=nowhere((4, 1, 5)), d_bias=nowhere((4, 3, 5)))
    with pytest.raises(ValueError, match="d_bias without a bias"):
        cuda.Backward(*arguments, d_bias=nowhere((4, 1, 5)))
    with pytest.raises(ValueError, match="d_sinks without sinks"):
        cuda.Backward(*arguments, d_sinks=nowhere((4,)))


@pytest.mark.parametrize("of", ["float16", "float32"])
def test_gradient_of_a_bias_has_its_dtype(of):
    q, k, v, out, statistics = described("float16")
    arguments = (q, k, v, out, statistics, out, q, k, v)
    bias, other = nowhere((4, 1, 5), of), "float16" if of == "float32" else "float32"
    assert cuda.Backward(*arguments, bias=bias, d_bias=bias)._params.forward.bias.dtype == cuda_types.DTYPES.index(of)
    with pytest.raises(TypeError, match=f"d_bias must be {of}, not {other}"):
        cuda.Backward(*arguments, bias=bias, d_bias=nowhere((4, 1, 5), other))
    with pytest.raises(TypeError, match="bias must be float16 or float32, not bfloat16"):
        cuda.Forward(*arguments[:5], bias=nowhere((4, 1, 5), "bfloat16"))


def test_the_array_interface():
    class Foreign:
        __cuda_array_interface__ = {"data": (64, False), "typestr": "<f4", "shape": (2, 3), "strides": (4, 8)}

    assert cuda_types.describe("x", Foreign()) == cuda.DeviceArray(64, "float32", (2, 3), (1, 2))


def test_a_library_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "libattn_ops_cuda.so")
    cuda._library.cache_clear()
    try:
        assert "built without its CUDA kernels" in cuda.unavailable_reason()
        with pytest.raises(RuntimeError, match="built without its CUDA kernels"):
            cuda.forward(*described())
    finally:
        cuda._library.cache_clear()


# ------------------------------------------------------------------------------------------------------ pages


@pytest.mark.wide(3)
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype, kept", [*zip(KINDS, KINDS), ("float32", "float16"), ("float32", "bfloat16")])
@pytest.mark.parametrize("size, seqlen_q, dim", [(16, 1, 64), (48, 3, 40), (128, 20, 72)])
def test_keys_in_pages(dtype, kept, size, seqlen_q, dim, rng):
    """Read where the table says, and nothing that no length reaches: neither entries nor rows of pages. Narrow ones beside
    float32 queries as well."""
    lengths = np.array([0, size + 5, 3 * size], np.int32)
    query, key, value, *_ = make_inputs(dtype, 3, seqlen_q, 3 * size, 4, 2, dim)
    key, value = (x.astype(DTYPES[kept]) for x in (key, value))
    table = rng.permutation(12).astype(np.int32)[:9].reshape(3, 3)
    pages = [np.full((12, size, *x.shape[2:]), np.nan, x.dtype) for x in (key, value)]
    for to, x in zip(pages, (key, value)):
        to[table] = x.reshape(3, 3, size, *x.shape[2:])
    for b, n in enumerate(lengths):
        table[b, -(-n // size) :] = 10**6
    arrays = [Array(x) for x in (query, *pages, table, lengths)]
    q, k, v, of_pages, of_keys = (x.view for x in arrays)
    out = Array.unwritten((*query.shape[:3], value.shape[3]), query.dtype)
    lse, statistics = (Array.unwritten((3, 4, seqlen_q, *last), "float32") for last in ((), (2,)))
    call = cuda.Forward(
        q, k, v, out.view, statistics.view, lse=lse.view, block_table=of_pages, key_lengths=of_keys,
        window_left=2 * size, window_right=0, bottom_right=True,
    )  # fmt: skip
    workspace = cuda_run.launch(call)
    right, right_lse = reference.attention(
        query, key, value, window=(2 * size, 0), causal_alignment="bottom_right", key_value_seq_lengths=lengths
    )
    nothing = {name: np.zeros(0) for name in ("dq", "dk", "dv")}
    found = Result(out.numpy(), lse.numpy(), **nothing)
    assert_close(found, Result(right, right_lse, **nothing), TOLERANCES[dtype], "pages")
    del workspace


# ------------------------------------------------------------------------------------------------------ keys of 16 bits


@pytest.mark.wide(3)
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("kept", ["float16", "bfloat16"])
@pytest.mark.parametrize("seqlen_q, seqlen_k, dim", [(1, 700, 64), (5, 90, 96), (90, 40, 128), (2, 50, 183), (3, 300, 256)])
def test_narrow_keys_beside_float32(kept, seqlen_q, seqlen_k, dim):
    """Exactly those numbers, as near as float32 is, with any number of rows; what is hidden may be NaN."""
    query, key, value, *_ = make_inputs("float32", 2, seqlen_q, seqlen_k, 4, 2, dim)
    key, value = (x.astype(DTYPES[kept]) for x in (key, value))
    value[0, 7], key[1, 8] = np.nan, np.inf
    visible = np.ones((1, 1, 1, seqlen_k), bool)
    visible[..., 7:9] = False
    arrays = [Array(x) for x in (query, key, value, visible)]
    q, k, v, mask = (x.view for x in arrays)
    out = Array.unwritten(query.shape, "float32")
    lse, statistics = (Array.unwritten((2, 4, seqlen_q, *last), "float32") for last in ((), (2,)))
    workspace = cuda_run.launch(cuda.Forward(q, k, v, out.view, statistics.view, lse=lse.view, masks=[mask]))
    right, right_lse = reference.attention(query, key, value, mask=visible)
    nothing = {name: np.zeros(0) for name in ("dq", "dk", "dv")}
    assert_close(Result(out.numpy(), lse.numpy(), **nothing), Result(right, right_lse, **nothing), TOLERANCES["float32"], kept)
    del workspace


@pytest.mark.usefixtures("cuda")
def test_which_keys_may_be_narrower():
    def reason(dtype, kept):
        query, key = Array(np.zeros((1, 1, 1, 64), DTYPES[dtype])), Array(np.zeros((1, 4, 1, 64), DTYPES[kept]))
        statistics = Array.unwritten((1, 1, 1, 2), "float32")
        return cuda.Forward(query.view, key.view, key.view, query.view, statistics.view).unsupported_reason()

    assert reason("float32", "bfloat16") is None
    with pytest.raises(TypeError, match="k must be float16, not bfloat16"):
        reason("float16", "bfloat16")


# ------------------------------------------------------------------------------------------------------ masks and biases


@pytest.mark.wide(3)
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("seqlen_k", [80, 144, 82, 81, 16, 8])
@pytest.mark.parametrize("rows", [1, 70])
def test_masks_and_biases_by_neighbours(attend, dtype, seqlen_k, rows, rng):
    """Of a mask sixteen bytes at a time, of a bias two numbers, where lines are aligned and whole; else one at a time. A
    window hides ends of what is so read."""
    mask = rng.random((1, 2 if rows > 1 else 1, rows, seqlen_k)) < 0.7
    for bias_dtype in sorted({dtype, "float32"}):
        bias = rng.normal(size=(1, 2, 70, seqlen_k)).astype(DTYPES[bias_dtype])
        bias[..., ::9] = -np.inf
        check(attend, dtype, seqlen_q=70, seqlen_k=seqlen_k, head_dim=64, mask=mask, bias=bias, window=(60, 3), **SMALL)

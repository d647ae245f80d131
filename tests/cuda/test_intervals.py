"""Intervals of keys per row, ids, and the position of the first row, on the CUDA kernels, which read both from device memory.

On the stand-in driver, or with `pytest -m gpu` on a device. Over several tiles of rows and keys, forward and backward, in
the kernels for plain calls (nothing else that hides) and in the others.
"""

import dataclasses

import numpy as np
import pytest
from attn_ops import masks
from attn_ops.kernels import cuda as kernels

import cuda_run
from cases import TOLERANCES, assert_close, check, make_inputs
from cuda_arrays import Array
from implementations import Cuda, Result, specification

LENGTH = 150
EXTENTS = {"seqlen_q": LENGTH, "seqlen_k": LENGTH, "head_dim": 16}
BIAS = np.random.default_rng(3).standard_normal((1, 4, 1, LENGTH)).astype(np.float32)


@pytest.fixture(params=(True, False), ids=("", "without-decode"))
def attend(cuda, on_device, request):
    return Cuda(on_device, request.param)


def intervals(batch, rows=LENGTH, keys=LENGTH):
    """Ends that never move back, anywhere; some rows see nothing."""
    rng = np.random.default_rng(batch)
    begin, end = np.sort(rng.integers(0, keys + 1, (2, batch, rows)).astype(np.int32))
    return masks.intervals(begin, end)


def segments(batch, kinds=3):
    """Ids that are scattered."""
    rng = np.random.default_rng(batch)
    return masks.segments(*rng.integers(0, kinds, (2, batch, LENGTH)), contiguous=False)


def blocks(batch, heads, block_q, block_k):
    shape = batch, heads, -(-LENGTH // block_q), -(-LENGTH // block_k)
    return masks.block_sparse(np.random.default_rng(block_q).random(shape) < 0.4, block_q, block_k)


MASKS = {
    "intervals": lambda: intervals(2),
    "intervals of all": lambda: intervals(1),
    "prefix": lambda: masks.prefix(np.array([40, 0])),
    "chunked": lambda: masks.chunked(37) & masks.causal(),
    "packed": lambda: masks.packed([0, 3, 70, LENGTH]),
    "window": lambda: intervals(2) & masks.window(left=20, right=5),
    "lengths": lambda: intervals(2) & masks.padding(np.array([120, 7]), np.array([0, 130])),
    "segments": lambda: segments(2),
    "segments of all": lambda: segments(1, 40) & masks.window(left=70) & masks.padding(None, np.array([150, 90])),
    "segments in intervals": lambda: segments(2) & intervals(2),
    "blocks": lambda: blocks(2, 4, 32, 64),
    "blocks of all": lambda: blocks(1, 1, 1, 200) & masks.causal(),
    "blocks, segments, intervals": lambda: blocks(1, 4, 13, 7) & segments(2) & intervals(2),
}


@pytest.mark.wide(4)
@pytest.mark.parametrize("options", [{}, {"bias": BIAS}], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mask", MASKS)
def test_intervals(attend, mask, dtype, options):
    check(attend, dtype, **EXTENTS, mask=MASKS[mask](), **options)


OFFSETS = {
    "causal": {"is_causal": True, "query_offset": np.array([7, 60])},
    "one": {"is_causal": True, "query_offset": 11},
    "window": {"window": (20, 3), "query_offset": np.array([0, 140])},
    "beyond the keys": {"is_causal": True, "window": (30, None), "query_offset": np.array([170, 100])},
    "lengths": {
        "is_causal": True,
        "query_offset": np.array([90, 3]),
        "query_seq_lengths": np.array([LENGTH, 60]),
        "key_value_seq_lengths": np.array([99, 63]),
    },
    "prefix": {"mask": masks.prefix(np.array([40, 5])), "query_offset": np.array([20, 0])},
}


@pytest.mark.wide(4)
@pytest.mark.parametrize("options", [{}, {"bias": BIAS}], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("offset", OFFSETS)
def test_query_offset(attend, offset, dtype, options):
    check(attend, dtype, **EXTENTS, **OFFSETS[offset], **options)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_of_decoding_with_a_cache(attend, rows):
    """Rows at the end of what a cache has, which is less than it could have."""
    lengths = np.array([700, 5])
    options = {"is_causal": True, "query_offset": lengths - rows, "key_value_seq_lengths": lengths}
    check(attend, "bfloat16", seqlen_q=rows, seqlen_k=1000, head_dim=16, **options)


def test_the_last_bits_are_those_of_the_same_window(attend):
    """A causal window said as intervals, and as an offset of 0: the same call."""
    inputs = dict(seqlen_q=LENGTH, seqlen_k=LENGTH, head_dim=16)
    rows = np.arange(LENGTH, dtype=np.int32)
    said = [
        {"is_causal": True, "window": (30, None)},
        {"is_causal": True, "window": (30, None), "query_offset": 0},
        {"mask": masks.intervals(np.maximum(rows - 30, 0)[None], rows[None] + 1)},
    ]
    first, *others = (check(attend, "bfloat16", **inputs, **options)[0] for options in said)
    for other in others:
        for (name, a), (_, b) in zip(first.items(), other.items()):
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiles_without_a_block_are_not_read(cuda, dtype):
    """Of 512 keys the first 128 are in memory, and they alone are in blocks that are seen."""
    kernels.set_most_decode_rows(0)
    query, key, value, d_out, _ = make_inputs(dtype, 1, 130, 128, 4, 2, 16)
    seen = np.zeros((1, 1, 2, 8), bool)
    seen[..., 0, :2], seen[..., 1, 1] = True, True
    there = {name: Array(x) for name, x in zip(("q", "k", "v", "d_out"), (query, key, value, d_out))}
    views = {name: x.view for name, x in there.items()}
    views |= {name: dataclasses.replace(views[name], shape=(1, 512, 2, 16)) for name in "kv"}
    out, statistics = Array.unwritten(query.shape, query.dtype), Array.unwritten((1, 4, 130, 2), "float32")
    d_query = Array.unwritten(query.shape, query.dtype)
    d_key, d_value = (Array.unwritten((1, 512, 2, 16), query.dtype) for _ in "kv")
    options = {"blocks": (blocks := Array(seen)).view, "block_q": 65, "block_k": 64}
    shared = (*(views[name] for name in "qkv"), out.view, statistics.view)
    cuda_run.launch(kernels.Forward(*shared, **options))
    gradients = (x.view for x in (d_query, d_key, d_value))
    workspace = cuda_run.launch(kernels.Backward(*shared, views["d_out"], *gradients, **options))
    expected = specification(query, key, value, d_out, mask=masks.block_sparse(seen[..., :2], 65, 64))
    found = Result(out.numpy(), expected.lse, d_query.numpy(), d_key.numpy()[:, :128], d_value.numpy()[:, :128])
    assert_close(found, expected, TOLERANCES[dtype], dtype)
    assert not d_key.numpy()[:, 128:].any() and not d_value.numpy()[:, 128:].any()
    del blocks, workspace


def test_bad_descriptions(cuda):
    x = Array(np.zeros((2, 3, 1, 8), np.float16)).view
    statistics = Array(np.zeros((2, 1, 3, 2), np.float32)).view

    def refuses(error, message, **options):
        with pytest.raises(error, match=message):
            kernels.Forward(x, x, x, x, statistics, **options)

    def ends(*shape, dtype=np.int32):
        return Array(np.zeros(shape, dtype)).view

    refuses(ValueError, "query_offset .*extents", query_offset=ends(3))
    refuses(TypeError, "query_offset must be int32", query_offset=ends(2, dtype=np.uint64))
    refuses(ValueError, "query_offset and bottom_right", query_offset=ends(2), bottom_right=True)
    refuses(ValueError, "key_end .*extents", intervals=(ends(2, 3), ends(2, 4)))
    blocks = Array(np.zeros((2, 1, 2, 3), bool)).view
    refuses(ValueError, "blocks must have .3, 3. blocks", blocks=blocks)
    refuses(ValueError, "block_q .0. and block_k", blocks=blocks, block_q=0)
    refuses(ValueError, "key_ids .*extents", segments=(ends(2, 3), ends(2, 4)))
    refuses(ValueError, "one shape", intervals=(ends(2, 3), ends(1, 3)))

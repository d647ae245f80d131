"""Keys and values in pages: the kernels read each where its table says, and give what they give for keys that lie together."""

import ml_dtypes
import numpy as np
import pytest
from attn_ops import _core, reference

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 20, 13
LARGEST_ERROR = {"float64": 1e-13, "float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}


def paged(rng, batch, pages, size, dtype="float32", layout="BSHD"):
    """(k, v, table, keys of the sequences, their values): random pages, some of them shared."""
    shapes = [(batch * pages + 2, size, KV_HEADS, dim) for dim in (DIM, VALUE_DIM)]
    k, v = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    table = rng.integers(0, len(k), (batch, pages)).astype("int32")
    sequences = [np.stack([np.concatenate([x[page] for page in row]) for row in table]) for x in (k, v)]
    if layout == "BHSD":
        k, v, *sequences = (x.swapaxes(1, 2) for x in (k, v, *sequences))
    return k, v, table, *sequences


@pytest.mark.wide(30)
@pytest.mark.parametrize("size", [16, 48, 64, 256])
@pytest.mark.parametrize("rows", [1, 2, 3, 50])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
@pytest.mark.parametrize("isa", _core.isas())
def test_any_pages(isa, layout, dtype, rows, size, rng):
    """With lengths that end inside of pages and between them, a window, and strides of the caller's."""
    k, v, table, keys, values = paged(rng, 4, 3, size, dtype, layout)
    lengths = np.array([0, size + 5, 2 * size, 3 * size])
    for b, n in enumerate(lengths):
        table[b, -(-n // size) :] = 10**6  # never read
    q = rng.standard_normal((4, rows, HEADS, 2 * DIM)).astype(dtype)[..., ::2]
    q = q.swapaxes(1, 2) if layout == "BHSD" else q
    options = {"window_left": size + 9, "window_right": 0, "bottom_right": True, "layout": layout}
    out, lse, _ = _core.forward(q, k, v, block_table=table, key_lengths=lengths, isa=isa, **options)
    right, right_lse = reference.attention(
        q, keys, values, window=(size + 9, 0), causal_alignment="bottom_right", layout=layout,
        key_value_seq_lengths=lengths,
    )  # fmt: skip
    for found, wanted in ((out, right), (lse, right_lse)):
        np.testing.assert_allclose(found.astype("float64"), wanted, rtol=0, atol=LARGEST_ERROR[np.dtype(dtype).name])


@pytest.mark.parametrize("rows", [1, 60])
def test_dropout_and_threads(rows, rng):
    """The same weights are dropped as without pages, and any number of threads gives the same bits."""
    k, v, table, keys, values = paged(rng, 2, 40, 48, "float64")
    q = rng.standard_normal((2, rows, HEADS, DIM))
    options = {"dropout_rate": 0.3, "dropout_seed": 5, "window_left": 1000, "window_right": 10}
    right = _core.forward(q, keys, values, **options)
    found = [_core.forward(q, k, v, block_table=table, num_threads=n, **options) for n in (1, 2, 5)]
    for results in found:
        for one, other, first in zip(results, right, found[0]):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-13)
            np.testing.assert_array_equal(one, first)


def test_what_no_length_reaches_may_be_anything(rng):
    """NaN in pages of others and past the end; and a table without any page."""
    k, v, table, keys, values = paged(rng, 1, 3, 16)
    q = np.ones((1, 1, HEADS, DIM), "f4")
    wanted = _core.forward(q, k, v, key_lengths=[20], block_table=table)[0]
    np.testing.assert_allclose(wanted, _core.forward(q, keys, values, key_lengths=[20])[0], rtol=0, atol=1e-6)
    for x in (k, v):
        x[np.setdiff1d(np.arange(len(x)), table[0, :2])] = np.nan
        x[table[0, 1], 4:] = np.nan
    if table[0, 0] == table[0, 1]:
        pytest.skip("the pages are one")
    found = _core.forward(q, k, v, key_lengths=[20], block_table=table)[0]
    np.testing.assert_array_equal(found, wanted)
    out, lse, _ = _core.forward(q, k, v, block_table=np.zeros((1, 0), int))
    assert not out.any() and (lse == -np.inf).all()


BAD = {
    "an entry past the end": ({"block_table": [[0, 5]]}, r"block_table\[0,1\] \(5\) must be from 0 to 4: there are 5 pages"),
    "a negative entry": ({"block_table": [[-1, 0]]}, r"block_table\[0,0\] \(-1\) must be from 0 to 4"),
    "what a length reaches": ({"block_table": [[0, 5]], "key_lengths": [17]}, "the sequence has 17 keys in pages of 16"),
    "another batch": ({"block_table": [[0], [1]]}, r"block_table \[2,1\] must be \[batch, pages\] \(\[1,...\]\)"),
    "another rank": ({"block_table": [0]}, "must be"),
    "lengths beyond the table": ({"block_table": [[0]], "key_lengths": [17]}, r"key_lengths\[0\] \(17\) must be from 0 to"),
    "other pages of values": ({"block_table": [[0]], "v": 4}, "number of pages"),
    "no table": ({}, "must have the batch of q"),
    "pages of 8": ({"block_table": [[0]], "size": 8}, r"the size of a page \(8\) must be a multiple of 16"),
}


@pytest.mark.wide(2)
@pytest.mark.parametrize("what", BAD)
def test_bad_tables(what):
    options, message = BAD[what]
    options = dict(options)
    size, values = options.pop("size", 16), options.pop("v", 5)
    with pytest.raises(ValueError, match=message):
        _core.forward(np.ones((1, 1, 1, 4)), np.ones((5, size, 1, 4)), np.ones((values, size, 1, 4)), **options)


def test_not_backward(rng):
    k, v, table, *_ = paged(rng, 1, 2, 16)
    q = np.ones((1, 1, HEADS, DIM), "f4")
    out, _, statistics = _core.forward(q, k, v, block_table=table)
    with pytest.raises(ValueError, match="pages of keys are for forward alone"):
        _core.backward(q, k, v, out, statistics, out, block_table=table)

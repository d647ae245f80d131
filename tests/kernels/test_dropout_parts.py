"""A call that is a part of a larger one drops what that would drop: heads, rows and keys are counted as they are there."""

import numpy as np
import pytest

import attn_ops._core as core
from attn_ops.call import philox

SEED, OFFSET, RATE = 11, 2**40 + 3, 0.4
BATCH, HEADS, ROWS, KEYS, DIM = 2, 6, 90, 75, 24  # of the whole


def part_of_the_whole(entries, heads, rows, keys):
    """What the whole keeps of a part, each given as (first, how many)."""
    kept = philox.keep(SEED, OFFSET, BATCH, HEADS, ROWS, KEYS, RATE)
    return kept[tuple(slice(first, first + count) for first, count in (entries, heads, rows, keys))]


def formula(q, k, v, kept, d_out):
    """(out, dq, dk, dv) of softmax(q k^T / sqrt(dim)) with dropout, causal from the first row and key on, in float64."""
    scale = q.shape[-1] ** -0.5
    scores = scale * q @ k.swapaxes(-1, -2)
    scores[..., np.triu_indices(q.shape[2], 1, k.shape[2])[0], np.triu_indices(q.shape[2], 1, k.shape[2])[1]] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    factors = kept / (1 - RATE)
    dropped = p * factors
    out = dropped @ v
    d_p = d_out @ v.swapaxes(-1, -2) * factors
    d_s = p * (d_p - (d_p * p).sum(-1, keepdims=True)) * scale
    return out, d_s @ k, d_s.swapaxes(-1, -2) @ q, dropped.swapaxes(-1, -2) @ d_out


@pytest.mark.parametrize("isa", core.isas())
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(
    "heads, rows, keys",
    [
        ((0, HEADS), (0, ROWS), (0, KEYS)),
        ((3, 3), (0, ROWS), (0, KEYS)),
        ((2, 2), (17, 41), (4, 40)),
        ((0, HEADS), (0, 64), (5, 70)),  # keys that begin within four
        ((0, HEADS), (30, 3), (7, 68)),  # few rows
        ((4, 1), (88, 1), (74, 1)),
    ],
)
@pytest.mark.parametrize("entry", [0, 1])
def test_parts(isa, dtype, heads, rows, keys, entry):
    rng = np.random.default_rng(heads[0] + rows[0] + keys[0])
    entries = (entry, BATCH - entry)
    kept = part_of_the_whole(entries, heads, rows, keys)
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16

    def random(count, dim):
        return rng.normal(size=(entries[1], heads[1], count, dim)).astype(dtype)

    q, d_out, k, v = random(rows[1], DIM), random(rows[1], DIM), random(keys[1], DIM), random(keys[1], DIM)
    options = dict(
        layout="BHSD", isa=isa, dropout_rate=RATE, dropout_seed=SEED, dropout_offset=OFFSET, window_right=0, window_left=-1,
        dropout_origin=(entry * HEADS + heads[0], HEADS, rows[0], keys[0]),
    )  # fmt: skip
    out, _, statistics = core.forward(q, k, v, **options)
    found = out, *core.backward(q, k, v, out, statistics, d_out, **options)[:3]
    expected = formula(*(x.astype("float64") for x in (q, k, v)), kept, d_out.astype("float64"))
    tolerance = {8: 1e-12, 4: 2e-5, 2: 4e-2}[np.dtype(dtype).itemsize]
    for name, x, wanted in zip(("out", "dq", "dk", "dv"), found, expected):
        assert np.abs(x.astype("float64") - wanted).max() <= tolerance * max(1, np.abs(wanted).max()), name


def test_origin_of_another_length():
    x = np.ones((1, 1, 1, 1), "float32")
    with pytest.raises(ValueError, match=r"first_head, heads_of_entry, first_row, first_key"):
        core.forward(x, x, x, dropout_origin=(1, 2, 3))

"""Random combinations of everything that an attention call may be given, as cases of `reference_cases`."""

import numpy as np

from attn_ops import T5RelativeBias, masks
from reference_cases import Case

LENGTHS = (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 65)


def draw(number):
    """The case of this number. Values are such that float64 tells any fault from rounding."""
    rng = np.random.default_rng([16, number])
    seqlen_q, seqlen_k = (int(n) for n in rng.choice(LENGTHS, 2))
    batch, kv_heads, group = int(rng.integers(1, 3)), int(rng.integers(1, 3)), int(rng.integers(1, 4))
    dims = tuple(int(n) for n in rng.choice([1, 3, 8, 17], 2))
    extents = batch, kv_heads * group, seqlen_q, seqlen_k
    return Case(
        f"combination {number}",
        lambda case: _options(case, rng, *extents),
        batch,
        seqlen_q,
        seqlen_k,
        (kv_heads * group, kv_heads),
        dims,
    )


def _options(case, rng, batch, num_heads, seqlen_q, seqlen_k):
    def sometimes(share):
        return rng.random() < share

    options = {"layout": str(rng.choice(["BSHD", "BHSD"]))}
    if sometimes(0.3):
        options["logits_soft_cap"] = float(10 ** rng.uniform(-1, 1.5))
    if sometimes(0.3):
        options["alibi_slopes"] = rng.uniform(-0.3, 0.5, (num_heads,) if sometimes(0.5) else (batch, num_heads))
    if sometimes(0.4):
        options["relative_bias"] = _table(rng, num_heads)
    if sometimes(0.3):
        options["sinks"] = np.where(rng.random(num_heads) < 0.1, -np.inf, rng.standard_normal(num_heads))
    if sometimes(0.3):
        bias = case.bias(*np.flatnonzero(rng.random(4) < 0.6))
        options["bias"] = np.where(rng.random(bias.shape) < 0.1, -np.inf, bias)
    if sometimes(0.3):
        options["is_causal"] = True
    if sometimes(0.3):
        options["window"] = tuple(None if sometimes(0.3) else int(rng.integers(0, seqlen_k + 2)) for _ in range(2))
    where = rng.choice(["top_left", "bottom_right", "offset", "offsets"])
    if where == "bottom_right":
        options["causal_alignment"] = "bottom_right"
    elif where != "top_left":
        options["query_offset"] = int(rng.integers(0, seqlen_k)) if where == "offset" else rng.integers(0, seqlen_k + 3, batch)
    for name, extent in (("query_seq_lengths", seqlen_q), ("key_value_seq_lengths", seqlen_k)):
        if sometimes(0.2):
            options[name] = rng.integers(0, extent + 1, batch)
    parts = [part(case, rng, batch, num_heads, seqlen_q, seqlen_k) for part in _PARTS if sometimes(0.2)]
    if parts:
        mask = parts[0]
        for part in parts[1:]:
            mask = mask & part
        options["mask"] = mask
    if sometimes(0.2):
        options["dropout_rate"], options["dropout_seed"] = 0.3, tuple(map(int, rng.integers(0, 2**62, 2)))
    if sometimes(0.3):
        options["scale"] = float(rng.choice([1.0, -0.7, 2.5, 0.0]))
    return options


def _table(rng, num_heads):
    if rng.random() < 0.3:
        bidirectional, max_distance = bool(rng.random() < 0.5), int(rng.integers(9, 40))
        return T5RelativeBias(rng.standard_normal((16, num_heads)), bidirectional, max_distance)
    table = rng.standard_normal((2 * int(rng.choice([0, 1, 2, 5, 16, 40])) + 1, num_heads))
    return np.where(rng.random(table.shape) < 0.1, -np.inf, table)


def _intervals(case, rng, batch, num_heads, seqlen_q, seqlen_k):
    begin, end = np.sort(rng.integers(0, seqlen_k + 1, (2, int(rng.choice([1, batch])), seqlen_q)), axis=-1)
    return masks.intervals(np.minimum(begin, end // 2) if rng.random() < 0.7 else begin, end)


def _segments(case, rng, batch, num_heads, seqlen_q, seqlen_k):
    ids = [rng.integers(0, 3, (int(rng.choice([1, batch])), n)) for n in (seqlen_q, seqlen_k)]
    return masks.segments(*(map(np.sort, ids) if rng.random() < 0.5 else ids))


def _blocks(case, rng, batch, num_heads, seqlen_q, seqlen_k):
    block_q, block_k = (int(n) for n in rng.choice([1, 3, 8, 16, 32], 2))
    shape = int(rng.choice([1, batch])), int(rng.choice([1, num_heads])), -(-seqlen_q // block_q), -(-seqlen_k // block_k)
    return masks.block_sparse(rng.random(shape) < rng.choice([0.3, 0.8]), block_q, block_k)


def _dense(case, rng, batch, num_heads, seqlen_q, seqlen_k):
    return masks.boolean(case.mask(*np.flatnonzero(rng.random(4) < 0.6)))


_PARTS = (_intervals, _segments, _blocks, _dense)

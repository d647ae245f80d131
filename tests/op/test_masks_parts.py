"""What kernels take of masks (`Mask.parts`): against the rules written out pair by pair, in NumPy, TensorFlow and JAX."""

import itertools

import numpy as np
import pytest

import attn_ops
from attn_ops import kernels, masks

BATCH, SEQLEN_Q, SEQLEN_K = 2, 9, 11
CU_Q, CU_K = np.array([0, 3, 3, 7]), np.array([0, 2, 5, 10])
OFFSETS = np.array([2, 0])
RNG = np.random.default_rng(3)
BEGIN = np.array([0, 0, 1, 1, 4, 4, 6, 6, 6], np.int32)
END = np.array([[0, 2, 2, 5, 5, 6, 9, 11, 11], [1, 1, 3, 4, 4, 7, 7, 7, 10]], np.int64)
RUNS_Q, RUNS_K = np.array([[5, 5, 1, 1, 1, 7, 7, 2, 2], [3, 3, 3, 3, 9, 9, 9, 0, 0]]), None
RUNS_K = np.array([[5, 5, 5, 1, 1, 4, 7, 7, 2, 2, 2], [3, 3, 3, 9, 9, 9, 9, 9, 0, 0, 0]])
MIXED_Q, MIXED_K = RNG.integers(0, 3, (BATCH, SEQLEN_Q)), RNG.integers(0, 3, (BATCH, SEQLEN_K))
WIDE = np.array([7, 7 + 2**32, -(2**40)])
BLOCKS = RNG.random((BATCH, 3, 3, 3)) < 0.6
PREFIXES = np.array([4, 0])


def _sequence(cu, at):
    """The sequence of a position, or None."""
    return next((s for s in range(len(cu) - 1) if cu[s] <= at < cu[s + 1]), None)


# name: (arrays, mask of them, truth(b, h, i, own, j), whether no ids may be left to compare when all is known)
STRUCTURED = {
    "intervals": ([BEGIN, END], masks.intervals, lambda b, h, i, own, j: BEGIN[i] <= j < END[b, i]),
    "begins": ([BEGIN], masks.intervals, lambda b, h, i, own, j: BEGIN[i] <= j),
    "ends": ([END], lambda e: masks.intervals(None, e), lambda b, h, i, own, j: j < END[b, i]),
    "ends past the keys": ([END - 3], lambda e: masks.intervals(e, e + 40), lambda b, h, i, own, j: j >= END[b, i] - 3),
    "prefix": ([], lambda: masks.prefix(5), lambda b, h, i, own, j: j <= own or j < 5),
    "no prefix": ([], lambda: masks.prefix(0), lambda b, h, i, own, j: j <= own),
    "prefixes": ([PREFIXES], masks.prefix, lambda b, h, i, own, j: j <= own or j < PREFIXES[b]),
    "chunked": ([], lambda: masks.chunked(4), lambda b, h, i, own, j: own // 4 == j // 4),
    "chunked by 1": ([], lambda: masks.chunked(1), lambda b, h, i, own, j: own == j),
    "packed": ([CU_Q, CU_K], masks.packed, lambda b, h, i, own, j: _sequence(CU_Q, i) == _sequence(CU_K, j) is not None),
    "packed alike": ([CU_K], masks.packed, lambda b, h, i, own, j: _sequence(CU_K, own) == _sequence(CU_K, j) is not None),
    "runs": ([RUNS_Q, RUNS_K], masks.segments, lambda b, h, i, own, j: RUNS_Q[b, i] == RUNS_K[b, j]),
    "one run": ([RUNS_Q[0], RUNS_K[0]], masks.segments, lambda b, h, i, own, j: RUNS_Q[0, i] == RUNS_K[0, j]),
    "mixed ids": ([MIXED_Q, MIXED_K], masks.segments, lambda b, h, i, own, j: MIXED_Q[b, i] == MIXED_K[b, j]),
    "mixed ids, compared": (
        [MIXED_Q, MIXED_K],
        lambda q, k: masks.segments(q, k, contiguous=False),
        lambda b, h, i, own, j: MIXED_Q[b, i] == MIXED_K[b, j],
    ),
    "promised": (
        [np.sort(MIXED_Q), np.sort(MIXED_K)],
        lambda q, k: masks.segments(q, k, contiguous=True),
        lambda b, h, i, own, j: np.sort(MIXED_Q)[b, i] == np.sort(MIXED_K)[b, j],
    ),
    "blocks": ([BLOCKS], lambda x: masks.block_sparse(x, 3, 4), lambda b, h, i, own, j: BLOCKS[b, h, i // 3, j // 4]),
    "blocks of no batch": (
        [BLOCKS[0, 0, :2, :2].astype(np.uint8)],
        lambda x: masks.block_sparse(x, 5, 8),
        lambda b, h, i, own, j: bool(BLOCKS[0, 0, i // 5, j // 8]),
    ),
    "with others": (
        [BEGIN, CU_Q, CU_K, MIXED_Q, MIXED_K, BLOCKS],
        lambda b, q, k, i, j, x: (
            masks.intervals(b)
            & masks.packed(q, k)
            & masks.chunked(6)
            & masks.segments(i, j)
            & masks.segments(j[:, :SEQLEN_Q], j)
            & masks.block_sparse(x, 3, 4)
            & masks.block_sparse(x[:1, :1], 3, 4)
        ),
        lambda b, h, i, own, j: (
            BEGIN[i] <= j
            and _sequence(CU_Q, i) == _sequence(CU_K, j) is not None
            and own // 6 == j // 6
            and MIXED_Q[b, i] == MIXED_K[b, j]
            and MIXED_K[b, i] == MIXED_K[b, j]
            and BLOCKS[b, h, i // 3, j // 4]
            and BLOCKS[0, 0, i // 3, j // 4]
        ),
    ),
}  # fmt: skip
OFFSET = {"none": None, "one": 2, "each": OFFSETS}


def truth(name, offset):
    """`[BATCH, 3, SEQLEN_Q, SEQLEN_K]`, pair by pair."""
    rule = STRUCTURED[name][2]
    visible = np.zeros((BATCH, 3, SEQLEN_Q, SEQLEN_K), bool)
    for b, h, i, j in np.ndindex(*visible.shape):
        own = i + (0 if offset is None else int(np.broadcast_to(offset, BATCH)[b]))
        visible[b, h, i, j] = bool(rule(b, h, i, own, j))
    return visible


def expanded(parts):
    """Who sees whom by `Parts`, as their documentation has it, once the promises it makes are checked."""
    keys = np.arange(SEQLEN_K)
    visible = np.ones((BATCH, 3, SEQLEN_Q, SEQLEN_K), bool)
    if parts.intervals is not None:
        begin, end = map(np.asarray, parts.intervals)
        for x in (begin, end):
            assert x.dtype == np.int32 and x.ndim == 2 and x.shape[0] in (1, BATCH) and x.shape[1] == SEQLEN_Q
            assert (np.diff(x) >= 0).all() and x.min() >= 0 and x.max() <= SEQLEN_K
        visible &= ((keys >= begin[..., None]) & (keys < end[..., None]))[:, None]
    if parts.segments is not None:
        q_ids, kv_ids = map(np.asarray, parts.segments)
        assert q_ids.dtype == kv_ids.dtype == np.int32
        visible &= (q_ids[:, :, None] == kv_ids[:, None])[:, None]
    if parts.blocks is not None:
        blocks = np.asarray(parts.blocks)
        assert blocks.dtype == bool and blocks.ndim == 4
        by_row = blocks[:, :, np.arange(SEQLEN_Q) // parts.block_q]
        visible &= by_row[..., keys // parts.block_k]
    for part in parts.dense:
        assert np.asarray(part).dtype == bool and len(part.shape) == 4
        visible &= np.asarray(part)
    return visible


@pytest.mark.parametrize("offset", OFFSET)
@pytest.mark.parametrize("name", STRUCTURED)
def test_parts_and_dense_arrays_are_the_rule(name, offset):
    arrays, make, _ = STRUCTURED[name]
    mask, offset = make(*arrays), OFFSET[offset]
    expected = truth(name, offset)
    assert not expected.all() and expected.any()
    dense = mask.materialize(SEQLEN_Q, SEQLEN_K, query_offset=offset)
    np.testing.assert_array_equal(np.broadcast_to(dense, expected.shape), expected)
    parts = mask.parts(SEQLEN_Q, SEQLEN_K, query_offset=offset)
    np.testing.assert_array_equal(expanded(parts), expected)
    if name != "with others":
        assert parts.dense == (), "a [seqlen_q, seqlen_k] array was made"
    if "run" in name or name in ("promised", "packed"):
        assert parts.segments is None and parts.intervals is not None, "ids that stand together are intervals"


@pytest.mark.wide(2)
@pytest.mark.parametrize("offset", ["none", "each"])
@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_traced_in_tensorflow(mode, offset):
    """With arrays, extents and offset that are all unknown where it is traced."""
    tf = pytest.importorskip("tensorflow")
    structured = dict(STRUCTURED)
    if mode == "xla" and kernels.core().cpu_features().get("avx512f"):
        # TensorFlow 2.21's XLA writes beyond one of its results there: with --xla_cpu_max_isa=AVX2, without fusion or
        # without optimization it does not, and no part of this mask alone makes it (docs/limits.md).
        del structured["with others"]

    def all_parts(rows, keys, offset, *arrays):
        seqlen_q, seqlen_k = tf.shape(rows)[0], tf.shape(keys)[0]
        found, arrays = {}, iter(arrays)
        for name, (given, make, _) in structured.items():
            mask = make(*(next(arrays) for _ in given))
            parts = mask.parts(seqlen_q, seqlen_k, None if offset is None else offset, like=(rows,))
            found[name] = tf.nest.map_structure(lambda x: None if x is None else tf.convert_to_tensor(x), parts)
        return found

    flat = [x for given, _, _ in structured.values() for x in given]
    unknown = [tf.TensorSpec([None] * x.ndim, x.dtype) for x in flat]
    rows = [tf.TensorSpec([None], tf.float32)] * 2
    value = OFFSET[offset]
    offsets = [None if value is None else tf.TensorSpec([None], tf.int32)]
    traced = tf.function(all_parts, jit_compile=mode == "xla", autograph=False)
    concrete = traced.get_concrete_function(*rows, *offsets, *unknown)
    arguments = [] if value is None else [tf.constant(value, tf.int32)]
    found = concrete(tf.zeros(SEQLEN_Q), tf.zeros(SEQLEN_K), *arguments, *map(tf.constant, flat))
    for name, parts in found.items():
        np.testing.assert_array_equal(expanded(parts), truth(name, value), name)
        if name != "with others":
            assert not parts.dense


@pytest.mark.parametrize("contiguous", [None, True])
def test_segments_of_nothing_in_tensorflow(contiguous):
    """Graphs of unknown extents take batches, rows and keys that are empty."""
    tf = pytest.importorskip("tensorflow")
    ids = [tf.TensorSpec([None, None], tf.int32)] * 2

    @tf.function(input_signature=ids, autograph=False)
    def intervals(q_ids, kv_ids):
        return masks.segments(q_ids, kv_ids, contiguous=contiguous).parts(tf.shape(q_ids)[1], tf.shape(kv_ids)[1]).intervals

    for batch, rows, keys in itertools.product((0, 2), (0, 3), (0, 4)):
        begin, end = intervals(tf.zeros((batch, rows), tf.int32), tf.zeros((batch, keys), tf.int32))
        assert begin.shape == end.shape == (batch, rows) and (np.maximum(end - begin, 0) == keys).all()


@pytest.mark.wide(2)
@pytest.mark.parametrize("offset", ["none", "each"])
def test_traced_in_jax(offset):
    jax = pytest.importorskip("jax")
    flat = [x.astype(np.int32) if x.dtype == np.int64 else x for given, _, _ in STRUCTURED.values() for x in given]
    value = OFFSET[offset]

    def all_parts(offset, *arrays):
        arrays = iter(arrays)
        masks_of = {name: make(*(next(arrays) for _ in given)) for name, (given, make, _) in STRUCTURED.items()}
        return {
            name: mask.parts(SEQLEN_Q, SEQLEN_K, query_offset=offset)._replace(block_q=0, block_k=0)
            for name, mask in masks_of.items()
        }

    sizes = {name: make(*given).parts(SEQLEN_Q, SEQLEN_K)[3:5] for name, (given, make, _) in STRUCTURED.items()}
    found = jax.jit(all_parts)(value, *flat)
    for name, parts in found.items():
        parts = parts._replace(block_q=sizes[name][0], block_k=sizes[name][1])
        np.testing.assert_array_equal(expanded(parts), truth(name, value), name)


def test_extents_that_jax_export_leaves_open():
    jax = pytest.importorskip("jax")
    (n,) = jax.export.symbolic_shape("n")
    mask = masks.prefix(3) & masks.chunked(4) & masks.packed([0, 2, 6])

    def parts(x, ids):
        found = (mask & masks.segments(ids)).parts(x.shape[0], x.shape[0], like=(x,))
        return found.intervals, found.segments

    described = jax.ShapeDtypeStruct((n,), "float32"), jax.ShapeDtypeStruct((1, n), "int32")
    (begin, end), (q_ids, kv_ids) = jax.export.export(jax.jit(parts))(*described).call(np.zeros(6, "f"), np.array([[0, 0, 0, 1, 1, 1]]))
    wanted_begin, wanted_end = mask.parts(6, 6).intervals
    np.testing.assert_array_equal(begin, wanted_begin)
    np.testing.assert_array_equal(end, wanted_end)
    np.testing.assert_array_equal(q_ids, kv_ids)


@pytest.mark.wide(2)
@pytest.mark.parametrize("offset", OFFSET)
@pytest.mark.parametrize("framework", ["tensorflow", "jax"])
def test_attention_by_parts_is_attention_by_the_dense_mask(framework, offset):
    pytest.importorskip(framework)
    attention = (attn_ops.jax if framework == "jax" else attn_ops).scaled_dot_product_attention
    q, k, v = (RNG.standard_normal((BATCH, n, 3, 4)).astype(np.float32) for n in (SEQLEN_Q, SEQLEN_K, SEQLEN_K))
    for name, (arrays, make, _) in STRUCTURED.items():
        mask = make(*arrays)
        found = attention(q, k, v, mask=mask, query_offset=OFFSET[offset], implementation="composite")
        expected = attention(q, k, v, mask=truth(name, OFFSET[offset]), implementation="composite")
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("contiguous", [None, False])
def test_ids_beyond_32_bits_are_not_mistaken(contiguous):
    """7 and 7 + 2^32 are the same 32 bits; known, and traced."""
    tf = pytest.importorskip("tensorflow")
    ids = WIDE[[0, 1, 0, 2, 1, 0, 2]]
    expected = ids[:, None] == ids

    def found(ids):
        parts = masks.segments(ids, contiguous=contiguous).parts(7, 7)
        return [tf.convert_to_tensor(x) for x in (parts.segments or ())]

    for q_ids, kv_ids in (found(ids), tf.function(found, autograph=False)(tf.constant(ids))):
        assert q_ids.dtype == tf.int32
        np.testing.assert_array_equal(q_ids[0, :, None] == kv_ids[0], expected)


def test_ids_of_two_dtypes_that_become_dense():
    """The second segments of a call do, and TensorFlow compared int32 with int64."""
    tf = pytest.importorskip("tensorflow")
    q_ids, kv_ids = tf.constant(MIXED_Q, tf.int64), tf.constant(MIXED_K, tf.int32)

    @tf.function(autograph=False)
    def dense(q_ids, kv_ids):
        ids = masks.segments(q_ids, kv_ids)
        return (ids & ids).parts(SEQLEN_Q, SEQLEN_K).dense[0]

    np.testing.assert_array_equal(dense(q_ids, kv_ids)[:, 0], MIXED_Q[:, :, None] == MIXED_K[:, None])


def test_traced_ids_of_runs_are_compared_within_their_runs_only():
    """Undecided when traced: the intervals alone already hold nothing else."""
    tf = pytest.importorskip("tensorflow")
    intervals = tf.function(lambda q, k: masks.segments(q, k).parts(SEQLEN_Q, SEQLEN_K).intervals)(RUNS_Q, RUNS_K)
    begin, end = (x.numpy()[..., None] for x in intervals)
    keys = np.arange(SEQLEN_K)
    np.testing.assert_array_equal((keys >= begin) & (keys < end), RUNS_Q[:, :, None] == RUNS_K[:, None])


@pytest.mark.parametrize("make", [masks.prefix, masks.chunked], ids=["prefix", "chunked"])
def test_bottom_right_stands_at_the_last_key(make):
    mask = make(4, "bottom_right") & masks.padding([9, 5], [11, 6])
    own = np.arange(SEQLEN_Q) + np.array([[2], [1]])
    keys = np.arange(SEQLEN_K)
    own, lengths = own[..., None], np.array([11, 6])[:, None, None]
    seen = (keys <= own) | (keys < 4) if make is masks.prefix else own // 4 == keys // 4
    begin, end = (x[..., None] for x in mask.parts(SEQLEN_Q, SEQLEN_K).intervals)
    np.testing.assert_array_equal((keys >= begin) & (keys < end), seen)
    rows = np.arange(SEQLEN_Q)[:, None] < np.array([9, 5])[:, None, None]
    np.testing.assert_array_equal(mask.materialize(SEQLEN_Q, SEQLEN_K)[:, 0], seen & rows & (keys < lengths))
    with pytest.raises(ValueError, match="causal_alignment 'bottom_right' and 'top_left'"):
        make(4, "bottom_right") & masks.causal()


def test_causal_and_windows_follow_the_offset():
    mask = masks.causal() & masks.window(2)
    own = np.arange(3)[:, None] + OFFSETS[:, None, None]
    keys = np.arange(SEQLEN_K)
    expected = (keys <= own) & (keys >= own - 2)
    np.testing.assert_array_equal(mask.materialize(3, SEQLEN_K, query_offset=OFFSETS)[:, 0], expected)
    with pytest.raises(ValueError, match="query_offset says where the first row stands"):
        masks.causal("bottom_right").materialize(3, 5, query_offset=1)
    with pytest.raises(ValueError, match=r"query_offset must be in \[0, 2\*\*30\], got -1"):
        masks.causal().materialize(3, 5, query_offset=-1)
    # A window as long as the keys still hides of a row that stands far after them.
    far = masks.window(SEQLEN_K + 3).materialize(3, SEQLEN_K, query_offset=8)[0, 0]
    np.testing.assert_array_equal(far, keys >= np.arange(3)[:, None] + 8 - SEQLEN_K - 3)


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_no_rows_or_no_keys(seqlen_q, seqlen_k):
    tf = pytest.importorskip("tensorflow")
    ids = np.zeros((1, seqlen_q), np.int32), np.zeros((1, seqlen_k), np.int32)
    cu = np.array([0, seqlen_q]), np.array([0, seqlen_k])
    for mask in (masks.prefix(0), masks.chunked(2), masks.segments(*ids), masks.packed(*cu), masks.intervals(ids[0])):
        assert mask.materialize(seqlen_q, seqlen_k).shape == (1, 1, seqlen_q, seqlen_k)
        begin, end = mask.parts(seqlen_q, seqlen_k).intervals
        assert begin.shape == end.shape == (1, seqlen_q)
    traced = tf.function(
        lambda q, k: masks.segments(q, k).parts(tf.shape(q)[1], tf.shape(k)[1]).intervals[0]
    )
    assert traced(*ids).shape == (1, seqlen_q)


def test_memory_does_not_grow_with_the_square():
    """A million tokens: anything of [seqlen_q, seqlen_k] would be 10^12 elements."""
    n = 2**20
    ids, cu = np.repeat(np.arange(2**10), 2**10), np.arange(0, n + 1, 2**14)
    blocks = np.ones((2**5, 2**5), bool)
    mask = masks.prefix(9) & masks.chunked(2**19) & masks.segments(ids) & masks.packed(cu) & masks.intervals(np.arange(n) // 2)
    parts = (mask & masks.block_sparse(blocks, 2**15, 2**15)).parts(n, n)
    begin, end = parts.intervals
    assert begin[0, 2**10 + 3] == 2**10 and end[0, 2**10 + 3] == 2**10 + 4
    assert parts.segments is None and parts.block_q == 2**15 and parts.dense == ()


def test_arrays_can_be_taken_out_and_put_back():
    mask = masks.intervals(BEGIN) & masks.segments(MIXED_Q, MIXED_K) & masks.padding(key_lengths=[3, 4]) & masks.prefix(3)
    mask = mask & masks.boolean(np.ones((SEQLEN_Q, SEQLEN_K), bool))
    arrays = mask.arrays()
    assert len(arrays) == 5
    other = mask.with_arrays([np.zeros_like(x) for x in arrays])
    assert not other.materialize(SEQLEN_Q, SEQLEN_K).any()
    same = other.with_arrays(arrays)
    np.testing.assert_array_equal(same.materialize(SEQLEN_Q, SEQLEN_K), mask.materialize(SEQLEN_Q, SEQLEN_K))


BAD = [
    (ValueError, r"intervals: key_begin must never move back along the rows, got 1 after 3 at 2$", lambda: masks.intervals([0, 3, 1])),
    (ValueError, r"intervals: key_end .* got 4 after 5 at 1 of batch entry 1", lambda: masks.intervals(None, [[1, 2], [5, 4]])),
    (TypeError, "intervals: key_end: dtype must be int, got float64", lambda: masks.intervals(None, [0.5])),
    (ValueError, r"intervals: key_begin: rank must be 1 or 2, got shape \(1, 1, 1\)", lambda: masks.intervals([[[1]]])),
    (ValueError, r"intervals: axis 1 of shape \(1, 3\) must be seqlen_q, here 4", lambda: masks.intervals([0, 0, 1]).parts(4, 4)),
    (ValueError, "prefix: length must not be negative, got -1", lambda: masks.prefix(-1)),
    (ValueError, r"prefix: length must not be negative, got \[ 3 -2\]", lambda: masks.prefix([3, -2])),
    (TypeError, "prefix: length: dtype must be int, got float64", lambda: masks.prefix(2.0)),
    (ValueError, r"chunked: size must be an integer from 1 to 2\*\*30, got 0", lambda: masks.chunked(0)),
    (TypeError, "chunked: size must be a Python integer, got float", lambda: masks.chunked(2.5)),
    (ValueError, "contiguous=True q_ids must never go back, got 0 after 1 at 1", lambda: masks.segments([1, 0], contiguous=True)),
    (ValueError, "contiguous=True kv_ids must", lambda: masks.segments([0, 1], [2, 1, 2], contiguous=True)),
    (ValueError, "Mask.materialize: seqlen_q must not be negative, got -1", lambda: masks.causal().materialize(-1, 3)),
    (TypeError, "Mask.materialize: seqlen_k must be an integer, got 'a'", lambda: masks.causal().materialize(1, "a")),
    (TypeError, "Mask.parts: seqlen_q must be an integer, got None", lambda: masks.prefix(2).parts(None, 3)),
    (ValueError, "batch must be 2, that of the mask, got 3", lambda: masks.padding(None, [1, 2]).materialize(4, 4, batch=3)),
    (TypeError, "show: entry must be an integer, got 'a'", lambda: masks.padding(None, [1, 2]).show(4, entry="a")),
    (TypeError, "show: block must hold two integers from 1, got 3", lambda: masks.causal().show(4, block=3)),
    (TypeError, "masks combine with &", lambda: masks.causal() and masks.window(2)),
    (TypeError, "boolean: mask must be boolean", lambda: masks.causal() & np.ones((3, 3), np.float32)),
    (TypeError, "segments: contiguous must be True or False, .*got str", lambda: masks.segments([1, 0], contiguous="no")),
    (ValueError, r"parts of one mask must have the same batch, or 1, got \[2, 3\]", lambda: (masks.prefix([1, 2, 3]) & masks.intervals([[0] * 4] * 2)).parts(4, 4)),
    (ValueError, r"segments: axis 1 of kv_ids shape \(1, 2\) must be seqlen_k, here 3", lambda: masks.segments([0, 0]).materialize(2, 3)),
    (ValueError, "packed: cu_seqlens_q must start at 0, got 1", lambda: masks.packed([1, 2])),
    (ValueError, "packed: cu_seqlens_k must never go back, got 1 after 2 at 2", lambda: masks.packed([0, 1, 2], [0, 2, 1])),
    (ValueError, r"numbers of sequences must be the same, got 1 \(cu_seqlens_q\) and 2", lambda: masks.packed([0, 1], [0, 1, 2])),
    (ValueError, r"packed: cu_seqlens_q must hold a 0 .*, got shape \(0,\)", lambda: masks.packed(np.zeros(0, int))),
    (TypeError, "block_sparse: dtype must be bool or uint8, got int64", lambda: masks.block_sparse(np.ones((2, 2), int), 4, 4)),
    (ValueError, "blocks must be boolean, or hold 0 and 1, got 3", lambda: masks.block_sparse(np.full((2, 2), 3, np.uint8), 4, 4)),
    (ValueError, r"block_sparse: rank must be 2 or 3 or 4, got shape \(2,\)", lambda: masks.block_sparse([True, True], 4, 4)),
    (ValueError, "block_sparse: block_q must be an integer from 1", lambda: masks.block_sparse([[True]], 0, 4)),
    (ValueError, r"axis 3 of shape \(1, 1, 1, 1\) must be ceil\(seqlen_k=9 / 4\), here 3", lambda: masks.block_sparse([[True]], 9, 4).parts(9, 9)),
]  # fmt: skip


@pytest.mark.parametrize("error, message, call", BAD, ids=[message for _, message, _ in BAD])
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_boolean_arrays_combine_from_either_side():
    tf = pytest.importorskip("tensorflow")
    array = np.arange(12).reshape(3, 4) % 3 > 0
    seen = masks.causal().materialize(3, 4) & array
    for x in (array, tf.constant(array)):
        for mask in (masks.causal() & x, x & masks.causal()):
            np.testing.assert_array_equal(mask.materialize(3, 4), seen)


def test_reprs():
    assert repr(masks.intervals(BEGIN, END)) == "<Mask: intervals([1, 9], [2, 9])>"
    assert repr(masks.intervals(None, END)) == "<Mask: intervals(all, [2, 9])>"
    assert repr(masks.prefix(5) & masks.prefix(PREFIXES)) == "<Mask: prefix(5) & prefix[2]>"
    assert repr(masks.chunked(8)) == "<Mask: chunked(8)>"
    assert repr(masks.packed(CU_Q)) == "<Mask: packed[4]>"
    assert repr(masks.packed(CU_Q, CU_K)) == "<Mask: packed([4], [4])>"
    assert repr(masks.block_sparse(BLOCKS, 3, 4)) == "<Mask: block_sparse([2, 3, 3, 3] of 3 x 4)>"


def test_pictures_in_text():
    assert masks.prefix(3).show(5) == (
        "5 x 5: prefix(3), 0.72 of all pairs\n"
        "███··\n"
        "███··\n"
        "███··\n"
        "████·\n"
        "█████\n"
        "█ seen, · hidden"
    )
    assert repr(masks.causal("bottom_right").show(2, 4)) == (
        "2 x 4: causal(bottom_right), 0.875 of all pairs\n███·\n████\n█ seen, · hidden"
    )
    assert masks.causal().show(2, 6, query_offset=3).splitlines()[1:3] == ["████··", "█████·"]


def test_pictures_tell_skipped_from_hidden():
    """Blocks of 2 x 2 that hold nothing visible are blank."""
    assert masks.packed([0, 3, 5]).show(6, block=(2, 2)) == (
        "6 x 6: packed[3], 0.361 of all pairs\n"
        "███·  \n"
        "███·  \n"
        "███···\n"
        "···██·\n"
        "  ·██·\n"
        "  ····\n"
        "█ seen, · hidden, blank: skipped, in blocks of 2 x 2"
    )


def test_pictures_of_long_sequences_are_condensed():
    """Cells of twice as many rows as keys, since characters are twice as high as wide."""
    assert masks.window(300, 0).show(1024, width=16) == (
        "1024 x 1024: window(left=300, right=0), 0.251 of all pairs\n"
        "▓░              \n"
        "██▓░            \n"
        "▒▓██▓░          \n"
        "·░▒▓██▓░        \n"
        "  ·░▒▓██▓░      \n"
        "    ·░▒▓██▓░    \n"
        "      ·░▒▓██▓░  \n"
        "        ·░▒▓██▓░\n"
        "█ seen, ░▒▓ partly, · hidden, blank: skipped, in blocks of 64 x 128, each is 128 x 64 pairs"
    )


def test_pictures_of_one_entry_and_head():
    mask = masks.boolean(RNG.random((2, 3, 4, 5)) < 0.5) & masks.padding(None, [5, 2])
    shown = mask.show(4, 5, entry=1, head=-1).splitlines()[1:5]
    expected = mask.materialize(4, 5)[1, 2]
    np.testing.assert_array_equal([[character == "█" for character in line] for line in shown], expected)
    with pytest.raises(ValueError, match="show: head must be one of 3, got 3"):
        mask.show(4, 5, head=3)
    with pytest.raises(ValueError, match="show: width must be at least 1, got 0"):
        mask.show(4, 5, width=0)

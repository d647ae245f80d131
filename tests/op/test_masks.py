"""Mask objects against the rule of csrc/mask.h, written out row by row."""

import itertools

import numpy as np
import pytest

import attn_ops
from attn_ops import masks

LARGEST = 2**63 - 1


def key_range(window_left, window_right, bottom_right, i, length_q, length_k):
    """csrc/mask.h, in Python."""
    if i >= length_q:
        return length_k, length_k
    own = i + length_k - length_q if bottom_right else i
    begin, end = 0, length_k
    if window_left >= 0 and own > window_left:
        begin = own - window_left
    if window_right >= 0 and length_k - 1 - own > window_right:
        end = own + window_right + 1
    return min(begin, length_k), max(end, 0)


def by_rows(window, is_causal, alignment, seqlen_q, seqlen_k, length_q, length_k):
    left, right = (-1 if end is None else end for end in window)
    if is_causal:
        right = 0
    visible = np.zeros((seqlen_q, seqlen_k), bool)
    for i in range(seqlen_q):
        begin, end = key_range(left, right, alignment == "bottom_right", i, length_q, length_k)
        visible[i, begin : max(begin, end)] = True
    return visible


WINDOWS = [
    (None, None), (0, 0), (2, 1), (None, 0), (0, None), (None, 2), (3, None), (-1, 1), (9, 9),
    (LARGEST, LARGEST), (LARGEST, 0), (0, LARGEST),
]  # fmt: skip
LENGTHS = [(1, 1), (5, 5), (3, 7), (7, 3), (1, 6), (6, 1), (0, 4), (4, 0)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("alignment", masks.ALIGNMENTS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_interval_is_the_kernels(window, alignment, is_causal):
    mask = masks.Mask(is_causal=is_causal, causal_alignment=alignment, window=window)
    for seqlen_q, seqlen_k in LENGTHS:
        found = mask.materialize(seqlen_q, seqlen_k)
        assert found.dtype == bool and found.shape == (1, 1, seqlen_q, seqlen_k)
        expected = by_rows(window, is_causal, alignment, seqlen_q, seqlen_k, seqlen_q, seqlen_k)
        np.testing.assert_array_equal(found[0, 0], expected, str((seqlen_q, seqlen_k)))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("alignment", masks.ALIGNMENTS)
@pytest.mark.parametrize("side", ["query", "key", "both"])
def test_interval_with_lengths_is_the_kernels(window, alignment, side):
    seqlen_q, seqlen_k = 6, 5
    pairs = [(q, k) for q, k in itertools.product(range(seqlen_q + 1), range(seqlen_k + 1))]
    query_lengths = np.array([q for q, _ in pairs], np.int32) if side != "key" else None
    key_lengths = np.array([k for _, k in pairs], np.int32) if side != "query" else None
    mask = masks.window(*window, alignment=alignment) & masks.padding(query_lengths, key_lengths)
    found = mask.materialize(seqlen_q, seqlen_k)
    assert found.shape == (len(pairs), 1, seqlen_q, seqlen_k)
    for visible, (q, k) in zip(found[:, 0], pairs):
        q, k = q if side != "key" else seqlen_q, k if side != "query" else seqlen_k
        expected = by_rows(window, False, alignment, seqlen_q, seqlen_k, q, k)
        np.testing.assert_array_equal(visible, expected, str((q, k)))


def test_causal_pictures():
    square = [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    for alignment in masks.ALIGNMENTS:
        np.testing.assert_array_equal(masks.causal(alignment).materialize(3, 3)[0, 0], square)
    np.testing.assert_array_equal(masks.causal().materialize(2, 4)[0, 0], [[1, 0, 0, 0], [1, 1, 0, 0]])
    np.testing.assert_array_equal(masks.causal("bottom_right").materialize(2, 4)[0, 0], [[1, 1, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(masks.causal("bottom_right").materialize(3, 2)[0, 0], [[0, 0], [1, 0], [1, 1]])


def test_sliding_window_of_keras():
    """Keras: a pair is visible if abs(i - j) < sliding_window."""
    i, j = np.ogrid[:7, :9]
    for width in (1, 2, 5):
        found = masks.window(width - 1, width - 1).materialize(7, 9)[0, 0]
        np.testing.assert_array_equal(found, abs(i - j) < width)


RNG = np.random.default_rng(0)
BATCH, SEQLEN_Q, SEQLEN_K = 3, 4, 6
ROWS, KEYS = RNG.random((BATCH, SEQLEN_Q)) < 0.5, RNG.random((BATCH, SEQLEN_K)) < 0.5


def test_padding_masks():
    np.testing.assert_array_equal(
        masks.query_padding(ROWS).materialize(SEQLEN_Q, SEQLEN_K),
        np.broadcast_to(ROWS[:, None, :, None], (BATCH, 1, SEQLEN_Q, SEQLEN_K)),
    )
    np.testing.assert_array_equal(
        masks.key_padding(KEYS).materialize(SEQLEN_Q, SEQLEN_K),
        np.broadcast_to(KEYS[:, None, None, :], (BATCH, 1, SEQLEN_Q, SEQLEN_K)),
    )
    assert masks.query_padding(ROWS).tensors()[0].shape == (BATCH, 1, SEQLEN_Q, 1)
    assert masks.key_padding(KEYS).tensors()[0].shape == (BATCH, 1, 1, SEQLEN_K)


def test_segments():
    q_ids, kv_ids = RNG.integers(0, 3, (BATCH, SEQLEN_Q)), RNG.integers(0, 3, (BATCH, SEQLEN_K))
    found = masks.segments(q_ids, kv_ids).materialize(SEQLEN_Q, SEQLEN_K)
    for b, i, j in itertools.product(range(BATCH), range(SEQLEN_Q), range(SEQLEN_K)):
        assert found[b, 0, i, j] == (q_ids[b, i] == kv_ids[b, j])


@pytest.mark.parametrize(
    "shape, rank_4",
    [
        ((4, 6), (1, 1, 4, 6)),
        ((1, 6), (1, 1, 1, 6)),
        ((3, 4, 6), (3, 1, 4, 6)),
        ((3, 1, 6), (3, 1, 1, 6)),
        ((3, 2, 4, 6), (3, 2, 4, 6)),
        ((1, 2, 1, 6), (1, 2, 1, 6)),
    ],
)
def test_boolean_of_each_rank(shape, rank_4):
    array = RNG.random(shape) < 0.5
    mask = masks.boolean(array)
    assert mask.tensors()[0].shape == rank_4
    expected = np.broadcast_to(array.reshape(rank_4), rank_4[:2] + (4, 6))
    np.testing.assert_array_equal(mask.materialize(4, 6), expected)


def test_boolean_takes_lists():
    np.testing.assert_array_equal(masks.boolean([[True, False]]).materialize(1, 2)[0, 0], [[True, False]])


PARTS = {
    "causal": masks.causal(),
    "window": masks.window(left=2, right=3),
    "one side": masks.window(right=1),
    "nothing": masks.Mask(),
    "lengths": masks.padding([4, 0, 2], [6, 3, 1]),
    "key lengths": masks.padding(key_lengths=[2, 5, 4]),
    "rows": masks.query_padding(ROWS),
    "keys": masks.key_padding(KEYS),
    "heads": masks.boolean(RNG.random((1, 2, 4, 6)) < 0.7),
    "segments": masks.segments(RNG.integers(0, 2, (BATCH, SEQLEN_Q)), RNG.integers(0, 2, (BATCH, SEQLEN_K))),
}


@pytest.mark.parametrize("one, other", list(itertools.combinations_with_replacement(PARTS, 2)))
def test_and_is_the_logical_and(one, other):
    one, other = PARTS[one], PARTS[other]
    expected = one.materialize(SEQLEN_Q, SEQLEN_K) & other.materialize(SEQLEN_Q, SEQLEN_K)
    for both in (one & other, other & one):
        np.testing.assert_array_equal(both.materialize(SEQLEN_Q, SEQLEN_K), expected)


def test_and_of_everything():
    both, expected = masks.Mask(), True
    for part in PARTS.values():
        both, expected = both & part, expected & part.materialize(SEQLEN_Q, SEQLEN_K)
    np.testing.assert_array_equal(both.materialize(SEQLEN_Q, SEQLEN_K), expected)
    assert len(both.tensors()) == 3 and len(both.structured) == 1, "boolean parts must stay apart"


def test_bottom_right_meets_lengths_in_any_order():
    """The lengths say where the last key of an entry is, whichever side of & they come from."""
    lengths, causal, keys = masks.padding([2, 4, 0], [5, 3, 6]), masks.causal("bottom_right"), PARTS["keys"]
    expected = np.stack(
        [by_rows((None, None), True, "bottom_right", 4, 6, q, k) for q, k in zip([2, 4, 0], [5, 3, 6])]
    )[:, None]
    for mask in (lengths & causal, causal & lengths):
        np.testing.assert_array_equal(mask.materialize(4, 6), expected)
    for mask in ((lengths & keys) & causal, lengths & (keys & causal), causal & (keys & lengths)):
        np.testing.assert_array_equal(mask.materialize(4, 6), expected & KEYS[:, None, None, :])


def test_windows_of_different_alignment_do_not_combine():
    top, bottom = masks.causal(), masks.window(left=1, alignment="bottom_right")
    with pytest.raises(ValueError, match="'top_left' and 'bottom_right'; make one of them dense"):
        top & bottom
    # As the message says:
    both = top & masks.boolean(bottom.materialize(3, 5))
    np.testing.assert_array_equal(both.materialize(3, 5), top.materialize(3, 5) & bottom.materialize(3, 5))
    # An alignment that nothing refers to is no conflict.
    for mask in (top & masks.Mask(causal_alignment="bottom_right"), masks.Mask(causal_alignment="bottom_right") & top):
        np.testing.assert_array_equal(mask.materialize(3, 5), top.materialize(3, 5))


@pytest.mark.parametrize("other", [None, 1, np.ones((3, 3))], ids=str)
def test_and_with_something_else(other):
    with pytest.raises(TypeError):
        masks.causal() & other


def test_combined_gathers_the_arguments_of_a_call():
    array = RNG.random((4, 6)) < 0.7
    options = dict(is_causal=True, window=(2, None), key_lengths=np.array([6, 2, 0]))
    found = masks.combined([array, PARTS["rows"]], **options)
    expected = masks.causal() & masks.window(2) & masks.padding(None, [6, 2, 0]) & masks.boolean(array) & PARTS["rows"]
    np.testing.assert_array_equal(found.materialize(4, 6), expected.materialize(4, 6))
    assert masks.combined().materialize(2, 3).all()
    np.testing.assert_array_equal(masks.combined(array).materialize(4, 6)[0, 0], array)
    np.testing.assert_array_equal(masks.combined(PARTS["rows"]).tensors(), PARTS["rows"].tensors())


def test_batch_of_the_result():
    assert masks.causal().materialize(2, 3, batch=5).shape == (5, 1, 2, 3)
    assert masks.padding(None, [1, 2]).materialize(2, 3, batch=2).shape == (2, 1, 2, 3)
    with pytest.raises(ValueError):
        masks.padding(None, [1, 2]).materialize(2, 3, batch=4)


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_tensorflow_arrays_give_the_same(mode):
    import tensorflow as tf

    def mask_of(rows, keys, q_ids, kv_ids, query_lengths, key_lengths):
        return (
            masks.causal("bottom_right")
            & masks.window(left=3, alignment="bottom_right")
            & masks.query_padding(rows)
            & masks.key_padding(keys)
            & masks.segments(q_ids, kv_ids)
            & masks.padding(query_lengths, key_lengths)
            & masks.padding(query_lengths=[4, 4, 3])
        )

    ids = RNG.integers(0, 2, (BATCH, SEQLEN_K))
    arrays = ROWS, KEYS, ids[:, :SEQLEN_Q], ids, np.array([4, 1, 3], np.int32), np.array([6, 5, 4], np.int64)
    expected = mask_of(*arrays).materialize(SEQLEN_Q, SEQLEN_K)
    assert isinstance(expected, np.ndarray)

    def materialize(*arrays):
        seqlen_q, seqlen_k = tf.shape(arrays[0])[1], tf.shape(arrays[1])[1]
        return mask_of(*arrays).materialize(seqlen_q, seqlen_k, batch=tf.shape(arrays[0])[0])

    if mode != "eager":
        unknown = [tf.TensorSpec([None] * array.ndim, array.dtype) for array in arrays]
        materialize = tf.function(materialize, jit_compile=mode == "xla", input_signature=unknown)
    found = materialize(*map(tf.constant, arrays))
    assert tf.is_tensor(found) and found.dtype == tf.bool
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("lengths", [(None, None), ([4, 1, 3], None), (None, [6, 5, 4])], ids=["none", "rows", "keys"])
def test_extents_that_tensorflow_traces(lengths):
    """Where no length is given the extent stands for it, in whatever integers."""
    import tensorflow as tf

    mask = masks.causal("bottom_right") & masks.padding(*lengths)

    @tf.function(input_signature=[tf.TensorSpec([None, None])])
    def materialize(x):
        return mask.materialize(tf.shape(x)[0], tf.shape(x)[1])

    np.testing.assert_array_equal(materialize(tf.zeros([4, 6])), mask.materialize(4, 6))


BAD = [
    (ValueError, "causal_alignment must be one of .*'middle'", lambda: masks.causal("middle")),
    (ValueError, r"window must hold integers from 0, .*\(-2, 3\)", lambda: masks.window(-2, 3)),
    (TypeError, r"window must be a pair \(left, right\), got 3", lambda: masks.Mask(window=3)),
    (TypeError, r"window must hold integers or None, got \(1.5, None\)", lambda: masks.window(1.5)),
    (ValueError, r"window must hold integers from 0, .*\(True, 1\)", lambda: masks.window(True, 1)),
    (TypeError, r"window must be a pair .*got \(1, 2, 3\)", lambda: masks.Mask(window=(1, 2, 3))),
    (TypeError, "boolean: mask must be boolean .*, got int64; cast it", lambda: masks.boolean(np.ones((2, 2), np.int64))),
    (TypeError, "boolean: mask must be boolean .*, got float32; .* bias=", lambda: masks.boolean(np.ones((2, 2), "f"))),
    (ValueError, r"boolean: rank must be 2 or 3 or 4, got shape \(3,\)", lambda: masks.boolean(np.ones(3, bool))),
    (ValueError, r"key_padding: rank must be 2, got shape \(1, 2, 3\)", lambda: masks.key_padding([[[True] * 3] * 2])),
    (TypeError, "query_padding: mask must be boolean .*, got int64", lambda: masks.query_padding(np.ones((2, 3), np.int64))),
    (TypeError, "packed: cu_seqlens_q must hold integers, .* got None", lambda: masks.packed(None)),
    (TypeError, "segments: dtype must be int, got float64", lambda: masks.segments(np.ones((2, 3)), np.ones((2, 3)))),
    (ValueError, r"query_lengths: rank must be 1, got shape \(1, 1\)", lambda: masks.padding([[1]])),
    (TypeError, "key_lengths: dtype must be int, got float64", lambda: masks.padding(None, [1.0])),
    (ValueError, r"key_lengths must be in \[0, 5\], got \[6\]", lambda: masks.padding(None, [6]).materialize(4, 5)),
    (ValueError, r"query_lengths must be in \[0, 4\], got \[-1\]", lambda: masks.padding([-1]).materialize(4, 5)),
    (
        ValueError,
        r"of shape \(1, 1, 4, 5\) does not broadcast to \[batch, num_heads, 1, 5\]",
        lambda: masks.boolean(np.ones((4, 5), bool)).materialize(1, 5),
    ),
]  # fmt: skip


@pytest.mark.parametrize("error, message, call", BAD, ids=[message for _, message, _ in BAD])
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_reprs_are_short():
    padding = masks.key_padding(np.ones((2, 600), bool))
    assert repr(masks.causal() & padding) == "<Mask: causal & key_padding[2, 600]>"
    assert repr(masks.causal("bottom_right")) == "<Mask: causal(bottom_right)>"
    assert repr(masks.window(3)) == "<Mask: window(left=3, right=all)>"
    assert repr(masks.query_padding(np.ones((2, 5), bool))) == "<Mask: query_padding[2, 5]>"
    assert repr(masks.segments(np.ones((2, 5), int), np.ones((2, 7), int))) == "<Mask: segments([2, 5], [2, 7])>"
    assert repr(masks.boolean(np.ones((5, 7), bool))) == "<Mask: boolean[1, 1, 5, 7]>"
    assert repr(masks.padding([1, 2], None)) == "<Mask: query_lengths[2]>"
    assert repr(masks.Mask()) == "<Mask: everything is visible>"


def test_reprs_of_tensors_whose_shape_is_not_known():
    import tensorflow as tf

    seen = []

    @tf.function(input_signature=[tf.TensorSpec([None, 4], "bool")], autograph=False)
    def function(mask):
        seen.append(repr(masks.key_padding(mask)))

    function(np.ones((2, 4), bool))
    assert seen == ["<Mask: key_padding[?, 4]>"]


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(TypeError, match="key_padding: an array is needed, or lists that make one"):
        masks.key_padding([[True], [True, False]])


def test_ragged_tensors_are_refused():
    import tensorflow as tf

    with pytest.raises(TypeError, match="key_padding: ragged tensors are not supported"):
        masks.key_padding(tf.ragged.constant([[True], [True, False]]))


SAID = [
    lambda: masks.Mask(),
    lambda: masks.causal(),
    lambda: masks.causal("top_left"),  # said, which slopes and tables may not contradict
    lambda: masks.causal("bottom_right"),
    lambda: masks.window(2, 1),
    lambda: masks.window(2, 0),
    lambda: masks.prefix(3),
    lambda: masks.prefix(np.int64(2)),
    lambda: masks.chunked(3),
    lambda: masks.causal() & masks.chunked(3),
]


def test_masks_that_say_the_same_are_equal():
    for a, made in enumerate(SAID):
        for b, other in enumerate(SAID):
            assert (made() == other()) == (a == b)
        assert hash(made()) == hash(made())
    held = masks.key_padding(np.ones((2, 3), bool))
    assert held == held and held != masks.key_padding(np.ones((2, 3), bool)) and len({held, held}) == 1
    assert masks.from_function(np.greater) != masks.from_function(np.greater)


def test_equal_masks_are_one_static_argument():
    import tensorflow as tf

    traced = []

    @tf.function
    def attend(x, mask):
        traced.append(mask)
        return attn_ops.scaled_dot_product_attention(x, x, x, mask=mask)

    x = tf.ones((1, 4, 1, 2))
    for made in (masks.causal, masks.causal, lambda: masks.prefix(3), lambda: masks.prefix(3)):
        attend(x, made())
    assert len(traced) == 2


@pytest.mark.parametrize("make", [lambda n: masks.padding(key_lengths=[n]), lambda n: masks.packed([0, n, 4])])
def test_lists_with_numbers_of_a_graph(make):
    import tensorflow as tf

    attend = tf.function(lambda n: attn_ops.scaled_dot_product_attention(x, x, x, mask=make(n)))
    x = tf.random.stateless_normal((1, 4, 1, 2), [1, 2])
    wanted = attn_ops.scaled_dot_product_attention(x, x, x, mask=make(3))
    np.testing.assert_allclose(attend(tf.constant(3)), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mask", [masks.window(2**70, 2**65), masks.prefix(2**70)])
def test_numbers_beyond_every_sequence(mask):
    assert mask.materialize(4, 5).all()
    assert mask.show(4).startswith("4 x 4")
    x = np.random.default_rng(0).standard_normal((1, 4, 1, 2))
    find = attn_ops.scaled_dot_product_attention
    np.testing.assert_array_equal(find(x, x, x, mask=mask), find(x, x, x))


@pytest.mark.parametrize(
    "extents, told",
    [((10**5,), "100000 x 100000 pairs"), ((-1,), "seqlen_q must be"), ((4, 4.0), "seqlen_k must be")],
)
def test_pictures_that_cannot_be(extents, told):
    with pytest.raises((ValueError, TypeError), match=told):
        masks.causal().show(*extents)

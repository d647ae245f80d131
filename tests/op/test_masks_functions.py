"""`masks.from_function`: what functions are recognised to be, and that they are it exactly.

The mask functions are those that FlexAttention's users know from the public attention-gym collection, written here from
their definitions, and others of the same kinds.
"""

import numpy as np
import pytest

from attn_ops import masks

RNG = np.random.default_rng(1)
N = 96
DOCUMENTS = np.repeat(np.arange(5), [10, 31, 15, 30, 10])
INTERLEAVED = np.arange(N) % 3
SPANS = np.where((np.arange(N) // 12) % 3 == 1, np.arange(N) // 12, -1)  # images in text: -1 is text
MEDIA = np.searchsorted([20, 50], np.arange(N), "right")  # the last image before a token of text
BIGBIRD = RNG.random((6, 6)) < 0.4
ALIVE = RNG.random(N) < 0.5
LENGTHS = np.array([96, 40, 7])


def causal(b, h, q, k):
    return q >= k


def window(size):
    return lambda b, h, q, k: (q >= k) & (q - k <= size)


def documents(mask):
    return lambda b, h, q, k: (DOCUMENTS[q] == DOCUMENTS[k]) & mask(b, h, q, k)


def natten(height, width, reach):
    """Neighbourhoods of a picture: (2 reach + 1)^2 around the pixel, moved inside at the borders."""

    def mask(b, h, q, k):
        y, x = np.clip(q // width, reach, height - 1 - reach), np.clip(q % width, reach, width - 1 - reach)
        return (abs(k // width - y) <= reach) & (abs(k % width - x) <= reach)

    return mask


def tiled(mask, width, tile):
    """The same for pixels that are numbered tile by tile."""

    def position(at):
        at_tile, within = at // tile**2, at % tile**2
        y, x = at_tile // (width // tile), at_tile % (width // tile)
        return (y * tile + within // tile) * width + x * tile + within % tile

    return lambda b, h, q, k: mask(b, h, position(q), position(k))


def morton(mask, width):
    """The same along a Z curve."""

    def position(at):
        y, x = (sum(((at >> (2 * bit + odd)) & 1) << bit for bit in range(8)) for odd in (1, 0))
        return y * width + x

    return lambda b, h, q, k: mask(b, h, position(q), position(k))


def batchified(mask, lengths):
    """Sequences of a batch in one row: only within a sequence, by its own positions."""
    starts = np.concatenate([[0], np.cumsum(lengths)])

    def packed(b, h, q, k):
        of_q, of_k = np.searchsorted(starts, q, "right") - 1, np.searchsorted(starts, k, "right") - 1
        return (of_q == of_k) & mask(of_q, h, q - starts[of_q], k - starts[of_k])

    return packed


def with_if(b, h, q, k):
    if k > q:
        return False
    return q - k < 7 and (q // 8 == k // 8 or k % 2 == 0)


# name: (function, seqlen_q, seqlen_k, what it is recognised as, or None for bits)
COLLECTION = {
    "everything": (lambda b, h, q, k: q >= 0, N, 50, "everything is visible"),
    "True": (lambda b, h, q, k: True, 20, 30, "everything is visible"),
    "nothing": (lambda b, h, q, k: q < 0, 20, 30, "intervals([1, 20], [1, 20])"),
    "causal": (causal, N, N, "causal"),
    "causal of few rows": (causal, 30, N, "causal"),
    "causal of few keys": (causal, N, 30, "causal"),
    "causal by the last key": (lambda b, h, q, k: q + N - 30 >= k, 30, N, "causal(bottom_right)"),
    "causal by the last key, more rows": (lambda b, h, q, k: q - 60 >= k, N, 36, "causal(bottom_right)"),
    "sliding window": (window(7), N, N, "causal & window(left=7, right=all)"),
    "sliding window by the last key": (
        lambda b, h, q, k: window(7)(b, h, q + N - 30, k), 30, N,
        "causal(bottom_right) & window(left=7, right=all, bottom_right)",
    ),
    "symmetric window": (lambda b, h, q, k: abs(q - k) <= 5, N, N, "window(left=5, right=5)"),
    "one-sided window": (lambda b, h, q, k: k - q <= 5, N, N, "window(left=all, right=5)"),
    "anti-causal": (lambda b, h, q, k: k >= q, N, N, "window(left=0, right=all)"),
    "itself": (lambda b, h, q, k: k == q, N, N, "causal & window(left=0, right=all)"),
    "window past the last key": (window(4), N, 30, "causal & window(left=4, right=all)"),
    "strictly before": (lambda b, h, q, k: k < q, N, N, f"intervals([1, {N}], [1, {N}])"),
    "strictly after": (lambda b, h, q, k: k > q, N, N, f"intervals([1, {N}], [1, {N}])"),
    "prefix LM": (lambda b, h, q, k: (k < 20) | (q >= k), N, N, "prefix(20)"),
    "prefix LM by maximum": (lambda b, h, q, k: k < np.maximum(q + 1, 33), N, 60, "prefix(33)"),
    "chunked": (lambda b, h, q, k: q // 16 == k // 16, N, N, "chunked(16)"),
    "chunked by 10": (lambda b, h, q, k: q // 10 == k // 10, N, N, "chunked(10)"),
    "documents": (lambda b, h, q, k: DOCUMENTS[q] == DOCUMENTS[k], N, N, "5 segments as intervals"),
    "causal documents": (documents(causal), N, N, "causal in 5 segments as intervals"),
    "window in documents": (documents(window(7)), N, N, f"intervals([1, {N}], [1, {N}])"),
    "prefix of documents": (
        batchified(lambda b, h, q, k: (k < 4) | (q >= k), [20, 30, 46]), N, N, f"intervals([1, {N}], [1, {N}])",
    ),
    "batchified causal": (batchified(causal, [40, 26, 30]), N, N, "causal in 3 segments as intervals"),
    "batchified window": (batchified(window(5), [40, 26, 30]), N, N, f"intervals([1, {N}], [1, {N}])"),
    "some monotone intervals": (lambda b, h, q, k: (k >= q // 3) & (k < 5 + q // 2), N, N, f"intervals([1, {N}], [1, {N}])"),
    "keys that are no padding": (lambda b, h, q, k: k < 77, N, N, f"intervals([1, {N}], [1, {N}])"),
    "documents by turns": (lambda b, h, q, k: INTERLEAVED[q] == INTERLEAVED[k], N, N, f"segments([1, {N}], [1, {N}])"),
    "random blocks": (lambda b, h, q, k: BIGBIRD[q // 16, k // 16], N, N, "block_sparse([1, 1, 6, 6] of 16 x 16)"),
    "blocks, the last in part": (lambda b, h, q, k: BIGBIRD[q // 32, k // 48], 80, 100, "block_sparse([1, 1, 3, 3] of 32 x 48)"),
    "causal blocks": (lambda b, h, q, k: BIGBIRD[q // 16, k // 16] & (q >= k), N, N,
        f"intervals([1, {N}], [1, {N}]) & block_sparse([1, 1, 6, 6] of 16 x 16)"),
    "causal and whole blocks": (
        lambda b, h, q, k: (q >= k) & ((k < 16) | (q // 16 - k // 16 < 2)), N, N,
        f"intervals([1, {N}], [1, {N}]) & block_sparse([1, 1, 6, 6] of 16 x 16)",
    ),
    "dilated sliding window": (lambda b, h, q, k: (abs(q - k) <= 12) & ((q - k) % 3 == 0), N, N, None),
    "global and window": (lambda b, h, q, k: (q < 5) | (k < 5) | (abs(q - k) <= 7), N, N, None),
    "sinks and window": (lambda b, h, q, k: (q >= k) & ((k < 4) | (q - k < 9)), N, N, None),
    "natten": (natten(8, 12, 2), N, N, None),
    "tiled natten": (tiled(natten(8, 12, 1), 12, 4), N, N, None),
    "morton natten": (morton(natten(8, 8, 2), 8), 64, 64, None),
    "transfusion": (lambda b, h, q, k: (q >= k) | ((SPANS[q] == SPANS[k]) & (SPANS[q] >= 0)), N, N, f"intervals([1, {N}], [1, {N}])"),
    "flamingo": (lambda b, h, q, k: k // 8 == MEDIA[q] - 1, N, 16, f"intervals([1, {N}], [1, {N}])"),
    "random": (lambda b, h, q, k: ALIVE[k] & (k * 7 % 5 != q % 5), N, N, None),
    "with if and and": (with_if, 40, 40, None),
    "by numbers": (lambda b, h, q, k: k in (0, 3) or q == k, 30, 20, None),
    "one of a list": (lambda b, h, q, k: max(q, 5) >= k, 30, 30, "prefix(6)"),
}  # fmt: skip


def pair_by_pair(fn, seqlen_q, seqlen_k, batch=1, num_heads=1, offset=0):
    visible = np.zeros((batch, num_heads, seqlen_q, seqlen_k), bool)
    for b, h, q, k in np.ndindex(*visible.shape):
        visible[b, h, q, k] = fn(np.int64(b), np.int64(h), np.int64(q + offset), np.int64(k))
    return visible


def expanded(mask, seqlen_q, seqlen_k, query_offset=None):
    """Who sees whom by the parts that kernels get, and the mask's windows."""
    parts = mask.parts(seqlen_q, seqlen_k, query_offset)
    rest = [masks.Mask(mask.is_causal, mask.causal_alignment, mask.window)]
    if parts.intervals is not None:
        rest.append(masks.intervals(*parts.intervals))
    if parts.segments is not None:
        rest.append(masks.segments(*parts.segments, contiguous=False))
    if parts.blocks is not None:
        rest.append(masks.block_sparse(parts.blocks, parts.block_q, parts.block_k))
    return masks.combined([*rest, *map(masks.boolean, parts.dense)]).materialize(
        seqlen_q, seqlen_k, query_offset=query_offset
    )


@pytest.mark.parametrize("name", COLLECTION)
def test_the_collection_is_recognised_or_exact(name):
    fn, seqlen_q, seqlen_k, kind = COLLECTION[name]
    mask = masks.from_function(fn, seqlen_q, seqlen_k)
    expected = pair_by_pair(fn, seqlen_q, seqlen_k)
    np.testing.assert_array_equal(mask.materialize(seqlen_q, seqlen_k), expected)
    np.testing.assert_array_equal(np.broadcast_to(expanded(mask, seqlen_q, seqlen_k), expected.shape), expected)
    resolved = mask.resolved(seqlen_q, seqlen_k)
    np.testing.assert_array_equal(np.broadcast_to(expanded(resolved, seqlen_q, seqlen_k), expected.shape), expected)
    description = resolved.described()
    assert repr(mask) == f"<Mask: from_function({fn.__name__}: {description})>"
    if kind is None:
        assert description.endswith(f"boolean[1, 1, {seqlen_q}, {seqlen_k}]")
    else:
        assert description == kind
        assert mask.parts(seqlen_q, seqlen_k).dense == ()


def test_extents_of_the_call_are_taken_where_none_were_given():
    mask = masks.from_function(causal)
    assert repr(mask) == "<Mask: from_function(causal, evaluated when called)>"
    both = mask & masks.window(3)
    for seqlen_q, seqlen_k in [(5, 9), (9, 5)]:
        np.testing.assert_array_equal(
            both.materialize(seqlen_q, seqlen_k)[0, 0], window(3)(0, 0, *np.ogrid[:seqlen_q, :seqlen_k])
        )
        resolved = both.resolved(seqlen_q, seqlen_k)
        assert resolved.is_causal and resolved.window == (3, -1) and not resolved.structured
    assert repr(mask) == "<Mask: from_function(causal: causal)>"


def test_a_window_of_the_other_alignment_becomes_intervals():
    mask = masks.from_function(lambda b, h, q, k: q + 4 >= k) & masks.window(2)
    for found in (mask.materialize(5, 9), expanded(mask, 5, 9), expanded(mask.resolved(5, 9), 5, 9)):
        q, k = np.ogrid[:5, :9]
        np.testing.assert_array_equal(found[0, 0], (q + 4 >= k) & (k >= q - 2))
    # Lengths would move what stands at the last key.
    mask = masks.from_function(lambda b, h, q, k: q + 4 >= k) & masks.padding(None, [9, 6])
    for found in (mask.materialize(5, 9), expanded(mask, 5, 9) & mask.materialize(5, 9)):
        np.testing.assert_array_equal(found[:, 0], (q + 4 >= k) & (k < np.array([9, 6])[:, None, None]))
    assert not mask.resolved(5, 9).bottom_right


def test_masks_of_each_entry_and_head():
    by_entry = masks.from_function(lambda b, h, q, k: k < LENGTHS[b], 50, N, batch=3)
    np.testing.assert_array_equal(by_entry.materialize(50, N), pair_by_pair(lambda b, h, q, k: k < LENGTHS[b], 50, N, 3))
    begin, end = by_entry.parts(50, N).intervals
    np.testing.assert_array_equal(end, np.tile(LENGTHS[:, None], 50))
    assert not begin.any()

    def by_head(b, h, q, k):
        return (q >= k) & (q - k < 4 * (h + 1))

    mask = masks.from_function(by_head, 20, 20, num_heads=2)
    expected = pair_by_pair(by_head, 20, 20, 1, 2)
    np.testing.assert_array_equal(mask.materialize(20, 20), expected)
    np.testing.assert_array_equal(expanded(mask, 20, 20), expected)
    # Heads that agree are one, and so are entries.
    assert masks.from_function(causal, 20, 20, batch=3, num_heads=2).parts(20, 20).intervals[0].shape == (1, 20)


@pytest.mark.parametrize("name", ["causal", "sliding window", "prefix LM", "chunked", "dilated sliding window"])
@pytest.mark.parametrize("offset", [0, 5, np.array([3, 0])])
def test_rows_stand_where_the_offset_says(name, offset):
    fn = COLLECTION[name][0]
    mask = masks.from_function(fn)
    expected = np.concatenate([pair_by_pair(fn, 4, 40, offset=int(at)) for at in np.atleast_1d(offset)])
    np.testing.assert_array_equal(mask.materialize(4, 40, query_offset=offset), expected)
    np.testing.assert_array_equal(np.broadcast_to(expanded(mask, 4, 40, offset), expected.shape), expected)
    resolved = mask.resolved(4, 40, offset)
    assert not resolved.bottom_right
    np.testing.assert_array_equal(np.broadcast_to(expanded(resolved, 4, 40, offset), expected.shape), expected)


ENTRIES = np.array([5, 20])
OF_ENTRIES = {
    "b": lambda b, h, q, k: k < ENTRIES[b],
    "b by numbers": lambda b, h, q, k: k < (5 if b == 0 else 20),
    "b by a list": lambda b, h, q, k: k in [range(5)][b],
    "h": lambda b, h, q, k: (q >= k) | (h == 1),
    "h by numbers": lambda b, h, q, k: q >= k or h == 1,
}


def attend(mask, batch=2, heads=2):
    import attn_ops

    x = np.zeros((batch, 20, heads, 4), np.float32)
    return attn_ops.scaled_dot_product_attention(x, x, x, mask=mask)


@pytest.mark.parametrize("name", OF_ENTRIES)
def test_functions_of_entries_that_nobody_told_of_are_refused(name):
    """The first entry's mask was that of all, in silence."""
    pytest.importorskip("tensorflow")
    fn, what = OF_ENTRIES[name], {"b": "batch", "h": "num_heads"}[name[0]]
    with pytest.raises(ValueError, match=rf"from_function: .*asks for {name[0]}, and the call has 2: give {what}="):
        attend(masks.from_function(fn))
    one = {"batch": 1} if name[0] == "b" else {"heads": 1}
    attend(masks.from_function(fn), **one)  # there is no other
    if name != "b by a list":
        attend(masks.from_function(fn, **{what: 2}))


@pytest.mark.parametrize("fn", [lambda b, h, q, k: k < 8 or b == 0, lambda b, h, q, k: k < 8 or h == 0], ids="bh")
@pytest.mark.parametrize("caller", ["arrays", "KerasTensors"])
def test_entries_are_asked_for_of_the_extents_of_the_call(caller, fn):
    """Not of those that the mask was last evaluated for, for which these functions do not ask."""
    keras = pytest.importorskip("keras")
    import attn_ops

    mask = masks.from_function(fn)

    def called(seqlen, entries=2):
        shape = (entries, seqlen, entries, 4)
        if caller == "arrays":
            x = np.zeros(shape, np.float32)
        else:
            x = keras.Input(shape[1:], batch_size=entries)
        return attn_ops.scaled_dot_product_attention(x, x, x, mask=mask)

    called(20, entries=1)
    called(5)
    with pytest.raises(ValueError, match="from_function: .*and the call has 2: give"):
        called(20)


def test_found_prefixes_and_chunks_go_with_rows_at_the_last_key():
    """They stand at the first one, as the function does, and the call's own mask at the last: each is what it says."""
    first, last = masks.from_function(lambda b, h, q, k: (q >= k) | (k < 5)), masks.causal("bottom_right")
    expected = np.arange(20) <= np.maximum(np.arange(12), 4)[:, None]
    expected &= np.arange(20) <= np.arange(8, 20)[:, None]
    for function in (first, masks.from_function(lambda b, h, q, k: q // 4 == k // 4)):
        both = (last & function).resolved(12, 20)
        seen = last.materialize(12, 20) & function.materialize(12, 20)
        np.testing.assert_array_equal(both.materialize(12, 20), seen)
        if function is first:
            np.testing.assert_array_equal(seen[0, 0], expected)


def test_offsets_of_decoding_are_not_all_remembered():
    mask = masks.from_function(causal)
    for offset in range(200):
        mask.parts(1, 300, offset)
    assert len(mask.structured[0]._found) < 100


def test_many_pairs_are_asked_for_a_few_rows_at_a_time():
    asked = []

    def fn(b, h, q, k):
        asked.append(q.size * k.size)
        return (q >= k) & (q - k < 100)

    mask = masks.from_function(fn, 3000, 3000)
    assert max(asked) <= 2**22 and sum(asked) == 3000**2
    assert repr(mask).endswith(": causal & window(left=99, right=all))>")


def test_a_function_of_numbers_is_called_for_each_pair():
    seen = []

    def fn(b, h, q, k):
        if q < 2:  # an array has no single truth
            seen.append((q, k))
            return k == 0
        return k <= 1

    np.testing.assert_array_equal(masks.from_function(fn, 4, 3).materialize(4, 3)[0, 0].sum(-1), [1, 1, 2, 2])
    assert (1, 2) in seen


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_function_in_tensorflow_is_evaluated_while_a_graph_is_made(jit_compile):
    tf = pytest.importorskip("tensorflow")
    documents = tf.constant(DOCUMENTS[8:14])
    by_arrays = masks.from_function(lambda b, h, q, k: tf.gather(documents, q) == tf.gather(documents, k))
    by_numbers = masks.from_function(lambda b, h, q, k: documents[q] == documents[k] and tf.constant(q) >= k)
    expected = DOCUMENTS[8:14, None] == DOCUMENTS[8:14]
    for mask, expected in ((by_arrays, expected), (by_numbers, expected & np.tri(6, dtype=bool))):
        found = tf.function(lambda x: mask.of_call(*x.shape, 6).materialize(6, 6, 1), jit_compile=jit_compile)(tf.zeros((2, 2, 6)))
        np.testing.assert_array_equal(found[0, 0], expected)
        np.testing.assert_array_equal(tf.function(lambda: mask.materialize(6, 6), jit_compile=jit_compile)()[0, 0], expected)


def test_a_function_in_jax_is_evaluated_while_it_traces():
    jax = pytest.importorskip("jax")
    documents = jax.numpy.asarray(DOCUMENTS[8:14])
    mask = masks.from_function(lambda b, h, q, k: (documents[q] == documents[k]) & (q >= k))
    expected = (DOCUMENTS[8:14, None] == DOCUMENTS[8:14]) & np.tri(6, dtype=bool)
    found = jax.jit(lambda x: mask.of_call(*x.shape, 6).materialize(6, 6) & (x[0, 0, 0] == 0))(np.zeros((2, 2, 6)))
    np.testing.assert_array_equal(found[0, 0], expected)


@pytest.mark.parametrize("traced", ["extent", "offset"])
def test_what_is_unknown_when_traced_is_an_error_that_says_so(traced):
    tf = pytest.importorskip("tensorflow")
    mask = masks.from_function(causal)

    @tf.function(input_signature=[tf.TensorSpec([None])], autograph=False)
    def parts(x):
        return mask.parts(tf.shape(x)[0], 3).intervals if traced == "extent" else mask.parts(4, 3, tf.shape(x)[0]).intervals

    with pytest.raises(ValueError, match="from_function: (seqlen_q|query_offset) must be known where .* evaluate causal"):
        parts(tf.zeros(4))
    if traced == "extent":  # unless they were given
        given = tf.function(lambda x: masks.from_function(causal, 4, 3).parts(tf.shape(x)[0], 3).intervals, autograph=False)
        np.testing.assert_array_equal(given(tf.zeros(4))[1], [[1, 2, 3, 3]])


BAD = [
    (TypeError, r"from_function: fn must be a function of \(b, h, q, k\), got int", lambda: masks.from_function(3)),
    (TypeError, "cannot be evaluated on integers: .*must be boolean .* got int", lambda: masks.from_function(lambda b, h, q, k: q - k, 3, 3)),
    (TypeError, "cannot be evaluated on integers: .*takes 2 positional", lambda: masks.from_function(lambda q, k: q >= k, 3, 3)),
    (ValueError, "<lambda>.* cannot be evaluated on integers: .*out of bounds", lambda: masks.from_function(lambda b, h, q, k: DOCUMENTS[q] == k, 97, 3)),
    (ValueError, "seqlen_q must be an integer from 0 to", lambda: masks.from_function(causal, -1, 3)),
    (ValueError, "num_heads must be an integer from 1 to", lambda: masks.from_function(causal, 1, 3, num_heads=0)),
    (ValueError, "causal is given for seqlen_k=3, and called with seqlen_k=4", lambda: masks.from_function(causal, None, 3).parts(2, 4)),
    (ValueError, "query_offset has 3 entries for batch=2", lambda: masks.from_function(causal, batch=2).parts(2, 4, np.array([1, 2, 3]))),
]  # fmt: skip


@pytest.mark.parametrize("error, message, call", BAD, ids=[message for _, message, _ in BAD])
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()

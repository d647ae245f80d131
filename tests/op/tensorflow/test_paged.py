"""attn_ops.paged_attention: rows that attend to keys in pages, eagerly, in graphs and in XLA."""

import numpy as np
import pytest
import tensorflow as tf

import attn_ops
import int8_rows
from attn_ops import kernels
from attn_ops.tensorflow import append
from cached_calls import turned
from paged_calls import DIM, HEADS, KV_HEADS, VALUE_DIM, Pages, cases

FORMS = {
    "eager": lambda f: f,
    "graph": lambda f: tf.function(f, autograph=False),
    "xla": lambda f: tf.function(f, autograph=False, jit_compile=True),
}
each_form = pytest.mark.parametrize("form", FORMS)
each_layout = pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
needs_operator = pytest.mark.skipif(kernels.unavailable_reason() is not None, reason="no compiled library")
LARGEST_ERROR = {"float64": 1e-12, "float32": 2e-5, "float16": 5e-3, "bfloat16": 5e-2}
NAMES = list(cases(Pages(np.random.default_rng(0), 16, [1], 1), np.random.default_rng(0)))


def close(found, right, dtype="float64"):
    np.testing.assert_allclose(np.asarray(found, np.float64), right, rtol=0, atol=LARGEST_ERROR[dtype])


def laid_out(x, layout):
    return x if layout == "BSHD" else np.ascontiguousarray(np.swapaxes(x, 1, 2))


def lengths_for(page_size):
    return [0, 1, page_size, 2 * page_size + 5, 3 * page_size]


@pytest.mark.wide(84)
@pytest.mark.parametrize("forced", [None, "composite"])
@pytest.mark.parametrize("rows, page_size", [(1, 16), (1, 256), (3, 48), (40, 16), (30, 64)])
@pytest.mark.parametrize("name", NAMES)
@each_form
def test_options(form, name, rows, page_size, forced, rng):
    pages = Pages(rng, page_size, lengths_for(page_size), rows)
    options, of_sequence = cases(pages, rng)[name]
    call = FORMS[form](
        lambda q, k, v, t, n: attn_ops.paged_attention(q, k, v, t, n, return_lse=True, implementation=forced, **options)
    )
    out, lse = call(*map(tf.constant, (pages.query, pages.keys, pages.values, pages.table, pages.lengths)))
    right, right_lse = pages.right(of_sequence, is_causal=options.get("is_causal", True))
    close(out, right)
    seen = np.isfinite(right_lse)
    close(lse.numpy()[seen], right_lse[seen])
    assert name == "sinks" or (lse.numpy()[~seen] == -np.inf).all()


@pytest.mark.wide(24)
@pytest.mark.parametrize("forced", [None, "composite"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("rows", [1, 20])
@each_layout
@each_form
def test_dtypes_and_layouts(form, dtype, rows, layout, forced, rng):
    """Queries in float32 beside pages of 16 bits, which alone are rounded."""
    pages = Pages(rng, 48, [0, 70, 131], rows)
    tensors = [tf.cast(laid_out(x, layout), dtype) for x in (pages.keys, pages.values)]
    pages.keys, pages.values = (laid_out(tf.cast(x, tf.float64).numpy(), layout) for x in tensors)
    call = FORMS[form](lambda *x: attn_ops.paged_attention(*x, layout=layout, implementation=forced))
    out = call(tf.constant(laid_out(pages.query, layout), tf.float32), *tensors, pages.table, pages.lengths)
    assert out.dtype == tf.float32
    close(laid_out(out.numpy(), layout), pages.right()[0], "float32")


@pytest.mark.wide(2)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits(dtype, rng):
    pages = Pages(rng, 48, [0, 70, 131], 1)
    out = attn_ops.paged_attention(
        *(tf.cast(x, dtype) for x in (pages.query, pages.keys, pages.values)), pages.table, pages.lengths
    )
    assert out.dtype == dtype
    close(tf.cast(out, tf.float64), pages.right()[0], dtype)


@pytest.mark.wide(2)
@pytest.mark.parametrize("rows", [2, 40])
def test_rows_that_are_padding(rows, rng):
    pages = Pages(rng, 16, [40, 45, 48], rows)
    counts = np.array([0, 1, rows])
    out = attn_ops.paged_attention(
        pages.query, pages.keys, pages.values, pages.table, pages.lengths, query_seq_lengths=counts
    )
    close(out, pages.right(counts=counts)[0])


def filled(pages, counts, keys, values):
    """Copies of the pages with the new rows at the ends of the sequences, by hand."""
    k, v = pages.keys.copy(), pages.values.copy()
    for b, (n, count) in enumerate(zip(pages.lengths, counts)):
        for i in range(count):
            at = n - count + i
            where = pages.table[b, at // pages.page_size], at % pages.page_size
            k[where], v[where] = keys[b, i], values[b, i]
    return k, v


@pytest.fixture(params=["operator", "scatters"])
def way(request, monkeypatch):
    """With the operator, and without it."""
    if request.param == "scatters":
        monkeypatch.setattr(append, "only_scatters", lambda: True)
    elif kernels.unavailable_reason() is not None:
        pytest.skip("no compiled library")


@pytest.mark.wide(16)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("counts", [None, [0, 1, 0, 5, 2]])
@each_layout
@each_form
def test_new_rows(way, form, layout, counts, in_place, rng):
    """Across the ends of pages; a sequence shorter than the rows has as many new ones as keys."""
    rows = 5
    pages = Pages(rng, 16, [0, 1, 16, 34, 48], rows)
    new = [rng.standard_normal((5, rows, KV_HEADS, dim)) for dim in (DIM, VALUE_DIM)]
    there = np.minimum(pages.lengths, rows if counts is None else counts)
    k, v = filled(pages, there, *new)
    call = FORMS[form](
        lambda q, k, v, t, n, *new: attn_ops.paged_attention(
            q, k, v, t, n, *new, query_seq_lengths=counts, layout=layout, in_place=in_place
        )
    )
    tensors = [tf.constant(laid_out(x, layout)) for x in (pages.query, pages.keys, pages.values)]
    out, *grown = call(*tensors, pages.table, pages.lengths, *(tf.constant(laid_out(x, layout)) for x in new))
    for found, right in zip(grown, (k, v)):
        np.testing.assert_array_equal(laid_out(found.numpy(), layout), right)
    if not in_place:
        np.testing.assert_array_equal(tensors[1], laid_out(pages.keys, layout))
    pages.keys, pages.values = k, v
    close(laid_out(out.numpy(), layout), pages.right(counts=there)[0])


@pytest.mark.wide(12)
@pytest.mark.parametrize("rows", [1, 30])
@each_layout
@each_form
def test_int8(way, form, layout, rows, rng):
    """Pages are pairs of integers and scales; new rows are rounded as they are written, the same in every form."""
    pages = Pages(rng, 16, [0, 1, 16, 34, 48], rows)
    new = [rng.standard_normal((5, rows, KV_HEADS, dim)).astype("float32") for dim in (DIM, VALUE_DIM)]
    there = np.minimum(pages.lengths, rows)
    right = [int8_rows.quantized(x) for x in filled(pages, there, *new)]
    given = [tuple(map(tf.constant, int8_rows.quantized(laid_out(x, layout)))) for x in (pages.keys, pages.values)]
    call = FORMS[form](lambda *x: attn_ops.paged_attention(*x, layout=layout))
    q = tf.constant(laid_out(pages.query, layout), tf.float32)
    out, *grown = call(q, *given, pages.table, pages.lengths, *(laid_out(x, layout) for x in new))
    for found, wanted in zip(grown, right):
        for x, y in zip(found, wanted):
            np.testing.assert_array_equal(laid_out(x.numpy(), layout), y)
    pages.keys, pages.values = (int8_rows.meant(*x) for x in right)
    close(laid_out(out.numpy(), layout), pages.right()[0], "float32")
    again = attn_ops.paged_attention(q, *grown, pages.table, pages.lengths, layout=layout, implementation="composite")
    close(again, out, "float32")


@pytest.mark.wide(2)
@needs_operator
@pytest.mark.parametrize("form", ["eager", "graph"])
def test_in_place(form, rng):
    """The memory stays the same: a token costs a token."""
    pages = Pages(rng, 16, [20], 1)
    new = [rng.standard_normal((1, 1, KV_HEADS, dim)) for dim in (DIM, VALUE_DIM)]
    call = FORMS[form](lambda *x: attn_ops.paged_attention(*x, in_place=True)[1:])
    tensors = tf.constant(pages.keys), tf.constant(pages.values)
    grown = call(pages.query, *tensors, pages.table, pages.lengths, *new)
    address = [np.asarray(memoryview(x)).ctypes.data for x in (*tensors, *grown)]
    assert address[:2] == address[2:]
    both = tf.constant(pages.keys)  # keys and values in one memory would overwrite each other
    keys, values = call(pages.query, both, both, pages.table, pages.lengths, new[0], new[0] + 1)
    assert (values.numpy()[pages.table[0, 1], 3] == new[0][0] + 1).all() and (keys.numpy()[pages.table[0, 1], 3] == new[0][0]).all()


@pytest.mark.wide(3)
@each_form
def test_loop_with_rotary(form, rng):
    """A token at a time in tf.while_loop is one causal attention over the whole sequence."""
    tokens, batch, size = 20, 2, 16
    query, key, value = (
        rng.standard_normal((batch, tokens, heads, dim)) for heads, dim in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
    )
    table = tf.constant([[3, 0], [1, 2]])

    def generate(query, key, value):
        def step(i, outs, *pages):
            rows = [x[:, i : i + 1] for x in (query, key, value)]
            out, *pages = attn_ops.paged_attention(rows[0], *pages, table, tf.fill([batch], i + 1), *rows[1:], rotary=True)
            return i + 1, outs.write(i, out[:, 0]), *pages

        pages = (tf.zeros([4, size, KV_HEADS, dim], tf.float64) for dim in (DIM, VALUE_DIM))
        outs = tf.TensorArray(tf.float64, tokens, element_shape=[batch, HEADS, VALUE_DIM])
        loop = (tf.constant(0), outs, *pages)
        return tf.transpose(tf.while_loop(lambda i, *_: i < tokens, step, loop, maximum_iterations=tokens)[1].stack(), [1, 0, 2, 3])

    right = attn_ops.reference.attention(turned(query), turned(key), value, is_causal=True)[0]
    close(FORMS[form](generate)(*map(tf.constant, (query, key, value))), right, "float32")


@pytest.mark.wide(6)
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("name", ["plain", "chunks", "slopes"])
def test_sizes_that_are_unknown(jit_compile, name, rng):
    pages = Pages(rng, 16, [5, 33], 3)
    options, of_sequence = cases(pages, rng)[name]

    @tf.function(autograph=False, jit_compile=jit_compile, input_signature=[
        tf.TensorSpec([None, None, HEADS, DIM], tf.float64), tf.TensorSpec([None, None, KV_HEADS, DIM], tf.float64),
        tf.TensorSpec([None, None, KV_HEADS, VALUE_DIM], tf.float64), tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None], tf.int32),
    ])  # fmt: skip
    def call(q, k, v, table, lengths):
        return attn_ops.paged_attention(q, k, v, table, lengths, **options)

    table = np.minimum(pages.table, len(pages.keys) - 1) if jit_compile else pages.table
    out = call(pages.query, pages.keys, pages.values, table, pages.lengths)
    close(out, pages.right(of_sequence)[0])


def arguments(rng, rows=1, lengths=(20, 33)):
    pages = Pages(rng, 16, lengths, rows)
    return {"q": pages.query, "k_pages": pages.keys, "v_pages": pages.values, "block_table": pages.table, "lengths": pages.lengths}


BAD = {
    "a table of floats": (lambda a: {"block_table": a["block_table"] * 1.0}, TypeError, "block_table must hold integers"),
    "a table of another batch": (lambda a: {"block_table": a["block_table"][:1]}, ValueError, "block_table must have shape"),
    "lengths beyond the table": (lambda a: {"lengths": [20, 999]}, ValueError, "lengths must be between 0 and 64"),
    "negative lengths": (lambda a: {"lengths": [-1, 3]}, ValueError, "lengths must be between 0"),
    "no lengths": (lambda a: {"lengths": None}, TypeError, "lengths must be integers"),
    "an entry past the pages": (lambda a: {"block_table": a["block_table"] * 0 + 99}, ValueError, r"block_table\[0, 0\] \(99\)"),
    "a negative entry": (lambda a: {"block_table": a["block_table"] * 0 - 1}, ValueError, r"\(-1\) must be from 0 to"),
    "an entry that a length reaches": (lambda a: {"lengths": [20, 49]}, ValueError, r"block_table\[1, 3\] \(1000000\)"),
    "an entry beyond 32 bits": (lambda a: {"block_table": np.int64(a["block_table"]) + 2**32}, ValueError, "must be from 0 to"),
    "pages of 8": (lambda a: {x: a[x][:, :8] for x in ("k_pages", "v_pages")}, ValueError, "multiple of 16, got 8"),
    "pages of other numbers": (lambda a: {"k_pages": a["k_pages"][:-1]}, ValueError, "must have one shape but for the last"),
    "no pages": (lambda a: {x: a[x][:0] for x in ("k_pages", "v_pages")}, ValueError, "there must be pages"),
    "pages of rank 3": (lambda a: {"k_pages": a["k_pages"][0]}, ValueError, "k_pages must have shape"),
    "pages of other dtypes": (lambda a: {"k_pages": np.float32(a["k_pages"])}, TypeError, "k_pages and v_pages must be"),
    "other heads": (lambda a: {"q": a["q"][:, :, :3]}, ValueError, "must be a multiple of num_kv_heads"),
    "keys alone": (lambda a: {"k_new": a["q"][:, :, :2]}, ValueError, "k_new and v_new come together"),
    "more new rows": (lambda a: {"k_new": np.zeros((2, 2, 2, 8)), "v_new": np.zeros((2, 2, 2, 6))}, ValueError, "k_new must have shape"),
    "an option of training": (lambda a: {"dropout_rate": 0.1}, TypeError, "dropout_rate"),
    "int8 without scales": (lambda a: {x: np.zeros(a[x].shape, "int8") for x in ("k_pages", "v_pages")}, TypeError, "come with their scales"),
    "scales of one": (lambda a: {"k_pages": (np.zeros(a["k_pages"].shape, "int8"), np.ones(a["k_pages"].shape[:3]))}, TypeError, "must both be"),
    "scales of floats": (lambda a: {x: (a[x], np.ones(a[x].shape[:3], "float32")) for x in ("k_pages", "v_pages")}, TypeError, "others without"),
    "scales of another shape": (
        lambda a: {x: (np.zeros(a[x].shape, "int8"), np.ones(a[x].shape[:2], "float32")) for x in ("k_pages", "v_pages")},
        ValueError, "must be float32 of shape",
    ),
    "another layout": (lambda a: {"layout": "SBHD"}, ValueError, "layout must be"),
}  # fmt: skip


@pytest.mark.wide(4)
@pytest.mark.parametrize("what", BAD)
def test_bad_input(what, rng):
    given = arguments(rng)
    change, error, message = BAD[what]
    with pytest.raises(error, match=f"paged_attention.*{message}"):
        attn_ops.paged_attention(**{**given, **change(given)})


@pytest.mark.wide(4)
@pytest.mark.parametrize("forced", [None, "composite"])
@pytest.mark.parametrize("wrong", ["entry", "length"])
def test_bad_input_that_only_a_graph_sees(wrong, forced, rng):
    given = {name: tf.constant(x) for name, x in arguments(rng).items()}
    call = tf.function(lambda **given: attn_ops.paged_attention(**given, implementation=forced), autograph=False)
    call(**given)  # what no length reaches may be anything
    other = {"block_table": given["block_table"] * 0 + 99} if wrong == "entry" else {"lengths": tf.constant([20, 65])}
    with pytest.raises(tf.errors.InvalidArgumentError, match="block_table" if wrong == "entry" else "length"):
        call(**{**given, **other})


@needs_operator
def test_refused_rows_leave_the_pages(rng):
    """Of two sequences the second has no page for its row."""
    given = {name: tf.constant(x) for name, x in arguments(rng, lengths=(20, 48)).items()}
    before = given["k_pages"].numpy().copy()
    call = tf.function(lambda **given: attn_ops.paged_attention(**given, in_place=True), autograph=False)
    new = {"k_new": tf.ones([2, 1, KV_HEADS, DIM], tf.float64), "v_new": tf.ones([2, 1, KV_HEADS, VALUE_DIM], tf.float64)}
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"block_table\[1,3\] \(1000000\)"):
        call(**{**given, "lengths": tf.constant([20, 49])}, **new)
    np.testing.assert_array_equal(given["k_pages"], before)


@pytest.mark.wide(2)
@pytest.mark.parametrize("form", ["eager", "graph"])
def test_no_gradient(form, rng):
    given = {name: tf.constant(x) for name, x in arguments(rng).items()}

    def gradient(q):
        with tf.GradientTape() as tape:
            tape.watch(q)
            out = attn_ops.paged_attention(**{**given, "q": q}, implementation="fused")
        return tape.gradient(out, q)

    with pytest.raises((NotImplementedError, LookupError), match="for generation"):
        FORMS[form](gradient)(given["q"])


# What the operator that appends is given wrong: (its arguments after the pages and the new rows, the error).
MALFORMED = {
    "a negative position": (([[0, 1]], [-1], [[1]]), "sequence 0 has -1 rows"),
    "a position past the table": (([[0, 1]], [32], [[1]]), "no room for 1 more"),
    "rows past the table": (([[0, 1]], [31], [[2]]), "no room for 2 more"),
    "more rows than there are": (([[0, 1]], [0], [[3]]), "must be from 0 to 2, got 3"),
    "less than no rows": (([[0, 1]], [0], [[-1]]), "must be from 0 to 2, got -1"),
    "all rows past the table": (([[0, 1]], [31], []), "no room for 2 more"),
    "an entry past the pages": (([[0, 4]], [15], []), r"block_table\[0,1\] \(4\) must be from 0 to 3"),
    "a negative entry": (([[-1, 0]], [15], []), r"block_table\[0,0\] \(-1\)"),
    "a table of another batch": (([[0], [0]], [0], []), r"block_table must be \[batch, pages\]"),
    "a table of another rank": (([0], [0], []), r"block_table must be \[batch, pages\]"),
    "positions of another batch": (([[0]], [0, 0], []), r"must have the shape \[1\]"),
    "two arrays of counts": (([[0]], [0], [[1], [1]]), "num_counts"),
}


@pytest.mark.wide(4)
@needs_operator
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_rows(what, in_place):
    """Refused before anything is written."""
    pages = [tf.zeros([4, 16, 2, dim]) for dim in (3, 5)]
    new = [tf.ones([1, 2, 2, dim]) for dim in (3, 5)]
    arguments, message = MALFORMED[what]
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        kernels.library().attn_ops_append_to_pages(*pages, *new, *arguments, in_place=in_place)
    assert not any(x.numpy().any() for x in pages)


@pytest.mark.wide(4)
@needs_operator
@pytest.mark.parametrize("shapes", [
    [(4, 16, 2, 3), (3, 16, 2, 5), (1, 2, 2, 3), (1, 2, 2, 5)], [(4, 16, 2, 3), (4, 8, 2, 5), (1, 2, 2, 3), (1, 2, 2, 5)],
    [(4, 16, 2, 3), (4, 16, 2, 5), (1, 2, 3, 3), (1, 2, 2, 5)], [(4, 16, 2, 3), (4, 16, 2, 5), (1, 2, 2, 3), (1, 1, 2, 5)],
    [(4, 16, 2, 3), (4, 16, 2, 5), (1, 2, 2, 3), (2, 2, 2, 5)], [(4, 16, 6), (4, 16, 2, 5), (1, 2, 2, 3), (1, 2, 2, 5)],
    [(4, 0, 2, 3), (4, 0, 2, 5), (1, 2, 2, 3), (1, 2, 2, 5)], [(4, 16, 2, 3), (4, 16, 2, 5), (2, 2, 3), (1, 2, 2, 5)],
])  # fmt: skip
def test_malformed_shapes(shapes):
    with pytest.raises(tf.errors.InvalidArgumentError, match="must have"):
        kernels.library().attn_ops_append_to_pages(*map(tf.zeros, shapes), [[0, 1]], [0], [])

"""attn_ops.jax.paged_attention: rows that attend to keys in pages, eagerly and in jax.jit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_ops.jax
from paged_calls import DIM, KV_HEADS, VALUE_DIM, Pages, cases

FORMS = {"eager": lambda f: f, "jit": jax.jit}
each_form = pytest.mark.parametrize("form", FORMS)
each_layout = pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
NAMES = list(cases(Pages(np.random.default_rng(0), 16, [1], 1), np.random.default_rng(0)))


def array(x):
    return jnp.asarray(x, "float32")


def close(found, right, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(found, np.float64), right, rtol=0, atol=tolerance)


def laid_out(x, layout):
    return x if layout == "BSHD" else np.swapaxes(x, 1, 2)


@pytest.mark.wide(56)
@pytest.mark.parametrize("forced", [None, "composite"])
@pytest.mark.parametrize("rows, page_size", [(1, 16), (3, 48), (40, 64)])
@pytest.mark.parametrize("name", NAMES)
@each_form
def test_options(form, name, rows, page_size, forced, rng):
    pages = Pages(rng, page_size, [0, 1, page_size, 2 * page_size + 5, 3 * page_size], rows)
    options, of_sequence = cases(pages, rng)[name]
    options = {what: array(x) if what == "bias" else x for what, x in options.items()}
    call = FORMS[form](
        lambda q, k, v, t, n: attn_ops.jax.paged_attention(q, k, v, t, n, return_lse=True, implementation=forced, **options)
    )
    out, lse = call(*map(array, (pages.query, pages.keys, pages.values)), pages.table, pages.lengths)
    right, right_lse = pages.right(of_sequence, is_causal=options.get("is_causal", True))
    close(out, right)
    seen = np.isfinite(right_lse)
    close(np.asarray(lse)[seen], right_lse[seen])


@pytest.mark.wide(8)
@pytest.mark.parametrize("forced", [None, "composite"])
@each_layout
@each_form
def test_new_rows(form, layout, forced, rng):
    """Of sequences that have other numbers of them, across the ends of pages."""
    rows, counts = 5, np.array([0, 1, 0, 5, 2])
    pages = Pages(rng, 16, [0, 1, 16, 34, 48], rows)
    new = [rng.standard_normal((5, rows, KV_HEADS, dim)) for dim in (DIM, VALUE_DIM)]
    call = FORMS[form](
        functools.partial(attn_ops.jax.paged_attention, query_seq_lengths=counts, layout=layout, implementation=forced)
    )
    given = [array(laid_out(x, layout)) for x in (pages.query, pages.keys, pages.values)]
    out, *grown = call(*given, pages.table, pages.lengths, *(array(laid_out(x, layout)) for x in new))
    for b, (n, count) in enumerate(zip(pages.lengths, counts)):
        for i in range(count):
            at = pages.table[b, (n - count + i) // 16], (n - count + i) % 16
            pages.keys[at], pages.values[at] = new[0][b, i], new[1][b, i]
    for found, right in zip(grown, (pages.keys, pages.values)):
        np.testing.assert_array_equal(laid_out(found, layout), np.float32(right))
    close(laid_out(out, layout), pages.right(counts=counts)[0])


def test_in_place(rng):
    """The arrays are taken over: in functions as far as they are donated, outside of them with in_place."""
    pages = Pages(rng, 16, [20], 1)
    new = [array(rng.standard_normal((1, 1, KV_HEADS, dim))) for dim in (DIM, VALUE_DIM)]
    for call in (
        jax.jit(attn_ops.jax.paged_attention, donate_argnums=(1, 2)),
        functools.partial(attn_ops.jax.paged_attention, in_place=True),
    ):
        keys, values = array(pages.keys), array(pages.values)
        address = keys.unsafe_buffer_pointer()
        _, grown, _ = call(array(pages.query), keys, values, pages.table, pages.lengths, *new)
        assert keys.is_deleted() and grown.unsafe_buffer_pointer() == address


@pytest.mark.wide(2)
def test_bad_input(rng):
    pages = Pages(rng, 16, [20, 33], 1)
    given = [array(pages.query), array(pages.keys), array(pages.values)]
    with pytest.raises(ValueError, match=r"block_table\[0, 0\] \(99\) must be from 0 to"):
        attn_ops.jax.paged_attention(*given, pages.table * 0 + 99, pages.lengths)
    call = jax.jit(attn_ops.jax.paged_attention)
    call(*given, pages.table, pages.lengths)
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=r"block_table\[0,0\] \(99\) must be from 0 to"):
        jax.block_until_ready(call(*given, pages.table * 0 + 99, pages.lengths))
    composite = jax.jit(functools.partial(attn_ops.jax.paged_attention, implementation="composite"))
    for table, lengths in (
        (np.where(np.arange(2)[:, None] == 0, 99, pages.table), pages.lengths),
        (pages.table, np.array([10**6, 33])),
    ):
        out = composite(*given, table, lengths)  # which has no errors
        assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()
    with pytest.raises(NotImplementedError, match="for generation"):
        jax.grad(lambda q: attn_ops.jax.paged_attention(q, *given[1:], pages.table, pages.lengths).sum())(given[0])

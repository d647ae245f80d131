"""Intervals whose last rows begin among the last keys, wherever those end within the groups that kernels take keys in."""

import numpy as np
import pytest
from attn_ops import kernels, reference
from attn_ops.masks import intervals

core = kernels.core()


@pytest.mark.parametrize("rows_behind", [0, 1, 9])
@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("isa", core.isas())
def test_rows_that_see_only_the_last_keys(isa, group, rows_behind):
    """Rows at the front see all keys, which are one block, `rows_behind` see nothing: these have no part in cutting the keys."""
    rng = np.random.default_rng(group)
    ahead = at_the_end = 16 // group  # a vector of each, at least
    rows = ahead + at_the_end + rows_behind
    for length in range(61, 65):
        begins = [0] * ahead + [(length - 1) // 4 * 4] * at_the_end + [length] * rows_behind
        ends = [length] * rows
        q, k, v, d_out = (
            rng.standard_normal((1, n, heads, 4)).astype("float32")
            for n, heads in ((rows, group), (80, 1), (80, 1), (rows, group))
        )
        found = (np.array([begins], np.int32), np.array([ends], np.int32))
        options = {"intervals": found, "key_lengths": np.array([length]), "isa": isa, "num_threads": 1}
        out, _, statistics = core.forward(q, k, v, **options)
        gradients = core.backward(q, k, v, out, statistics, d_out, **options)[:3]
        named = {"mask": intervals(*found), "key_value_seq_lengths": np.array([length])}
        wanted, _ = reference.attention(q, k, v, **named)
        np.testing.assert_allclose(out, wanted, rtol=2e-5, atol=2e-6, err_msg=f"{length} keys")
        derivatives = reference.attention_gradients(q, k, v, d_out, **named)[:3]
        for name, x, y in zip(("dq", "dk", "dv"), gradients, derivatives, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5, err_msg=f"{name}, {length} keys")


@pytest.mark.parametrize("isa", core.isas())
def test_windows_over_many_blocks_of_copied_keys(isa):
    """Copies of halves are kept for as many blocks as the rows that pass together see: fewer than there are."""
    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.standard_normal((1, 1100, 2, 8)).astype("float16") for _ in range(4))
    options = {"window_left": 60, "window_right": 0}
    out, _, statistics = core.forward(q, k, v, isa=isa, **options)
    results = (out, *core.backward(q, k, v, out, statistics, d_out, isa=isa, **options)[:3])
    q, k, v, d_out = (x.astype("float64") for x in (q, k, v, d_out))
    named = {"window": (60, 0)}
    wanted = (reference.attention(q, k, v, **named)[0], *reference.attention_gradients(q, k, v, d_out, **named)[:3])
    for name, x, y in zip(("out", "dq", "dk", "dv"), results, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=4e-3, err_msg=name)


@pytest.mark.parametrize("rows", [4, 8, 16])
@pytest.mark.parametrize("isa", core.isas())
def test_documents_of_a_vector_of_rows(isa, rows):
    """Of three vectors that are a tile each meets keys of its own: the first, the middle one and the last."""
    rng = np.random.default_rng(rows)
    q, k, v, d_out = (rng.standard_normal((1, n, 1, 20)).astype("float32") for n in (3 * rows, 72, 72, 3 * rows))
    document = np.arange(3 * rows)[None] // rows
    found = ((24 * document).astype(np.int32), (24 * document + 24).astype(np.int32))
    out, _, statistics = core.forward(q, k, v, intervals=found, isa=isa)
    results = (out, *core.backward(q, k, v, out, statistics, d_out, intervals=found, isa=isa)[:3])
    mask = intervals(*found)
    wanted = (reference.attention(q, k, v, mask=mask)[0], *reference.attention_gradients(q, k, v, d_out, mask=mask)[:3])
    for name, x, y in zip(("out", "dq", "dk", "dv"), results, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", ["q", "d_out"])
@pytest.mark.parametrize("isa", core.isas())
def test_garbage_of_one_document_beside_another(isa, name):
    """Both end with a tile, whose rows see all keys of their own: what is masked is where the others' begin."""
    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.standard_normal((1, n, 1, 16)).astype("float32") for n in (48, 128, 128, 48))
    for border in (60, 64, 69):
        second = np.arange(48) >= 24
        found = tuple(np.where(second, x, y)[None].astype(np.int32) for x, y in ((border, 0), (128, border)))

        def gradients(**changed):
            x = dict(q=q, k=k, v=v, d_out=d_out) | changed
            options = {"intervals": found, "isa": isa, "num_threads": 1}
            out, _, statistics = core.forward(x["q"], x["k"], x["v"], **options)
            return core.backward(x["q"], x["k"], x["v"], out, statistics, x["d_out"], **options)[:3]

        garbage = dict(q=q, d_out=d_out)[name].copy()
        garbage[0, 3] = np.nan
        for of, x, plain in zip(("dq", "dk", "dv"), gradients(**{name: garbage}), gradients(), strict=True):
            others = second if of == "dq" else np.arange(128) >= border
            np.testing.assert_array_equal(x[:, others], plain[:, others], err_msg=f"{of}, {border} keys")

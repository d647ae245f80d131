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

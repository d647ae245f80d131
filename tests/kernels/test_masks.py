"""Dense boolean masks, whose bits all heads share: tiles cut them at rows and keys that no word of 64 ends at."""

import numpy as np
import pytest
from attn_ops import kernels, reference

core = kernels.core()


@pytest.mark.parametrize("isa", core.isas())
@pytest.mark.parametrize("group", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("per_entry", [False, True], ids=["one mask", "a mask an entry"])
@pytest.mark.parametrize("other", ["alone", "causal", "window", "lengths", "bias", "blocks of the diagonal"])
def test_gradients_too(isa, group, per_entry, other):
    rng = np.random.default_rng(group)
    batch, kv_heads, rows, keys = 2, 2, 131, 150
    q, k, v, d_out = (
        rng.standard_normal((batch, n, heads, 8)).astype("float32")
        for n, heads in ((rows, kv_heads * group), (keys, kv_heads), (keys, kv_heads), (rows, kv_heads * group))
    )
    mask = rng.random((batch if per_entry else 1, 1, rows, keys)) < 0.5
    mask[:, :, 5] = False
    if other == "blocks of the diagonal":
        mask &= np.arange(rows)[:, None] // 40 == np.arange(keys) // 40
    given, named = {}, {}
    if other == "causal":
        given, named = {"window_right": 0}, {"is_causal": True, "causal_alignment": "top_left"}
    elif other == "window":
        given, named = {"window_left": 30, "window_right": 20}, {"window": (30, 20)}
    elif other == "lengths":
        lengths = np.array([97, 150], np.int32), np.array([131, 70], np.int32)
        given = {"key_lengths": lengths[0], "query_lengths": lengths[1]}
        named = {"key_value_seq_lengths": lengths[0], "query_seq_lengths": lengths[1]}
    elif other == "bias":  # whose gradient takes the heads of a group one after the other
        given = {"bias": rng.standard_normal((1, 1, rows, keys)).astype("float32")}
        named = dict(given)
    options = {"masks": [mask], "isa": isa, **given}
    out, _, statistics = core.forward(q, k, v, num_threads=1, **options)
    gradients = core.backward(q, k, v, out, statistics, d_out, num_threads=1, **options)
    wanted, _ = reference.attention(q, k, v, mask=mask, **named)
    np.testing.assert_allclose(out, wanted, rtol=2e-5, atol=2e-6)
    derivatives = reference.attention_gradients(q, k, v, d_out, mask=mask, **named)
    for name, x, y in zip(("dq", "dk", "dv"), gradients, derivatives):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=3e-5, err_msg=name)
    for x, y in zip(core.forward(q, k, v, num_threads=3, **options), (out, None, statistics)):
        if y is not None:
            np.testing.assert_array_equal(x, y)

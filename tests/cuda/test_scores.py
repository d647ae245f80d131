"""What the CUDA kernels do to scores beside products: in the order of csrc/attention.h, and its gradients.

On the stand-in driver, or with `pytest -m gpu` on a device. Over several tiles of rows and keys, forward and backward.
"""

import numpy as np
import pytest
from attn_ops import T5RelativeBias, masks

from cases import TOLERANCES, check, make_inputs
from implementations import Cuda

KINDS = ("float32", "bfloat16", "float16")
LENGTH = 150
EXTENTS = {"seqlen_q": LENGTH, "seqlen_k": LENGTH, "head_dim": 16}
RNG = np.random.default_rng(5)
BIAS = RNG.standard_normal((1, 4, LENGTH, LENGTH)).astype(np.float32)
SINKS = np.array([0.5, -np.inf, 3.0, -1.0], np.float32)
TABLE = RNG.standard_normal((141, 4)).astype(np.float32)  # of distances up to 70: two blocks' for each head
SLOPES = RNG.uniform(-0.3, 0.5, (2, 4)).astype(np.float32)


@pytest.fixture(params=(True, False), ids=("", "without-decode"))
def attend(cuda, on_device, request):
    return Cuda(on_device, request.param)


SCORES = {
    "cap": {"logits_soft_cap": 1.5},
    "cap, bias": {"logits_soft_cap": 3.0, "bias": BIAS, "mask": masks.window(left=70, right=9)},
    "slopes": {"alibi_slopes": SLOPES[0]},
    "slopes, offset": {"alibi_slopes": SLOPES, "query_offset": np.array([20, 3]), "is_causal": True},
    "slopes, cap, bias, lengths": {
        "alibi_slopes": SLOPES,
        "logits_soft_cap": 2.0,
        "bias": BIAS,
        "is_causal": True,
        "causal_alignment": "bottom_right",
        "query_seq_lengths": np.array([150, 40]),
        "key_value_seq_lengths": np.array([99, 150]),
    },
    "sinks": {"sinks": SINKS},
    "sinks, window": {"sinks": SINKS, "window": (30, None), "is_causal": True},
    "sinks, rows without keys": {
        "sinks": SINKS,
        "is_causal": True,
        "causal_alignment": "bottom_right",
        "query_seq_lengths": np.array([150, 40]),
        "key_value_seq_lengths": np.array([99, 0]),
    },
    "table": {"relative_bias": TABLE},
    "table of one number": {"relative_bias": TABLE[:1]},
    "table, causal, offset": {"relative_bias": TABLE[:41], "query_offset": np.array([20, 3]), "is_causal": True},
    "table of T5, lengths": {
        "relative_bias": T5RelativeBias(TABLE[:32], max_distance=64),
        "scale": 1.0,
        "query_seq_lengths": np.array([150, 40]),
        "key_value_seq_lengths": np.array([99, 150]),
    },
    "everything": {
        "sinks": SINKS,
        "relative_bias": TABLE,
        "alibi_slopes": SLOPES,
        "logits_soft_cap": 2.0,
        "bias": BIAS,
        "mask": masks.window(left=60, right=4),
        "dropout_rate": 0.3,
        "dropout_seed": 7,
    },
    "cap, negative scale, dropout": {"logits_soft_cap": 0.8, "scale": -1.7, "dropout_rate": 0.3, "dropout_seed": 5},
}


@pytest.mark.wide(2)
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("scores", SCORES)
def test_scores(attend, scores, dtype):
    check(attend, dtype, **EXTENTS, **SCORES[scores])


@pytest.mark.wide(2)
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("scores", SCORES)
def test_scores_of_few_rows(attend, scores, dtype):
    """Decoded, unless that is forbidden, and cut along the keys."""
    options = dict(SCORES[scores])
    if "bias" in options:
        options["bias"] = np.resize(BIAS, (1, 4, 3, 700))
    if "query_seq_lengths" in options:
        options["query_seq_lengths"], options["key_value_seq_lengths"] = np.array([3, 2]), np.array([130, 600])
    check(attend, dtype, seqlen_q=3, seqlen_k=700, head_dim=16, **options)


@pytest.mark.parametrize("seqlen_q", [3, 70])
@pytest.mark.parametrize("dtype", KINDS)
def test_caps_of_what_is_not_finite(attend, dtype, seqlen_q):
    """Infinite products are seen as the cap, and have no gradient; NaN that is hidden stays hidden."""
    query, key, value, d_out, d_lse = make_inputs(dtype, 1, seqlen_q, 75, 2, 2, 16)
    key[:, 60:], value[:, 60:] = np.nan, np.inf
    key[:, 7, 1, 3] = np.inf
    options = {"logits_soft_cap": 2.0, "key_value_seq_lengths": np.array([60])}
    result, _ = check(attend, dtype, inputs=(query, key, value, d_out, d_lse), **options)
    assert np.isfinite(result.out.astype(float)).all() and np.isfinite(result.lse).all()


@pytest.mark.parametrize("dtype", KINDS)
def test_the_largest_and_the_smallest_cap(attend, dtype):
    """The one caps nothing; by the other all scores are the same."""
    inputs, tolerance = make_inputs(dtype, 1, 20, 75, 2, 2, 16), max(TOLERANCES[dtype] / 10, 1e-5)
    largest, none = (attend(*inputs, **options) for options in ({"logits_soft_cap": 2.0**127}, {}))
    for (name, found), (_, wanted) in zip(largest.items(), none.items()):
        np.testing.assert_allclose(found.astype(float), wanted.astype(float), atol=tolerance, err_msg=name)
    smallest = attend(*inputs, logits_soft_cap=2.0**-126)
    mean = np.broadcast_to(inputs[2].astype(np.float64).mean(1, keepdims=True), smallest.out.shape)
    np.testing.assert_allclose(smallest.out.astype(float), mean, atol=TOLERANCES[dtype])
    assert not smallest.dq.any() and not smallest.dk.any()


@pytest.mark.parametrize("seqlen_q", [3, 70])
def test_the_largest_slopes(attend, seqlen_q):
    """Beside them the products are nothing: each row sees one end of the keys."""
    slopes = np.array([2.0**64, -(2.0**64)], np.float32)
    inputs = make_inputs("float32", 1, seqlen_q, 75, 2, 2, 16)
    result, _ = check(attend, inputs=inputs, alibi_slopes=slopes)
    ends = inputs[2][:, [-1, 0], [0, 1]]
    np.testing.assert_allclose(result.out, np.broadcast_to(ends[:, None], result.out.shape), rtol=1e-6)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("lengths", [(3, 2), (70, 40)])
def test_rows_that_a_sink_has_alone(attend, dtype, lengths):
    """Past the last row, and before the first key: out 0, lse the sink, and the gradient of lse is the sink's, whatever
    comes from out."""
    rows, length = lengths
    query, key, value, d_out, d_lse = make_inputs(dtype, 2, rows, 75, 4, 2, 16)
    key_lengths = np.array([75, 0])
    d_out[:, length:], d_out[1] = np.nan, np.inf
    options = {"query_seq_lengths": np.array([length, length]), "key_value_seq_lengths": key_lengths}
    result, _ = check(attend, dtype, inputs=(query, key, value, d_out, d_lse), sinks=SINKS, **options)
    assert np.isfinite(result.d_sinks).all() and result.d_sinks[1] == 0
    assert (result.lse[1] == SINKS[:, None]).all() and not result.out[1].any()


def test_the_gradient_of_sinks_that_many_rows_share(cuda, on_device):
    """More rows than threads of the block, without a gradient of lse: as summed in float64."""
    attend = Cuda(on_device, False)
    inputs = make_inputs("float32", 3, 700, 5, 2, 1, 8)
    result, expected = check(attend, inputs=inputs, with_d_lse=False, sinks=SINKS[[0, 2]])
    np.testing.assert_allclose(result.d_sinks, expected.d_sinks, rtol=1e-5)


def test_gradients_of_nothing_are_zero(attend):
    for sizes in ({"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}):
        result, _ = check(attend, **sizes, sinks=SINKS)
        assert result.d_sinks.any() == ("seqlen_k" in sizes)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("seqlen_q", [3, 70])
def test_what_a_table_hides_no_bias_shows(attend, dtype, seqlen_q):
    """A -inf of the table hides, whatever stands in the bias beside it: NaN, infinity, or nothing; read in pairs or not."""
    table = TABLE[:41, :2].copy()
    table[14::7] = -np.inf
    own = {"relative_bias": table, "sinks": SINKS[[0, 2]]}
    for keys in (76, 75):
        inputs = make_inputs(dtype, 1, seqlen_q, keys, 2, 2, 16)
        distance = np.clip(np.arange(keys) - np.arange(seqlen_q)[:, None], -20, 20) + 20
        hidden = np.isneginf(table[distance]).transpose(2, 0, 1)[None]
        plain = RNG.standard_normal(hidden.shape).astype(np.float32)
        bad = np.where(hidden, np.resize(np.float32([np.nan, np.inf]), hidden.shape), plain)
        for (name, found), (_, wanted) in zip(*(attend(*inputs, bias=x, **own).items() for x in (bad, plain))):
            np.testing.assert_array_equal(found.astype(float), wanted.astype(float), err_msg=name)
            assert np.isfinite(found.astype(float)).all(), name

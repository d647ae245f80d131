"""Maxima of rows that rise from tile to tile, by less and by more than forward may leave its sums as they are.

On the stand-in driver, or with `pytest -m gpu` on a device. What is right comes from float64.
"""

import numpy as np
import pytest

from cases import DTYPES, TOLERANCES, check, make_inputs
from implementations import Cuda, specification

KINDS = ("float16", "bfloat16", "float32")
KEYS = 200
# What a key adds to the scores (natural units): over a tile of forward (16 to 64 keys) or a step of decode from nothing
# to a hundred, where 8 ln 2 = 5.5 may pass.
RISES = {"slowly": 0.03, "about as far": 0.09, "fast": 1.5, "falling": -0.4}
OPTIONS = {
    "plain": {},
    "window": {"window": (150, 3), "causal_alignment": "bottom_right"},
    "mask, bias": {
        "mask": np.random.default_rng(1).random((1, 1, 40, KEYS)) < 0.5,
        "bias": np.random.default_rng(2).standard_normal((1, 2, 40, KEYS)).astype(np.float32),
    },
    "sinks, lengths": {"sinks": np.array([-1.0, 12.0], np.float32), "key_value_seq_lengths": np.array([KEYS - 9])},
    "dropout": {"dropout_rate": 0.3, "dropout_seed": 5},
}


@pytest.fixture(params=(True, False), ids=("", "without-decode"))
def attend(cuda, on_device, request):
    return Cuda(on_device, request.param)


def rising_inputs(dtype, rise, rows=40, head_dim=64):
    """Of each three rows, neighbours in a warp, one rises so, one does not at all, and one falls."""
    query, key, *rest = make_inputs(dtype, 1, rows, KEYS, 2, 2, head_dim)
    query[..., 0] = np.array([1, 0, -1])[np.arange(rows) % 3][None, :, None]
    key[..., 0] = (8 * rise * np.arange(KEYS))[None, :, None]  # 8: of the scale
    return query, key, *rest


@pytest.mark.wide(4)
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("rise", RISES)
@pytest.mark.parametrize("options", OPTIONS)
def test_maxima_that_rise(attend, dtype, rise, options):
    result, expected = check(attend, dtype, inputs=rising_inputs(dtype, RISES[rise]), **OPTIONS[options])
    np.testing.assert_allclose(result.lse, expected.lse, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("times, names", [(30, ("out", "dq")), (300, ("out",))])
def test_a_row_does_not_depend_on_its_neighbours(attend, dtype, times, names):
    """When one of a warp's rows rises, all go the way of it, with a factor of 1; and when one has scores that are too large
    for an exponent in one instruction."""
    query, key, value, d_out, _ = rising_inputs(dtype, RISES["about as far"])
    expected = attend(query, key, value, d_out)
    query[:, 1::3, :, 0] *= DTYPES[dtype].type(times)
    query[:, 2::3, :, 0] *= DTYPES[dtype].type(-times)
    result = attend(query, key, value, d_out)
    for name in names:
        np.testing.assert_array_equal(getattr(result, name)[:, ::3], getattr(expected, name)[:, ::3], name)


def test_float16_keeps_small_weights(attend):
    """Of 2^-17, which float16 has to 7 bits; below a reference of 2^8 above the maximum they were nothing."""
    query, key, value, d_out, _ = make_inputs("float16", 1, 40, KEYS, 1, 1, 16)
    query[:], key[:], value[:] = 0, 0, 1
    query[..., 0], key[:, 0, :, 0], value[:, 0] = 1, 17 * np.log(2), 0
    result = attend(query, key, value, d_out, scale=1.0)
    expected = specification(query, key, value, d_out, scale=1.0).out
    np.testing.assert_allclose(result.out.astype(np.float64), expected, rtol=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_near_the_end_of_the_range(attend, dtype):
    """There is nothing above 3.4e38: no weight is more than 1."""
    query, key, value, d_out, _ = rising_inputs(dtype, RISES["about as far"])
    value[:] = value * value.dtype.type(3e35)
    result = attend(query, key, value, d_out)
    expected = specification(query, key, value, d_out).out
    error = np.abs(result.out.astype(np.float64) - expected).max() / np.abs(expected).max()
    assert error < TOLERANCES[dtype] / 4

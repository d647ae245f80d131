"""The accuracy rule: no more than twice the error of the plain formula in the same precision, outputs and gradients.

Errors are against float64 on the same (rounded) inputs, relative to the largest value. Two units in the last place are
allowed in any case, and half a unit of lse in gradients: weights recomputed as exp(score - lse) inherit its rounding,
which the plain formula does not have because it keeps the weights.
"""

import functools

import numpy as np
import pytest

from cases import DTYPES, make_inputs
from implementations import specification
from plain_formula import plain_attention

ULPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 2.0**-52}
CASES = {
    "plain": (dict(seqlen_q=96, seqlen_k=160, head_dim=64), {}),
    "causal": (dict(seqlen_q=130, seqlen_k=130, head_dim=40), dict(is_causal=True)),
    "grouped heads": (dict(seqlen_q=70, seqlen_k=90, num_heads=6, num_kv_heads=2, head_dim=33), {}),
    "one query": (dict(seqlen_q=1, seqlen_k=700, head_dim=128), {}),
    "few queries": (dict(seqlen_q=6, seqlen_k=300, head_dim=128), {}),
    "bias": (dict(seqlen_q=64, seqlen_k=80, head_dim=16), dict(bias=(1, 4, 64, 80))),
    "sharp": (dict(seqlen_q=64, seqlen_k=100, head_dim=64), dict(scale=0.5)),
    "flat": (dict(seqlen_q=64, seqlen_k=500, head_dim=64), dict(scale=0.01)),
}
NAMES = ("out", "dq", "dk", "dv")


def arguments(case, dtype, seed):
    """(query, key, value, d_out) and the options of a case."""
    sizes, options = CASES[case]
    if "bias" in options:
        bias = np.random.default_rng(seed).standard_normal(options["bias"]).astype(DTYPES[dtype])
        options = {**options, "bias": bias}
    return make_inputs(dtype, batch=1, seed=seed, **sizes)[:4], options


def plain(inputs, dtype, is_causal=False, **options):
    """`NAMES` by the plain formula; of one query only the output is meant to be looked at."""
    query, key, value, d_out = inputs
    visible = np.tri(query.shape[1], key.shape[1], dtype=bool) if is_causal else None
    rows = query.shape[1]
    if rows == 1:
        # Products with one row have their own, more accurate, sums in NumPy: let it see several.
        query, d_out = np.repeat(query, 8, axis=1), np.repeat(d_out, 8, axis=1)
    out, *gradients = plain_attention(query, key, value, DTYPES[dtype], d_out, visible=visible, **options)
    return out[:, :rows], *gradients


def errors(found, expected):
    """Largest and root-mean-square error."""
    difference = np.abs(found.astype(np.float64) - expected)
    return np.array([difference.max(), np.sqrt((difference**2).mean())]) / np.abs(expected).max()


@functools.cache
def problem(case, dtype, seed):
    """Inputs, options, float64 results, and the errors of the plain formula."""
    inputs, options = arguments(case, dtype, seed)
    expected = specification(*inputs, **options)
    plainly = [errors(x, getattr(expected, name)) for name, x in zip(NAMES, plain(inputs, dtype, **options))]
    return inputs, options, expected, plainly


@pytest.mark.wide(4)
@pytest.mark.parametrize("of", ["float32", "float16", "bfloat16"])
def test_at_most_twice_the_error_of_the_plain_formula(implementation, of, pytestconfig):
    for case in implementation.thin(CASES):
        ours, theirs, lse = [], [], 0.0
        for seed in range(4 if pytestconfig.getoption("whole") else 2):  # of both what is measured and its limit
            inputs, options, expected, plainly = problem(case, of, seed)
            result = implementation(*inputs, **options)
            ours.append([errors(getattr(result, name), getattr(expected, name)) for name in NAMES])
            theirs.append(plainly)
            lse = max(lse, np.abs(expected.lse).max())
        # Gradients of a single row hang on its one or two largest weights: no statistics.
        names = NAMES[:1] if case == "one query" else NAMES
        for name, found, plainly in zip(names, np.max(ours, axis=0), np.max(theirs, axis=0)):
            floor = 2 * ULPS[of] + (np.spacing(np.float32(lse)) / 2 if name != "out" else 0)
            # The largest of so many errors is a matter of luck, so there the floor is added.
            limit = 2 * plainly[0] + floor, max(2 * plainly[1], floor)
            assert (found <= limit).all(), f"{case}: {name}: max, rms {found}, plain formula {plainly}, limit {limit}"


def test_float64_is_as_good_as_float64(implementation):
    for case in implementation.thin(CASES):
        inputs, options = arguments(case, "float64", seed=0)
        result, expected = implementation(*inputs, **options), specification(*inputs, **options)
        for (name, array), (_, wanted) in zip(result.items(), expected.items()):
            assert errors(array, wanted)[0] <= 64 * ULPS["float64"], f"{case}: {name}"

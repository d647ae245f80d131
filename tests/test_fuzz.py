"""A slice of the fuzz (fuzz/run.py has the whole), and that its judge catches faults and its truth is the derivative."""

import ml_dtypes
import numpy as np
import pytest
from attn_ops import _native

from fuzz import cases, check, run, truth, ways

SEED = 14
CORE = range(60)
OTHER_WAYS = {"op": range(60, 68), "graph": (70, 71), "composite": range(72, 75), "jax-fused": (75, 76), "jax-composite": (77,)}


def assert_no_findings(numbers, chosen):
    told = []
    count, failed = run.fuzz(SEED, numbers, chosen, whole=True, report=told.append)
    assert (count, failed) == (len(numbers), 0), "\n".join(told)


@pytest.mark.parametrize("isa", _native.core().isas())
def test_kernels(isa):
    assert_no_findings(CORE, run.chosen_ways(["core"], [isa]))


@pytest.mark.parametrize("name", OTHER_WAYS)
def test_other_ways(name):
    assert_no_findings(OTHER_WAYS[name], run.chosen_ways([name], None))


# Faults


def small_case(**options):
    """Six rows over seven keys with all results, one key hidden, and no garbage."""
    rng = np.random.default_rng(SEED)
    case = cases.Case(SEED, 0, "float32", (1, 2, 6, 7), "normal")
    mask = np.ones((1, 1, 1, 7), bool)
    mask[..., 3] = False
    bias = rng.standard_normal((1, 2, 6, 7)).astype(np.float32)
    case.options = {"layout": "BHSD", "mask": [mask], "bias": bias, **options}
    for name, heads, length, dim in (("query", 2, 6, 5), ("key", 1, 7, 5), ("value", 1, 7, 4), ("d_out", 2, 6, 4)):
        setattr(case, name, rng.standard_normal((1, heads, length, dim)).astype(np.float32))
    case.d_lse = rng.standard_normal((1, 2, 6)).astype(np.float32)
    return case


def right_results(case, judge):
    """The truth, rounded to the dtypes of the results."""
    wide = judge.expected
    return {name: x.astype(judge._dtype(name)) for name, x in wide.items()}


def one_element_off(results, case, right):
    results["out"][0, 1, 2, 3] += 1e-4


def a_hidden_keys_weight(results, case, right):
    results["dv"][0, 0, 3] += np.float32(1e-6) * case.d_out[0].sum(axis=(0, 1))


def dropped_delta(results, case, right):
    p_delta = right.p * (right.p * (case.d_out @ case.value.swapaxes(-1, -2))).sum(axis=-1, keepdims=True)
    results["dq"] += (right.scale * (p_delta @ case.key)).astype(np.float32)


def dropped_d_lse(results, case, right):
    results["d_bias"] -= (right.p * case.d_lse[..., None]).astype(np.float32)


def lse_off_by_a_thousandth(results, case, right):
    results["lse"] *= np.float32(1.001)


def statistics_swapped(results, case, right):
    results["maximum"], results["sum"] = results["sum"], results["maximum"]


def sum_off(results, case, right):
    results["sum"] *= np.float32(1.0001)


def one_nan(results, case, right):
    results["dk"][0, 0, 0, 0] = np.nan


def missing_gradient(results, case, right):
    del results["d_bias"]


def narrow_result(results, case, right):
    results["out"] = results["out"].astype(ml_dtypes.bfloat16)


FAULTS = (
    one_element_off,
    a_hidden_keys_weight,
    dropped_delta,
    dropped_d_lse,
    lse_off_by_a_thousandth,
    statistics_swapped,
    sum_off,
    one_nan,
    missing_gradient,
    narrow_result,
)


def test_judge_accepts_the_truth():
    case = small_case()
    judge = check.Judge(case)
    assert judge.findings(right_results(case, judge), case.accumulator) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_judge_catches(fault):
    case = small_case()
    judge = check.Judge(case)
    results = right_results(case, judge)
    fault(results, case, judge.truth)
    assert judge.findings(results, case.accumulator)


@pytest.mark.parametrize("options", ({}, {"scale": -0.4, "is_causal": True, "causal_alignment": "bottom_right"}), ids=("plain", "causal"))
def test_truth_is_the_derivative(options):
    """Of the loss sum(out d_out) + sum(lse d_lse), by central differences of the truth's own forward in float64."""
    case = small_case(**options)
    found = truth.Truth(case).results()
    seen_rows = case.seen.any(axis=-1)

    def loss():
        results = truth.Truth(case).results()
        lse = np.where(seen_rows, results["lse"], 0)
        return float((results["out"] * case.d_out).sum() + (lse * case.d_lse).sum())

    arrays = {"dq": "query", "dk": "key", "dv": "value", "d_bias": "bias"}
    for gradient, name in arrays.items():
        original = case.options["bias"] if name == "bias" else getattr(case, name)
        wide = original.astype(np.float64)
        if name == "bias":
            case.options["bias"] = wide
        else:
            setattr(case, name, wide)
        for index in np.ndindex(wide.shape):
            kept, step = wide[index], 1e-5
            wide[index] = kept + step
            above = loss()
            wide[index] = kept - step
            below = loss()
            wide[index] = kept
            np.testing.assert_allclose(found[gradient][index], (above - below) / (2 * step), rtol=1e-5, atol=1e-8, err_msg=gradient)


@pytest.mark.parametrize("changes", ("garbage", "threads"))
def test_changed_bits_are_told(changes):
    case = small_case()
    case.threads, case.garbage = (1, 2), ("nan", "inf")
    judge = check.Judge(case)

    class Changing(ways.Core):
        def __call__(self, case, turn=0, threads=None):
            results = right_results(case, judge)
            different = turn if changes == "garbage" else (threads or case.threads[turn]) != case.threads[0]
            results["out"][0, 0, 0, 0] = np.nextafter(results["out"][0, 0, 0, 0], np.float32(8 if different else -8))
            return results

    told = run.findings(case, Changing("generic"), judge)
    assert len(told) == 1 and ("threads" if changes == "threads" else "where hidden") in told[0]

"""A slice of the fuzz (run.py has the whole), and that its judge catches faults and its truth is the derivative."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from attn_ops import T5RelativeBias

import cuda_run
import int8_rows
from fuzz import cases, check, reductions, run, shrink, stored, truth, ways

SEED = 14
CORE = range(120)
OTHER_WAYS = {
    "reference": range(120, 140),
    "op": range(140, 150),
    "graph": range(150, 152),
    "composite": range(152, 155),
    "jax-fused": range(155, 157),
    "jax-composite": range(157, 158),
    "core-stored": range(158, 170),
    "cache": range(170, 180),
    "rolling": range(180, 190),
    "pages": range(190, 200),
    "varlen": range(200, 210),
    "jax-cache": range(230, 232),
    "jax-rolling": range(235, 236),
    "jax-pages": range(238, 240),
    "jax-varlen": range(242, 244),
    "torch": range(210, 230),
    "cuda": range(244, 264),
    "cuda-without-decode": range(264, 294),
    "cuda-stored": range(294, 314),
}


def assert_no_findings(numbers, chosen):
    told = []
    counts, failed = run.fuzz(SEED, numbers, chosen, whole=True, report=told.append)
    assert failed == 0, "\n".join(told)
    assert all(2 * count >= len(numbers) for count in counts.values()), "few suit"
    return counts


def test_kernels():
    chosen = run.chosen_ways(["core"], None)
    assert assert_no_findings(CORE, chosen) == dict.fromkeys(chosen, len(CORE))


@pytest.mark.parametrize("name", OTHER_WAYS)
def test_other_ways(name):
    if name == "torch":
        pytest.importorskip("torch")
    if name.startswith("cuda") and (reason := cuda_run.skip_reason(False)):
        pytest.skip(reason)
    assert_no_findings(OTHER_WAYS[name], run.chosen_ways([name], None))


@pytest.mark.parametrize("name", ["core-stored", "cuda-stored", "cache", "rolling", "pages", "varlen"])  # on JAX they are the same code
def test_what_is_stored_is_what_is_read(name):
    """A way that computes another case than the one that it says is found out, by a value of one key."""
    if name.startswith("cuda") and (reason := cuda_run.skip_reason(False)):
        pytest.skip(reason)
    way = list(run.chosen_ways([name], None).values())[0]
    for number in range(100):
        case = way.suited(cases.draw(SEED, number))
        if case is None or case.poison or case.garbage or not case.seen.any() or case.options.get("dropout_rate"):
            continue
        rows = case.seen.sum(axis=-1)
        if (rows == 1).any():  # a row whose result is that value
            break
    b, h, i = (int(x[0]) for x in (rows == 1).nonzero())
    kv_head = h // (case.scores_shape[1] // truth.heads_first(case, case.key).shape[1])
    key = int(case.seen[b, h, i].argmax())
    judge = check.Judge(case)
    assert run.findings(case, way, judge) == []
    value = case.value.copy()
    truth.heads_first(case, value)[b, kv_head, key] *= 2
    assert run.findings(dataclasses.replace(case, value=value, _seen=None), way, judge)


def test_rows_of_int8_are_those_before(rng):
    """What a memory of int8 is given becomes what it should, to the last bit."""
    x = (rng.standard_normal((40, 3, 9)) * 10.0 ** rng.integers(-9, 9, (40, 3, 1))).astype("float32")
    x8, scale = int8_rows.quantized(x)
    given = stored.before_rounding(stored.meant(x))
    for found, wanted in zip((*stored.integers(stored.meant(x)), *int8_rows.quantized(given)), (x8, scale) * 2):
        np.testing.assert_array_equal(found, wanted)


# The judge


def small_case(dtype="float32", **options):
    """Six rows over seven keys with all results, and no garbage. One key is hidden, and all of the last row."""
    rng = np.random.default_rng(SEED)
    case = cases.Case(SEED, 0, dtype, (1, 2, 6, 7), "normal")
    mask = np.ones((1, 1, 6, 7), bool)
    mask[..., 3] = mask[..., 5, :] = False
    bias = rng.standard_normal((1, 2, 6, 7)).astype(case.accumulator)
    case.options = {"layout": "BHSD", "mask": [mask], "bias": bias, **options}
    for name, heads, length, dim in (("query", 2, 6, 5), ("key", 1, 7, 5), ("value", 1, 7, 4), ("d_out", 2, 6, 4)):
        setattr(case, name, rng.standard_normal((1, heads, length, dim)).astype(cases.DTYPES[dtype]))
    case.d_lse = rng.standard_normal((1, 2, 6)).astype(case.accumulator)
    return case


def dropped_out_case():
    return small_case(dropout_rate=0.5, dropout_seed=(1, 2))


def massive_case():
    """All keys share a huge channel: what their d_out v have in common must vanish from ds to the last digit."""
    case = small_case("bfloat16", mask=[np.ones((1, 1, 6, 7), bool)])
    case.key[..., 0] = -1000
    return case


def poisoned_case():
    case = small_case()
    case.poison = (0, 0, 1)
    return case


def scored_case():
    """With all that happens to scores; a row that sees no key, and one that keys count little in beside the sink."""
    case = small_case(
        logits_soft_cap=1.5,
        alibi_slopes=np.array([0.25, -0.5], np.float32),
        relative_bias=np.random.default_rng(SEED).standard_normal((5, 2)).astype(np.float32),
        sinks=np.array([0.5, 3.0], np.float32),
        causal_alignment="bottom_right",
    )
    case.query *= 3
    return case


def with_option(case, **option):
    case.options |= option
    return case


def rounded(case, wide):
    """Results of the dtypes that they have for the case."""
    judge = check.Judge(case)
    return {name: x.astype(judge.dtype(name)) for name, x in wide.items()}


def of_other_options(**changes):
    """A fault: all results are right, but for other options."""

    def results(case, right):
        case = dataclasses.replace(case, options={**case.options, **changes}, _seen=None)
        return rounded(case, truth.Truth(case).results())

    return results


def changed(name, change):
    """A fault: one result is not `right.results()[name]` but that after `change`, in place or returned."""

    def results(case, right):
        wide = right.results()
        x = wide[name].copy()
        wide[name] = x if (other := change(x, case, right)) is None else other
        return rounded(case, wide)

    return results


def put(index, value):
    return lambda x, case, right: x.__setitem__(index, value)


def a_hidden_keys_weight(dv, case, right):
    dv[0, 0, 3] += 1e-6 * case.d_out[0].sum(axis=(0, 1))


def ds_for_rounded_delta(case, right):
    out = right.out.astype(case.query.dtype).astype(float)
    delta = (case.d_out.astype(float) * out).sum(axis=-1)
    dp = case.d_out.astype(float) @ case.value.astype(float).swapaxes(-1, -2)
    return right.p * (dp - (delta - case.d_lse)[..., None])


def dq_of_rounded_delta(dq, case, right):
    return right.scale * (ds_for_rounded_delta(case, right) @ case.key.astype(float))


def bias_gradient_without_d_lse(d_bias, case, right):
    return d_bias - right.p * case.d_lse[..., None]


def ignored_slope_of_the_cap(dq, case, right):
    return right.scale * (right.ds @ case.key.astype(float))


def sinks_gradient_of_values_alone(d_sinks, case, right):
    return d_sinks - (np.exp(right.log_p_sink) * case.d_lse).sum((0, 2))


def ignored_delta(dq, case, right):
    dp = case.d_out @ case.value.swapaxes(-1, -2)
    return right.scale * (right.p * (dp + case.d_lse[..., None]) @ case.key)


def statistics_swapped(case, right):
    wide = right.results()
    return rounded(case, wide | {"maximum": wide["sum"], "sum": wide["maximum"]})


def missing_gradient(case, right):
    return {name: x for name, x in rounded(case, right.results()).items() if name != "d_bias"}


def narrow_output(case, right):
    results = rounded(case, right.results())
    return results | {"out": results["out"].astype(ml_dtypes.bfloat16)}


def shifted(mask):
    return [np.roll(mask, 1, axis=-1)]


MASK = small_case().options["mask"][0]
TABLE, SLOPES, SINKS = (scored_case().options[name] for name in ("relative_bias", "alibi_slopes", "sinks"))
FAULTS = {
    "mask off by one key": (small_case, of_other_options(mask=shifted(MASK))),
    "causal": (small_case, of_other_options(is_causal=True)),
    "no bias": (small_case, of_other_options(bias=np.zeros((1, 2, 6, 7), np.float32))),
    "scale": (small_case, of_other_options(scale=0.4472)),
    "other bits of dropout": (dropped_out_case, of_other_options(dropout_seed=(1, 3))),
    "dropout not rescaled": (dropped_out_case, changed("out", lambda out, case, right: out / 2)),
    "dropout rescaled for another rate": (dropped_out_case, changed("dv", lambda dv, case, right: dv * 1.0001)),
    "one element": (
        small_case,
        changed("out", lambda out, case, right: out + 1e-4 * (np.arange(out.size) == 7).reshape(out.shape)),
    ),
    "a hidden key counts": (small_case, changed("dv", a_hidden_keys_weight)),
    "NaN of a hidden key leaks": (small_case, changed("dk", put((0, 0, 3), np.nan))),
    "NaN": (small_case, changed("dq", put((0, 0, 0, 0), np.nan))),
    "a row without keys has a mean": (small_case, changed("out", put((0, 0, 5), 0.1))),
    "lse of a row without keys": (small_case, changed("lse", put((0, 0, 5), 0.0))),
    "NaN of a seen key is lost": (poisoned_case, lambda case, right: rounded(case, right.results())),
    "delta from a rounded out": (massive_case, changed("dq", dq_of_rounded_delta)),
    "no delta": (small_case, changed("dq", ignored_delta)),
    "d_bias without d_lse": (small_case, changed("d_bias", bias_gradient_without_d_lse)),
    "lse a thousandth off": (small_case, changed("lse", lambda lse, case, right: lse * 1.001)),
    "lse to base 2": (small_case, changed("lse", lambda lse, case, right: lse / np.log(2))),
    "statistics swapped": (small_case, statistics_swapped),
    "sum": (small_case, changed("sum", lambda total, case, right: total * 1.0001)),
    "no d_bias": (small_case, missing_gradient),
    "no cap": (scored_case, of_other_options(logits_soft_cap=None)),
    "another cap": (scored_case, of_other_options(logits_soft_cap=1.5001)),
    "no slopes": (scored_case, of_other_options(alibi_slopes=SLOPES * 0)),
    "slopes of the other heads": (scored_case, of_other_options(alibi_slopes=SLOPES[::-1])),
    "distances from the first key": (scored_case, of_other_options(causal_alignment="top_left")),
    "another row of the table": (scored_case, of_other_options(relative_bias=np.roll(TABLE, 1, axis=0))),
    "one number of the table": (scored_case, of_other_options(relative_bias=TABLE + 1e-4 * (TABLE == TABLE.max()))),
    "the sinks of the other heads": (scored_case, of_other_options(sinks=SINKS[::-1])),
    "no sinks": (scored_case, of_other_options(sinks=SINKS - np.inf)),
    "no derivative of the cap": (scored_case, changed("dq", ignored_slope_of_the_cap)),
    "d_sinks without d_lse": (scored_case, changed("d_sinks", sinks_gradient_of_values_alone)),
    "d_relative_bias backwards": (scored_case, changed("d_relative_bias", lambda x, case, right: x[::-1])),
    "a row with a sink alone has values": (scored_case, changed("out", put((0, 0, 5), 0.1))),
    "lse of a row with a sink alone": (scored_case, changed("lse", put((0, 0, 5), -np.inf))),
    "dtype": (small_case, narrow_output),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_judge_catches(fault):
    make_case, results = FAULTS[fault]
    case = make_case()
    judge = check.Judge(case)
    assert judge.findings(results(case, judge.truth), case.accumulator)


@pytest.mark.parametrize("make_case", (small_case, dropped_out_case, massive_case, poisoned_case, scored_case))
def test_judge_accepts_the_truth(make_case):
    case = make_case()
    judge = check.Judge(case)
    results = rounded(case, judge.expected)
    for name, places in judge.infected.items():
        results[name][places] = np.nan
    assert judge.findings(results, case.accumulator) == []


@pytest.mark.parametrize("changes", ("garbage", "threads"))
def test_changed_bits_are_told(changes):
    case = small_case()
    case.threads, case.garbage = (1, 2), ("nan", "inf")
    judge = check.Judge(case)

    class Changing(ways.Core):
        def __call__(self, case, turn=0, threads=None):
            results = rounded(case, judge.expected)
            differs = turn if changes == "garbage" else (threads or case.threads[turn]) != case.threads[0]
            out = results["out"]
            out[0, 0, 0, 0] = np.nextafter(out[0, 0, 0, 0], np.float32(8 if differs else -8))
            return results

    (told,) = run.findings(case, Changing("generic"), judge)
    assert ("threads" if changes == "threads" else "where hidden") in told


def test_errors_are_findings():
    class Failing(ways.Core):
        def __call__(self, case, turn=0, threads=None):
            raise ValueError("refused")

    case = small_case()
    (told,) = run.findings(case, Failing("generic"), check.Judge(case))
    assert "ValueError: refused" in told


def test_limits_at_the_ends_of_the_range():
    """They are not so wide that they accept anything: the largest score wins, whatever roundings its size allows."""
    case = small_case("float64", scale=1.0)
    case.query *= 1e153
    case.key *= 1e153
    case.options["bias"][0, 0, 0, :2] = np.finfo(np.float64).max * np.array([-1, 1])
    limits = check.Judge(case).limits(case.accumulator)
    assert limits["out"].max() < 1e-13 and limits["lse"].max() < 1e-13 * np.finfo(np.float64).max


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_float32_bias_is_added_in_float32(dtype):
    """A score of 3e7 is a multiple of 2: what that makes of two weights is no fault; a weight beyond 1 is."""
    case = cases.Case(SEED, 0, dtype, (1, 1, 1, 2), "massive")
    case.options = {"layout": "BHSD", "bias": np.full((1, 1, 1, 1), -3e7, np.float32), "scale": 1.0}
    for name, x in (("query", [[1.0]]), ("key", [[-1.0859375], [-0.71484375]]), ("value", [[1.0], [2.0]]), ("d_out", [[1.0]])):
        setattr(case, name, np.array([[x]]).astype(cases.DTYPES[dtype]))
    judge = check.Judge(case)
    lower = 1 / (1 + np.exp(2.0))

    def results(first):
        right = dict(judge.expected) | {"dv": np.array([[[[first], [1 - first]]]]), "out": np.array([[[[2 - first]]]])}
        return {name: x for name, x in rounded(case, right).items() if name in ("out", "dv")}

    for first, accepted in ((lower, True), (1.5, False)):
        found = {**rounded(case, judge.expected), **results(first)}
        told = [text for text in judge.findings(found, cases.DTYPES[dtype]) if text.startswith(("out", "dv"))]
        assert (told == []) == accepted, told


# Cases that fail


class Planted(ways.Way):
    """The truth, but wrong where a cap meets three keys and more, or another way where there are five heads."""

    def precision(self, case):
        return case.accumulator

    def __call__(self, case):
        results = rounded(case, check.Judge(case).expected)
        heads = case.scores_shape[1]
        if heads >= 5:
            raise ValueError(f"{heads} heads")
        if case.options.get("logits_soft_cap") and case.scores_shape[3] >= 3:
            results["dv"] = results["dv"] + 1
        return results


def drawn_with_a_cap(wanted):
    for number in range(10**4):
        case = cases.draw(SEED, number)
        if case.options.get("logits_soft_cap") and len(case.options) > 5 and case.structure and wanted(case):
            return number


def test_failures_become_small():
    """A planted one becomes all that it needs, and no other fault; the line that is told gives the same."""
    number = drawn_with_a_cap(lambda case: case.scores_shape[1] < 5 and min(case.scores_shape[2:]) > 8)
    told = []
    _, failed = run.fuzz(SEED, [number], {"planted": Planted()}, whole=True, report=told.append)
    assert failed == 1
    line = told[told.index("the smallest that fails so:") + 1]
    without = line.split('--without "')[1].strip('"').split(", ")
    case = cases.draw(SEED, number)
    for text in without:
        case = reductions.reduced(case, text)
    assert case.scores_shape == (1, 1, 1, 3) and case.query.shape[-1] == case.value.shape[-1] == 1
    assert set(case.options) == {"layout", "logits_soft_cap"} and not case.structure and case.d_lse is None
    told_again = []
    run.fuzz(SEED, [number], {"planted": Planted()}, whole=True, report=told_again.append, without=without, shrinking=0)
    found = [text.strip() for text in told_again if "dv is off" in text]
    assert found and found[0] in [text.strip() for text in told]
    assert any(text.strip() == "key = [[[[1.0]], [[1.0]], [[1.0]]]]" for text in told)
    assert len(told) < 20 and max(map(len, told)) < 2000


def test_another_fault_does_not_take_its_place():
    """One that vanishes as the case gets smaller."""
    number = drawn_with_a_cap(lambda case: case.scores_shape[1] >= 5)
    case = cases.draw(SEED, number)
    smallest, _, found = shrink.shrunk(case, lambda case: run.failure(Planted(), case))
    assert found[0].endswith("5 heads") and smallest.scores_shape[1] == 5
    assert "logits_soft_cap" not in smallest.options


@pytest.mark.wide(4)
@pytest.mark.parametrize("number", range(40))
def test_reductions_are_cases(number):
    """Of each kind one, drawn: what is left is a case whose truth can be computed, smaller or simpler."""
    rng = np.random.default_rng([SEED, number])
    case = cases.draw(SEED, number)
    for _ in range(6):
        texts = list(reductions.candidates(case))
        if not texts:
            break
        case = reductions.reduced(case, str(rng.choice(texts)))
        judge = check.Judge(case)
        results = rounded(case, judge.expected)
        for name, places in judge.infected.items():
            results[name][places] = np.nan
        assert judge.findings(results, case.accumulator) == []


# The truth


@pytest.mark.parametrize(
    "make_case",
    (
        small_case,
        lambda: small_case(scale=-0.4, is_causal=True, causal_alignment="bottom_right"),
        scored_case,
        lambda: with_option(scored_case(), relative_bias=T5RelativeBias(np.concatenate([TABLE, -TABLE])[:8], max_distance=4)),
    ),
    ids=("plain", "causal", "scores", "buckets"),
)
def test_truth_is_the_derivative(make_case):
    """Of the loss sum(out d_out) + sum(lse d_lse), by central differences of the truth's own forward in float64."""
    case = make_case()
    right = truth.Truth(case)
    found, rows = right.results(), ~right.alone
    arrays = {"dq": case.query, "dk": case.key, "dv": case.value, "d_bias": case.options["bias"]}
    arrays |= {"d_relative_bias": truth.table_of(case), "d_sinks": case.options.get("sinks")}
    arrays = {name: x.astype(np.float64) for name, x in arrays.items() if x is not None}
    case.query, case.key, case.value, case.options["bias"] = (arrays[name] for name in ("dq", "dk", "dv", "d_bias"))
    if "d_sinks" in arrays:
        case.options["sinks"] = arrays["d_sinks"]
        case.options["relative_bias"] = case.with_table(arrays["d_relative_bias"])

    def loss():
        results = truth.Truth(case).results()
        return float((results["out"] * case.d_out).sum() + (results["lse"] * case.d_lse)[rows].sum())

    step = 1e-5
    for name, x in arrays.items():
        differences = np.zeros(x.shape)
        for index in np.ndindex(x.shape):
            kept = x[index]
            for sign in (1, -1):
                x[index] = kept + sign * step
                differences[index] += sign * loss() / (2 * step)
            x[index] = kept
        np.testing.assert_allclose(found[name], differences, rtol=1e-5, atol=1e-8, err_msg=name)

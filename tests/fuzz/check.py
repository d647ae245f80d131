"""Judges results against the truth of their case.

An element may be off by twice what the plain formula (plain_formula.py), computed in the same precision on the same
case, is off at most in rows of scores of the same size (`FLOOR` roundings in any case), and by the rounding of the
result. Errors are counted relative to the sum of the absolute values of an element's terms (`Truth.sizes`). No limit
knows what an implementation does. Exact are: rows without keys, keys without rows, and what is hidden, which has no effect.
"""

import functools

import ml_dtypes
import numpy as np

from cases import DTYPES
from fuzz import truth as truths
from plain_formula import plain_results

FACTOR = 2
FLOOR = 4


class Judge:
    """Of one case: finds what is wrong with results for it."""

    def __init__(self, case):
        self.case = case
        self.truth = truths.Truth(case)
        self.expected = self.truth.results()
        self._limits = {}  # by precision

    def findings(self, results, precision, rounded=True):
        """What is wrong with `results`, arrays by name, as a list of texts.

        `precision` is the dtype in which they were computed, and `rounded` whether they have the dtypes of the case and
        not that one.
        """
        found = []
        if set(results) - {"maximum", "sum"} != set(self.expected) - {"maximum", "sum"}:
            return [f"results are {sorted(results)}, expected {sorted(self.expected)}"]
        for name, x in results.items():
            dtype, shape = self._dtype(name) if rounded else precision, self.expected[name].shape
            if (x.dtype, x.shape) != (dtype, shape):
                found.append(f"{name} is {x.dtype}{list(x.shape)}, expected {dtype}{list(shape)}")
            elif name == "sum":
                found += self._sum_findings(results)
            else:
                found += self._findings(name, x, self.limits(precision)[name])
        return found

    def _findings(self, name, x, limit):
        expected, x = self.expected[name], x.astype(self.truth.dtype)
        unseen, unknown, infected = self.unseen[name], self.unknown[name], self.infected[name]
        nothing = -np.inf if name == "lse" else 0
        wrong = {
            "must be exactly what nothing gives": unseen & (x != nothing),
            "must be NaN": infected & ~np.isnan(x),
        }
        largest = self.truth.dtype(float(_finfo(self._dtype(name)).max))
        with np.errstate(invalid="ignore"):
            error = np.abs(np.clip(x, -largest, largest) - np.clip(expected, -largest, largest))
            wrong["is off"] = ~(error <= limit) & ~unseen & ~unknown
        texts = []
        for what, places in wrong.items():
            if places.any():
                excess = np.where(places, error / limit, -1) if what == "is off" else places
                at = np.unravel_index(np.nanargmax(np.where(np.isnan(excess), np.inf, excess)), places.shape)
                texts.append(
                    f"{name} {what} in {places.sum()} of {places.size} places, worst at {list(map(int, at))}: "
                    f"{x[at]:.9g}, expected {expected[at]:.9g} within {limit[at]:.3g}"
                )
        return texts

    def _sum_findings(self, results):
        """The sum of exp(score - maximum): at least that of the maximum itself, and the lse together with it."""
        maximum, total, lse = (results[name].astype(np.float64) for name in ("maximum", "sum", "lse"))
        epsilon = np.finfo(results["sum"].dtype).eps
        keys = self.truth.seen.sum(axis=-1)
        sound = np.where(keys == 0, total == 0, (total >= 1) & (total <= keys * (1 + FLOOR * epsilon)))
        if not (sound | self.infected["lse"]).all():
            return [f"sum is not between 1 and the number of keys: {total[~sound][:5]} of {keys[~sound][:5]} keys"]
        with np.errstate(divide="ignore", invalid="ignore"):
            together = maximum + np.log(total)
            same = np.abs(together - lse) <= FLOOR * epsilon * (1 + np.abs(maximum) + np.log(np.maximum(keys, 1)))
        same |= (keys == 0) | self.infected["lse"]
        return [] if same.all() else [f"lse is not maximum + log(sum): {lse[~same][:5]}, {together[~same][:5]}"]

    @functools.cached_property
    def unseen(self):
        """By name: which elements nothing contributes to."""
        return self._by_name(self.truth.empty_rows, self.case.hidden_keys(), ~self.truth.seen)

    @functools.cached_property
    def infected(self):
        """By name: which elements must be NaN, since their row sees a key of NaN."""
        rows = self._infected_rows
        if self.case.options.get("dropout_rate"):  # whether a dropped NaN counts is nobody's promise
            rows = np.zeros_like(rows)
        keys = np.zeros_like(self.case.hidden_keys())
        return self._by_name(rows, keys, np.zeros_like(self.truth.seen))

    @functools.cached_property
    def unknown(self):
        """By name: which elements have no number to be compared with, because of such rows."""
        rows = self._infected_rows
        pairs = rows[..., None] & self.truth.seen
        return self._by_name(rows, self._any_row(pairs), pairs, reduce=np.any)

    @functools.cached_property
    def _infected_rows(self):
        rows = np.zeros(self.truth.empty_rows.shape, bool)
        if self.case.poison:
            batch, kv_head, key = self.case.poison
            heads = slice(kv_head * self.truth.group, (kv_head + 1) * self.truth.group)
            rows[batch, heads] = self.truth.seen[batch, heads, :, key]
        return rows

    def _any_row(self, pairs, reduce=np.any):
        """`[batch, num_kv_heads, seqlen_k]` of `[batch, num_heads, seqlen_q, seqlen_k]`."""
        batch, num_heads, seqlen_q, seqlen_k = self.case.scores_shape
        pairs = pairs.reshape(batch, num_heads // self.truth.group, self.truth.group * seqlen_q, seqlen_k)
        return reduce(pairs, axis=2) if pairs.shape[2] else np.zeros_like(self.case.hidden_keys(), pairs.dtype)

    def _by_name(self, rows, keys, pairs, reduce=np.all):
        """What holds for rows, keys and pairs, as arrays like the results."""
        like = {"out": rows, "dq": rows, "dk": keys, "dv": keys}
        named = {"lse": rows, "maximum": rows, "sum": rows}
        for name, x in like.items():
            shape = truths.heads_first(self.case, self.expected[name]).shape
            named[name] = truths.heads_first(self.case, np.broadcast_to(x[..., None], shape))
        if "d_bias" in self.expected:
            axes = tuple(axis for axis in range(4) if self.case.options["bias"].shape[axis] == 1)
            named["d_bias"] = reduce(pairs, axis=axes, keepdims=True)
        return named

    def _dtype(self, name):
        if name in ("lse", "maximum", "sum"):
            return self.case.accumulator
        return self.case.options["bias"].dtype if name == "d_bias" else DTYPES[self.case.dtype]

    def limits(self, precision):
        """By name: how far each element may be off, for arithmetic in `precision`, a dtype.

        One of 16 bits rounds weights to it, as matrix units want them, and sums in float32.
        """
        if precision not in self._limits:
            self._limits[precision] = self._limits_of(precision)
        return self._limits[precision]

    def _limits_of(self, precision):
        wide = np.dtype(np.float32) if precision.itemsize == 2 else precision
        epsilon = float(_finfo(precision).eps)
        sizes = self.truth.sizes(epsilon)
        lost = self.truth.underflow(float(_finfo(wide).tiny), float(_finfo(wide).smallest_subnormal))
        ratios = self._plain_ratios(precision, sizes, lost)
        classes = self._classes()
        limits = {}
        for name, size in sizes.items():
            off = FACTOR * _largest_of_class(ratios[name], classes[name]) + FLOOR * epsilon
            kept = _finfo(self._dtype(name))
            rounding = float(kept.eps) * np.abs(self.expected[name]).astype(np.float64)
            limits[name] = off * size + lost[name] + np.minimum(rounding, float(kept.max)) + float(kept.smallest_subnormal)
        return limits

    def _plain_ratios(self, precision, sizes, lost):
        """By name: the plain formula's errors in units of `sizes`, the larger of two orders of its sums."""
        ratios = {}
        for results in (_plain(self.case, self.truth, precision, shuffled) for shuffled in (False, True)):
            for name, size in sizes.items():
                with np.errstate(invalid="ignore", divide="ignore"):
                    error = np.abs(results[name].astype(self.truth.dtype) - self.expected[name]).astype(np.float64)
                    ratio = np.where(size > 0, (error - lost[name]) / size, 0)
                ratios[name] = np.fmax(ratios.get(name, 0), np.nan_to_num(ratio, posinf=0))
        return ratios

    def _classes(self):
        """By name: the decade of the largest score that an element hangs on."""
        rows = np.log10(np.maximum(self.truth.score_sizes, 1)).astype(int)
        pairs = np.where(self.truth.seen, rows[..., None], 0)

        def largest(x, axis, keepdims=False):
            return x.max(axis=axis, keepdims=keepdims, initial=0)

        return self._by_name(rows, self._any_row(pairs, largest), pairs, reduce=largest)


def _largest_of_class(ratio, classes):
    result = np.zeros_like(ratio)
    for c in np.unique(classes):
        result[classes == c] = ratio[classes == c].max()
    return result


def _plain(case, truth, precision, shuffled):
    """The plain formula's results; `shuffled`: with its sums in another order and the scale on the queries."""
    q, k, v, g = (truths.heads_first(case, getattr(case, name)) for name in ("query", "key", "value", "d_out"))
    bias, seen, scale = case.options.get("bias"), case.seen, truth.scale
    bias = None if bias is None else np.broadcast_to(np.where(bias == -np.inf, 0, bias).astype(bias.dtype), seen.shape)
    z = truths.keep_factors(case)
    keys, dims = np.arange(k.shape[2]), np.arange(k.shape[3])
    if shuffled:
        rng = np.random.default_rng(0)
        keys, dims = rng.permutation(keys), rng.permutation(dims)
        q = (q.astype(case.accumulator) * case.accumulator.type(scale))[..., dims]
        k, v, seen = k[:, :, keys][..., dims], v[:, :, keys], seen[..., keys]
        bias, z = (None if x is None else x[..., keys] for x in (bias, z))
    results = plain_results(
        *(x.swapaxes(1, 2) for x in (q, k, v)),
        precision,
        g.swapaxes(1, 2),
        case.d_lse,
        bias=bias,
        visible=seen,
        factors=z,
        scale=1.0 if shuffled else scale,
    )
    for name in ("out", "dq", "dk", "dv"):
        results[name] = results[name].swapaxes(1, 2)
    ds = results.pop("ds")
    if shuffled:
        back, dims = np.argsort(keys), np.argsort(dims)
        results["dq"] = results["dq"][..., dims] * case.accumulator.type(scale)
        results["dk"], results["dv"], ds = results["dk"][:, :, back][..., dims], results["dv"][:, :, back], ds[..., back]
    if case.options.get("bias") is not None:
        results["d_bias"] = truths.sum_to(case.options["bias"].shape, ds)
    for name in ("out", "dq", "dk", "dv"):
        results[name] = truths.heads_first(case, results[name])
    return results


def different(results, others):
    """The names of arrays of which not every number is the same; NaN is NaN."""
    return [name for name in results if not np.array_equal(_plain_numbers(results[name]), _plain_numbers(others[name]), True)]


def _plain_numbers(x):
    return x if x.dtype.kind == "f" else x.astype(np.float32)


def _finfo(dtype):
    return ml_dtypes.finfo(dtype)

"""Judges results against the truth of their case.

An element may be off by twice what the plain formula (plain_formula.py), computed in the same precision on the same
case, is off at most in rows of scores of the same size, and by the rounding of the result. Since a small case may spare
the plain formula every error, there are a few roundings in any case: `FLOOR` of an element, in units of the sum of the
absolute values of its terms (`Truth.sizes`), and one of each product q.k and of each exponent s - maximum
(`Truth.spread`). A bias gives no such allowance: to add it is one rounding, which the plain formula has too. No limit
knows what an implementation does.

Exact are rows without keys, keys without rows, and that what is hidden has no effect.
"""

import functools

import ml_dtypes
import numpy as np

from cases import DTYPES
from fuzz import truth as truths
from plain_formula import pairwise_sums, plain_results, serial_products, serial_sums

FACTOR = 2
FLOOR = 4


class Judge:
    """Of one case: finds what is wrong with results for it."""

    def __init__(self, case):
        self.case = case
        self.truth = truths.Truth(case)
        self.expected = self.truth.results()
        self._limits = {}  # by precision

    def findings(self, results, precision, rounded=True, differentiated=True):
        """What is wrong with `results`, arrays by name, as a list of texts.

        `precision` is the dtype in which they were computed, and `rounded` whether they have the dtypes of the case and
        not that one. `differentiated`: whether gradients are among them.
        """
        found = []
        expected = set(self.expected) - {"maximum", "sum"} if differentiated else {"out", "lse"}
        if set(results) - {"maximum", "sum"} != expected:
            return [f"results are {sorted(results)}, expected {sorted(expected)}"]
        for name, x in results.items():
            dtype, shape = self.dtype(name) if rounded else precision, self.expected[name].shape
            if (x.dtype, x.shape) != (dtype, shape):
                found.append(f"{name} is {x.dtype}{list(x.shape)}, expected {dtype}{list(shape)}")
            elif name == "sum":
                found += self._sum_findings(results)
            else:
                found += self._findings(name, x, self.limits(precision)[name])
        return found

    def _findings(self, name, x, limit):
        expected = self.expected[name]
        unseen, unknown, infected = self.unseen[name], self.unknown[name], self.infected[name]
        nothing = expected if name in ("lse", "maximum") else 0  # -inf and 0, or the sink
        wrong = {
            "must be exactly what nothing gives": unseen & (x != nothing),
            "must be NaN": infected & ~np.isnan(x),
        }
        error = self._error(name, x)
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

    def _error(self, name, x):
        """How far x is off; what is beyond the range of the result is as good as the end of it."""
        largest = self.truth.dtype(float(_finfo(self.dtype(name)).max))
        with np.errstate(invalid="ignore"):
            return np.abs(
                np.clip(x.astype(self.truth.dtype), -largest, largest) - np.clip(self.expected[name], -largest, largest)
            )

    def _sum_findings(self, results):
        """The sum of exp(score - maximum): at least that of the maximum itself, and the lse together with it."""
        maximum, total, lse = (results[name].astype(np.float64) for name in ("maximum", "sum", "lse"))
        epsilon = np.finfo(results["sum"].dtype).eps
        keys = self.truth.seen.sum(axis=-1) + (self.truth.sink != -np.inf)  # or the sink
        sound = np.where(keys == 0, total == 0, (total >= 1) & (total <= keys * (1 + FLOOR * epsilon)))
        sound |= self.unknown["sum"]
        if not sound.all():
            return [f"sum is not between 1 and the number of keys: {total[~sound][:5]} of {keys[~sound][:5]} keys"]
        with np.errstate(divide="ignore", invalid="ignore"):
            together = maximum + np.log(total)
            same = np.abs(together - lse) <= FLOOR * epsilon * (1 + np.abs(maximum) + np.log(np.maximum(keys, 1)))
        same |= (keys == 0) | self.unknown["sum"]
        return [] if same.all() else [f"lse is not maximum + log(sum): {lse[~same][:5]}, {together[~same][:5]}"]

    @functools.cached_property
    def unseen(self):
        """By name: which elements nothing contributes to."""
        no_sinks = np.broadcast_to(self.truth.sink == -np.inf, self.truth.empty_rows.shape)
        return self._by_name(self.truth.empty_rows, self.case.hidden_keys(), ~self.truth.seen, no_sinks)

    @functools.cached_property
    def infected(self):
        """By name: which elements must be NaN, since their row sees a key of NaN."""
        rows = self._infected_rows
        if self.case.options.get("dropout_rate"):  # whether a dropped NaN counts is nobody's promise
            rows = np.zeros_like(rows)
        keys = np.zeros_like(self.case.hidden_keys())
        named = self._by_name(rows, keys, np.zeros_like(self.truth.seen), np.zeros_like(rows), reduce=np.any)
        return named | {"maximum": np.zeros_like(rows)}  # its sum tells

    @functools.cached_property
    def unknown(self):
        """By name: which elements have no number to be compared with, because of such rows."""
        rows = self._infected_rows
        pairs = rows[..., None] & self.truth.seen
        return self._by_name(rows, self._any_row(pairs), pairs, rows, reduce=np.any)

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

    def _by_name(self, rows, keys, pairs, sinks, reduce=np.all):
        """What holds for rows, keys, pairs, and the sinks of rows, as arrays like the results."""
        like = {"out": rows, "dq": rows, "dk": keys, "dv": keys}
        named = {"lse": rows, "maximum": rows, "sum": rows}
        for name, x in like.items():
            shape = truths.heads_first(self.case, self.expected[name]).shape
            named[name] = truths.heads_first(self.case, np.broadcast_to(x[..., None], shape))
        if "d_bias" in self.expected:
            axes = tuple(axis for axis in range(4) if self.case.options["bias"].shape[axis] == 1)
            named["d_bias"] = reduce(pairs, axis=axes, keepdims=True)
        if "d_relative_bias" in self.expected:
            named["d_relative_bias"] = truths.gathered(self.case, pairs, *_UFUNCS.get(reduce, (np.maximum, 0)))
        if "d_sinks" in self.expected:
            named["d_sinks"] = reduce(sinks, axis=(0, 2))
        return named

    def dtype(self, name):
        if name in ("lse", "maximum", "sum"):
            return self.case.accumulator
        if name in ("d_relative_bias", "d_sinks"):
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
        lost = self.truth.underflow(float(_finfo(wide).tiny))
        ratios = self._plain_ratios(precision, sizes, lost)
        classes = self._largest(np.log10(np.maximum(self.truth.score_sizes, 1)).astype(int))
        spread = self.truth.spread(epsilon)
        limits = {}
        for name, size in sizes.items():
            off = FACTOR * _largest_of_class(ratios[name], classes[name]) + FLOOR * epsilon
            kept = _finfo(self.dtype(name))
            rounding = float(kept.eps) * np.minimum(np.abs(self.expected[name]), float(kept.max)).astype(np.float64)
            rounding += float(kept.smallest_subnormal)
            limits[name] = off * size + spread.get(name, 0) + lost[name] + rounding
            if not np.isfinite(limits[name]).all():  # would accept anything
                raise FloatingPointError(f"no finite limit for {name} in {precision}")
        return limits

    def _plain_ratios(self, precision, sizes, lost):
        """By name: the plain formula's errors in units of `sizes`, the larger of two ways to sum.

        Of 16 bits, also of the way in which scores are float32 from where a float32 bias is added: where the others' 16
        bits cannot hold the sum, all their scores may be the same, which may be nearer to the truth by chance.

        Where something is added that is larger than the scores, those before may be off by two roundings either way: the sum
        of one that is near a tie falls to its other side, which another way to the same product may do.
        """
        bias = self.case.options.get("bias")
        promotes = precision.itemsize == 2 and bias is not None and bias.dtype == np.float32
        adds = any(self.case.options.get(name) is not None for name in ("bias", "relative_bias", "alibi_slopes"))
        nudges = [sign * 2 * float(_finfo(precision).eps) for sign in (1, -1)]
        ways = [{"shuffled": False}, {"shuffled": True}, *[{"shuffled": False, "promotes": True}] * promotes]
        ways += [{"shuffled": False, "nudge": nudge} for nudge in nudges if adds and precision.itemsize > 2]
        ratios = {}
        for results in (_plain(self.case, self.truth, precision, **way) for way in ways):
            for name, size in sizes.items():
                error = self._error(name, results[name]).astype(np.float64)
                with np.errstate(invalid="ignore", divide="ignore"):
                    ratio = np.where(size > 0, (error - lost[name]) / size, 0)
                ratios[name] = np.fmax(ratios.get(name, 0), np.nan_to_num(ratio, posinf=0))
        return ratios

    def _largest(self, rows):
        """By name: the largest number of the `[batch, num_heads, seqlen_q]` rows that an element hangs on."""
        pairs = np.where(self.truth.seen, rows[..., None], 0)

        def largest(x, axis, keepdims=False):
            return x.max(axis=axis, keepdims=keepdims, initial=0)

        return self._by_name(rows, self._any_row(pairs, largest), pairs, rows, reduce=largest)


_UFUNCS = {np.all: (np.logical_and, True), np.any: (np.logical_or, False)}


def _largest_of_class(ratio, classes):
    largest = np.zeros(classes.max(initial=0) + 1)
    np.maximum.at(largest, classes, ratio)
    return largest[classes]


def _plain(case, truth, precision, shuffled, promotes=False, nudge=0.0):
    """The plain formula's results; `shuffled`: keys in another order, plain sums of dimensions and of weights, scaled
    queries."""
    q, k, v, g = (truths.heads_first(case, getattr(case, name)) for name in ("query", "key", "value", "d_out"))
    options, seen, scale = case.options, case.seen, truth.scale
    bias = relative = slopes = None
    if options.get("bias") is not None:
        bias = np.broadcast_to(finite(options["bias"]), seen.shape)
    if options.get("relative_bias") is not None:
        relative = finite(truths.relative_bias(case))
    if options.get("alibi_slopes") is not None:
        slopes = [np.atleast_2d(options["alibi_slopes"])[..., None, None], truths.distances(case)[:, None]]
    sinks = None if options.get("sinks") is None else options["sinks"][:, None]
    z = truths.keep_factors(case)
    keys = np.arange(k.shape[2])
    if shuffled:
        keys = np.random.default_rng(0).permutation(keys)
        q = q.astype(case.accumulator) * case.accumulator.type(scale)
        k, v, seen = k[:, :, keys], v[:, :, keys], seen[..., keys]
        bias, relative, z = (None if x is None else x[..., keys] for x in (bias, relative, z))
        slopes = None if slopes is None else [slopes[0], slopes[1][..., keys]]
    results = plain_results(
        *(x.swapaxes(1, 2) for x in (q, k, v)),
        precision,
        g.swapaxes(1, 2),
        case.d_lse,
        bias=bias,
        visible=seen,
        factors=z,
        scale=1.0 if shuffled else scale,
        cap=options.get("logits_soft_cap"),
        slopes=slopes,
        relative=relative,
        sinks=sinks,
        products=serial_products if shuffled else np.matmul,
        sums=serial_sums if shuffled else pairwise_sums,
        promotes=promotes,
        nudge=nudge,
    )
    for name in ("out", "dq", "dk", "dv"):
        results[name] = results[name].swapaxes(1, 2)
    ds = results.pop("ds")
    if shuffled:
        back = np.argsort(keys)
        results["dq"] = results["dq"] * case.accumulator.type(scale)
        results["dk"], results["dv"], ds = results["dk"][:, :, back], results["dv"][:, :, back], ds[..., back]
    if bias is not None:
        results["d_bias"] = truths.sum_to(options["bias"].shape, ds)
    if relative is not None:
        results["d_relative_bias"] = truths.gathered(case, ds, np.add, 0)
    for name in ("out", "dq", "dk", "dv"):
        results[name] = truths.heads_first(case, results[name])
    return results


def finite(bias):
    """What hides is told apart."""
    return np.where(bias == -np.inf, 0, bias).astype(bias.dtype)


def different(results, others):
    """The names of arrays of which not every number is the same; NaN is NaN."""
    return [
        name
        for name in results
        if not np.array_equal(_plain_numbers(results[name]), _plain_numbers(others[name]), True)
    ]


def _plain_numbers(x):
    return x if x.dtype.kind == "f" else x.astype(np.float32)


def _finfo(dtype):
    return ml_dtypes.finfo(dtype)

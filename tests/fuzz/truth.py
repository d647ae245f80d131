"""What a case should give: attention in a precision above that of the case, written apart from attn_ops.reference.

float64 for 16- and 32-bit cases, `np.longdouble` for float64 ones. It shares with the package only the random bits of
dropout, which test_philox.py compares with the published generator. Beside every result stands the sum of the absolute
values of the terms it is made of, `sizes`: the unit in which rounding errors are counted.
"""

import functools

import numpy as np

from attn_ops import T5RelativeBias
from attn_ops.call import philox
from position_buckets import mesh_tensorflow_bucket

# How far a tanh may be off, in units of the last place of 1. A score that the cap holds is cap tanh, and where tanh is near 1 its
# roundings are all that tells such scores apart, while those of NumPy's, to which the plain formula comes down, often are the same
# for all. The quotient of two polynomials that the kernels compute in float32 rounds twice at its end and up to four times in
# each polynomial that counts in full: found are 3.1 units at most where products and sums are rounded apart, 2.7 where not (two
# million numbers in each quarter from 0 to 9).
TANH_ROUNDINGS = 3


def visible(case):
    """Which pairs count: bool `[batch, num_heads, seqlen_q, seqlen_k]`."""
    options = case.options
    _, _, seqlen_q, seqlen_k = case.scores_shape
    seen = np.ones(case.scores_shape, bool)
    left, right = options.get("window") or (None, None)
    if options.get("is_causal"):
        right = 0
    rows, keys = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)
    length_q, length_k = (x[:, None, None, None] for x in lengths(case))
    seen &= (rows < length_q) & (keys < length_k)
    distance = distances(case)[:, None]
    if left is not None and left != -1:
        seen &= distance >= -left
    if right is not None and right != -1:
        seen &= distance <= right
    for mask in options.get("mask") or ():
        seen &= mask
    if "intervals" in case.structure:
        begin, end = case.structure["intervals"]
        seen &= (keys >= begin[:, None, :, None]) & (keys < end[:, None, :, None])
    if "segments" in case.structure:
        q_ids, kv_ids = case.structure["segments"]
        seen &= q_ids[:, None, :, None] == kv_ids[:, None, None, :]
    if "blocks" in case.structure:
        blocks, block_q, block_k = case.structure["blocks"]
        seen &= blocks[:, :, np.arange(seqlen_q) // block_q][..., np.arange(seqlen_k) // block_k]
    if options.get("bias") is not None:
        seen &= options["bias"] != -np.inf
    if options.get("relative_bias") is not None:
        seen &= relative_bias(case) != -np.inf
    return seen


def lengths(case):
    """How many rows and keys are real, by the entries of the batch."""
    batch, _, seqlen_q, seqlen_k = case.scores_shape
    given = (case.options.get(name) for name in ("query_seq_lengths", "key_value_seq_lengths"))
    return [np.full(batch, extent) if x is None else np.asarray(x, int) for x, extent in zip(given, (seqlen_q, seqlen_k))]


def distances(case):
    """From the key that the row stands at, `[batch, seqlen_q, seqlen_k]`."""
    batch, _, seqlen_q, seqlen_k = case.scores_shape
    shift = np.zeros(batch, int)
    if case.options.get("causal_alignment") == "bottom_right":
        length_q, length_k = lengths(case)
        shift = length_k - length_q
    if case.options.get("query_offset") is not None:
        shift = np.asarray(case.options["query_offset"], int)
    return np.arange(seqlen_k) - np.arange(seqlen_q)[:, None] - shift[:, None, None]


def table_of(case):
    """The values of relative_bias, `[rows, num_heads]`, or None."""
    given = case.options.get("relative_bias")
    return given.table if isinstance(given, T5RelativeBias) else given


def places(case):
    """The row of the table for each pair, `[batch, seqlen_q, seqlen_k]`."""
    given, distance = case.options["relative_bias"], distances(case)
    if not isinstance(given, T5RelativeBias):
        reach = len(given) // 2
        return np.clip(distance, -reach, reach) + reach
    most = given.max_distance  # further ones share its bucket
    rule = given.bidirectional, len(given.table), given.max_distance
    buckets = np.array([mesh_tensorflow_bucket(d, *rule) for d in range(-most, most + 1)])
    return buckets[np.clip(distance, -most, most) + most]


def relative_bias(case):
    """Of each pair, `[batch, num_heads, seqlen_q, seqlen_k]`."""
    return np.moveaxis(table_of(case)[places(case)], -1, 1)


def gathered(case, pairs, ufunc, start):
    """`[rows, num_heads]`: the `pairs` of each element of the table, which start from `start`, by a `ufunc`."""
    found = np.full(table_of(case).shape, start, pairs.dtype)
    heads = np.arange(pairs.shape[1])[:, None, None]
    ufunc.at(found, np.broadcast_arrays(places(case)[:, None], heads), pairs) if pairs.size else None
    return found


def wide_dtype(case):
    return np.longdouble if case.dtype == "float64" else np.float64


def heads_first(case, x):
    return x if case.options["layout"] == "BHSD" else x.swapaxes(1, 2)


def keep_factors(case):
    """What dropout multiplies the weights with, or None."""
    rate = case.options.get("dropout_rate", 0.0)
    if not rate:
        return None
    return philox.keep(*case.options["dropout_seed"], *case.scores_shape, rate) / (1.0 - rate)


def scale_of(case):
    scale = case.options.get("scale")
    return 1 / np.sqrt(np.float64(case.query.shape[-1])) if scale is None else scale


class Truth:
    """The results for a case without its garbage, in the case's layout and as `results()` names them."""

    def __init__(self, case):
        self.case = case
        wide = wide_dtype(case)
        self.dtype = wide
        self.seen = case.seen
        self.empty_rows = ~self.seen.any(axis=-1)
        q, k, v, g = (heads_first(case, x).astype(wide) for x in (case.query, case.key, case.value, case.d_out))
        self.group = q.shape[1] // k.shape[1]
        k, v = (np.repeat(x, self.group, axis=1) for x in (k, v))
        self._arrays = q, k, v, g
        self.scale = scale_of(case)
        h = np.zeros(q.shape[:3], wide) if case.d_lse is None else case.d_lse.astype(wide)
        z = keep_factors(case)
        self.z = np.ones((1, 1, 1, 1)) if z is None else z
        cap = case.options.get("logits_soft_cap")
        sinks = case.options.get("sinks")
        self.sink = np.full((1, 1), -np.inf, wide) if sinks is None else sinks[:, None].astype(wide)
        self.alone = self.empty_rows & (self.sink == -np.inf)  # rows without anything

        with np.errstate(over="ignore", under="ignore", divide="ignore"):
            s = product = wide(self.scale) * (q @ k.swapaxes(-1, -2))
            slope_of_cap = 1
            if cap is not None:
                tanh = np.tanh(s / wide(cap))
                s, slope_of_cap = wide(cap) * tanh, 1 - tanh**2
            self._product, self._capped = product, s
            for term in self._terms():
                s = s + np.where(term == -np.inf, 0, term).astype(wide)
            largest = wide(np.finfo(case.accumulator).max)
            self._beyond = self._largest_seen(np.maximum(np.abs(s) - largest, 0)).astype(np.float64)
            s = np.where(self.seen, s, -np.inf)
            maximum = np.maximum(s.max(axis=-1, initial=-np.inf), self.sink)
            self.maximum = np.where(self.alone, 0, maximum)
            below = s - self.maximum[..., None]
            e = np.exp(below)
            self.sum = total = e.sum(axis=-1) + np.exp(self.sink - self.maximum)
            self.lse = np.where(self.alone, -np.inf, self.maximum + np.log(total))
            total = np.where(self.alone, 1, total)
            self.p = e / total[..., None]
            self._log_p = below - np.log(total)[..., None]
            self.log_p_sink = self.sink - self.maximum - np.log(total)
            zp = self.z * self.p
            self.out = zp @ v
            dp = self.z * (g @ v.swapaxes(-1, -2))
            delta = (self.p * dp).sum(axis=-1)
            self.ds = self.p * (dp - (delta - h)[..., None])
            dt = self.ds * slope_of_cap
            self.dq = wide(self.scale) * (dt @ k)
            self.dk = self._sum_groups(wide(self.scale) * (dt.swapaxes(-1, -2) @ q))
            self.dv = self._sum_groups(zp.swapaxes(-1, -2) @ g)
            self.d_sinks = (np.exp(self.log_p_sink) * (h - delta)).sum((0, 2))
        self._h = h

    def _terms(self):
        """What is added to the capped scores."""
        options, wide = self.case.options, self.dtype
        terms = []
        if options.get("alibi_slopes") is not None:
            slopes = np.atleast_2d(options["alibi_slopes"])[..., None, None].astype(wide)
            terms.append(slopes * distances(self.case)[:, None])
        if options.get("relative_bias") is not None:
            terms.append(relative_bias(self.case))
        if options.get("bias") is not None:
            terms.append(options["bias"])
        return terms

    def results(self):
        """Those that implementations give, by name."""
        found = {"out": self._to_layout(self.out), "lse": self.lse, "maximum": self.maximum, "sum": self.sum}
        found |= {name: self._to_layout(getattr(self, name)) for name in ("dq", "dk", "dv")}
        return found | self._of_terms(self.ds, self.d_sinks)

    def _of_terms(self, ds, d_sinks):
        """The gradients of what the case adds to scores, by name, from those of the scores."""
        options, found = self.case.options, {}
        if options.get("bias") is not None:
            found["d_bias"] = sum_to(options["bias"].shape, ds)
        if options.get("relative_bias") is not None:
            found["d_relative_bias"] = gathered(self.case, ds, np.add, 0)
        if options.get("sinks") is not None:
            found["d_sinks"] = d_sinks
        return found

    @functools.cached_property
    def _pair_sizes(self):
        """By pairs: the sum of absolute terms in a product q.k, scaled; and a bound on the derivative of the cap there."""
        q, k, _, _ = self._magnitudes
        sizes = abs(self.scale) * (q @ k.swapaxes(-1, -2))
        cap = self.case.options.get("logits_soft_cap")
        if cap is None:
            return sizes, np.ones((1, 1, 1, 1))
        off = 8 * np.finfo(self.case.accumulator).eps * sizes
        least = np.maximum(np.abs(self._product.astype(np.float64)) - off, 0)
        return sizes, 1 - np.tanh(least / cap) ** 2

    @functools.cached_property
    def product_sizes(self):
        """`[batch, num_heads, seqlen_q]`: the largest product that the row sees, of q and k, through the cap, or of slopes
        and distances, as the sum of its absolute terms, and the roundings of the cap."""
        sizes, slope = self._pair_sizes
        if self.case.options.get("logits_soft_cap") is not None:
            sizes = sizes * slope + TANH_ROUNDINGS * np.abs(self._capped).astype(np.float64)
        if self.case.options.get("alibi_slopes") is not None:
            sizes = sizes + np.abs(self._terms()[0]).astype(np.float64)
        return self._largest_seen(sizes)

    @functools.cached_property
    def score_sizes(self):
        """The same and the largest that is added to a score that the row sees."""
        sizes = self.product_sizes
        for term in self._terms():
            largest = self._largest_seen(np.abs(np.where(term == -np.inf, 0, term)).astype(np.float64))
            sizes = sizes + np.minimum(largest, np.finfo(np.float64).max - sizes)
        return sizes

    def _largest_seen(self, x):
        return np.where(self.seen, x, 0).max(axis=-1, initial=0)

    def _largest_weights(self, epsilon):
        """As large as scores that are off by a few roundings (`epsilon` of their own terms) allow.

        Beyond 1e6 in float32 that is no more than "at most 1". A score beyond the range of the accumulator may as well
        be the end of the range.
        """
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            off = 4 * epsilon * self.score_sizes + self._beyond
            log_p = np.where(self.seen, self._log_p.astype(np.float64) + off[..., None], -np.inf)
            return np.exp(np.minimum(log_p, 0))

    def _largest_sink_weights(self, epsilon):
        """The same of the sinks, `[batch, num_heads, seqlen_q]`."""
        with np.errstate(over="ignore", under="ignore"):
            off = 4 * epsilon * self.score_sizes + 4 * epsilon * self._sink_sizes + self._beyond
            return np.exp(np.minimum(self.log_p_sink.astype(np.float64) + off, 0))

    @functools.cached_property
    def _sink_sizes(self):
        return np.where(self.sink == -np.inf, 0, np.abs(self.sink)).astype(np.float64)

    def sizes(self, epsilon):
        """By name: for every element the sum of the absolute values of its terms, with the largest weights."""
        p, p_sink = self._largest_weights(epsilon), self._largest_sink_weights(epsilon)
        dp, delta = self._dp_sizes(p)
        cap = self.case.options.get("logits_soft_cap")
        slope = 1.0
        if cap is not None:  # a rounding of the product changes the derivative of the cap too, at most by 1
            products, most = self._pair_sizes
            with np.errstate(over="ignore"):
                slope = slope + np.minimum(2 * most * products / cap, 1 / epsilon)
        sizes = self._sums(p, p * (dp + delta), p_sink * delta[..., 0], slope)
        log = np.log(np.where(self.alone, 1, self.sum)).astype(np.float64)
        sizes["lse"] = sizes["maximum"] = 1 + np.maximum(self.score_sizes, self._sink_sizes) + log
        return sizes

    def spread(self, epsilon):
        """By name: what one rounding of each product q.k, and of each exponent of e, can do through the weights.

        It multiplies a weight by at most exp(epsilon (product + exponent)), but adds no more than it takes from the
        others of the row.
        """
        p, p_sink = self._largest_weights(epsilon), self._largest_sink_weights(epsilon)
        with np.errstate(over="ignore"):
            exponents = np.where(self.seen, np.abs(self._log_p), 0).astype(np.float64)
            factors = np.minimum(epsilon * (self.product_sizes[..., None] + exponents), 1)
            of_sink = np.minimum(epsilon * np.where(self.sink == -np.inf, 0, np.abs(self.log_p_sink)), 1).astype(np.float64)
        total = p.sum(axis=-1) + p_sink
        changes = np.minimum(factors * p, np.maximum(total[..., None] - p, 0))
        sink_changes = np.minimum(of_sink * p_sink, np.maximum(total - p_sink, 0))
        # What one weight gains the others lose: a sink's change moves all of them.
        moved = sink_changes + np.minimum(changes.sum(axis=-1) * p_sink, p_sink)
        return self._changes(p, changes + p * sink_changes[..., None], 0.0, p_sink, moved)

    def underflow(self, tiny):
        """By name: what numbers below `tiny`, the smallest that is normal, can amount to when they are lost, as in threads
        of TensorFlow and in XLA."""
        _, _, seqlen_q, seqlen_k = self.case.scores_shape
        terms = seqlen_q + seqlen_k + self.case.query.shape[-1] + self.case.value.shape[-1]
        lost = np.where(self.seen, np.float64(tiny), 0)
        p_sink = np.exp(self.log_p_sink).astype(np.float64)
        lost = self._changes(self.p.astype(np.float64), lost, lost, p_sink, np.full(p_sink.shape, tiny))
        lost["lse"] = lost["maximum"] = np.zeros(self.lse.shape)
        return {name: x + tiny * terms for name, x in lost.items()}

    def _changes(self, p, changes, ds, p_sink, sink_changes):
        """By name: how far results are off if weights p are by `changes`, those of sinks by `sink_changes`, and gradients
        of scores by a further `ds`.

        A gradient p (dp - delta) changes with its own weight, and with all of its row through delta.
        """
        dp, delta = self._dp_sizes(p)
        _, change_of_delta = self._dp_sizes(changes, h=0)
        ds = changes * (dp + delta) + (p + changes) * change_of_delta + ds
        d_sink = sink_changes * delta[..., 0] + (p_sink + sink_changes) * change_of_delta[..., 0]
        return self._sums(changes, ds, d_sink, self._pair_sizes[1])

    @functools.cached_property
    def _magnitudes(self):
        return tuple(np.abs(x).astype(np.float64) for x in self._arrays)

    @functools.cached_property
    def _magnitudes_of_dp(self):
        _, _, v, g = self._magnitudes
        return self.z * (g @ v.swapaxes(-1, -2))

    def _dp_sizes(self, p, h=1):
        """Sizes of dp, and of delta, their sum by the weights p and the gradient of lse, which counts h times."""
        dp = self._magnitudes_of_dp
        return dp, (p * dp).sum(axis=-1, keepdims=True) + h * np.abs(self._h).astype(np.float64)[..., None]

    def _sums(self, p, ds, d_sink, slope):
        """By name: sums of the magnitudes of the arrays, by weights, by gradients of the scores, which reach products
        times a `slope`, and by those that rows have for sinks."""
        q, k, v, g = self._magnitudes
        zp = self.z * p
        scale, dt = abs(self.scale), ds * slope
        sums = {
            "out": zp @ v,
            "dq": scale * (dt @ k),
            "dk": self._sum_groups(scale * (dt.swapaxes(-1, -2) @ q)),
            "dv": self._sum_groups(zp.swapaxes(-1, -2) @ g),
        }
        return {name: self._to_layout(x) for name, x in sums.items()} | self._of_terms(ds, d_sink.sum((0, 2)))

    def _to_layout(self, x):
        return heads_first(self.case, x)

    def _sum_groups(self, x):
        return x.reshape(x.shape[0], x.shape[1] // self.group, self.group, *x.shape[2:]).sum(axis=2)


def sum_to(shape, x):
    axes = tuple(axis for axis in range(4) if shape[axis] == 1)
    return x.sum(axis=axes, keepdims=True)

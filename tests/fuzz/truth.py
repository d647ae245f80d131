"""What a case should give: attention in a precision above that of the case, written apart from attn_ops.reference.

float64 for 16- and 32-bit cases, `np.longdouble` for float64 ones. It shares with the package only the random bits of
dropout, which test_philox.py compares with the published generator. Beside every result stands the sum of the absolute
values of the terms it is made of, `sizes`: the unit in which rounding errors are counted.
"""

import functools

import numpy as np

from attn_ops.call import philox


def visible(case):
    """Which pairs count: bool `[batch, num_heads, seqlen_q, seqlen_k]`."""
    options = case.options
    batch, num_heads, seqlen_q, seqlen_k = case.scores_shape
    seen = np.zeros(case.scores_shape, bool)
    left, right = options.get("window") or (None, None)
    if options.get("is_causal"):
        right = 0
    bottom_right = options.get("causal_alignment") == "bottom_right"
    rows, keys = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)
    for b in range(batch):
        length_q, length_k = (
            extent if options.get(name) is None else int(options[name][b])
            for name, extent in (("query_seq_lengths", seqlen_q), ("key_value_seq_lengths", seqlen_k))
        )
        shift = length_k - length_q if bottom_right else 0
        if options.get("query_offset") is not None:
            shift = int(options["query_offset"][b])
        distance = keys - rows - shift  # from the row's own key
        band = (rows < length_q) & (keys < length_k)
        if left is not None and left != -1:
            band &= distance >= -left
        if right is not None and right != -1:
            band &= distance <= right
        seen[b] = band
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
    return seen


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
        bias = case.options.get("bias")
        h = np.zeros(q.shape[:3], wide) if case.d_lse is None else case.d_lse.astype(wide)
        z = keep_factors(case)
        self.z = np.ones((1, 1, 1, 1)) if z is None else z

        with np.errstate(over="ignore", under="ignore", divide="ignore"):
            s = wide(self.scale) * (q @ k.swapaxes(-1, -2))
            if bias is not None:
                s = s + np.where(bias == -np.inf, 0, bias).astype(wide)
            largest = wide(np.finfo(case.accumulator).max)
            self._beyond = self._largest_seen(np.maximum(np.abs(s) - largest, 0)).astype(np.float64)
            s = np.where(self.seen, s, -np.inf)
            maximum = s.max(axis=-1, initial=-np.inf)
            self.maximum = np.where(self.empty_rows, 0, maximum)
            below = s - self.maximum[..., None]
            e = np.exp(below)
            self.sum = total = e.sum(axis=-1)
            self.lse = np.where(self.empty_rows, -np.inf, self.maximum + np.log(total))
            self.p = e / np.where(self.empty_rows, 1, total)[..., None]
            self._log_p = below - np.log(np.where(self.empty_rows, 1, total))[..., None]
            zp = self.z * self.p
            self.out = zp @ v
            dp = self.z * (g @ v.swapaxes(-1, -2))
            delta = (self.p * dp).sum(axis=-1)
            self.ds = self.p * (dp - (delta - h)[..., None])
            self.dq = wide(self.scale) * (self.ds @ k)
            self.dk = self._sum_groups(wide(self.scale) * (self.ds.swapaxes(-1, -2) @ q))
            self.dv = self._sum_groups(zp.swapaxes(-1, -2) @ g)
        self._h = h

    def results(self):
        """Those that implementations give, by name."""
        found = {"out": self._to_layout(self.out), "lse": self.lse, "maximum": self.maximum, "sum": self.sum}
        found |= {name: self._to_layout(getattr(self, name)) for name in ("dq", "dk", "dv")}
        bias = self.case.options.get("bias")
        return found if bias is None else found | {"d_bias": sum_to(bias.shape, self.ds)}

    @functools.cached_property
    def product_sizes(self):
        """`[batch, num_heads, seqlen_q]`: the largest sum of absolute terms in a product q.k that the row sees, scaled."""
        q, k, _, _ = self._magnitudes
        return self._largest_seen(abs(self.scale) * (q @ k.swapaxes(-1, -2)))

    @functools.cached_property
    def score_sizes(self):
        """The same and the largest bias that the row sees."""
        bias = self.case.options.get("bias")
        if bias is None:
            return self.product_sizes
        largest = self._largest_seen(np.abs(np.where(bias == -np.inf, 0, bias)).astype(np.float64))
        return self.product_sizes + np.minimum(largest, np.finfo(np.float64).max - self.product_sizes)

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

    def sizes(self, epsilon):
        """By name: for every element the sum of the absolute values of its terms, with the largest weights."""
        p = self._largest_weights(epsilon)
        dp, delta = self._dp_sizes(p)
        sizes = self._sums(p, p * (dp + delta))
        log = np.log(np.where(self.empty_rows, 1, self.sum)).astype(np.float64)
        sizes["lse"] = sizes["maximum"] = 1 + self.score_sizes + log
        return sizes

    def spread(self, epsilon):
        """By name: what one rounding of each product q.k, and of each exponent of e, can do through the weights.

        It multiplies a weight by at most exp(epsilon (product + exponent)), but adds no more than it takes from the
        others of the row.
        """
        p = self._largest_weights(epsilon)
        with np.errstate(over="ignore"):
            exponents = np.where(self.seen, np.abs(self._log_p), 0).astype(np.float64)
            factors = np.minimum(epsilon * (self.product_sizes[..., None] + exponents), 1)
        others = np.maximum(p.sum(axis=-1, keepdims=True) - p, 0)
        return self._changes(p, np.minimum(factors * p, others))

    def underflow(self, tiny, smallest):
        """By name: what numbers below `tiny`, the smallest that is normal, can amount to when they are lost."""
        terms = sum(self.case.scores_shape[2:]) + self.case.query.shape[-1] + self.case.value.shape[-1]
        lost = np.where(self.seen, np.float64(tiny), 0)
        lost = self._changes(self.p.astype(np.float64), lost, np.where(self.seen, smallest * terms, 0))
        lost["lse"] = lost["maximum"] = np.full(self.lse.shape, tiny)
        return {name: x + smallest * terms for name, x in lost.items()}

    def _changes(self, p, changes, ds=0.0):
        """By name: how far results are off if weights p are by `changes`, and gradients of scores by a further `ds`.

        A gradient p (dp - delta) changes with its own weight, and with all of its row through delta.
        """
        dp, delta = self._dp_sizes(p)
        _, change_of_delta = self._dp_sizes(changes, h=0)
        return self._sums(changes, changes * (dp + delta) + (p + changes) * change_of_delta + ds)

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

    def _sums(self, p, ds):
        """By name: sums of the magnitudes of the arrays, by weights and by gradients of the scores."""
        q, k, v, g = self._magnitudes
        zp = self.z * p
        scale = abs(self.scale)
        sums = {
            "out": zp @ v,
            "dq": scale * (ds @ k),
            "dk": self._sum_groups(scale * (ds.swapaxes(-1, -2) @ q)),
            "dv": self._sum_groups(zp.swapaxes(-1, -2) @ g),
        }
        sums = {name: self._to_layout(x) for name, x in sums.items()}
        bias = self.case.options.get("bias")
        return sums if bias is None else sums | {"d_bias": sum_to(bias.shape, ds)}

    def _to_layout(self, x):
        return heads_first(self.case, x)

    def _sum_groups(self, x):
        return x.reshape(x.shape[0], x.shape[1] // self.group, self.group, *x.shape[2:]).sum(axis=2)


def sum_to(shape, x):
    axes = tuple(axis for axis in range(4) if shape[axis] == 1)
    return x.sum(axis=axes, keepdims=True)

"""The specification: attention in NumPy float64, forward and gradients, written as equations.

    t_ij   = cap tanh(scale q_i . k_j / cap), or scale q_i . k_j without a cap
    s_ij   = t_ij + slope d_ij + table[clip(d_ij)] + bias_ij              d_ij = j - own_i
    lse_i  = log (sum_j exp(s_ij) + exp(sink))    p_ij = exp(s_ij - lse_i)
    out_i  = sum_j z_ij p_ij v_j                  z_ij = keep_ij / (1 - dropout_rate)

Sums run over the keys j that row i sees: those inside its interval (csrc/mask.h), allowed by every boolean mask, and
whose bias, dense or of the table, is not -inf. Row i stands at the key own_i, which is i, i + query_offset or, aligned at
the bottom right, i + length_k - length_q. With g_i = d_out_i and h_i = d_lse_i, the gradients are

    delta_i = g_i . out_i                         ds_ij = p_ij (z_ij g_i . v_j - delta_i + h_i)
    dq_i = scale sum_j dt_ij k_j                  dk_j = scale sum_i dt_ij q_i
    dv_j = sum_i z_ij p_ij g_i                    dt_ij = ds_ij (1 - (t_ij / cap)^2), or ds_ij without a cap
    dbias = ds, summed over the axes that bias broadcasts along
    dtable[r] = sum of ds_ij with clip(d_ij) = r  dsink = sum_i exp(sink - lse_i) (h_i - delta_i)

(Dao, Fu, Ermon, Rudra and Re, "FlashAttention", 2022, appendix B; the term h_i is d lse_i / d s_ij = p_ij.)

Edges, the same in every implementation:
- A row that sees no key, or only scores of -inf, has out 0, lse -inf, or the sink, and gradients exactly 0 but for that of
  its lse, which goes to the sink.
- A weight of exactly 0 selects its key out: NaN and infinity in keys, values and gradients that a row does not weigh
  never reach it. A NaN or infinity that a row does weigh propagates.
- Dropout leaves lse alone and is decided by `philox.keep`.

Inputs of any float dtype are computed in float64; nothing here is fast or small in memory.
"""

import types

import numpy as np

from attn_ops.call import arrays, options, philox, public
from attn_ops.call.options import Options
from attn_ops.call.position_bias import T5RelativeBias
from attn_ops.masks.mask import combined


@public.function(without=("return_lse",))
def attention(query, key, value, **given):
    """Scaled dot-product attention in float64.

    Args:
      query: `[batch, seqlen_q, num_heads, head_dim]`, floats or integers.
      key: `[batch, seqlen_k, num_kv_heads, head_dim]`; num_heads must be a multiple of num_kv_heads, and query head h
        reads key head `h // (num_heads // num_kv_heads)`.
      value: `[batch, seqlen_k, num_kv_heads, value_dim]`.
        All three may have rank 3, `[batch, seqlen, dim]` for a single head, or rank 2, `[seqlen, dim]` for a single
        sequence; so do the results then.
      bias: None or an array added to the scores, rank 4, broadcastable to `[batch, num_heads, seqlen_q, seqlen_k]`; for
        inputs of lower rank also `[batch, seqlen_q, seqlen_k]` or `[seqlen_q, seqlen_k]`. -inf hides a key.
      mask: None, a bool array (true = may see; see `masks.boolean`), a `masks.Mask`, or a list of them, ANDed.
      scale: multiplies q.k; None is 1/sqrt(head_dim).
      is_causal, causal_alignment, window: see `masks.Mask`.
      query_seq_lengths, key_value_seq_lengths: None or integers `[batch]`; see `masks.Mask`.
      dropout_rate: probability of dropping a weight, in [0, 1); kept weights are scaled by 1 / (1 - rate).
      dropout_seed: an integer or a pair (seed, offset); needed when dropout_rate > 0.
      layout: "BSHD" as above, or "BHSD": `[batch, heads, seqlen, dim]` for query, key, value and out.
      query_offset: None, an integer or integers `[batch]`: the key that row 0 stands at.
      logits_soft_cap: None or a number > 0: scaled scores s become cap tanh(s / cap).
      alibi_slopes: None, `[num_heads]` or `[batch, num_heads]`, times the distance j - own.
      relative_bias: None, `[2 R + 1, num_heads]` by the distance clipped to -R … R, or an `attn_ops.T5RelativeBias`.
      sinks: None or `[num_heads]`: one more logit in each row's denominator.
    Returns:
      (out, lse): float64 `[batch, seqlen_q, num_heads, value_dim]` (in `layout`) and `[batch, num_heads, seqlen_q]`;
        without the axes that the inputs lack.
    Raises:
      ValueError, TypeError: arguments that do not fit together.
    """
    c = _Call("reference.attention", query, key, value, given)
    return c.to_caller(c.out), c.without_added(c.lse)


def merge_attention(outs, lses, *, layout="BSHD"):
    """(out, lse) of all keys, of lists of what `attention` to parts of them returned; see `attn_ops.merge_attention`.

        lse_i = log sum_n exp(lse_ni)       out_i = sum_n exp(lse_ni - lse_i) out_ni
    """
    outs, lses = (np.stack([np.asarray(x, np.float64) for x in xs]) for xs in (outs, lses))
    lse = np.logaddexp.reduce(lses, 0)
    seen = lses != -np.inf
    weights = np.where(seen, np.exp(np.where(seen, lses - np.where(lse != -np.inf, lse, 0.0), 0.0)), 0.0)
    if layout == "BSHD" and weights.ndim == 4:
        weights = weights.swapaxes(2, 3)
    return np.where(weights[..., None] != 0, weights[..., None] * outs, 0.0).sum(0), lse


@public.function(without=("dropout_rate", "dropout_seed", "return_lse"))
def attention_weights(query, key, **given):
    """The softmax before dropout: float64 `[batch, num_heads, seqlen_q, seqlen_k]`. Arguments as in `attention`."""
    c = _Call("reference.attention_weights", query, key, key, given)
    return c.without_added(c.p)


@public.function(without=("return_lse",))
def attention_gradients(query, key, value, d_out, d_lse=None, **given):
    """Gradients of `sum(d_out * out) + sum(d_lse * lse)`; entries of lse that are -inf are constants.

    The arguments are those of `attention`, and two more.

    Args:
      d_out: like out, in `layout`.
      d_lse: None for zero, or `[batch, num_heads, seqlen_q]`.
    Returns:
      (dq, dk, dv, dbias): float64, of the shapes of query, key, value and bias; dbias None without a bias. After them
        the gradient of relative_bias (of its table, if it is T5's), where there is one, and that of sinks.
    """
    c = _Call("reference.attention_gradients", query, key, value, given)
    d_out = c.cotangent("d_out", d_out, c.to_caller(c.out).shape)
    d_out = c.to_layout(d_out.reshape(c.to_layout(c.out).shape))
    lse_shape = c.without_added(c.lse).shape
    d_lse = c.cotangent("d_lse", np.zeros(lse_shape) if d_lse is None else d_lse, lse_shape).reshape(c.lse.shape)

    with np.errstate(invalid="ignore", over="ignore"):
        weighed = c.p != 0
        dp = c.z * (d_out @ _transposed(c.v))
        delta = np.where(weighed.any(axis=-1), np.sum(d_out * c.out, axis=-1), 0.0)
        ds = np.where(weighed, c.p * (dp - (delta - d_lse)[..., None]), 0.0)
        dt = np.where(weighed, c.slope_of_cap * ds, 0.0)
        dq = c.scale * _weighted_sum(dt, c.k)
        dk = c.scale * c.sum_groups(_weighted_sum(_transposed(dt), c.q))
        dv = c.sum_groups(_weighted_sum(_transposed(c.z * c.p), d_out))
    dbias = None
    if c.bias is not None:
        axes = tuple(axis for axis in range(4) if c.bias.shape[axis] == 1)
        dbias = ds.sum(axis=axes, keepdims=True).reshape(c.bias_shape)
    gradients = [c.to_caller(dq), c.to_caller(dk), c.to_caller(dv), dbias]
    if c.table is not None:
        gradients.append(c.table_gradient(ds))
    if c.sinks is not None:
        with np.errstate(invalid="ignore"):
            gradients.append(np.where(c.p_sink != 0, c.p_sink * (d_lse - delta), 0.0).sum(axis=(0, 2)))
    return tuple(gradients)


class _Call:
    """One attention call: its inputs as float64 `[batch, num_heads, seqlen, dim]`, and what forward computes."""

    def __init__(self, name, query, key, value, given):
        given = Options(**given)
        layout = given.layout
        if layout not in ("BSHD", "BHSD"):
            raise ValueError(f"{name}: layout must be 'BSHD' or 'BHSD', got {layout!r}")
        self.name, self.layout = name, layout
        ranks = {np.ndim(x) for x in (query, key, value)}
        if len(ranks) > 1 or not ranks <= {2, 3, 4}:
            raise ValueError(
                f"{name}: rank must be 4 (layout {layout}), 3 ([batch, seqlen, dim]) or 2 ([seqlen, dim]), the same of "
                f"query, key and value, got shapes {np.shape(query)}, {np.shape(key)} and {np.shape(value)}"
            )
        self.rank = ranks.pop()
        self.q, k, v = (self.from_caller(what, x) for what, x in (("query", query), ("key", key), ("value", value)))
        batch, num_heads, seqlen_q, head_dim = self.q.shape
        num_kv_heads, seqlen_k = k.shape[1:3]
        if k.shape != (batch, num_kv_heads, seqlen_k, head_dim) or v.shape[:3] != k.shape[:3]:
            raise ValueError(
                f"{name}: query, key and value must agree in batch, seqlen_k, num_kv_heads and head_dim, got shapes "
                f"{np.shape(query)}, {np.shape(key)} and {np.shape(value)} (layout {layout})"
            )
        if head_dim < 1:
            raise ValueError(f"{name}: head_dim must be at least 1, got 0 (query {np.shape(query)}, layout {layout})")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"{name}: num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})")
        self.num_kv_heads = num_kv_heads
        self.k, self.v = (np.repeat(x, num_heads // num_kv_heads, axis=1) for x in (k, v))
        self.scale = 1 / np.sqrt(head_dim) if given.scale is None else float(given.scale)
        self.bias = None if given.bias is None else self._float64("bias", given.bias)
        self.bias_shape = np.shape(given.bias)
        if self.bias is not None and self.bias.ndim in (2, 3):
            self.bias = self.bias[None, None] if self.bias.ndim == 2 else self.bias[:, None]

        weights_shape = (batch, num_heads, seqlen_q, seqlen_k)
        counts_distances = given.alibi_slopes is not None or given.relative_bias is not None
        alone = combined(given.mask)
        if counts_distances and alone.is_aligned:
            options.check_distances(name, given.causal_alignment, alone.causal_alignment)
        mask = combined(
            given.mask,
            is_causal=given.is_causal,
            causal_alignment=given.causal_alignment,
            window=given.window,
            query_lengths=given.query_seq_lengths,
            key_lengths=given.key_value_seq_lengths,
        )
        offset = given.query_offset
        if offset is not None:
            offset = arrays.query_offset(_NUMPY, name, offset, batch)
        visible = np.asarray(mask.materialize(seqlen_q, seqlen_k, query_offset=offset))
        visible = self._broadcast("mask", visible, weights_shape)
        cap = options.logits_soft_cap(name, given.logits_soft_cap, in_float64=True)
        self._distances = np.arange(seqlen_k) - _own(mask, offset, seqlen_q, seqlen_k)[..., None]
        self.table = self.sinks = None
        if given.relative_bias is not None:
            self._given_table = given.relative_bias
            self.table = arrays.relative_bias(_NUMPY, name, given.relative_bias, num_heads, np.float64)
        if given.sinks is not None:
            self.sinks = arrays.sinks(_NUMPY, name, given.sinks, num_heads, np.float64)

        # Scores of -inf, from wherever, hide: their exp is 0.
        with np.errstate(invalid="ignore", over="ignore"):
            s = self.scale * (self.q @ _transposed(self.k))
            self.slope_of_cap = 1.0
            if cap is not None:
                s = np.tanh(s / cap)
                s, self.slope_of_cap = cap * s, 1 - s**2
            if given.alibi_slopes is not None:
                slopes = arrays.alibi_slopes(_NUMPY, name, given.alibi_slopes, batch, num_heads, np.float64)
                s = s + slopes[..., None, None] * self._distances
            if self.table is not None:
                b = np.moveaxis(self.table[:, self._places()], 0, 1)  # [batch or 1, num_heads, seqlen_q, seqlen_k]
                s, visible = s + b, visible & (b != -np.inf)
            if self.bias is not None:
                b = self._broadcast("bias", self.bias, weights_shape)
                s, visible = s + b, visible & (b != -np.inf)
            s = np.where(visible, s, -np.inf)
            m = s.max(axis=-1, keepdims=True, initial=-np.inf)
            sink = -np.inf if self.sinks is None else self.sinks[:, None, None]
            m = np.maximum(m, sink)
            m = np.where(m == -np.inf, 0.0, m)
            e = np.exp(s - m)
            total = e.sum(axis=-1, keepdims=True) + np.exp(sink - m)
            # Selected, since in a row of NaN even hidden weights would be NaN.
            self.p = np.where(s == -np.inf, 0.0, e / np.where(total == 0, 1.0, total))
            # Not by lse, which has no digits left for the other weights where the sink is large.
            p_sink = np.exp(sink - m) / np.where(total == 0, 1.0, total)
            self.p_sink = np.where(sink == -np.inf, 0.0, p_sink)[..., 0]  # nothing, also in a row of NaN
            with np.errstate(divide="ignore"):
                self.lse = (m + np.log(total))[..., 0]
            self.z = self._dropout_factors(given.dropout_rate, given.dropout_seed, weights_shape)
            self.out = _weighted_sum(self.z * self.p, self.v)

    def _places(self):
        """The column of the table of each pair, `[batch or 1, seqlen_q, seqlen_k]`."""
        reach = self.table.shape[1] // 2
        return np.clip(self._distances[:, 0], -reach, reach) + reach

    def table_gradient(self, ds):
        """The gradient of the caller's table from that of the scores."""
        by_distance = np.zeros(self.table.shape[::-1])
        places = np.broadcast_to(self._places()[:, None], ds.shape)
        heads = np.broadcast_to(np.arange(ds.shape[1])[:, None, None], ds.shape)
        np.add.at(by_distance, (places, heads), ds)
        if not isinstance(self._given_table, T5RelativeBias):
            return by_distance
        by_bucket = np.zeros(np.shape(self._given_table.table))
        np.add.at(by_bucket, self._given_table.buckets(self.name, len(by_bucket)), by_distance)
        return by_bucket

    def from_caller(self, what, x):
        """query, key or value as `[batch, heads, seqlen, dim]`."""
        x = self._float64(what, x)
        return self.to_layout(x) if self.rank == 4 else x.reshape(-1, 1, *x.shape[-2:])

    def to_caller(self, x):
        """The inverse of `from_caller`."""
        return self.to_layout(x) if self.rank == 4 else self.without_added(x)

    def without_added(self, x):
        """`[batch, heads, ...]` without the axes that the caller's arrays lack."""
        return x if self.rank == 4 else x[:, 0] if self.rank == 3 else x[0, 0]

    def cotangent(self, what, x, shape):
        x = self._float64(what, x)
        if x.shape != shape:
            raise ValueError(f"{self.name}: {what} must be shaped like {what[2:]} {shape}, got {x.shape}")
        return x

    def to_layout(self, x):
        """Between `layout` and `[batch, heads, seqlen, dim]`, either way."""
        return x.swapaxes(1, 2) if self.layout == "BSHD" else x

    def sum_groups(self, x):
        """Sums `[batch, num_heads, ...]` over the query heads of each key head."""
        batch, num_heads = x.shape[:2]
        return x.reshape(batch, self.num_kv_heads, num_heads // self.num_kv_heads, *x.shape[2:]).sum(axis=2)

    def _float64(self, what, x):
        x = np.asarray(x)
        if x.dtype.kind not in "fiu" and x.dtype.name != "bfloat16":
            raise TypeError(f"{self.name}: {what} must hold floats or integers, got {x.dtype.name}")
        return x.astype(np.float64)

    def _broadcast(self, what, x, shape):
        if x.ndim != 4 or any(extent not in (1, full) for extent, full in zip(x.shape, shape)):
            raise ValueError(f"{self.name}: {what} of shape {x.shape} does not broadcast to {shape}")
        return np.broadcast_to(x, shape)

    def _dropout_factors(self, rate, seed, shape):
        if rate == 0.0:
            return 1.0
        if seed is None:
            raise ValueError(f"{self.name}: dropout_rate={rate} needs a dropout_seed")
        seed, offset = (seed, 0) if np.ndim(seed) == 0 else seed
        return philox.keep(seed, offset, *shape, rate) / (1.0 - rate)


def _own(mask, offset, seqlen_q, seqlen_k):
    """The key that each row stands at, `[batch or 1, 1, seqlen_q]`."""
    own = np.arange(seqlen_q)[None]
    if offset is not None:
        own = own + offset.astype(np.int64)[:, None]
    elif mask.bottom_right:
        lengths = (n if given is None else np.asarray(given, np.int64)[:, None]
                   for n, given in ((seqlen_q, mask.query_lengths), (seqlen_k, mask.key_lengths)))  # fmt: skip
        length_q, length_k = lengths
        own = own + (length_k - length_q)
    return own[:, None]


# What the rules for arguments (call/arrays.py) need of NumPy.
_NUMPY = types.SimpleNamespace(
    as_tensor=lambda name, what, x: np.asarray(x),
    as_int32=lambda x: x.astype(np.int32),
    cast=lambda x, dtype: x.astype(dtype),
    cast_text=lambda what: f'{what}.astype("float64")',
    expand_dims=np.expand_dims,
    extents=lambda x: list(x.shape),
    is_floating=lambda dtype: dtype.kind == "f" or dtype.name == "bfloat16",
    is_integer=lambda dtype: dtype.kind in "iu",
    static_value=lambda x: x,
    stop_gradient=lambda x: x,
    take_columns=lambda x, indices: x[:, indices],
    transpose=np.transpose,
)


def _transposed(x):
    return x.swapaxes(-1, -2)


def _weighted_sum(weights, values):
    """`weights @ values`, except that a weight of exactly 0 times NaN or infinity is 0."""
    infected = ~np.isfinite(values).all(axis=-1)
    total = weights @ np.where(infected[..., None], 0.0, values)
    for b, h, j in np.argwhere(infected):
        w = weights[b, h, :, j, None]
        total[b, h] += np.where(w != 0, w * values[b, h, j], 0.0)
    return total

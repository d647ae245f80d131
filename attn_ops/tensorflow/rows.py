"""The mathematics of the composite: the attention of a block of query rows in TensorFlow operations, forward and backward.

The equations are those of `reference.py`. Shapes inside: query and out `[batch, num_heads, seqlen_q, dim]`, key and value
`[batch, num_kv_heads, seqlen_k, dim]`, scores `[batch, num_heads, seqlen_q, seqlen_k]`.
"""

import collections
import functools
import math

import tensorflow as tf

from attn_ops.call.attention_call import OPTIONAL_DIFFERENTIABLE
from attn_ops.masks import key_range
from attn_ops.tensorflow import philox
from attn_ops.tensorflow.runtime_checks import at_least_1, canonical_extents, extents

# Some query rows and what belongs to them; bias (or None) and masks may broadcast along the rows. The table by distance
# and the sinks (or None) are those of all rows.
Block = collections.namedtuple("Block", "rows q bias masks relative_bias sinks")


class Problem:
    """The parts of a call that are not differentiated, and the mathematics of a block of query rows.

    `forward` and `backward` take all rows at once. ``masked_products`` are the `products` some of which count for nothing: no
    NaN or infinity is to reach derivatives through those.
    """

    def __init__(self, call, masked_products):
        self.call = call
        self._masked_products = masked_products
        self.dtype = tf.float64 if call.query.dtype == tf.float64 else tf.float32
        self.batch, self.num_heads, self.seqlen_q, self.head_dim = canonical_extents(call.query, call.layout)
        _, self.num_kv_heads, self.seqlen_k, self.value_dim = canonical_extents(call.value, call.layout)
        self.group_size = self.num_heads // at_least_1(self.num_kv_heads)
        self.query_lengths = _lengths(call.query_lengths)
        self.key_lengths = _lengths(call.key_lengths)
        self.query_offset = _lengths(call.query_offset)

    def rows_shape(self):
        """That of lse."""
        return [self.batch, self.num_heads, self.seqlen_q]

    def query(self):
        """The scaled query."""
        if self.call.scale is None:
            scale = 1.0 / tf.sqrt(tf.cast(self.head_dim, self.dtype))
        else:
            scale = tf.constant(self.call.scale, self.dtype)
        return self._canonical(self.call.query) * scale

    def key(self):
        return self._keys(self.call.key, self.head_dim)

    def value(self):
        return self._keys(self.call.value, self.value_dim)

    def others(self):
        """What else is differentiated and the call has: bias, relative_bias and sinks."""
        return tuple(self.call.differentiable()[3:])

    def to_layout(self, x):
        """Between `layout` and `[batch, heads, seqlen, dim]`, either way."""
        return tf.transpose(x, [0, 2, 1, 3]) if self.call.layout == "BSHD" else x

    def forward(self, q, k, v, *others):
        """out and lse."""
        return self.forward_block(self.block(q, others), k, v)

    def backward(self, d_out, d_lse, q, k, v, *others):
        """The gradients of q, k, v and the `others`."""
        return self.backward_block(self.block(q, others), k, v, d_out, d_lse)

    def block(self, q, others=()):
        """All rows."""
        return Block(tf.range(self.seqlen_q), q, masks=self.call.masks, **self.named(others))

    def named(self, others):
        """The `others` by name, and None for those that there are not."""
        others = iter(others)
        return {
            name: None if getattr(self.call, name) is None else next(others) for name in OPTIONAL_DIFFERENTIABLE
        }

    def forward_block(self, block, k, v):
        s, seen, _ = self.scores(block, k)
        e, _, total, m, empty = softmax_terms(s, seen, block.sinks)
        lse = m + tf.math.log(total)
        if self.call.return_lse:
            lse = tf.where(empty, tf.constant(-math.inf, s.dtype), lse)
        lse = tf.squeeze(lse, -1)
        keep = self._keep(block)
        if keep is not None:
            e = self._drop(keep, e)
        out = _weighted_sum(self._grouped(e), v, seen is not None or keep is not None)
        return self._ungrouped(out, lse) / total, lse

    def backward_block(self, block, k, v, d_out, d_lse):
        s, seen, slope_of_cap = self.scores(block, k)
        masked = seen is not None
        e, e_sink, total, *_ = softmax_terms(s, seen, block.sinks)
        # Selected, since in a row of NaN even hidden weights would be NaN.
        p = select(seen, e / total)
        weighed = ~_is_zero(p) if masked else None
        # Selected before it is multiplied too: its product with 0 would be NaN, or that of the derivative.
        dp = select(weighed, self._products(d_out, v, masked))
        dropped_p = p
        keep = self._keep(block)
        if keep is not None:
            dropped_p, dp = self._drop(keep, p), self._drop(keep, dp)
        delta = tf.reduce_sum(p * dp, -1, keepdims=True)
        minus_d_row = delta - d_lse[..., None]
        ds = select(weighed, p * (dp - minus_d_row))
        dv = _weighted_sum(self._grouped(dropped_p), self._grouped(d_out), masked or keep is not None, True)
        # A NaN or infinity of q or k that counts has made ds NaN already, or was capped; the others must not meet the
        # zeros of ds.
        q = self._grouped(block.q)
        capped = slope_of_cap is not None
        q, k = (finite(q), finite(k)) if masked or capped else (q, k)
        ds_grouped = self._grouped(select(weighed, ds * slope_of_cap) if capped else ds)
        dq = self._ungrouped(tf.matmul(ds_grouped, k), d_lse)
        dk = tf.matmul(ds_grouped, q, transpose_a=True)
        others = []
        if block.bias is not None:
            others.append(_sum_to_shape_of(block.bias, ds))
        if block.relative_bias is not None:
            others.append(self._sums_by_distance(self._distances(block), ds, extents(block.relative_bias)[1] // 2))
        if block.sinks is not None:
            p_sink = select(~_is_zero(e_sink), e_sink / total)  # -inf is nothing, also in a row of NaN
            others.append(-tf.reduce_sum(select(~_is_zero(p_sink), p_sink * minus_d_row), [0, 2, 3]))
        return dq, dk, dv, *others

    def scores(self, block, k):
        """The scores, which of them are seen, None where all are, and the derivative of their cap, or None. Hidden scores
        may be anything."""
        seqlen_q, seqlen_k = tf.cast(self.seqlen_q, tf.int64), tf.cast(self.seqlen_k, tf.int64)
        visible = key_range.interval(
            tf.cast(block.rows, tf.int64)[:, None],
            tf.range(seqlen_k),
            seqlen_q,
            seqlen_k,
            self.query_lengths,
            self.key_lengths,
            self.call.window_left,
            self.call.window_right,
            self.call.bottom_right,
            self.query_offset,
        )
        visible += self._structured(block)
        visible += block.masks
        added = []
        if block.relative_bias is not None:
            added.append(self._by_distance(self._distances(block), block.relative_bias))
        if block.bias is not None:
            added.append(tf.cast(block.bias, self.dtype))
        there = [above_minus_inf(bias) for bias in added]  # -inf hides
        visible += there
        seen = functools.reduce(tf.logical_and, visible) if visible else None
        capped = self.call.logits_soft_cap is not None
        s, slope_of_cap = self._products(block.q, k, masked=capped or seen is not None), None
        if capped:
            # Hidden scores may be NaN, which would meet the zeros of gradients in the derivative of tanh.
            s = select(seen, s)
            cap = tf.constant(self.call.logits_soft_cap, self.dtype)
            t = tf.tanh(s / cap)
            s, slope_of_cap = cap * t, 1.0 - t * t
        if self.call.alibi_slopes is not None:
            slopes = self.call.alibi_slopes[:, :, None, None]
            s = _biased(s, slopes * tf.cast(self._distances(block), self.dtype))
        for bias, finite in zip(added, there):
            s = _biased(s, select(finite, bias))
        # Nor may a mask or bias broadcast the scores.
        shape = [self.batch, self.num_heads, extents(block.q)[2], self.seqlen_k]
        if seen is None:
            return tf.reshape(s, shape), None, slope_of_cap
        return tf.reshape(s, shape), tf.reshape(seen & above_minus_inf(s), shape), slope_of_cap

    def _structured(self, block):
        """Who sees whom by intervals, segments and blocks: conditions that broadcast to the scores."""
        call, terms = self.call, []
        keys = tf.range(self.seqlen_k)

        def of_rows(x):
            return tf.gather(x, block.rows, axis=1)[:, None, :, None]

        if call.intervals is not None:
            begin, end = map(of_rows, call.intervals)
            terms += [keys >= begin, keys < end]
        if call.segments is not None:
            q_ids, kv_ids = call.segments
            terms.append(tf.equal(of_rows(q_ids), kv_ids[:, None, None, :]))
        if call.blocks is not None:
            of_blocks = tf.gather(call.blocks, block.rows // call.block_q, axis=2)
            terms.append(tf.gather(of_blocks, keys // call.block_k, axis=3))
        return terms

    def _distances(self, block):
        """j - own, int32 `[batch or 1, 1, n, seqlen_k]`."""
        query_lengths, key_lengths, offset = (
            None if x is None else tf.cast(x, tf.int32)
            for x in (self.query_lengths, self.key_lengths, self.query_offset)
        )
        rows = block.rows[None, None, :, None]
        return tf.range(self.seqlen_k) - key_range.positions(
            rows, self.seqlen_q, self.seqlen_k, query_lengths, key_lengths, self.call.bottom_right, offset
        )

    @staticmethod
    def _by_distance(distances, table):
        """What a table `[num_heads, 2 R + 1]` holds for these distances, `[batch or 1, num_heads, n, seqlen_k]`."""
        reach = extents(table)[1] // 2
        columns = tf.clip_by_value(distances[:, 0], -reach, reach) + reach
        return tf.transpose(tf.gather(table, columns, axis=1), [1, 0, 2, 3])

    @staticmethod
    def _sums_by_distance(distances, ds, reach):
        """The gradient of such a table."""
        if ds.shape[0] != 1 and distances.shape[0] == 1:
            ds = tf.reduce_sum(ds, 0, keepdims=True)
        # The ends have most terms. A sum by segments goes through its terms one after the other, these do not.
        past = distances <= -reach
        first, last = (
            tf.reduce_sum(tf.where(far, ds, tf.zeros((), ds.dtype)), [0, 2, 3])[None]
            for far in (past, ~past & (distances >= reach))
        )
        segments = tf.where(tf.abs(distances) < reach, distances + reach, -1)
        segments = tf.broadcast_to(segments[:, 0], tf.gather(tf.shape(ds), [0, 2, 3]))
        near = tf.math.unsorted_segment_sum(tf.transpose(ds, [0, 2, 3, 1]), segments, 2 * reach + 1)
        sums = near + tf.pad(first, [[0, 2 * reach], [0, 0]]) + tf.pad(last, [[2 * reach, 0], [0, 0]])
        return tf.transpose(sums)

    def _keep(self, block):
        """Which weights dropout keeps, or None."""
        if not self.call.dropout_rate:
            return None
        return philox.keep(
            self.call.seed, self.batch, self.num_heads, block.rows, self.seqlen_k, self.call.dropout_rate
        )

    def _drop(self, keep, x):
        return select(keep, x * tf.constant(1.0 / (1.0 - self.call.dropout_rate), self.dtype))

    def _products(self, rows, keys, masked):
        """`[batch, num_heads, n, dim]` times `[batch, num_kv_heads, seqlen_k, dim]`, over dim; if ``masked``, some of them
        count for nothing."""
        multiply = self._masked_products if masked else products
        return self._ungrouped(multiply(self._grouped(rows), keys), rows)

    def _grouped(self, x):
        """The query heads of a key head as more rows: `[batch, num_kv_heads, group_size * n, last]`."""
        _, _, n, last = extents(x)
        return tf.reshape(x, [self.batch, self.num_kv_heads, n * self.group_size, last])

    def _ungrouped(self, x, like):
        """The inverse of `_grouped`, with as many rows as `like`, `[batch, num_heads, n, ...]`, has."""
        return tf.reshape(x, [self.batch, self.num_heads, extents(like)[2], extents(x)[-1]])

    def _keys(self, x, dim):
        # Matmul broadcasts; the reshape makes a batch or head too few an error instead.
        return tf.reshape(self._canonical(x), [self.batch, self.num_kv_heads, self.seqlen_k, dim])

    def _canonical(self, x):
        return self.to_layout(tf.cast(x, self.dtype))


def _lengths(lengths):
    """As int64 `[batch, 1, 1, 1]`."""
    return None if lengths is None else tf.cast(lengths, tf.int64)[:, None, None, None]


def _biased(s, bias):
    """s + bias. A sum of finite numbers stays finite: -inf would hide a key, inf would make the row NaN."""
    total = s + bias
    overflowed = ~_is_finite(total) & _is_finite(s) & _is_finite(bias)
    return tf.where(overflowed, tf.sign(tf.stop_gradient(total)) * total.dtype.max, total)


def softmax_terms(s, seen, sinks=None):
    """exp(s - m) with m the largest score of a row and its sink, 0 where hidden; and, `[..., 1]` each, exp(sink - m), or
    None without ``sinks`` `[num_heads]`, the sum of it all (1 for an empty row), m, and which rows are empty.

    Without infinities, which `tf.debugging.enable_check_numerics` would take for errors.
    """
    lowest = tf.constant(s.dtype.min, s.dtype)
    visible = s if seen is None else tf.where(seen, s, lowest)
    if s.shape[-1] == 0:
        m = tf.zeros_like(tf.reduce_sum(s, -1, keepdims=True))
        m = m if sinks is None else m + lowest
    else:
        # m is only a shift: its derivative cancels.
        m = tf.stop_gradient(tf.reduce_max(visible, -1, keepdims=True))
    e_sink = None
    if sinks is not None:
        sinks = sinks[:, None, None]
        m = tf.maximum(m, tf.stop_gradient(sinks))
    m = select(above_minus_inf(m), m)
    # Hidden scores become m before the subtraction: lowest - m may be beyond the range, and NaN has no derivative of 0.
    e = tf.exp((s if seen is None else tf.where(seen, s, m)) - m)
    e = select(seen, e)
    total = tf.reduce_sum(e, -1, keepdims=True)
    if sinks is not None:
        there = above_minus_inf(sinks)
        e_sink = select(there, tf.exp(tf.where(there, sinks, m) - m))
        total += e_sink
    empty = _is_zero(total)
    return e, e_sink, tf.where(empty, tf.ones((), s.dtype), total), m, empty


# Constants are compared: nested ForwardAccumulators fail in graphs at a comparison, or a sign, of what they watch.


def _is_zero(x):
    return tf.equal(tf.stop_gradient(x), 0.0)


def _is_finite(x):
    return tf.math.is_finite(tf.stop_gradient(x))


def products(rows, keys):
    return tf.matmul(rows, keys, transpose_b=True)


def _weighted_sum(weights, values, masked, transpose_weights=False):
    """`weights @ values` for weights >= 0; if `masked`, a weight of exactly 0 selects its value out, NaN or not.

    A row that weighs a value with NaN or infinity in it gets, on top, all the NaN and infinity of its batch entry and
    head: right for those that weigh none, while of the others more elements may be NaN than in the exact sum.
    """
    if not masked:
        return tf.matmul(weights, values, transpose_a=transpose_weights)
    bad = ~_is_finite(values)
    clean, spill = select(~bad, values), tf.reduce_sum(select(bad, values), -2, keepdims=True)
    has_bad = tf.cast(tf.reduce_any(bad, -1, keepdims=True), values.dtype)
    meets_bad = tf.stop_gradient(tf.matmul(weights, has_bad, transpose_a=transpose_weights)) > 0
    return tf.matmul(weights, clean, transpose_a=transpose_weights) + select(meets_bad, spill)


def select(condition, x):
    """`x` where the condition is None or holds, else 0."""
    return x if condition is None else tf.where(condition, x, tf.zeros((), x.dtype))


def above_minus_inf(x):
    """Where `x` is not -inf, NaN included; without that constant, which `tf.debugging.enable_check_numerics` finds."""
    # Not the negation of "below": TensorFlow's optimiser turns that into "at least", and NaN with it.
    x = tf.stop_gradient(x)
    return (x >= x.dtype.min) | tf.math.is_nan(x)


def finite(x):
    return select(_is_finite(x), x)


def _sum_to_shape_of(x, full):
    """`full` summed over the axes along which `x` broadcasts to its shape."""
    axes, _ = tf.raw_ops.BroadcastGradientArgs(s0=tf.shape(x), s1=tf.shape(full))
    return tf.reshape(tf.reduce_sum(full, axes), tf.shape(x))

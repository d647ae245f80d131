"""Attention in TensorFlow operations: runs everywhere, eagerly, in graphs, and compiled by XLA.

The same function as the fused kernels, and what runs where they cannot. Against the usual composition of matmul,
softmax and matmul:
- scores, softmax and sums are float32 for every 16-bit and float32 input (float64 for float64), with the scale on the
  query before the product, so that 16-bit logits neither round nor overflow;
- a row that sees no key gives zeros, and NaN or infinity that no weight reaches stays where it is (`_weighted_sum`);
- key heads are never repeated: the query heads of a group are extra rows of one matmul;
- the backward pass recomputes the weights, so nothing of size seqlen_q * seqlen_k lives between forward and backward;
- where batch * num_heads * seqlen_q * seqlen_k is large, query rows are taken in chunks, forward and backward, and
  memory is that of one chunk of scores.

Shapes inside: query and out `[batch, num_heads, seqlen_q, dim]`, key and value `[batch, num_kv_heads, seqlen_k, dim]`,
scores `[batch, num_heads, seqlen_q, seqlen_k]`. The equations are those of `reference.py`.
"""

import collections
import functools
import math

import tensorflow as tf

from attn_ops import masks
from attn_ops.tensorflow import dynamic_sizes, philox, place
from attn_ops.tensorflow.runtime_checks import at_least_1, canonical_extents, checked, extents

# Scores that query_chunk="auto" computes in one piece, and the scores of a chunk when there are more.
UNCHUNKED_SCORES = 2**24
CHUNK_SCORES = 2**22

# Some query rows and what belongs to them; bias (or None) and masks may broadcast along the rows.
_Block = collections.namedtuple("_Block", "rows q bias masks")


@tf.autograph.experimental.do_not_convert
def attention(call, query_chunk="auto", in_xla=False):
    """Scaled dot-product attention.

    Args:
      call: an `AttentionCall`.
      query_chunk: how many query rows to take at a time: an integer, None for all, or "auto": all, unless that is
        more than `UNCHUNKED_SCORES` scores; then chunks of about `CHUNK_SCORES` scores, and never less than one row.
        Second derivatives and forward-mode ones are only promised for None.
      in_xla: that only XLA will run what is made here, where that cannot be seen.
    Returns:
      out in the shape and dtype of query (with value_dim), and lse `[batch, num_heads, seqlen_q]` in float32, or
      float64 for float64. Both are differentiable with respect to query, key, value and bias. Only where
      `call.return_lse` asks for it is lse -inf for rows that see no key; it is anything finite otherwise.
    Raises:
      ValueError: for another query_chunk.
      tf.errors.InvalidArgumentError: for what only a running graph can know (runtime_checks.py).
    """
    if query_chunk not in (None, "auto") and (not isinstance(query_chunk, int) or query_chunk < 1):
        raise ValueError(f"composite.attention: query_chunk must be None, 'auto' or at least 1, got {query_chunk!r}")
    room = _room(call, in_xla)
    if room is not None:
        out, lse = _attention(room.call, query_chunk)
        return room.cut_out(out), room.cut_lse(lse)
    return _attention(call, query_chunk)


def _attention(call, query_chunk):
    with tf.name_scope("scaled_dot_product_attention"):
        problem = _Problem(checked(call))
        rows = _chunk_rows(problem, query_chunk)
        steps = problem if rows is None else _Chunks(problem, rows)

        @tf.custom_gradient
        def run(q, k, v, *bias):
            inputs = (q, k, v, *bias)
            # Tapes would record the inside: eager ones keep it, those of graphs, where they are nested or persistent,
            # what every chunk of a loop needs. But in graphs forward-mode derivatives need the way through it.
            watched = not tf.executing_eagerly() and place.in_forward_mode(inputs)
            out, lse = steps.forward(*(inputs if watched else map(tf.stop_gradient, inputs)))

            def gradient(d_out, d_lse):
                # A function of the inputs alone, so that it can itself be differentiated.
                return [tf.cast(d, x.dtype) for d, x in zip(steps.backward(d_out, d_lse, *inputs), inputs)]

            return (out, lse), gradient

        out, lse = run(problem.query(), problem.key(), problem.value(), *steps.bias())
        return problem.to_layout(tf.cast(out, call.query.dtype)), lse


@tf.autograph.experimental.do_not_convert
def attention_weights(call, lse=None):
    """The softmax before dropout: `[batch, num_heads, seqlen_q, seqlen_k]`, query's dtype.

    From `lse` where that is given. Dense: for plots and for models that return their scores. Differentiable with
    respect to query, key, bias and lse.
    """
    room = _room(call)
    if room is not None:
        return room.cut_weights(_attention_weights(room.call, None if lse is None else room.like_lse(lse)))
    return _attention_weights(call, lse)


def _attention_weights(call, lse):
    with tf.name_scope("attention_weights"):
        problem = _Problem(checked(call))
        s, seen = problem.scores(problem.block(problem.query(), *problem.bias()), problem.key())
        if lse is None:
            e, total, *_ = _softmax_terms(s, seen)
            return tf.cast(_select(seen, e / total), call.query.dtype)
        lse = tf.cast(lse, s.dtype)[..., None]
        # Selected before the subtraction too: the gradient of -inf - -inf would be NaN.
        difference = _select(seen, s) - _select(_above_minus_inf(lse), lse)
        p = _select(seen, tf.exp(tf.minimum(difference, 0.0)))
        return tf.cast(p, call.query.dtype)


def _room(call, in_xla=False):
    """The `dynamic_sizes.Room` of a call in a function that XLA compiles, whose loops over rows need known sizes; or
    None."""
    if not (in_xla or place.in_xla()) or not dynamic_sizes.any_unknown(call) or not place.with_static_size():
        return None
    return None if place.in_forward_mode(call.differentiable()) else dynamic_sizes.Room(call)


class _Problem:
    """The parts of a call that are not differentiated, and the mathematics of a block of query rows.

    `forward` and `backward` take all rows at once.
    """

    def __init__(self, call):
        self.call = call
        self.dtype = tf.float64 if call.query.dtype == tf.float64 else tf.float32
        self.batch, self.num_heads, self.seqlen_q, self.head_dim = canonical_extents(call.query, call.layout)
        _, self.num_kv_heads, self.seqlen_k, self.value_dim = canonical_extents(call.value, call.layout)
        self.group_size = self.num_heads // at_least_1(self.num_kv_heads)
        self.query_lengths = _lengths(call.query_lengths)
        self.key_lengths = _lengths(call.key_lengths)

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

    def bias(self):
        return () if self.call.bias is None else (self.call.bias,)

    def to_layout(self, x):
        """Between `layout` and `[batch, heads, seqlen, dim]`, either way."""
        return tf.transpose(x, [0, 2, 1, 3]) if self.call.layout == "BSHD" else x

    def forward(self, q, k, v, bias=None):
        """out and lse."""
        return self.forward_block(self.block(q, bias), k, v)

    def backward(self, d_out, d_lse, q, k, v, bias=None):
        """The gradients of q, k, v and, if there is one, bias."""
        return self.backward_block(self.block(q, bias), k, v, d_out, d_lse)

    def block(self, q, bias=None):
        """All rows."""
        return _Block(tf.range(self.seqlen_q), q, bias, self.call.masks)

    def forward_block(self, block, k, v):
        s, seen = self.scores(block, k)
        e, total, m, empty = _softmax_terms(s, seen)
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
        s, seen = self.scores(block, k)
        masked = seen is not None
        e, total, *_ = _softmax_terms(s, seen)
        # Selected, since in a row of NaN even hidden weights would be NaN.
        p = _select(seen, e / total)
        dp = self._products(d_out, v)
        dropped_p = p
        keep = self._keep(block)
        if keep is not None:
            dropped_p, dp = self._drop(keep, p), self._drop(keep, dp)
        weighed = tf.not_equal(p, 0.0) if masked else None
        delta = tf.reduce_sum(_select(weighed, p * dp), -1, keepdims=True)
        ds = _select(weighed, p * (dp - (delta - d_lse[..., None])))
        dv = _weighted_sum(self._grouped(dropped_p), self._grouped(d_out), masked or keep is not None, True)
        # A NaN or infinity of q or k that counts has made ds NaN already; the others must not meet the zeros of ds.
        q = self._grouped(block.q)
        q, k = (_finite(q), _finite(k)) if masked else (q, k)
        ds_grouped = self._grouped(ds)
        dq = self._ungrouped(tf.matmul(ds_grouped, k), d_lse)
        dk = tf.matmul(ds_grouped, q, transpose_a=True)
        if block.bias is None:
            return dq, dk, dv
        return dq, dk, dv, _sum_to_shape_of(block.bias, ds)

    def scores(self, block, k):
        """The scores, and which of them are seen; None where all are. Hidden scores may be anything."""
        s = self._products(block.q, k)
        seqlen_q, seqlen_k = tf.cast(self.seqlen_q, tf.int64), tf.cast(self.seqlen_k, tf.int64)
        visible = masks.interval(
            tf.cast(block.rows, tf.int64)[:, None],
            tf.range(seqlen_k),
            seqlen_q,
            seqlen_k,
            self.query_lengths,
            self.key_lengths,
            self.call.window_left,
            self.call.window_right,
            self.call.bottom_right,
        )
        visible += block.masks
        if block.bias is not None:
            bias = tf.cast(block.bias, self.dtype)
            visible.append(_above_minus_inf(bias))
            s = _biased(s, _select(visible[-1], bias))
        # Nor may a mask or bias broadcast the scores.
        shape = [self.batch, self.num_heads, extents(block.q)[2], self.seqlen_k]
        if not visible:
            return tf.reshape(s, shape), None
        seen = functools.reduce(tf.logical_and, [*visible, _above_minus_inf(s)])
        return tf.reshape(s, shape), tf.reshape(seen, shape)

    def _keep(self, block):
        """Which weights dropout keeps, or None."""
        if not self.call.dropout_rate:
            return None
        return philox.keep(
            self.call.seed, self.batch, self.num_heads, block.rows, self.seqlen_k, self.call.dropout_rate
        )

    def _drop(self, keep, x):
        return _select(keep, x * tf.constant(1.0 / (1.0 - self.call.dropout_rate), self.dtype))

    def _products(self, rows, keys):
        """`[batch, num_heads, n, dim]` times `[batch, num_kv_heads, seqlen_k, dim]`, over dim."""
        return self._ungrouped(tf.matmul(self._grouped(rows), keys, transpose_b=True), rows)

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


class _Chunks:
    """`forward` and `backward` of `_Problem`, a chunk of `rows` query rows at a time."""

    def __init__(self, problem, rows):
        self.problem = problem
        seqlen_q = problem.seqlen_q
        # There is always one full chunk, of no rows if there are none; `rest` are those that do not fill another.
        static = isinstance(rows, int) and isinstance(seqlen_q, int)
        self.rows = min(rows, seqlen_q) if static else tf.minimum(rows, seqlen_q)
        self.count = at_least_1(seqlen_q // at_least_1(self.rows))
        self.rest = seqlen_q - self.count * self.rows
        self.masks = tuple(self._with_known_rows(mask) for mask in problem.call.masks)

    def bias(self):
        return tuple(self._with_known_rows(bias) for bias in self.problem.bias())

    def forward(self, q, k, v, bias=None):
        def step(start, n):
            return self.problem.forward_block(self._block(start, n, q, bias), k, v)

        return self._run(step, (None, None))

    def backward(self, d_out, d_lse, q, k, v, bias=None):
        def step(start, n):
            d = [_slice_rows(x, start, n) for x in (d_out, d_lse)]
            return self.problem.backward_block(self._block(start, n, q, bias), k, v, *d)

        sums = (None, tf.zeros_like(k), tf.zeros_like(v))
        if bias is not None:
            sums += (tf.zeros_like(bias, self.problem.dtype) if bias.shape[2] == 1 else None,)
        return self._run(step, sums)

    def _run(self, step, sums):
        """The results of `step(start, n)` over all rows: added to `sums`, joined along the rows where that is None."""

        def body(i, *state):
            results = step(i * self.rows, self.rows)
            return i + 1, *(s.write(i, r) if s_0 is None else s + r for s, s_0, r in zip(state, sums, results))

        state = [tf.TensorArray(self.problem.dtype, self.count) if s is None else s for s in sums]
        _, *state = tf.while_loop(
            lambda i, *_: i < self.count,
            body,
            (0, *state),
            maximum_iterations=self.count,
            parallel_iterations=1,  # more would hold the scores of as many chunks
        )
        _let_xla_fold_shapes(state)
        state = [_join_rows(s.stack()) if s_0 is None else s for s, s_0 in zip(state, sums)]
        if isinstance(self.rest, int) and self.rest == 0:
            return state
        rest = step(self.count * self.rows, self.rest)
        return [tf.concat([s, r], 2) if s_0 is None else s + r for s, s_0, r in zip(state, sums, rest)]

    def _block(self, start, n, q, bias):
        rows = start + tf.range(n)
        bias = None if bias is None else _slice_scores(bias, start, n)
        return _Block(rows, _slice_rows(q, start, n), bias, tuple(_slice_scores(m, start, n) for m in self.masks))

    def _with_known_rows(self, x):
        """`x` with the rows written out where it cannot be seen whether it broadcasts along them."""
        if x.shape[2] is not None:
            return x
        batch, heads, _, seqlen_k = extents(x)
        return tf.broadcast_to(x, [batch, heads, self.problem.seqlen_q, seqlen_k])


def _let_xla_fold_shapes(state):
    """Lets XLA look through the loop that made ``state`` for the extents inside it, which it must know.

    TensorFlow asks for that itself where it traces for XLA. But any other graph may come to be compiled by it too.
    """
    if tf.executing_eagerly():
        return
    for x in state:
        op = (x.flow if isinstance(x, tf.TensorArray) else x).op
        while op.type == "Identity":
            op = op.inputs[0].op
        if op.type in ("While", "StatelessWhile"):
            place.set_attribute(op, "_xla_propagate_compile_time_consts")
            return


def _chunk_rows(problem, query_chunk):
    """How many rows to take at a time, an integer or int32 scalar; None for all."""
    if query_chunk is None:
        return None
    if not tf.executing_eagerly() and not place.can_set_attributes():
        return None  # see `_let_xla_fold_shapes`
    batch = problem.batch
    if not isinstance(batch, int) and place.exporting():
        # LiteRT has no dynamic loop over rows. One entry decides, so that no loop is exported where it needs none.
        batch = 1
    dims = (batch, problem.num_heads, problem.seqlen_k)
    known = all(isinstance(n, int) for n in (*dims, problem.seqlen_q))
    if query_chunk != "auto":
        return None if known and query_chunk >= problem.seqlen_q else query_chunk
    if known:
        row = math.prod(dims)
        return None if row * problem.seqlen_q <= UNCHUNKED_SCORES else max(CHUNK_SCORES // row, 1)
    row = at_least_1(tf.reduce_prod([tf.cast(n, tf.int64) for n in dims]))
    seqlen_q = tf.cast(problem.seqlen_q, tf.int64)
    rows = tf.where(row * seqlen_q <= UNCHUNKED_SCORES, seqlen_q, tf.maximum(CHUNK_SCORES // row, 1))
    return tf.cast(rows, tf.int32)


def _lengths(lengths):
    """As int64 `[batch, 1, 1, 1]`."""
    return None if lengths is None else tf.cast(lengths, tf.int64)[:, None, None, None]


def _biased(s, bias):
    """s + bias. A sum of finite numbers stays finite: -inf would hide a key, inf would make the row NaN."""
    total = s + bias
    overflowed = ~tf.math.is_finite(total) & tf.math.is_finite(s) & tf.math.is_finite(bias)
    return tf.where(overflowed, tf.sign(total) * total.dtype.max, total)


def _softmax_terms(s, seen):
    """exp(s - m) with m the largest score of a row, 0 where hidden; and, `[..., 1]` each, their sum (1 for an empty
    row), m, and which rows are empty.

    Without infinities, which `tf.debugging.enable_check_numerics` would take for errors.
    """
    lowest = tf.constant(s.dtype.min, s.dtype)
    visible = s if seen is None else tf.where(seen, s, lowest)
    if s.shape[-1] == 0:
        m = tf.zeros_like(tf.reduce_sum(s, -1, keepdims=True))
    else:
        # m is only a shift: its derivative cancels.
        m = tf.stop_gradient(tf.reduce_max(visible, -1, keepdims=True))
    m = _select(_above_minus_inf(m), m)
    # Hidden scores become m before the subtraction: lowest - m may be beyond the range, and NaN has no derivative of 0.
    e = tf.exp((s if seen is None else tf.where(seen, s, m)) - m)
    e = _select(seen, e)
    total = tf.reduce_sum(e, -1, keepdims=True)
    empty = tf.equal(total, 0.0)
    return e, tf.where(empty, tf.ones((), s.dtype), total), m, empty


def _weighted_sum(weights, values, masked, transpose_weights=False):
    """`weights @ values` for weights >= 0; if `masked`, a weight of exactly 0 selects its value out, NaN or not.

    A row that weighs a value with NaN or infinity in it gets, on top, all the NaN and infinity of its batch entry and
    head: right for those that weigh none, while of the others more elements may be NaN than in the exact sum.
    """
    if not masked:
        return tf.matmul(weights, values, transpose_a=transpose_weights)
    bad = tf.logical_not(tf.math.is_finite(values))
    clean, spill = _select(~bad, values), tf.reduce_sum(_select(bad, values), -2, keepdims=True)
    has_bad = tf.cast(tf.reduce_any(bad, -1, keepdims=True), values.dtype)
    meets_bad = tf.matmul(weights, has_bad, transpose_a=transpose_weights) > 0
    return tf.matmul(weights, clean, transpose_a=transpose_weights) + _select(meets_bad, spill)


def _select(condition, x):
    """`x` where the condition is None or holds, else 0."""
    return x if condition is None else tf.where(condition, x, tf.zeros((), x.dtype))


def _above_minus_inf(x):
    """Where `x` is not -inf, NaN included; without that constant, which `tf.debugging.enable_check_numerics` finds."""
    # Not the negation of "below": TensorFlow's optimiser turns that into "at least", and NaN with it.
    return (x >= x.dtype.min) | tf.math.is_nan(x)


def _finite(x):
    return _select(tf.math.is_finite(x), x)


def _sum_to_shape_of(x, full):
    """`full` summed over the axes along which `x` broadcasts to its shape."""
    axes, _ = tf.raw_ops.BroadcastGradientArgs(s0=tf.shape(x), s1=tf.shape(full))
    return tf.reshape(tf.reduce_sum(full, axes), tf.shape(x))


def _slice_rows(x, start, n):
    """Rows start .. start + n - 1 of `[a, b, rows, ...]`."""
    shape = extents(x)
    return tf.slice(x, [0, 0, start] + [0] * (len(shape) - 3), shape[:2] + [n] + shape[3:])


def _slice_scores(x, start, n):
    """The same of a mask or bias, which may have a single row that broadcasts."""
    return x if x.shape[2] == 1 else _slice_rows(x, start, n)


def _join_rows(chunks):
    """`[count, a, b, rows, ...]` to `[a, b, count * rows, ...]`."""
    shape = extents(chunks)
    rank = len(shape)
    chunks = tf.transpose(chunks, [1, 2, 0, *range(3, rank)])
    return tf.reshape(chunks, [shape[1], shape[2], shape[0] * shape[3], *shape[4:]])

"""Attention in TensorFlow operations: runs everywhere, eagerly, in graphs, and compiled by XLA.

The same function as the fused kernels, and what runs where they cannot. Against the usual composition of matmul,
softmax and matmul:
- scores, softmax and sums are float32 for every 16-bit and float32 input (float64 for float64), with the scale on the
  query before the product, so that 16-bit logits neither round nor overflow;
- a row that sees no key gives zeros, and NaN or infinity that no weight reaches stays where it is (`rows._weighted_sum`);
- key heads are never repeated: the query heads of a group are extra rows of one matmul;
- the backward pass recomputes the weights, so nothing of size seqlen_q * seqlen_k lives between forward and backward;
- where batch * num_heads * seqlen_q * seqlen_k is large, query rows are taken in chunks, forward and backward, and
  memory is that of one chunk of scores.

The mathematics is in rows.py.
"""

import functools
import math

import tensorflow as tf

from attn_ops.call import out_of_range, pages
from attn_ops.generation import int8
from attn_ops.tensorflow import custom_gradient, dynamic_sizes, place, rows, xp
from attn_ops.tensorflow.as_written import as_written
from attn_ops.tensorflow.runtime_checks import at_least_1, checked, checked_pages, extents

# Scores that query_chunk="auto" computes in one piece, and the scores of a chunk when there are more.
UNCHUNKED_SCORES = 2**24
CHUNK_SCORES = 2**22

@as_written
def attention(call, query_chunk="auto", in_xla=False, exporting=False, vectorized=False):
    """Scaled dot-product attention.

    Args:
      call: an `AttentionCall`.
      query_chunk: how many query rows to take at a time: an integer, None for all, or "auto": all, unless that is
        more than `UNCHUNKED_SCORES` scores; then chunks of about `CHUNK_SCORES` scores, and never less than one row.
        Second derivatives and forward-mode ones are only promised for None.
      in_xla: that only XLA will run what is made here, where that cannot be seen.
      exporting: that what is made here is exported, perhaps for a runtime without loops over unknown rows: "auto" then
        decides by one entry of an unknown batch.
      vectorized: that what is made here is rewritten for all examples at once, which loses the gradients of
        `tf.custom_gradient`: its operations are to have the right ones of themselves. Without chunks.
    Returns:
      out in the shape and dtype of query (with value_dim), and lse `[batch, num_heads, seqlen_q]` in float32, or
      float64 for float64. Both are differentiable with respect to query, key, value, bias, relative_bias and sinks. Only where
      `call.return_lse` asks for it is lse -inf for rows that see no key (and have no sink); it is anything finite
      otherwise.
    Raises:
      ValueError: for another query_chunk.
      tf.errors.InvalidArgumentError: for what only a running graph can know (runtime_checks.py); XLA has NaN instead.
    """
    if query_chunk not in (None, "auto") and (not isinstance(query_chunk, int) or query_chunk < 1):
        raise ValueError(f"composite.attention: query_chunk must be None, 'auto' or at least 1, got {query_chunk!r}")
    wrong = out_of_range.entries(xp, call) if in_xla or place.in_xla() else None
    call = checked_pages(call, functools.partial(out_of_range.no_pages, xp))
    call = pages.gathered(xp, int8.dequantized(xp, call))
    room = _room(call, in_xla)
    out, lse = _attention(call if room is None else room.call, query_chunk, exporting, vectorized)
    if room is not None:
        out, lse = room.cut_out(out), room.cut_lse(lse)
    return out_of_range.told(xp, wrong, out), out_of_range.told(xp, wrong, lse)


def _attention(call, query_chunk, exporting, vectorized):
    with tf.name_scope("scaled_dot_product_attention"):
        problem = rows.Problem(checked(call), _masked_products)
        # In graphs forward-mode derivatives need the way through the inside, without a loop.
        watched = _in_forward_mode(call.differentiable())
        steps = _steps(problem, None if watched or vectorized else query_chunk, exporting)
        inputs = problem.query(), problem.key(), problem.value(), *steps.others()
        if vectorized:
            out, lse = steps.forward(*inputs)
        elif watched or tf.executing_eagerly():
            out, lse = _with_gradient(steps, inputs, forward_mode=watched)
        else:
            out, lse = _with_gradient_in_graphs(steps, [*map(custom_gradient.own, inputs)])
        return problem.to_layout(tf.cast(out, call.query.dtype)), lse


def _in_forward_mode(tensors):
    """Whether accumulators see what a graph makes of them."""
    return not tf.executing_eagerly() and place.in_forward_mode(tensors)


def _masked_products(x, y):
    """`rows.products` some of which count for nothing: NaN and infinity do not reach derivatives through those."""
    # Vectorization forgets what gradient it was given, and forward mode around a function needs the way through the inside:
    # the same at the price of two.
    if place.in_vectorization() or _in_forward_mode([x, y]):
        exact = rows.products(tf.stop_gradient(x), tf.stop_gradient(y))
        return tf.where(tf.math.is_finite(exact), rows.products(rows.finite(x), rows.finite(y)), exact)

    def gradient(results, kept, cotangents, by_tape):
        # A NaN or infinity that counts has made the score NaN already; the others must not meet the zeros of gradients.
        (d,), (own_x, own_y) = cotangents, map(custom_gradient.own, (x, y))
        return tf.matmul(d, rows.finite(own_y)), tf.matmul(d, rows.finite(own_x), transpose_a=True)

    return custom_gradient.apply(lambda *factors: ([rows.products(*factors)], []), gradient, [x, y])[0]


def _with_gradient(steps, inputs, forward_mode):
    """(out, lse) of ``steps``, whose backward is the gradient; in ``forward_mode`` accumulators see the inside too."""

    @tf.custom_gradient
    def run(*inputs):
        # Tapes would record the inside, and eager ones keep it.
        out, lse = steps.forward(*(inputs if forward_mode else map(tf.stop_gradient, inputs)))
        return (out, lse), lambda d_out, d_lse: _gradients(steps, d_out, d_lse, inputs)

    return run(*inputs)


def _with_gradient_in_graphs(steps, inputs):
    """The same in graphs. `tf.vectorized_map` of a function that was traced before rewrites its operations and forgets
    which gradient they were given: then those of the inside count, which are right where nothing stops them."""

    def gradient(results, kept, cotangents, by_tape):
        return _gradients(steps, *map(custom_gradient.own, cotangents), [*map(custom_gradient.own, inputs)])

    return custom_gradient.apply(lambda *inputs: (steps.forward(*inputs), []), gradient, inputs)


def _gradients(steps, d_out, d_lse, inputs):
    """A function of the inputs and the cotangents alone, so that it can itself be differentiated."""
    return [tf.cast(d, x.dtype) for d, x in zip(steps.backward(d_out, d_lse, *inputs), inputs)]


@as_written
def attention_weights(call, lse=None):
    """The softmax before dropout: `[batch, num_heads, seqlen_q, seqlen_k]`, query's dtype.

    From `lse` where that is given. Dense: for plots and for models that return their scores. Differentiable with
    respect to query, key, bias, relative_bias, sinks and lse.
    """
    wrong = out_of_range.entries(xp, call) if place.in_xla() else None
    room = _room(call)
    if room is not None:
        weights = room.cut_weights(_attention_weights(room.call, None if lse is None else room.like_lse(lse)))
    else:
        weights = _attention_weights(call, lse)
    return out_of_range.told(xp, wrong, weights)


def _attention_weights(call, lse):
    with tf.name_scope("attention_weights"):
        problem = rows.Problem(checked(call), _masked_products)
        block = problem.block(problem.query(), problem.others())
        s, seen, _ = problem.scores(block, problem.key())
        if lse is None:
            e, _, total, *_ = rows.softmax_terms(s, seen, block.sinks)
            return tf.cast(rows.select(seen, e / total), call.query.dtype)
        lse = tf.cast(lse, s.dtype)[..., None]
        # Selected before the subtraction too: the gradient of -inf - -inf would be NaN.
        difference = rows.select(seen, s) - rows.select(rows.above_minus_inf(lse), lse)
        p = rows.select(seen, tf.exp(tf.minimum(difference, 0.0)))
        return tf.cast(p, call.query.dtype)


def gradients(call, cotangents, wanted=None, **options):
    """The gradients of `attention` with respect to the differentiable inputs of the call.

    Args:
      call: an `AttentionCall` whose inputs are `separate`.
      cotangents: [d_out] or [d_out, d_lse].
      wanted: for which of these inputs, by number; None for all.
      **options: of `attention`.
    """
    inputs = call.differentiable()
    if wanted is None:
        wanted = range(len(inputs))
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = attention(call, **options)
    return tape.gradient(
        outputs[: len(cotangents)],  # without d_lse only `out` counts
        [inputs[i] for i in wanted],
        output_gradients=list(cotangents),
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )


def separate(call):
    """``call`` with copies: one tensor may be key and value at once, and a tape would give each the gradient of both."""
    return call.with_differentiable([tf.identity(x) for x in call.differentiable()])


def _room(call, in_xla=False):
    """The `dynamic_sizes.Room` of a call in a function that XLA compiles, whose loops over rows need known sizes; or
    None."""
    if not (in_xla or place.in_xla()) or not dynamic_sizes.any_unknown(call) or not place.with_static_size():
        return None
    return None if place.in_forward_mode(call.differentiable()) else dynamic_sizes.Room(call)


class _NoRows:
    """`forward` and `backward` of `rows.Problem` where nothing is to be computed, beside extents that may be huge."""

    def __init__(self, problem):
        self.problem = problem
        self.shape = problem.rows_shape()

    def others(self):
        return self.problem.others()

    def forward(self, *inputs):
        problem = self.problem
        return tf.zeros([*self.shape, problem.value_dim], problem.dtype), tf.zeros(self.shape, problem.dtype)

    def backward(self, d_out, d_lse, *inputs):
        return [tf.zeros_like(x) for x in inputs]


class _Chunks:
    """`forward` and `backward` of `rows.Problem`, a chunk of query rows at a time."""

    def __init__(self, problem, chunk):
        self.problem = problem
        seqlen_q = problem.seqlen_q
        # There is always one full chunk, of no rows if there are none; `rest` are those that do not fill another.
        static = isinstance(chunk, int) and isinstance(seqlen_q, int)
        self.rows = min(chunk, seqlen_q) if static else tf.minimum(chunk, seqlen_q)
        self.count = at_least_1(seqlen_q // at_least_1(self.rows))
        self.rest = seqlen_q - self.count * self.rows
        self.masks = tuple(self._with_known_rows(mask) for mask in problem.call.masks)

    def others(self):
        others = self.problem.others()
        if self.problem.call.bias is None:
            return others
        return self._with_known_rows(others[0]), *others[1:]

    def forward(self, q, k, v, *others):
        def step(start, n):
            return self.problem.forward_block(self._block(start, n, q, others), k, v)

        return self._run(step, (None, None))

    def backward(self, d_out, d_lse, q, k, v, *others):
        def step(start, n):
            d = [_slice_rows(x, start, n) for x in (d_out, d_lse)]
            return self.problem.backward_block(self._block(start, n, q, others), k, v, *d)

        by_row = self.problem.named(others)["bias"]
        by_row = None if by_row is None or by_row.shape[2] == 1 else by_row
        sums = [tf.zeros_like(x, self.problem.dtype) if x is not by_row else None for x in (k, v, *others)]
        return self._run(step, (None, *sums))

    def _run(self, step, sums):
        """The results of `step(start, n)` over all rows: added to `sums`, joined along the rows where that is None."""

        def body(i, *state):
            results = step(i * self.rows, self.rows)
            return i + 1, *(s.write(i, r) if s_0 is None else _plus(s, r) for s, s_0, r in zip(state, sums, results))

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
        return [tf.concat([s, r], 2) if s_0 is None else _plus(s, r) for s, s_0, r in zip(state, sums, rest)]

    def _block(self, start, n, q, others):
        named = self.problem.named(others)
        if named["bias"] is not None:
            named["bias"] = _slice_scores(named["bias"], start, n)
        masks = tuple(_slice_scores(m, start, n) for m in self.masks)
        return rows.Block(start + tf.range(n), _slice_rows(q, start, n), masks=masks, **named)

    def _with_known_rows(self, x):
        """`x` with the rows written out where it cannot be seen whether it broadcasts along them."""
        if x.shape[2] is not None:
            return x
        batch, heads, _, seqlen_k = extents(x)
        return tf.broadcast_to(x, [batch, heads, self.problem.seqlen_q, seqlen_k])


def _plus(total, x):
    """The sum of two of one shape, of which a loop must keep all that is known: an extent of 1 could broadcast to another."""
    x.set_shape(total.shape)
    return total + x


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


def _steps(problem, query_chunk, exporting):
    """What computes ``problem``, and in which pieces."""
    if any(isinstance(n, int) and n == 0 for n in problem.rows_shape()):
        return _NoRows(problem)
    chunk = _chunk_rows(problem, query_chunk, exporting)
    return problem if chunk is None else _Chunks(problem, chunk)


def _chunk_rows(problem, query_chunk, exporting):
    """How many rows to take at a time, an integer or int32 scalar; None for all."""
    if query_chunk is None:
        return None
    if not tf.executing_eagerly() and not place.can_set_attributes():
        return None  # see `_let_xla_fold_shapes`
    batch = problem.batch
    if not isinstance(batch, int) and exporting:
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
    chunk = tf.where(row * seqlen_q <= UNCHUNKED_SCORES, seqlen_q, tf.maximum(CHUNK_SCORES // row, 1))
    return tf.cast(chunk, tf.int32)


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

"""Attention in JAX operations: runs on every platform, and has derivatives of every order and both modes.

The same function as the fused kernels, and what runs where they cannot, as tensorflow/composite.py is there:
- scores, softmax and sums are float32 for every 16-bit and float32 input (float64 for float64), with the scale on the
  query before the product;
- a row that sees no key gives zeros, and NaN or infinity in masked queries, keys and values stays where it is;
- key heads are never repeated: the query heads of a group are one more axis of the product;
- the backward pass recomputes the weights (`jax.checkpoint`), and where there are many scores, query rows are taken in
  chunks, so that memory is that of one chunk of scores.

Shapes inside: query and out `[batch, num_heads, seqlen_q, dim]`, key and value `[batch, num_kv_heads, seqlen_k, dim]`,
scores `[batch, num_heads, seqlen_q, seqlen_k]`.
"""

from __future__ import annotations

import functools
import math
import operator

import jax
import jax.numpy as jnp

from attn_ops.call import out_of_range, pages
from attn_ops.call.attention_call import canonical
from attn_ops.generation import int8
from attn_ops.jax import philox, place, xp
from attn_ops.jax.call import Arrays, Options, accumulator
from attn_ops.masks import key_range

# Scores that are computed in one piece, and the scores of a chunk when there are more.
UNCHUNKED_SCORES = 2**24
CHUNK_SCORES = 2**22


def attention(options: Options, arrays: Arrays, chunk_rows: int | None = None):
    """out in the shape and dtype of query (with value_dim), and lse `[batch, num_heads, seqlen_q]`, or None unless
    ``options.return_lse``; ``chunk_rows`` as in `with_statistics`."""
    return with_statistics(options, arrays, chunk_rows)[:2]


@place.any_ranks
def with_statistics(options: Options, arrays: Arrays, chunk_rows: int | None = None):
    """(out, lse, statistics): as `attention`, and what the kernels leave for their backward, `[batch, num_heads,
    seqlen_q, 2]`: the maximum of a row's scores and its sink, and the sum of exp(score - maximum) over them; both 0
    where there are none.

    ``chunk_rows`` is how many query rows to take at a time; None for all, unless that is more than `UNCHUNKED_SCORES`
    scores. Extents that `jax.export` leaves open, or Keras for a batch of any size, are taken in one piece.
    """
    wrong = out_of_range.entries(xp, arrays, options.layout)
    arrays = pages.gathered(xp, int8.dequantized(xp, arrays), options.layout)
    batch, num_heads, seqlen_q, _ = canonical(arrays.query.shape, options.layout)
    seqlen_k = canonical(arrays.key.shape, options.layout)[2]
    if chunk_rows is None:
        row = batch * num_heads * seqlen_k
        whole = not isinstance(row * seqlen_q, int) or row * seqlen_q <= UNCHUNKED_SCORES
        chunk_rows = 0 if whole else max(CHUNK_SCORES // row, 1)
    q, k, v = _inputs(options, arrays)

    # What has rows is an argument, and cut; bias and masks that broadcast along the rows are not.
    cut = [q] + [x if x is not None and x.shape[2] != 1 else None for x in (arrays.bias, *arrays.masks)]

    count = seqlen_q // chunk_rows if 0 < chunk_rows < seqlen_q else 0

    # Without a loop XLA would find that the backward pass computes the scores again, and keep the first ones.
    @functools.partial(jax.checkpoint, prevent_cse=not count)
    def block(start, k, v, q, *cut_scores):
        whole = (arrays.bias, *arrays.masks)
        bias, *dense = [w if c is None else c for w, c in zip(whole, cut_scores)]
        s, visible = _scores(options, arrays, (seqlen_q, seqlen_k), start, q, k, bias, dense)
        return _softmax(options, arrays, start, s, visible, v)

    results = []
    if count:
        starts = jnp.arange(count) * chunk_rows
        chunks = [x if x is None else _chunks(x, count, chunk_rows) for x in cut]
        results.append([_joined(x) for x in jax.lax.map(lambda xs: block(xs[0], k, v, *xs[1:]), (starts, *chunks))])
    start = count * chunk_rows
    if not count or start < seqlen_q:
        results.append(block(start, k, v, *(x if x is None else x[:, :, start:] for x in cut)))
    out, m, total = (jnp.concatenate(parts, 2) if len(parts) > 1 else parts[0] for parts in zip(*results))
    lse = None
    if options.return_lse:
        empty = total == 0.0
        lse = out_of_range.told(xp, wrong, jnp.where(empty, -math.inf, m + jnp.log(jnp.where(empty, 1.0, total))))
    out = out_of_range.told(xp, wrong, out).astype(arrays.query.dtype)
    return _to_layout(options, out), lse, jnp.stack([m, total], -1)


def gradients(options: Options, wanted: tuple[str, ...], arrays: Arrays, d_out, d_lse):
    """The gradients of the ``wanted`` of ``arrays.differentiable()``, in that order; ``d_lse`` is None without an lse."""

    def run(*differentiable):
        return attention(options, arrays._replace(**dict(zip(wanted, differentiable))))

    return jax.vjp(run, *(getattr(arrays, name) for name in wanted))[1]((d_out, d_lse))


@place.any_ranks
def attention_weights(options: Options, arrays: Arrays, lse):
    """The softmax before dropout, recomputed from ``lse``: `[batch, num_heads, seqlen_q, seqlen_k]`, query's dtype."""
    q, k, _ = _inputs(options, arrays)
    s, _ = _scores(options, arrays, (q.shape[2], k.shape[2]), 0, q, k, arrays.bias, arrays.masks)
    lse = lse.astype(s.dtype)[..., None]
    # Selected before the subtraction too: the gradient of -inf - -inf would be NaN.
    seen = s != -math.inf
    difference = _select(seen, s) - _select(lse != -math.inf, lse)
    weights = _select(seen, jnp.exp(jnp.minimum(difference, 0.0)))
    wrong = out_of_range.entries(xp, arrays, options.layout)
    return out_of_range.told(xp, wrong, weights).astype(arrays.query.dtype)


def _inputs(options, arrays):
    """The scaled query, key and value in the dtype of the scores, heads first."""
    dtype = accumulator(arrays.query.dtype)
    q, k, v = (_to_layout(options, x.astype(dtype)) for x in (arrays.query, arrays.key, arrays.value))
    scale = 1.0 / math.sqrt(q.shape[-1]) if options.scale is None else options.scale
    return q * jnp.asarray(scale, dtype), k, v


def _to_layout(options, x):
    """Between `layout` and `[batch, heads, seqlen, dim]`, either way."""
    return x.swapaxes(1, 2) if options.layout == "BSHD" else x


def _scores(options, arrays, seqlens, start, q, k, bias, dense):
    """The scores of the rows from ``start`` on, -inf where hidden, and whether any can be hidden."""
    rows = start + jnp.arange(q.shape[2])
    visible = key_range.interval(
        rows[:, None],
        jnp.arange(seqlens[1]),
        *seqlens,
        _lengths(arrays.query_lengths),
        _lengths(arrays.key_lengths),
        options.window_left,
        options.window_right,
        options.bottom_right,
        _lengths(arrays.query_offset),
    )
    visible += _structured(options, arrays, start, rows, seqlens[1])
    visible += dense
    table = None
    if arrays.relative_bias is not None:
        distances = _diagonals(start + _shift(options, arrays, seqlens), q.shape[2], seqlens[1])
        table = _along_diagonals(_by_distance(arrays.relative_bias, distances), q.shape[2])
        visible.append(table != -math.inf)
    if bias is not None:
        bias = bias.astype(q.dtype)
        visible.append(bias != -math.inf)
    seen = functools.reduce(operator.and_, visible) if visible else None
    capped = options.logits_soft_cap is not None
    product = _masked_products if visible or capped else _products
    s = product(_grouped(q, k.shape[1]), k)
    s = s.reshape(*q.shape[:3], seqlens[1])
    if capped:
        # Hidden scores may be NaN, which would meet the zeros of gradients in the derivative of tanh.
        s = s if seen is None else _select(seen, s)
        s = options.logits_soft_cap * jnp.tanh(s / options.logits_soft_cap)
    if arrays.alibi_slopes is not None:
        own = rows[:, None] + _shift(options, arrays, seqlens)[:, None, None, None]
        distances = (jnp.arange(seqlens[1]) - own).astype(s.dtype)
        s = _biased(s, arrays.alibi_slopes[:, :, None, None] * distances)
    for added in (table, bias):
        s = s if added is None else _biased(s, added)
    return s if seen is None else jnp.where(seen, s, -math.inf), seen is not None


def _structured(options, arrays, start, rows, seqlen_k):
    """Who sees whom by intervals, segments and blocks: conditions that broadcast to the scores."""
    keys, terms = jnp.arange(seqlen_k), []

    def of_rows(x):
        return jax.lax.dynamic_slice_in_dim(x, start, rows.shape[0], 1)[:, None, :, None]

    if arrays.intervals is not None:
        begin, end = map(of_rows, arrays.intervals)
        terms += [keys >= begin, keys < end]
    if arrays.segments is not None:
        q_ids, kv_ids = arrays.segments
        terms.append(of_rows(q_ids) == kv_ids[:, None, None])
    if arrays.blocks is not None:
        of_blocks = jnp.take(arrays.blocks, rows // options.block_q, axis=2, mode="clip")
        terms.append(jnp.take(of_blocks, keys // options.block_k, axis=3, mode="clip"))
    return terms


def _shift(options, arrays, seqlens):
    """How far from key i row i stands: integers `[batch or 1]`."""
    if arrays.query_offset is not None:
        return arrays.query_offset
    if not options.bottom_right:
        return jnp.zeros(1, "int32")
    length_q, length_k = (
        jnp.full(1, seqlen) if lengths is None else lengths
        for seqlen, lengths in zip(seqlens, (arrays.query_lengths, arrays.key_lengths))
    )
    return length_k - length_q


def _diagonals(own, seqlen_q, seqlen_k):
    """The distances j - own_i of the diagonals of so many rows and keys, `[batch or 1, seqlen_q + seqlen_k]`.

    Row 0 stands at ``own``, `[batch or 1]`. The first belongs to no pair.
    """
    return jnp.arange(seqlen_q + seqlen_k) - seqlen_q - own[:, None]


def _by_distance(table, distances):
    """What a table `[num_heads, 2 R + 1]` holds for distances `[batch or 1, n]`: `[batch or 1, num_heads, n]`."""
    reach = table.shape[1] // 2
    return jnp.take(table, jnp.clip(distances, -reach, reach) + reach, axis=1, mode="clip").swapaxes(0, 1)


def _along_diagonals(x, seqlen_q):
    """Values of `_diagonals`, `[a, b, seqlen_q + seqlen_k]`, for each pair: `[a, b, seqlen_q, seqlen_k]`.

    By copies and a change of shape that moves each row one further, whose derivative is a sum of rows: that of a gather
    for each pair would add up one pair after the other.
    """
    a, b, count = x.shape
    rows = jnp.broadcast_to(jnp.pad(x, ((0, 0), (0, 0), (0, 1)))[:, :, None], (a, b, seqlen_q, count + 1))
    shifted = rows.reshape(a, b, seqlen_q * (count + 1))[:, :, seqlen_q:]
    return shifted.reshape(a, b, seqlen_q, count)[..., : count - seqlen_q]


def _softmax(options, arrays, start, s, masked, v):
    """out of these scores, and the two statistics of each row."""
    # m is only a shift: its derivative cancels.
    m = jax.lax.stop_gradient(jnp.max(s, -1, keepdims=True, initial=-math.inf))
    sinks = None if arrays.sinks is None else arrays.sinks[:, None, None]
    if sinks is not None:
        m = jnp.maximum(m, jax.lax.stop_gradient(sinks))
    m = _select(m != -math.inf, m)
    difference = s - m
    if masked:
        # Selected before and after each step: in a row of NaN even hidden weights would be NaN, and so would the
        # derivatives of what is selected only afterwards.
        seen = s != -math.inf
        e = _select(seen, jnp.exp(_select(seen, difference)))
    else:
        e = jnp.exp(difference)
    total = e.sum(-1, keepdims=True)
    weighs_none = total == 0.0
    if sinks is not None:
        there = sinks != -math.inf
        total += _select(there, jnp.exp(_select(there, sinks - m)))
    p = e / jnp.where(total == 0.0, 1.0, total)
    if masked:
        p = _select(seen, p)
    if options.dropout_rate:
        batch, num_heads, n, seqlen_k = s.shape
        rows = start + jnp.arange(n)
        keep = philox.keep(arrays.seed, batch, num_heads, rows, seqlen_k, options.dropout_rate, arrays.origin)
        p = _select(keep, p / (1.0 - options.dropout_rate))
    weigh = _masked_sum if masked or options.dropout_rate else _weighted_sum
    out = weigh(_grouped(p, v.shape[1]), v).reshape(*s.shape[:3], v.shape[3])
    # Selected, since the gradient of out may be NaN in padded rows.
    return _select(~weighs_none, out), m[..., 0], total[..., 0]


def _biased(s, bias):
    """s + bias. A sum of finite numbers stays finite: -inf would hide a key, inf would make the row NaN."""
    total = s + bias
    overflowed = ~jnp.isfinite(total) & jnp.isfinite(s) & jnp.isfinite(bias)
    return jnp.where(overflowed, jnp.copysign(jnp.finfo(s.dtype).max, total), total)


def _lengths(lengths):
    """Integers `[batch]` with the axes of the scores."""
    return None if lengths is None else lengths[:, None, None, None]


def _grouped(x, num_kv_heads):
    """`[batch, num_heads, n, last]` as `[batch, num_kv_heads, group_size, n, last]`."""
    batch, num_heads, n, last = x.shape
    return x.reshape(batch, num_kv_heads, num_heads // max(num_kv_heads, 1), n, last)


def _products(rows, keys):
    return jnp.einsum("bhgnd,bhkd->bhgnk", rows, keys)


def _weighted_sum(weights, values):
    return jnp.einsum("bhgnk,bhkd->bhgnd", weights, values)


@jax.custom_jvp
def _masked_products(rows, keys):
    """`_products` some of which count for nothing: NaN and infinity do not reach derivatives through those."""
    return _products(rows, keys)


@_masked_products.defjvp
def _masked_products_jvp(primals, tangents):
    # A NaN or infinity that counts has made the score NaN already; the others must not meet the zeros of gradients.
    (rows, keys), (d_rows, d_keys) = primals, tangents
    return _masked_products(rows, keys), _products(d_rows, _finite(keys)) + _products(_finite(rows), d_keys)


@jax.custom_jvp
def _masked_sum(weights, values):
    """`_weighted_sum` in which a weight of exactly 0 selects its value out, NaN or not.

    A row that weighs a value with NaN or infinity in it gets, on top, all the NaN and infinity of its batch entry and
    head: right for those that weigh none, while of the others more elements may be NaN than in the exact sum.
    """
    bad = ~jnp.isfinite(values)
    spill = _select(bad, values).sum(-2, keepdims=True)[:, :, None]
    return _weighted_sum(weights, _finite(values)) + _select(_meets_bad(weights, values), spill)


def _meets_bad(weights, values):
    """Which rows weigh a value with NaN or infinity in it."""
    bad = ~jnp.isfinite(values).all(-1, keepdims=True)
    return _weighted_sum(weights, bad.astype(values.dtype)) > 0


@_masked_sum.defjvp
def _masked_sum_jvp(primals, tangents):
    (weights, values), (d_weights, d_values) = primals, tangents
    # A product, since this must be linear: rows that are NaN have derivatives of NaN, and no others.
    along = jax.lax.stop_gradient(jnp.where(_meets_bad(weights, values), math.nan, 1.0))
    d_out = _weighted_sum(d_weights, _finite(values)) + _weighted_sum(weights, d_values)
    return _masked_sum(weights, values), along * d_out


def _select(condition, x):
    return jnp.where(condition, x, 0.0)


def _finite(x):
    return _select(jnp.isfinite(x), x)


def _chunks(x, count, rows):
    """`[a, b, rows, last]` as `[count, a, b, rows, last]`, without the rows that do not fill a chunk."""
    a, b, _, last = x.shape
    return jnp.moveaxis(x[:, :, : count * rows].reshape(a, b, count, rows, last), 2, 0)


def _joined(x):
    """The inverse of `_chunks`."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])

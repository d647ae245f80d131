"""Keys and values go from device to device, round a ring, and each attends to the share it holds with its own rows (Liu
et al. 2023, Ring Attention, arXiv:2310.01889); what the shares gave is merged. Of the whole no device ever holds more
than two shares.

Backward goes round once more with the gradients of keys and values as passengers. Each share's attention is computed
again there, and differentiated with the cotangents that merging gives it: for the weight w of a share in a row,

    d_out_share = w d_out        d_lse_share = w (d_out · (out_share - out) + d_lse).

Forward mode is the derivative of a round of the composite.

Shares of 16 bits are computed in float32: rounded ones would leave of delta, in which they must cancel, their rounding.

To kernels no row stands before the first key. Rows that do, of the keys of a share that lies ahead, are moved ``ahead``
to where they may stand, the tables of distances with them, and what slopes give is as much less in all scores of a row.
"""

from __future__ import annotations

import functools
import typing

import jax
import jax.numpy as jnp

from attn_ops.jax import call as calls
from attn_ops.jax import composite, derivatives, philox, place, rules
from attn_ops.jax.call import Arrays, Options, accumulator
from attn_ops.jax.parallel import order, shares


class _Setting(typing.NamedTuple):
    """What is known when the function is traced."""

    name: str
    axis: str
    count: int
    order: str
    steps: tuple[int, ...]  # how many devices back the keys come from, in turn
    options: Options
    chosen: str
    forced: bool
    window: tuple[int, int]


class _Rows(typing.NamedTuple):
    """Some rows, with all that says which keys they see, all keys of the whole counted."""

    arrays: Arrays  # without key, value, and what has a gradient
    first: jax.Array  # of the rows, in the whole
    position: jax.Array | None  # int32 [batch or 1]: the key at which the first stands; None where none counts


class _State(typing.NamedTuple):
    """What rows have so far: out, and the maximum and sum of exp of their scores, both 0 where they saw none."""

    out: jax.Array  # [batch, rows, num_heads, value_dim]
    maximum: jax.Array  # [batch, num_heads, rows]
    total: jax.Array


def attend(share, chosen, forced):
    """(out, lse) of the device's rows."""
    pieces = share.own_rows()
    called = [share.call(rows) for rows in pieces]
    call = called[0]
    dtype = accumulator(call.query.dtype)
    setting = _Setting(
        share.name,
        share.axis,
        share.count,
        share.order,
        _steps(share, call),
        calls.split(call)[0]._replace(window_left=-1, window_right=-1, return_lse=True, layout="BSHD"),
        chosen,
        forced,
        (call.window_left, call.window_right),
    )

    def inside(x):
        """Between the layout and that of the ring, which is BSHD, either way."""
        return x if share.layout == "BSHD" else x.swapaxes(1, 2)

    rows, queries, biases = [], [], []
    for piece, own in zip(pieces, called):
        queries.append(inside(own.query).astype(dtype))
        biases.append(None if own.bias is None else own.bias.astype(dtype))
        rest = calls.split(own)[1]._replace(query=None, bias=None, relative_bias=None, sinks=None, query_offset=None)
        rows.append(_Rows(rest, jnp.asarray(piece.first), own.query_offset))
    key, value = (inside(x).astype(call.query.dtype) for x in (share.key, share.value))
    arguments = (tuple(queries), key, value, tuple(biases), call.relative_bias, call.sinks)
    results, _ = _compiled(setting, *place.varying_alike((tuple(rows), arguments)))
    return share.joined(
        call, [(inside(out.astype(call.query.dtype)), lse if call.return_lse else None) for out, lse in results]
    )


def _steps(share, call):
    """How many devices back rows find keys that they may see, in turn: not those whose keys no row of any device
    sees."""
    everything = tuple(range(share.count))
    simple = (
        share.order == "contiguous" and isinstance(share.offset, int) and share.offset == 0 and share.rows == share.keys
    )
    if not simple or call.query_offset is None:
        return everything
    # The nearest row and key of shares that stand n apart are (n - 1) keys + 1 apart.
    back, ahead = (
        share.count - 1 if reach < 0 else min((reach + share.keys - 1) // share.keys, share.count - 1)
        for reach in (call.window_left, call.window_right)
    )
    return tuple(sorted({*range(back + 1), *(share.count - n for n in range(1, ahead + 1))}))


@functools.partial(jax.jit, static_argnums=0)
def _compiled(setting, rows, arguments):
    """(out [batch, rows, num_heads, value_dim], lse) of each of the ``rows``, and the `_State` of each, without out and
    without derivative. ``arguments`` are what has a gradient: queries, key, value, biases, table and sinks.

    Compiled, since JAX does not find the derivatives inside `jax.shard_map` outside of `jax.jit`.
    """
    leaves, tree = jax.tree.flatten((rows, arguments))
    results = iter(rules.call(*_ring(setting, tree), leaves))
    found = [((out, lse), _State(None, *state)) for out, lse, *state in zip(*[results] * 4)]
    return [x for x, _ in found], [state for _, state in found]


@functools.cache
def _ring(setting, tree):
    """The results for the leaves of arguments of this ``tree``, flat, and their derivative, as `rules.call` wants both."""

    def results(*leaves):
        rows, arguments = jax.tree.unflatten(tree, leaves)
        return tuple(x for out, lse, state in _forward(setting, rows, *arguments) for x in (out, lse, *state[1:]))

    def derivative(leaves, tangents):
        rows, arguments = jax.tree.unflatten(tree, leaves)
        found, states = _compiled(setting, rows, arguments)
        along = {at: x for at, x in enumerate(tangents) if x is not None}
        kept, like = jax.tree.leaves(jax.lax.stop_gradient((found, states))), jax.tree.leaves(found)
        of_first_order = _of_first_order(setting, tree, tuple(along))
        d_found = iter(of_first_order((*leaves, *kept), tuple(along.values()), like))
        primals, d_results = [], []
        for (out, lse), (_, *state) in zip(found, states):
            primals += out, lse, *state
            d_results += next(d_found), next(d_found), *map(jnp.zeros_like, state)
        return tuple(primals), tuple(d_results)

    return results, derivative


@functools.cache
def _of_first_order(setting, tree, wanted):
    """The derivative of out and lse of all rows by the ``wanted`` leaves of arguments of this ``tree``: of them all, and
    of what `_compiled` found for them."""
    count = tree.num_leaves

    def forward(kept, along):
        leaves = list(kept[:count])

        def run(*differentiable):
            for at, x in zip(wanted, differentiable):
                leaves[at] = x
            rows, arguments = jax.tree.unflatten(tree, leaves)
            of_composite = setting._replace(chosen="composite", forced=False)
            return tuple(x for found in _forward(of_composite, rows, *arguments) for x in found[:2])

        return jax.jvp(run, tuple(leaves[at] for at in wanted), along)[1]

    def backward(kept, cotangents):
        rows, arguments = jax.tree.unflatten(tree, kept[:count])
        results = kept[count : count + 2 * len(rows)]
        states = [_State(None, *x) for x in _pairs_of(kept[count + 2 * len(rows) :])]
        found = [(*x, state) for x, state in zip(_pairs_of(results), states)]
        gradients = _gradients(setting, rows, *arguments, found, _pairs_of(cotangents))
        by_leaf = [None] * len(jax.tree.leaves(rows)) + jax.tree.leaves(gradients)
        return tuple(by_leaf[at] for at in wanted)

    return rules.Linear(forward, backward)


def _pairs_of(x):
    """x[0] and x[1], x[2] and x[3], and so on."""
    return list(zip(x[::2], x[1::2]))


def _gradients(setting, rows, queries, key, value, biases, table, sinks, found, cotangents):
    """The cotangents of all but the rows; ``found`` is what `_forward` gave, ``cotangents`` are those of out and lse."""
    arguments = queries, key, value, biases, table, sinks
    arguments, found, cotangents = _first_order(setting.name, (arguments, found, cotangents))
    queries, key, value, biases, table, sinks = arguments
    # [batch, num_heads, rows]: what the cotangents of all scores of a row have in common.
    common = [d_lse - _products(d_out, out) for (out, _, _), (d_out, d_lse) in zip(found, cotangents)]

    def gradients_of(n, held, keys, start):
        """Those of query, key, value, bias and table by one piece of keys."""
        d_out = cotangents[n][0]

        def attention(query, key, value, bias, table):
            out, lse, statistics = _of_keys(setting, rows[n], query, key, value, bias, table, keys, start)
            return (out, lse), statistics

        arguments = queries[n], *widened(held), biases[n], table
        (out, _), pull, statistics = jax.vjp(attention, *arguments, has_aux=True)
        weight = _weight(statistics[..., 0], statistics[..., 1], found[n][2])
        return pull((_along_rows(weight) * d_out, weight * (_products(d_out, out) + common[n])))

    def widened(held):
        return tuple(x.astype(accumulator(x.dtype)) for x in held)

    def step(back, held, sums):
        d_queries, d_key, d_value, d_biases, d_table = sums
        d_queries, d_biases = list(d_queries), list(d_biases)
        for n, keys, start in _pairs(setting, len(rows), key.shape[1], back):
            d_query, d_k, d_v, d_bias, d_t = _if_seen(
                _seen(setting, rows[n], queries[n].shape[1], keys, start),
                functools.partial(gradients_of, n, held, keys, start),
                lambda n=n: _zeros((queries[n], *widened(held), biases[n], table), queries),
            )
            d_queries[n] += d_query
            d_key, d_value = d_key + d_k, d_value + d_v
            d_biases[n] = None if d_bias is None else d_biases[n] + d_bias
            d_table = None if d_t is None else d_table + d_t
        return tuple(d_queries), d_key, d_value, tuple(d_biases), d_table

    def moved(sums, by):
        d_queries, d_key, d_value, d_biases, d_table = sums
        return d_queries, _shifted(setting, d_key, by), _shifted(setting, d_value, by), d_biases, d_table

    sums = _zeros((queries, *widened((key, value)), biases, table), queries)
    d_queries, d_key, d_value, d_biases, d_table = _round(setting, (key, value), sums, step, moved)
    if setting.steps[-1]:
        d_key, d_value = (_shifted(setting, x, setting.count - setting.steps[-1]) for x in (d_key, d_value))
    d_sinks = None
    if sinks is not None:
        weights = (jnp.exp(sinks[:, None] - state.maximum) / _nonzero(state.total) for _, _, state in found)
        d_sinks = sum((weight * c).sum((0, 2)) for weight, c in zip(weights, common))
    return d_queries, d_key.astype(key.dtype), d_value.astype(value.dtype), d_biases, d_table, d_sinks


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _first_order(name, tree):
    """``tree``, with no derivative: the statistics of shares have none."""
    return tree


@_first_order.defjvp
def _no_second_order(name, primals, tangents):
    raise NotImplementedError(
        f"{name}: method='ring' has first derivatives in reverse mode: method='all_gather_kv' has those of second order"
    )


def _forward(setting, rows, queries, key, value, biases, table, sinks):
    """(out, lse, `_State` without out) of each of the ``rows``."""

    def more(n, held, state, keys, start):
        out, _, statistics = _of_keys(setting, rows[n], queries[n], *held, biases[n], table, keys, start)
        return _merged(state, _State(out, statistics[..., 0], statistics[..., 1]))

    def step(back, held, states):
        states = list(states)
        for n, keys, start in _pairs(setting, len(rows), key.shape[1], back):
            states[n] = _if_seen(
                _seen(setting, rows[n], queries[n].shape[1], keys, start),
                functools.partial(more, n, held, states[n], keys, start),
                lambda n=n: states[n],
            )
        return tuple(states)

    def empty(query):
        batch, count, num_heads, _ = query.shape
        none = jnp.zeros((batch, num_heads, count), query.dtype)
        return _State(jnp.zeros((batch, count, num_heads, value.shape[3]), query.dtype), none, none)

    states, _ = place.varying_alike((tuple(map(empty, queries)), queries))
    results = []
    for state in _round(setting, (key, value), states, step):
        state = state if sinks is None else _with_sinks(state, sinks)
        lse = jnp.where(state.total == 0, -jnp.inf, state.maximum + jnp.log(_nonzero(state.total)))
        results.append((state.out, lse, state._replace(out=None)))
    return results


def _round(setting, held, states, step, moved=lambda states, by: states):
    """``states`` after the ``step`` of each share of keys that passes; ``moved`` is what travels of them between
    two."""
    steps = list(setting.steps)

    def one(by, carry, back):
        held, states = carry
        following = tuple(_shifted(setting, x, by) for x in held)  # while the step works with what is here
        return (following, moved(step(back, held, states), by)), None

    while len(steps) > 1:
        by, alike = steps[1] - steps[0], []
        while len(steps) > 1 and steps[1] - steps[0] == by:  # those of one length are one loop
            alike.append(steps.pop(0))
        (held, states), _ = jax.lax.scan(functools.partial(one, by), (held, states), jnp.array(alike, "int32"))
    return step(steps[0], held, states)


def _shifted(setting, x, by):
    """``x`` of the device that stands ``by`` places back in the ring."""
    return jax.lax.ppermute(x, setting.axis, [(n, (n + by) % setting.count) for n in range(setting.count)])


def _pairs(setting, rows, extent, back):
    """Each piece of rows with each piece of the keys of the device that stands ``back`` places back: number of the
    rows, (first key, number of keys) among those held, and which key of the whole the first one is."""
    device = (jax.lax.axis_index(setting.axis) - back) % setting.count
    pieces = order.pieces(setting.order, extent, device, setting.count)
    return [(n, (at, count), start) for n in range(rows) for at, count, start in pieces]


def _ends(setting, rows, num_rows, count, start):
    """(key_begin, key_end) of the rows among ``count`` keys from ``start`` on, int32 [batch or 1, rows]; None: all."""
    begin = end = None
    left, right = setting.window
    if left >= 0 or right >= 0:
        own = rows.position[:, None] + jnp.arange(num_rows, dtype="int32")
        begin = own - left if left >= 0 else jnp.zeros_like(own)
        end = own + (right + 1) if right >= 0 else jnp.full_like(own, jnp.iinfo("int32").max)
    if rows.arrays.intervals is not None:
        given = rows.arrays.intervals
        begin, end = given if begin is None else (jnp.maximum(begin, given[0]), jnp.minimum(end, given[1]))
    return None if begin is None else tuple(jnp.clip(x - start, 0, count).astype("int32") for x in (begin, end))


def _key_lengths(rows, count, start):
    lengths = rows.arrays.key_lengths
    return None if lengths is None else jnp.clip(lengths - start, 0, count).astype("int32")


def _blocks(setting, rows, count, start):
    """(blocks, keys of each) of ``count`` keys from ``start`` on, which is a multiple of it."""
    if rows.arrays.blocks is None:
        return None, 0
    blocks, size = shares.finer(rows.arrays.blocks, 3, setting.options.block_k, count)
    return jax.lax.dynamic_slice_in_dim(blocks, start // size, count // size, 3), size


def _seen(setting, rows, num_rows, keys, start):
    """Whether some row may see some of the keys; None where that goes without saying."""
    ends, lengths = _ends(setting, rows, num_rows, keys[1], start), _key_lengths(rows, keys[1], start)
    blocks, _ = _blocks(setting, rows, keys[1], start)
    some = [] if ends is None else [jnp.any(ends[0] < ends[1])]
    some += [] if lengths is None else [jnp.any(lengths > 0)]
    some += [] if blocks is None else [jnp.any(blocks)]
    return functools.reduce(jnp.logical_and, some) if some else None


def _if_seen(seen, work, nothing):
    return work() if seen is None else jax.lax.cond(seen, work, nothing)


def _of_keys(setting, rows, query, key, value, bias, table, keys, start):
    """(out, lse, statistics) of the rows that see these keys alone: ``keys`` of those held, from ``start`` of the whole
    on."""
    at, count = keys
    whole = key.shape[1] * setting.count
    key, value = (jax.lax.slice_in_dim(x, at, at + count, axis=1).astype(query.dtype) for x in (key, value))

    def columns(x, axis):
        return x if x is None or x.shape[axis] != whole else jax.lax.dynamic_slice_in_dim(x, start, count, axis)

    own = rows.arrays
    origin = None
    if setting.options.dropout_rate:
        origin = philox.origin(0, query.shape[2], rows.first, start)
    blocks, block_k = _blocks(setting, rows, count, start)
    options = setting.options._replace(block_k=block_k)
    offset = ahead = None
    if own.alibi_slopes is not None or table is not None:
        offset = rows.position - start
        ahead = jnp.maximum(-offset.min(), 0)
        offset += ahead
    if table is not None:
        # How far rows and keys may lie apart where rows were moved: one of the batch then stands at the first key.
        table = _moved_table(table, ahead, max(query.shape[1], count) if offset.shape[0] == 1 else whole)
    arrays = own._replace(
        query=query,
        key=key,
        value=value,
        bias=columns(bias, 3),
        masks=tuple(columns(x, 3) for x in own.masks),
        key_lengths=_key_lengths(rows, count, start),
        intervals=_ends(setting, rows, query.shape[1], count, start),
        segments=own.segments and (own.segments[0], columns(own.segments[1], 1)),
        blocks=blocks,
        query_offset=offset,
        relative_bias=table,
        origin=origin,
    )
    arrays = place.varying_alike(arrays)
    if setting.chosen == "composite":
        out, lse, statistics = composite.with_statistics(options, arrays)
    else:
        out, lse, statistics = derivatives.attention(setting.forced, options, arrays)
    if own.alibi_slopes is not None:
        less = (own.alibi_slopes * ahead.astype(own.alibi_slopes.dtype))[:, :, None]
        lse += less
        statistics = statistics.at[..., 0].add(jnp.where(statistics[..., 1] == 0, 0.0, less))
    return out, lse, statistics


def _moved_table(table, ahead, extent):
    """A table [num_heads, 2 R + 1] of distances that are ``ahead`` less than those of the ``table``."""
    reach = table.shape[1] // 2
    wide = reach + extent
    distances = jnp.arange(-wide, wide + 1) + ahead
    return jnp.take(table, jnp.clip(distances, -reach, reach) + reach, axis=1, mode="clip")


def _merged(a, b):
    """The state of rows that saw the keys of both. (Asked is what is 0, not what is more: NaN is not hidden.)"""
    maximum = jnp.maximum(_logarithm_base(a), _logarithm_base(b))
    maximum = jnp.where(maximum == -jnp.inf, 0.0, maximum)
    shares = [x.total * jnp.exp(_logarithm_base(x) - maximum) for x in (a, b)]
    total = shares[0] + shares[1]
    out = sum(
        jnp.where(w == 0, 0.0, w * x.out) for w, x in zip((_along_rows(w / _nonzero(total)) for w in shares), (a, b))
    )
    return _State(out, maximum, total)


def _with_sinks(state, sinks):
    """The state with one more logit in the denominator of each row."""
    none = jnp.zeros_like(state.total)
    there = sinks[:, None] > -jnp.inf
    return _merged(state, _State(jnp.zeros_like(state.out), none + jnp.where(there, sinks[:, None], 0.0), none + there))


def _logarithm_base(state):
    return jnp.where(state.total == 0, -jnp.inf, state.maximum)


def _weight(maximum, total, whole):
    """What share of the rows' weights those keys have."""
    return jnp.where(total == 0, 0.0, total * jnp.exp(maximum - whole.maximum)) / _nonzero(whole.total)


def _products(x, y):
    """[batch, num_heads, rows] of two [batch, rows, num_heads, dim]."""
    return (x * y).sum(-1).swapaxes(1, 2)


def _along_rows(x):
    """[batch, num_heads, rows] to be multiplied with [batch, rows, num_heads, dim]."""
    return x.swapaxes(1, 2)[..., None]


def _nonzero(x):
    return jnp.where(x == 0, 1.0, x)


def _zeros(tree, like):
    return place.varying_alike((jax.tree.map(jnp.zeros_like, tree), like))[0]

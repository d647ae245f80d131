"""Sizes that only the data decide, inside functions that XLA compiles.

There `tf.boolean_mask` gives an axis of bounded size, of which TensorFlow sees only that it is unknown. Custom calls
take none, nor do loops over rows: the attention is computed with all the room that such axes have, lengths hide what
lies beyond the sizes, and the results are cut to them. That is done for the batch, the query rows and the keys. Where
XLA finds an unknown axis fixed when it compiles, only the lengths remain of it.
"""

from __future__ import annotations

import functools

import tensorflow as tf

from attn_ops.call.attention_call import AttentionCall
from attn_ops.tensorflow import place

_BATCH, _ROWS, _KEYS = "batch", "rows", "keys"
_SCORES = {0: _BATCH, 2: _ROWS, 3: _KEYS}
_LENGTHS = {0: _BATCH}
_BY_ROW = {0: _BATCH, 1: _ROWS}
_BY_KEY = {0: _BATCH, 1: _KEYS}


def any_unknown(call: AttentionCall) -> bool:
    """Whether the batch, the query rows or the keys of a tensor of ``call`` are unknown."""
    if call.block_table is not None and None in [*call.block_table.shape, *call.key.shape]:
        return True
    return any(x.shape[axis] is None for x, axes in _full(call) + _broadcasting(call) for axis in axes)


class Room:
    """A call whose unknown axes have all their room.

    Attributes:
        call: The call with such tensors. What they hold beyond the sizes may be anything: lengths hide it.
    """

    def __init__(self, call: AttentionCall):
        self._layout = call.layout
        self._sizes = {name: _size(call, name) for name in (_BATCH, _ROWS, _KEYS)}
        self._rooms = {name: _room(call, name) if n is None else n for name, n in self._sizes.items()}
        for x, axes in _full(call)[:2]:
            for axis, name in axes.items():
                if self._sizes[name] is None:
                    self._sizes[name] = tf.shape(x)[axis]
        rows, keys = _input_axes(call.layout)
        self.call = call._replace(
            query=self._widened(call.query + tf.cast(_nothing_unless_equal(call), call.query.dtype), rows),
            key=self._widened(call.key, keys),
            value=self._widened(call.value, keys),
            bias=None if call.bias is None else self._broadcasting(call.bias),
            masks=tuple(map(self._broadcasting, call.masks)),
            query_lengths=self._lengths(call.query_lengths, _ROWS, _BATCH),
            key_lengths=self._lengths(call.key_lengths, _KEYS),
            intervals=None if call.intervals is None else tuple(map(self._ends, call.intervals)),
            segments=None if call.segments is None else tuple(
                self._broadcasting(ids, axes) for ids, axes in zip(call.segments, (_BY_ROW, _BY_KEY))
            ),
            blocks=None if call.blocks is None else self._blocks(call),
            query_offset=None if call.query_offset is None else self._positions(call.query_offset),
            alibi_slopes=None if call.alibi_slopes is None else self._broadcasting(call.alibi_slopes, _LENGTHS),
            key_scales=None if call.key_scales is None else self._widened(call.key_scales, keys),
            value_scales=None if call.value_scales is None else self._widened(call.value_scales, keys),
        )

    def like_out(self, x):
        """``x``, shaped like the given call's output, with all the room."""
        return self._widened(x, _input_axes(self._layout)[0])

    def like_lse(self, x):
        """The same of `[batch, num_heads, seqlen_q, ...]`."""
        return self._widened(x, {0: _BATCH, 2: _ROWS})

    def cut_out(self, out):
        """The given call's output from that of `call`."""
        return self._cut(out, _input_axes(self._layout)[0])

    def cut_lse(self, x):
        """The same of `[batch, num_heads, seqlen_q, ...]`."""
        return self._cut(x, {0: _BATCH, 2: _ROWS})

    def cut_weights(self, weights):
        """The same of `[batch, num_heads, seqlen_q, seqlen_k]`."""
        return self._cut(weights, _SCORES)

    def _widened(self, x, axes):
        rooms = {axis: self._rooms[name] for axis, name in axes.items() if x.shape[axis] is None}
        return _widened(x, rooms) if rooms else x

    def _broadcasting(self, x, axes=_SCORES):
        """Of a mask or bias, or of what has these ``axes``. An axis with room for one broadcasts, and stays."""
        rooms = {}
        for axis, name in axes.items():
            if x.shape[axis] is None:
                own = _room_of(x, axis)
                rooms[axis] = tf.where(tf.equal(own, 1), 1, self._rooms[name])
        return _widened(x, rooms) if rooms else x

    def _ends(self, ends):
        """Ends of intervals. Those of rows that are hidden must not move back either: past every key they do not."""
        wide = self._broadcasting(ends, _BY_ROW)
        if wide is ends:
            return ends
        hidden = tf.range(tf.shape(wide)[1]) >= self._sizes[_ROWS]
        wide = tf.where(hidden[None], tf.cast(self._sizes[_KEYS], wide.dtype), wide)
        if ends.shape[0] is None:
            wide = tf.where((tf.range(tf.shape(wide)[0]) >= tf.shape(ends)[0])[:, None], 0, wide)
        return wide

    def _positions(self, offset):
        """Offsets, 0 in entries that are not there."""
        wide = self._broadcasting(offset, _LENGTHS)
        return wide if wide is offset else tf.where(tf.range(tf.shape(wide)[0]) < tf.shape(offset)[0], wide, 0)

    def _blocks(self, call):
        """As many blocks as rows and keys have room for."""
        x = self._broadcasting(call.blocks, _LENGTHS)
        for axis, name, size in ((2, _ROWS, call.block_q), (3, _KEYS, call.block_k)):
            count = -(-self._rooms[name] // size)
            if x.shape[axis] is None:
                x = _widened(x, {axis: count})
            elif not isinstance(count, int):
                x = tf.pad(x, [[0, count - x.shape[axis] if i == axis else 0] for i in range(4)])
        return x

    def _lengths(self, lengths, name, *others):
        """Lengths that hide what lies beyond the size of ``name`` and, with it or ``others``, beyond the batch."""
        if all(isinstance(self._sizes[n], int) for n in (name, *others)):
            return None if lengths is None else self._widened(lengths, _LENGTHS)
        if lengths is None:
            lengths = tf.fill([self._rooms[_BATCH]], self._sizes[name])
        else:
            lengths = self._widened(lengths, _LENGTHS)
        return tf.where(tf.range(self._rooms[_BATCH]) < self._sizes[_BATCH], lengths, 0)

    def _cut(self, x, axes):
        sizes = {axis: self._sizes[name] for axis, name in axes.items() if not isinstance(self._sizes[name], int)}
        return _cut(x, sizes) if sizes else x


def cut_like(gradient, x):
    """``gradient``, of an input of `Room.call`, with the sizes of the input of the given call that it comes from."""
    sizes = {axis: tf.shape(x)[axis] for axis, n in enumerate(x.shape) if n is None}
    return _cut(gradient, sizes) if sizes else gradient


def _input_axes(layout):
    """The axes of the query, which the output shares, and of key and value."""
    sequence = 1 if layout == "BSHD" else 2
    return {0: _BATCH, sequence: _ROWS}, {0: _BATCH, sequence: _KEYS}


def _full(call):
    """The tensors of ``call`` that do not broadcast, query and key first, and their axes; pages have others."""
    rows, keys = _input_axes(call.layout)
    lengths = [(x, _LENGTHS) for x in (call.query_lengths, call.key_lengths) if x is not None]
    by_key = [call.key, call.value, *(x for x in (call.key_scales, call.value_scales) if x is not None)]
    by_key = [(x, keys) for x in by_key if call.block_table is None]
    return [(call.query, rows), *by_key, *lengths]


def _broadcasting(call):
    """Those that may broadcast, and their axes; those of blocks count others."""
    begin, end = call.intervals or (None, None)
    q_ids, kv_ids = call.segments or (None, None)
    axes_of = [
        *((x, _SCORES) for x in (call.bias, *call.masks)),
        *((x, _BY_ROW) for x in (begin, end, q_ids)),
        (kv_ids, _BY_KEY),
        *((x, _LENGTHS) for x in (call.blocks, call.query_offset, call.alibi_slopes)),
    ]
    return [(x, axes) for x, axes in axes_of if x is not None]


def _nothing_unless_equal(call):
    """0. Where sizes differ that must be the same, XLA refuses to compile it: widened to the largest, no operation would
    notice. (Stacked, since one of 1 would broadcast.)"""
    sides = []
    for name in (_BATCH, _ROWS, _KEYS):
        same = [(x, axis) for x, axes in _full(call) for axis, n in axes.items() if n == name]
        like = [(x, axis) for x, axes in _broadcasting(call) for axis, n in axes.items() if n == name]
        if any(x.shape[axis] is None for x, axis in same + like):
            zeros = [_zeros_along(x, axis) for x, axis in same]
            zeros += [zeros[0] + _zeros_along(x, axis) for x, axis in like]  # of masks and bias, one broadcasts
            sides.append(tf.reduce_sum(tf.stack(zeros)))
    return tf.add_n(sides) if sides else tf.zeros(())


def _zeros_along(x, axis):
    zeros = tf.zeros_like(x, tf.float32)
    return tf.reduce_sum(zeros, [i for i in range(x.shape.rank) if i != axis])


def _size(call, name):
    """The size of this name, if any tensor tells it; None if not."""
    sizes = [x.shape[axis] for x, axes in _full(call) for axis, n in axes.items() if n == name]
    scores = [x.shape[axis] for x, axes in _broadcasting(call) for axis, n in axes.items() if n == name]
    sizes += [n for n in scores if n != 1]  # what has one broadcasts
    return next((n for n in sizes if n is not None), None)


def _room(call, name):
    """The largest room that a tensor of ``call`` has along the axis of this name."""
    axes_of = [(x, axis) for x, axes in _full(call) for axis, n in axes.items() if n == name]
    return functools.reduce(tf.maximum, [_room_of(x, axis) for x, axis in axes_of])


def _room_of(x, axis):
    return tf.shape(_with_all_room(x, axis))[axis]


def _with_all_room(x, axis):
    shape = x.shape.as_list()
    x = place.with_static_size()(x, axis)
    x.set_shape(shape[:axis] + [None] + shape[axis + 1 :])  # it forgets the rank
    return x


def _widened(x, rooms):
    """``x`` with these extents, by axis; cut where it has more. Differentiable."""

    @tf.custom_gradient
    def run(x):
        wide = x
        for axis, room in rooms.items():
            wide = _with_all_room(wide, axis)
            kept = tf.minimum(tf.shape(wide)[axis], room)
            paddings = [[0, room - kept if i == axis else 0] for i in range(x.shape.rank)]
            wide = tf.pad(_slice(wide, {axis: kept}), paddings)
        wide.set_shape([rooms[i] if isinstance(rooms.get(i), int) else n for i, n in enumerate(wide.shape)])
        return wide, lambda d: _cut(d, {axis: tf.shape(x)[axis] for axis in rooms})

    return run(x)


def _cut(x, sizes):
    """The first elements of ``x``, as many as these sizes say, by axis. Differentiable."""

    @tf.custom_gradient
    def run(x):
        def gradient(d):
            d = _widened(d, {axis: tf.shape(x)[axis] for axis in sizes})
            for axis, size in sizes.items():
                inside = tf.range(tf.shape(x)[axis]) < size
                shape = [-1 if i == axis else 1 for i in range(x.shape.rank)]
                d = tf.where(tf.reshape(inside, shape), d, tf.zeros((), d.dtype))
            return d

        return _slice(x, sizes), gradient

    return run(x)


def _slice(x, sizes):
    # A strided slice: of both, XLA compiles this one with sizes that it does not know.
    return x[tuple(slice(sizes.get(axis)) for axis in range(x.shape.rank))]

"""What a device has of a call whose sequence is divided: the call of its rows, with all keys or some of them."""

from __future__ import annotations

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp

from attn_ops.call import arrays, options, out_of_range, shapes
from attn_ops.call.attention_call import AttentionCall, canonical
from attn_ops.call.normalize import normalize, split_masks
from attn_ops.jax import philox, place, xp
from attn_ops.jax.parallel.order import pieces, unzigzag
from attn_ops.masks import constructors
from attn_ops.masks.mask import Mask


class Rows(typing.NamedTuple):
    """Some neighbouring rows of a device: where among its own, how many, and which row of the whole is the first."""

    start: int
    count: int
    first: jax.Array


@dataclasses.dataclass(frozen=True)
class Share:
    """The arguments of one device. The sequence is divided along the mesh axis ``axis``, in ``order``.

    Attributes:
      count, index: how many devices there are, and which this one is.
      rows, keys: how many rows and keys it has.
      offset: the key at which the first row of the whole stands: an integer, or integers [batch].
      query_lengths: of the whole, int32 [batch], or None.
      given: the other options, where masks and biases are of the device's rows and all keys.
    """

    name: str
    axis: str
    order: str
    query: jax.Array
    key: jax.Array
    value: jax.Array
    layout: str
    count: int
    index: jax.Array
    rows: int
    keys: int
    offset: typing.Any
    query_lengths: typing.Any
    given: dict

    @property
    def sequence_axis(self):
        return 1 if self.layout == "BSHD" else 2

    @property
    def heads_axis(self):
        return 2 if self.layout == "BSHD" else 1

    def own_rows(self) -> list[Rows]:
        """The device's rows, in pieces that are neighbours in the whole."""
        return [Rows(*piece) for piece in pieces(self.order, self.rows, self.index, self.count)]

    def call(self, rows: Rows) -> AttentionCall:
        """The checked call of these rows, with no key or value: masks, biases and segments are of all keys, and
        positions those of the whole."""
        first = rows.first - rows.start  # of the device's rows, if all were neighbours
        lengths = self.query_lengths
        if lengths is not None:
            lengths = jnp.clip(lengths - first, 0, self.rows)
        # What is checked are extents: of the keys of the others there is nothing to be seen.
        extents = [list(x.shape) for x in (self.key, self.value)]
        for of in extents:
            of[self.sequence_axis] *= self.count
        key, value = (jnp.broadcast_to(jnp.zeros((), x.dtype), s) for x, s in zip((self.key, self.value), extents))
        call = normalize(
            xp,
            self.name,
            self.query,
            key,
            value,
            query_seq_lengths=lengths,
            query_offset=self.offset + first,
            layout=self.layout,
            **self.given,
        )
        if not counts_positions(call):
            call = call._replace(query_offset=None)
        return _rows_of(call._replace(key=None, value=None), rows, self.rows, self.heads_axis)

    def without_functions(self) -> Share:
        """The same with what functions of indices in the mask say of these rows: they are functions of those of the
        whole."""
        masks = self.given["mask"] or []
        structure = [x for x in masks if isinstance(x, Mask)]
        functions = tuple(part for mask in structure for part in mask.structured if part.is_function)
        if not functions:
            return self
        [structure] = structure
        others = tuple(part for part in structure.structured if not part.is_function)
        offset = None if isinstance(self.offset, int) and self.offset == 0 else self.offset
        extents = self.rows * self.count, self.keys * self.count
        try:
            found = Mask(structured=functions).parts(*extents, offset)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        structure = dataclasses.replace(structure, structured=others)
        if found.intervals is not None:
            structure &= constructors.intervals(*(self.own(x, 1) for x in found.intervals))
        if found.segments is not None:
            structure &= constructors.segments(self.own(found.segments[0], 1), found.segments[1])
        if found.blocks is not None:
            blocks, size = finer(found.blocks, 2, found.block_q, self.own_rows()[0].count)
            structure &= constructors.block_sparse(self.own(blocks, 2, size), size, found.block_k)
        own = [self.own(x, 2) if x.shape[2] > 1 else x for x in found.dense]
        dense = [x for x in masks if not isinstance(x, Mask)]
        return dataclasses.replace(self, given={**self.given, "mask": [structure, *dense, *own]})

    def own(self, x, axis, size=1):
        """The device's rows of an array of the rows of the whole, or of blocks of ``size`` of them."""
        starts = [(rows.first // size, rows.count // size) for rows in self.own_rows()]
        return jnp.concatenate([jax.lax.dynamic_slice_in_dim(x, *start, axis) for start in starts], axis)

    def in_order(self, x):
        """What was gathered along the sequence of all devices, in the order of the whole."""
        return unzigzag(x, self.count, self.sequence_axis) if self.order == "zigzag" else x

    def origin(self, first_row, first_head=0):
        """Where in the whole the rows and heads of a call with all keys begin, as dropout counts them."""
        num_heads = canonical(self.query.shape, self.layout)[1]
        return philox.origin(first_head, num_heads, first_row)

    def joined(self, call, results):
        """(out, lse) of the device's rows from those of its pieces; ``call`` is that of one. Pieces have of lengths what
        falls on them, so that those of the whole that are out of range are told here."""
        out, lse = zip(*results)
        joined = jnp.concatenate(out, self.sequence_axis), None if lse[0] is None else jnp.concatenate(lse, 2)
        wrong = out_of_range.beyond(
            (self.query_lengths, self.rows * self.count), (call.key_lengths, self.keys * self.count)
        )
        return tuple(x if x is None else out_of_range.told(xp, wrong, x) for x in joined)


def described(name, axis, order, query, key, value, given) -> Share:
    """The `Share` of the arguments of a public function. Raises TypeError and ValueError for those that no call may
    have, NotImplementedError for those that a divided one may not."""
    query, key, value = (xp.as_tensor(name, what, x) for what, x in zip(("query", "key", "value"), (query, key, value)))
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(
            f"{name}: query, key and value must have rank 4, got {query.shape}, {key.shape}, {value.shape}"
        )
    if axis is None:
        raise TypeError(
            f"{name}: axis must be the name of the mesh axis of jax.shard_map along which sequences are divided"
        )
    given = dict(given)
    layout = given.pop("layout", "BSHD")
    shapes.check_layout(name, layout)
    count, index = place.axis_size(axis), jax.lax.axis_index(axis)
    batch, _, rows, _ = canonical(query.shape, layout)
    keys = canonical(key.shape, layout)[2]
    if order == "zigzag" and (rows % 2 or keys % 2):
        raise ValueError(f"{name}: order='zigzag' needs even shares of rows ({rows}) and keys ({keys})")
    structure, dense = split_masks(name, given.pop("mask", None))
    alignment = given.pop("causal_alignment", options.TOP_LEFT)
    bottom_right = options.bottom_right(name, alignment)
    lengths = [given.pop("query_seq_lengths", None)]
    if structure is not None:
        lengths.append(structure.query_lengths)
        bottom_right |= structure.bottom_right
        structure = dataclasses.replace(structure, query_lengths=None, causal_alignment="top_left")
    segment_ids = given.pop("segment_ids", None)
    if segment_ids is not None:
        segments = _segments(name, segment_ids, axis, order, count, rows, keys)
        structure = segments if structure is None else structure & segments
    lengths = [arrays.lengths(xp, name, "query_seq_lengths", x, batch, rows * count) for x in lengths if x is not None]
    query_lengths = jnp.minimum(*lengths) if len(lengths) == 2 else lengths[0] if lengths else None
    offset = given.pop("query_offset", None)
    if bottom_right:
        key_lengths = given.get("key_value_seq_lengths"), structure and structure.key_lengths
        if query_lengths is not None or any(x is not None for x in key_lengths):
            raise NotImplementedError(
                f"{name}: causal_alignment='bottom_right' beside lengths: pass query_offset, where each first row stands"
            )
        if offset is not None or rows > keys:
            raise ValueError(
                f"{name}: causal_alignment='bottom_right' needs as many keys as rows, and no query_offset; got {rows} rows and "
                f"{keys} keys a device, query_offset {offset!r}"
            )
        offset = (keys - rows) * count
    elif offset is None:
        offset = 0
    else:
        offset = arrays.query_offset(xp, name, offset, batch)
        offset = offset[0] if offset.shape == (1,) else offset
    masks = [x for x in (structure, *dense) if x is not None]
    given["mask"] = masks or None
    share = Share(name, axis, order, query, key, value, layout, count, index, rows, keys, offset, query_lengths, given)
    return share.without_functions()


def finer(blocks, axis, size, extent):
    """(blocks, size): those of a mask of blocks of ``size`` along ``axis``, cut so that they divide ``extent``."""
    parts = size // math.gcd(size, extent)
    return jnp.repeat(blocks, parts, axis) if parts > 1 else blocks, size // parts


def counts_positions(call) -> bool:
    """Whether it matters to a call where its rows stand."""
    return (
        call.window_left >= 0
        or call.window_right >= 0
        or call.alibi_slopes is not None
        or call.relative_bias is not None
    )


def _segments(name, ids, axis, order, count, rows, keys) -> Mask:
    """The mask of ids [batch, rows] of the device's tokens, or of a pair, of its rows and its keys."""
    q_ids, kv_ids = (jnp.asarray(x) for x in (ids if isinstance(ids, (tuple, list)) else (ids, ids)))
    if q_ids.ndim != 2 or kv_ids.ndim != 2 or q_ids.shape[1] != rows or kv_ids.shape[1] != keys:
        raise ValueError(
            f"{name}: segment_ids must be those of this device's rows, [batch, {rows}], and keys, [batch, {keys}], got "
            f"{q_ids.shape} and {kv_ids.shape}"
        )
    kv_ids = jax.lax.all_gather(kv_ids, axis, axis=1, tiled=True)
    if order == "zigzag":
        kv_ids = unzigzag(kv_ids, count)
    return constructors.segments(q_ids, kv_ids)


def _rows_of(call, rows, extent, heads_axis):
    """A call of fewer rows."""
    if rows.count == extent:
        return call
    end = rows.start + rows.count

    def cut(x, axis):
        return x if x is None or x.shape[axis] != extent else jax.lax.slice_in_dim(x, rows.start, end, axis=axis)

    lengths = call.query_lengths
    if call.blocks is not None:
        blocks, size = finer(call.blocks, 2, call.block_q, rows.count)
        call = call._replace(blocks=blocks[:, :, rows.start // size : end // size], block_q=size)
    return call._replace(
        query=cut(call.query, 3 - heads_axis),
        bias=cut(call.bias, 2),
        masks=tuple(cut(x, 2) for x in call.masks),
        intervals=call.intervals and tuple(cut(x, 1) for x in call.intervals),
        segments=call.segments and (cut(call.segments[0], 1), call.segments[1]),
        query_lengths=lengths if lengths is None else jnp.clip(lengths - rows.start, 0, rows.count),
        query_offset=None if call.query_offset is None else call.query_offset + rows.start,
    )

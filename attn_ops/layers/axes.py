"""Attention over any axes, seen as attention over one.

``MultiHeadAttention(attention_axes=...)`` attends over some axes of ``[batch, *dims, features]`` and treats the others
like the batch. Moving the *free* axes to the front and the *attended* ones behind them, then merging each group, gives
the ``[batch, seqlen, num_heads, head_dim]`` of every attention function, at the price of a transpose only where the
axes are not already in that order.
"""

from __future__ import annotations

import math

from keras import ops


def dims(x):
    """The extents of `x`: ints where they are static, scalar tensors where not."""
    extents = list(x.shape)
    return list(ops.shape(x)) if None in extents else extents


def one_per_query_head(x, num_heads):
    """Keys or values `[batch, seqlen_k, num_kv_heads, dim]` with a head for each of the ``num_heads`` of the query, as Keras
    repeats them; in operations of which XLA compiles the gradient in a branch too, as it does not that of `repeat`."""
    num_kv_heads = x.shape[2]
    if None in (num_kv_heads, num_heads) or num_kv_heads in (0, num_heads) or num_heads % num_kv_heads:
        return x
    batch, seqlen, _, dim = dims(x)
    return ops.reshape(ops.stack([x] * (num_heads // num_kv_heads), 3), (batch, seqlen, num_heads, dim))


class AttentionAxes:
    """Splits the leading axes of `[batch, *dims, ...]` tensors into free and attended ones.

    Args:
        attended: The axes that attention runs over, in the order in which they appear in the scores. Negative ones
            count from the features, which follow the leading axes in the input. None for all but the batch.
        num_axes: How many leading axes there are, the batch included.
    """

    def __init__(self, attended, num_axes):
        attended = range(1, num_axes) if attended is None else attended  # as in Keras, whose layers know when they are built
        self.attended = tuple(axis if axis >= 0 else num_axes + 1 + axis for axis in attended)
        self.free = tuple(axis for axis in range(num_axes) if axis not in self.attended)
        self.num_axes = num_axes
        self._order = self.free + self.attended
        self.is_flat = self._order == (0, 1) and self.attended == (1,)

    def flatten(self, x):
        """`[batch, *dims, num_heads, depth]` to `[prod(free), prod(attended), num_heads, depth]`."""
        if self.is_flat:
            return x
        n = self.num_axes
        x = ops.transpose(x, [*self._order, n, n + 1])
        extents = dims(x)
        num_free = len(self.free)
        return ops.reshape(x, [math.prod(extents[:num_free]), math.prod(extents[num_free:n]), *extents[n:]])

    def unflatten(self, x, like):
        """Undoes :meth:`flatten`; `like` has the leading extents that the result gets."""
        if self.is_flat:
            return x
        extents = dims(like)
        x = ops.reshape(x, [*(extents[axis] for axis in self._order), *dims(x)[2:]])
        back = [self._order.index(axis) for axis in range(self.num_axes)]
        return ops.transpose(x, [*back, self.num_axes, self.num_axes + 1])

    def unflatten_scores(self, scores, query, key):
        """`[prod(free), num_heads, seqlen_q, seqlen_k]` to `[*free, num_heads, *attended of query, *attended of key]`."""
        if self.is_flat:
            return scores
        extents_q, extents_k = dims(query), dims(key)
        return ops.reshape(
            scores,
            [
                *(extents_q[axis] for axis in self.free),
                dims(scores)[1],
                *(extents_q[axis] for axis in self.attended),
                *(extents_k[axis] for axis in self.attended),
            ],
        )

    def flatten_padding(self, mask, like):
        """A mask of the first axes of `like` (Keras's `[batch, seqlen]`, or more axes) to `[prod(free), prod(attended)]`.

        Beside one attended axis a mask of two axes is `[batch, seqlen]` of that one, as in Keras, wherever it stands, unless
        its length shows that it is not.

        Raises:
            ValueError: `mask` has more axes than there are before the features, or others.
        """
        if self.is_flat and len(mask.shape) == 2:
            return mask
        missing = self.num_axes - len(mask.shape)
        if missing < 0:
            raise ValueError(
                f"attn_ops.layers: a padding mask of shape {tuple(mask.shape)} has more axes than the {self.num_axes} "
                "before the features of its input"
            )
        extents = dims(mask)
        if len(extents) == 2 and len(self.attended) == 1 and broadcasts(mask.shape[1], like.shape[self.attended[0]]):
            ones = [1] * missing
            before = self.attended[0] - 1
            extents = [extents[0], *ones[:before], extents[1], *ones[before:]]
        else:
            extents += [1] * missing
        padded = ops.transpose(ops.reshape(mask, extents), self._order)
        extents = dims(like)
        groups = [[extents[axis] for axis in self.free], [extents[axis] for axis in self.attended]]
        return _merge(padded, groups, f"a padding mask of shape {tuple(mask.shape)}", like)

    def flatten_mask(self, mask, query, key, what="attention_mask"):
        """A mask (or bias) that Keras would broadcast to the scores to rank 4, broadcastable to
        `[prod(free), num_heads, seqlen_q, seqlen_k]`.

        The last axes of `mask` are those of the query and of the key; the axes before them are the first ones of the
        scores (free axes, then heads), and the ones between are added. So `[batch, seqlen_q, seqlen_k]` is per batch
        element, not per head.

        Raises:
            ValueError: `mask` has too few axes to cover query and key, more than the scores have, or others.
        """
        num_free, num_attended = len(self.free), len(self.attended)
        leading = len(mask.shape) - 2 * num_attended
        if not 0 <= leading <= num_free + 1:
            raise ValueError(
                f"attn_ops.layers: an {what} of shape {tuple(mask.shape)} has {len(mask.shape)} axes, and needs "
                f"{2 * num_attended} (the query's and the key's) to {num_free + 1 + 2 * num_attended} (with "
                f"{num_free} batch axes and the heads before them)"
            )
        extents = dims(mask)
        missing = [1] * (num_free + 1 - leading)
        dense = ops.reshape(mask, [*extents[:leading], *missing, *extents[leading:]])
        if self.is_flat:
            return dense
        extents_q, extents_k = dims(query), dims(key)
        groups = [
            [extents_q[axis] for axis in self.free],
            [dense.shape[num_free]],
            [extents_q[axis] for axis in self.attended],
            [extents_k[axis] for axis in self.attended],
        ]
        return _merge(dense, groups, f"an {what} of shape {tuple(mask.shape)}", query, key)


def _merge(mask, groups, what, *like):
    """Merges each group of consecutive axes of `mask` into one. `groups` are the extents that the axes broadcast to: a
    group in which every axis is 1 stays 1, one in which only some are is broadcast, since merged axes cannot be.

    Raises:
        ValueError: Extents do not broadcast, as far as they are known; it names the mask by ``what`` and those ``like`` which
            it should be.
    """
    extents = dims(mask)
    if not all(broadcasts(mine, other) for mine, other in zip(mask.shape, sum(groups, []))):
        shapes = " and ".join(str(tuple(x.shape)) for x in like)
        raise ValueError(f"attn_ops.layers: {what} does not broadcast along the axes of inputs of shape {shapes}")
    broadcast, merged = [], []
    for group in groups:
        mine = extents[len(broadcast) : len(broadcast) + len(group)]
        if len(group) > 1 and any(not _is_one(extent) for extent in mine):
            mine = group
        broadcast += mine
        merged.append(math.prod(mine))
    if len(broadcast) > len(merged):
        mask = ops.broadcast_to(mask, broadcast)
    return ops.reshape(mask, merged)


def _is_one(extent):
    return isinstance(extent, int) and extent == 1


def broadcasts(extent, other):
    """Whether an ``extent`` is 1 or the ``other`` one, or may be: those that are no ints only the running graph knows."""
    return not isinstance(extent, int) or extent == 1 or not isinstance(other, int) or extent == other

"""Ragged input of the multi-head layers: its tokens one after the other, as one sequence, projected and attended to without
padding. Keras hands `tf.RaggedTensor`s to layers as they are; its own cannot compute with them."""

from __future__ import annotations

import typing

import tensorflow as tf

import attn_ops
from attn_ops.tensorflow.runtime_checks import with_rows_of


class Tokens(typing.NamedTuple):
    """What a layer computes with in place of ragged query, key and value: `[1, tokens, features]` each, and what puts the
    result together again."""

    query: tf.Tensor
    key: tf.Tensor
    value: tf.Tensor
    splits: tuple  # row splits of queries and of keys; None for those of the queries
    positions: tuple  # of queries and keys in their sequences, [1, tokens]
    like: tf.RaggedTensor

    def attend(self, query, key, value, **options):
        """`[1, tokens, num_heads, head_dim]` of projected ones; options of :func:`attn_ops.varlen_attention`."""
        return attn_ops.varlen_attention(query[0], key[0], value[0], *self.splits, **options)[None]

    def ragged(self, out):
        return self.like.with_values(out[0])


def mask_of_tokens(name, mask, like):
    """A ragged mask `[batch, (seqlen)]`, as Keras's embeddings of ragged ids have, of the `[1, tokens]` of ``like``.

    Raises:
        TypeError: ``like`` is dense.
        ValueError: Rows of other lengths, or more ragged dimensions.
    """
    if not isinstance(like, tf.RaggedTensor):
        raise TypeError(f"{name}: a mask is ragged, and its input is dense: pass mask.to_tensor()")
    if mask.ragged_rank != 1 or mask.values.shape.rank != 1:
        raise ValueError(f"{name}: a ragged mask must be [batch, (seqlen)], got shape {mask.shape}")
    return with_rows_of(name, like, mask, "an input and its mask").values[None]


def tokens(name, query, key, value, query_offset=None):
    """The `Tokens` of three ragged tensors `[batch, (seqlen), features]`; queries stand from their ``query_offset`` on.

    Raises:
        TypeError: One of them is dense.
        ValueError: More ragged dimensions, or keys and values of different lengths.
    """
    for what, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, tf.RaggedTensor):
            raise TypeError(f"{name}: query, key and value must all be ragged or all be dense, and {what} is dense")
        if x.ragged_rank != 1 or x.values.shape.rank != 2:
            raise ValueError(
                f"{name}: {what} must be ragged [batch, (seqlen), features] with one ragged dimension, got shape {x.shape}"
            )
    value = with_rows_of(name, key, value)
    same = key.row_splits is query.row_splits
    positions = _positions(query, query_offset)[None], _positions(key)[None]
    splits = query.row_splits, None if same else key.row_splits
    return Tokens(query.values[None], key.values[None], value.values[None], splits, positions, query)


def _positions(x, start=None):
    """The position of each token in its sequence, `[tokens]`, counted from a ``start``, an integer or integers `[batch]`."""
    splits = x.row_splits
    tokens = tf.range(tf.shape(x.values, splits.dtype)[0])
    sequence = tf.searchsorted(splits, tokens, "right") - 1  # XLA has no tf.ragged.range
    positions = tokens - tf.gather(splits, sequence)
    if start is None:
        return positions
    start = tf.cast(start, splits.dtype)
    return positions + (start if start.shape.rank == 0 else tf.gather(start, sequence))

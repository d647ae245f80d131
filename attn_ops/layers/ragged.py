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


class Padded(typing.NamedTuple):
    """Ragged query, key and value with padding, for what is to be told of all pairs of a query and a key."""

    inputs: list
    masks: list  # bool [batch, seqlen]: what is neither padding nor hidden
    lengths: list

    def ragged(self, out, weights):
        """Both without the padding: `[batch, (seqlen_q), features]` and `[batch, (seqlen_q), (seqlen_k)]`."""
        of_queries, of_keys, _ = self.lengths
        nested = of_queries, tf.repeat(of_keys, of_queries)
        return tf.RaggedTensor.from_tensor(out, of_queries), tf.RaggedTensor.from_tensor(weights, nested)


def padded(name, inputs, masks):
    """The `Padded` of ragged query, key and value, and of ragged masks or Nones. Raises what `tokens` does."""
    tokens(name, *inputs)
    rows = [padded_rows(name, x, mask) for x, mask in zip(inputs, masks or [None] * 3)]
    return Padded([x.dense for x in rows], [x.real for x in rows], [x.lengths[0] for x in rows])


class PaddedRows(typing.NamedTuple):
    """A ragged tensor `[batch, …, features]` with padding."""

    dense: tf.Tensor
    real: tf.Tensor  # bool [batch, …]: what is neither padding nor hidden
    lengths: tuple  # of its rows, of each ragged dimension

    def cut(self, *results):
        """Results `[batch, …]` without the padding."""
        return tuple(tf.RaggedTensor.from_tensor(x, self.lengths[: x.shape.rank - 1]) for x in results)


def padded_rows(name, x, mask=None):
    """The `PaddedRows` of a ragged tensor and a ragged mask or None.

    Raises:
        ValueError: the mask has other dimensions, or rows of other lengths (tf.errors.InvalidArgumentError where only the
            running graph knows).
    """
    real = x.with_flat_values(tf.ones(tf.shape(x.flat_values)[:-1], tf.bool))
    if mask is not None:
        if mask.ragged_rank != x.ragged_rank or mask.shape.rank != x.shape.rank - 1:
            raise ValueError(f"{name}: a mask must be ragged like its input, of shape {x.shape}, got shape {mask.shape}")
        shown = tf.cast(_with_rows_of(name, x, mask).flat_values, tf.bool)
        real = real.with_flat_values(tf.logical_and(real.flat_values, shown))
    return PaddedRows(x.to_tensor(), real.to_tensor(False), tuple(x.nested_row_lengths()))


def _with_rows_of(name, x, mask):
    if x.ragged_rank > 1:
        mask = mask.with_values(_with_rows_of(name, x.values, mask.values))
    return with_rows_of(name, x, mask, "an input and its mask")


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

"""Attention of a sequence that is divided among the replicas of a `tf.distribute.Strategy`."""

from __future__ import annotations

import tensorflow as tf

from attn_ops.call import arrays, options, public
from attn_ops.call.normalize import split_masks
from attn_ops.tensorflow import xp
from attn_ops.tensorflow.attention import scaled_dot_product_attention

_NAME = "all_gather_kv"


@public.function(without=("dropout_rate", "dropout_seed", "query_offset"), implementation=None)
def all_gather_kv(query, key, value, **given):
    """Attention of this replica's rows to the keys of all replicas, which are gathered: in a replica context.

    The sequence is divided among the replicas, in their order and in equal shares. What is said of positions, lengths
    and distances is said of the whole: is_causal, window, alibi_slopes, relative_bias and both lengths. Masks and
    biases are of this replica's rows and all keys. Outside of `Strategy.run`, or with one replica, it is
    `scaled_dot_product_attention`. With dropout use `attn_ops.jax.parallel`.

    Args:
        query: [batch, seqlen_q / replicas, num_heads, head_dim]; lengths are to be known when a function is traced.
        key: [batch, seqlen_k / replicas, num_kv_heads, head_dim].
        value: [batch, seqlen_k / replicas, num_kv_heads, value_dim].
        {options}
        implementation: as in `attn_ops.scaled_dot_product_attention`.

    Returns:
        The output of this replica's rows, or (output, lse). The gradient of a key is the sum over the rows of all
        replicas.

    Raises:
        TypeError, ValueError: as `attn_ops.scaled_dot_product_attention`, and in a cross-replica context.
        NotImplementedError: causal_alignment="bottom_right" beside lengths, or lengths of rows in a mask.
    """
    context = tf.distribute.get_replica_context()
    if context is None:
        raise ValueError(f"{_NAME}: call it in a replica context, inside Strategy.run")
    count = context.num_replicas_in_sync
    if count == 1:
        return scaled_dot_product_attention(query, key, value, **given)
    query, key, value = map(tf.convert_to_tensor, (query, key, value))
    axis = 1 if given.get("layout", "BSHD") == "BSHD" else 2
    rows, keys = query.shape[axis], key.shape[axis]
    if None in (rows, keys):
        raise ValueError(f"{_NAME}: the lengths of query and key must be known, got {query.shape} and {key.shape}")
    first = tf.cast(context.replica_id_in_sync_group, tf.int32) * rows
    structure, _ = split_masks(_NAME, given.get("mask"))
    lengths = given.get("query_seq_lengths"), given.get("key_value_seq_lengths")
    if structure is not None:
        if structure.query_lengths is not None or structure.bottom_right:
            raise NotImplementedError(
                f"{_NAME}: say lengths of rows as query_seq_lengths, and causal_alignment='bottom_right' beside the mask"
            )
        lengths += (structure.key_lengths,)
    if lengths[0] is not None:
        whole = arrays.lengths(xp, _NAME, "query_seq_lengths", lengths[0], query.shape[0], rows * count)
        # What is out of range stays so, for the attention to tell.
        wrong = (whole < 0) | (whole > rows * count)
        given["query_seq_lengths"] = tf.where(wrong, whole, tf.clip_by_value(whole - first, 0, rows))
    if options.bottom_right(_NAME, given.pop("causal_alignment", options.TOP_LEFT)):
        if any(x is not None for x in lengths):
            raise NotImplementedError(f"{_NAME}: causal_alignment='bottom_right' beside lengths")
        if rows > keys:
            raise ValueError(
                f"{_NAME}: causal_alignment='bottom_right' needs as many keys as rows, got {rows} rows and {keys} keys a replica"
            )
        first += (keys - rows) * count
    key, value = (_gathered(context, x, axis) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, query_offset=first, **given)


def _gathered(context, x, axis):
    """``x`` of all replicas along ``axis``."""
    # Several workers gather only what knows its device, which in a graph few tensors do. Devices are those of this
    # worker.
    devices = context.strategy.extended.worker_devices
    replica = tf.get_static_value(context.replica_id_in_sync_group)
    if replica is None:
        return context.all_gather(x, axis)
    with tf.device(devices[int(replica) % len(devices)]):
        return context.all_gather(tf.identity(x), axis)

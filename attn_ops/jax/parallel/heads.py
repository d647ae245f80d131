"""Devices exchange a part of the sequence of all heads for all of the sequence of some heads (Jacobs et al. 2023,
DeepSpeed Ulysses, arXiv:2309.14509), and back: what each head computes is what one device would."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from attn_ops import namespaces
from attn_ops.call.attention_call import canonical
from attn_ops.jax import run
from attn_ops.jax.parallel.shares import finer
from attn_ops.masks import structure


def refusal(share) -> str | None:
    """Why heads cannot be exchanged for this call; None when they can."""
    num_heads = canonical(share.query.shape, share.layout)[1]
    num_kv_heads = canonical(share.key.shape, share.layout)[1]
    if share.order != "contiguous":
        return f"it needs order='contiguous', got {share.order!r}"
    if num_heads % share.count or (num_kv_heads % share.count and share.count % num_kv_heads):
        return f"{num_heads} heads and {num_kv_heads} key heads cannot be divided among {share.count} devices"
    return None


def attend(share, chosen, forced):
    """(out, lse) of the device's rows."""
    heads, sequence = share.heads_axis, share.sequence_axis
    [rows] = share.own_rows()
    call = share.call(rows)
    num_heads = call.query.shape[heads]
    own = num_heads // share.count

    def exchanged(x, split, concat):
        return jax.lax.all_to_all(x, share.axis, split, concat, tiled=True)

    def of_heads(x):
        x = x.astype(call.query.dtype)
        if x.shape[heads] % share.count:
            x = jnp.repeat(x, share.count // x.shape[heads], heads)
        return exchanged(x, heads, sequence)

    def gathered(x, axis):
        return jax.lax.all_gather(x, share.axis, axis=axis, tiled=True)

    def sliced(x, axis):
        return x if x.shape[axis] == 1 != num_heads else jax.lax.dynamic_slice_in_dim(x, share.index * own, own, axis)

    def scores(x, rows):
        """A mask or bias of the device's rows as one of its heads."""
        if x is None or x.shape[2] != rows:
            return x if x is None else sliced(x, 1)
        return gathered(x, 2) if x.shape[1] == 1 != num_heads else exchanged(x, 1, 2)

    if call.blocks is not None:
        blocks, size = finer(call.blocks, 2, call.block_q, share.rows)
        count = share.rows // size
        call = call._replace(blocks=scores(blocks[:, :, :count], count), block_q=size)
    intervals = call.intervals and tuple(gathered(x, 1) for x in call.intervals)
    if intervals and call.segments:  # those of ids go from an id's first key to its last, and back for each device
        intervals = structure.hull(namespaces.of(intervals), *intervals)
    offset = None
    if call.query_offset is not None and not (isinstance(share.offset, int) and share.offset == 0):
        offset = jnp.broadcast_to(jnp.asarray(share.offset, "int32"), call.query_offset.shape)
    whole = call._replace(
        query=exchanged(call.query, heads, sequence),
        key=of_heads(share.key),
        value=of_heads(share.value),
        bias=scores(call.bias, share.rows),
        masks=tuple(scores(x, share.rows) for x in call.masks),
        intervals=intervals,
        segments=call.segments and (gathered(call.segments[0], 1), call.segments[1]),
        query_lengths=share.query_lengths,
        query_offset=offset,
        alibi_slopes=None if call.alibi_slopes is None else sliced(call.alibi_slopes, 1),
        relative_bias=None if call.relative_bias is None else sliced(call.relative_bias, 0),
        sinks=None if call.sinks is None else sliced(call.sinks, 0),
    )
    origin = share.origin(0, first_head=share.index * own) if call.dropout_rate else None
    out, lse = run.attention(share.name, whole, chosen, forced, origin)
    return exchanged(out, sequence, heads), None if lse is None else exchanged(lse, 2, 1)

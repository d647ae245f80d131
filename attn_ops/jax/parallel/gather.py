"""Each device gathers all keys and values, and attends with its own rows: little to say, much to hold."""

from __future__ import annotations

import jax

from attn_ops.jax import run


def attend(share, chosen, forced):
    """(out, lse) of the device's rows."""
    gathered = [
        jax.lax.all_gather(x, share.axis, axis=share.sequence_axis, tiled=True) for x in (share.key, share.value)
    ]
    results = []
    for rows in share.own_rows():
        call = share.call(rows)
        key, value = (share.in_order(x).astype(call.query.dtype) for x in gathered)
        call = call._replace(key=key, value=value)
        origin = share.origin(rows.first) if call.dropout_rate else None
        results.append(run.attention(share.name, call, chosen, forced, origin))
    return share.joined(call, results)

"""A normalised call, run by the implementation that it gets."""

from __future__ import annotations

import functools

import jax
from jax.sharding import PartitionSpec

from attn_ops.call.attention_call import canonical
from attn_ops.jax import call as calls
from attn_ops.jax import choice, composite, derivatives, place

_composite = jax.jit(composite.attention, static_argnums=0)


def attention(name, call, chosen, forced, origin=None):
    """(out, lse) of an `AttentionCall` by the implementation that was ``chosen``, because it was ``forced`` or not;
    lse is None unless asked for. ``origin`` is that of `Arrays`."""
    if chosen == "fused" and not forced and place.exporting(call.query):
        chosen = "composite"
    choice.calls[chosen] += 1
    options, arrays = calls.split(call)
    arrays = arrays._replace(origin=origin)
    run = functools.partial(_run, chosen, forced, options)
    out, *lse = place.without_explicit_axes(run, _specs(options, arrays), arrays)
    return out, lse[0] if lse else None


def _run(chosen, forced, options, arrays):
    if chosen == "composite":
        return _found(_composite(options, arrays))
    return _found(derivatives.attention(forced and chosen == "fused", options, place.varying_alike(arrays))[:2])


def _found(results):
    return tuple(x for x in results if x is not None)


def _specs(options, arrays):
    """How the results are divided on a mesh with explicit axes: along batch and heads, like the query."""
    batch, heads, _, _ = canonical(place.spec(arrays.query), options.layout)
    out = (batch, None, heads, None) if options.layout == "BSHD" else (batch, heads, None, None)
    specs = PartitionSpec(*out), PartitionSpec(batch, heads, None)
    return specs if options.return_lse else specs[:1]

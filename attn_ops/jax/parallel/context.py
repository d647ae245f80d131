"""The functions for sequences that are divided among devices, and which way a call goes."""

from __future__ import annotations

from attn_ops.call import public
from attn_ops.jax import choice
from attn_ops.jax.parallel import gather, heads, rings, shares
from attn_ops.jax.parallel.order import ORDERS

_WAYS = {"head_parallel": heads, "ring": rings, "all_gather_kv": gather}
_METHODS = ("auto", *_WAYS)
_OWN = {"axis": None, "order": "contiguous", "segment_ids": None, "implementation": None}


@public.function(method="auto", **_OWN)
def context_parallel(query, key, value, **given):
    """`scaled_dot_product_attention` of sequences that are divided along an axis of a mesh: inside `jax.shard_map`.

    Each device gives its rows, and the keys and values that it has, and gets the output of its rows: that of the whole
    sequence, to any of whose keys they may attend. What is said of positions, lengths and distances is said of the
    whole: is_causal, window, query_offset, alibi_slopes, relative_bias and both lengths. Masks and biases are of the
    device's rows and all keys, but functions of indices (`masks.from_function`) are those of the whole; sinks, slopes
    and tables are of all heads, and the same on each device.

    Args:
        query: [batch, seqlen_q / devices, num_heads, head_dim].
        key: [batch, seqlen_k / devices, num_kv_heads, head_dim].
        value: [batch, seqlen_k / devices, num_kv_heads, value_dim].
        {options}
        method: "head_parallel" exchanges a part of the sequence of all heads for all of it of some heads, and back, and
            needs heads that the devices divide. "ring" sends keys and values from device to device, and holds two
            shares at a time. "all_gather_kv" gathers all keys and values on each device. "auto" takes the first of them
            that has the call.
        axis: the name of the mesh axis.
        order: "contiguous": device n has the n-th share. "zigzag": it has two of 2 devices chunks, the n-th and the
            n-th from the end, as `zigzag` deals them out, so that under a causal mask all cost the same; not for
            "head_parallel".
        segment_ids: integers [batch, seqlen / devices] of the device's tokens, or a pair, of its rows and its keys:
            equal ones see each other. With a gathering of the ids, `masks.segments` of the whole.
        implementation: see `scaled_dot_product_attention`.

    Returns:
        The output of the device's rows, or (output, lse). Differentiable in reverse mode, the ring once, the others to
        any order; gradients of what all devices hold alike are those of the whole.

    Raises:
        NotImplementedError: what a method does not have, naming one that has it.
        TypeError, ValueError: as `scaled_dot_product_attention`; no axis, or an unknown method or order.
    """
    return _attend("context_parallel", given.pop("method", "auto"), query, key, value, given)


@public.function(**_OWN)
def head_parallel(query, key, value, **given):
    """`context_parallel` with method="head_parallel"."""
    return _attend("head_parallel", "head_parallel", query, key, value, given)


@public.function(**_OWN)
def all_gather_kv(query, key, value, **given):
    """`context_parallel` with method="all_gather_kv"."""
    return _attend("all_gather_kv", "all_gather_kv", query, key, value, given)


@public.function(**_OWN)
def ring(query, key, value, **given):
    """`context_parallel` with method="ring"."""
    return _attend("ring", "ring", query, key, value, given)


def _attend(name, method, query, key, value, given):
    axis, order = given.pop("axis", None), given.pop("order", "contiguous")
    implementation = given.pop("implementation", None)
    if method not in _METHODS:
        raise ValueError(f"{name}: method must be one of {_METHODS}, got {method!r}")
    if order not in ORDERS:
        raise ValueError(f"{name}: order must be one of {ORDERS}, got {order!r}")
    share = shares.described(name, axis, order, query, key, value, given)
    chosen = choice.choose(name, implementation)
    refused = heads.refusal(share)
    if method == "auto":
        method = "ring" if refused else "head_parallel"
    elif method == "head_parallel" and refused:
        raise NotImplementedError(f"{name}: {refused} for method={method!r}; method='ring' has it")
    out, lse = _WAYS[method].attend(share, chosen, implementation is not None)
    return out if lse is None else (out, lse)

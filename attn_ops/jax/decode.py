"""decode_attention on JAX arrays: new rows attend to a cache, and become part of it."""

from __future__ import annotations

import functools

import jax.numpy as jnp

from attn_ops.call import public
from attn_ops.call.normalize import normalize
from attn_ops.generation import decode
from attn_ops.jax import append, choice, place, run, xp

update = functools.partial(decode.update, xp, append.append)
rewound = functools.partial(decode.rewound, xp)


@public.function(without=decode.NOT_TAKEN, is_causal=True, rotary=None, implementation=None)
@place.any_ranks
def decode_attention(q, cache, k_new=None, v_new=None, **given):
    """Appends new keys and values to a cache, and attends to all that it has then.

    The function of `attn_ops.decode_attention` on JAX arrays: the same arguments, results and errors. Works under
    `jax.jit`, `jax.lax.scan` and `jax.lax.while_loop`. Forward only. Memory is taken over in loops, and in functions
    whose argument the cache is, donated: ``jax.jit(step, donate_argnums=…)``; outside of functions the arrays of the old
    cache are deleted.

    Args:
        q: floating [batch, rows, num_heads, head_dim], in the layout of the cache.
        cache: an `attn_ops.KVCache`.
        k_new, v_new: floating [batch, rows, num_kv_heads, head_dim] and [..., value_dim], or None.
        is_causal: whether a row sees no key behind its own.
        rotary: None, True, or a dict of the options of `attn_ops.rotary_embedding`: turns q and k_new by their
            positions.
        {options}
        implementation: as in `attn_ops.jax.scaled_dot_product_attention`.

    Returns:
        (out, cache); with return_lse (out, lse, cache).

    Raises:
        TypeError, ValueError: as in `attn_ops.decode_attention`.
        jax.errors.JaxRuntimeError: no room for the new rows, where only the running kernel can know. Of the composite such
            a sequence gets NaN; kernels of GPUs leave out what there was no room for.
    """
    name = "decode_attention"
    implementation = given.pop("implementation", None)
    q = xp.as_tensor(name, "q", q)
    decoding = decode.prepared(xp, name, q, cache, k_new, v_new, **given)
    chosen = choice.choose(name, implementation)
    call, cache = decoding.grown(xp, append.append)  # only what nothing speaks against changes the cache
    out, lse = run.attention(name, call, chosen, forced=implementation is not None)
    out = out if out.dtype == q.dtype else out.astype(q.dtype)
    return (out, lse, cache) if call.return_lse else (out, cache)


def attend_stacked(q, cache, k_new, v_new, positions, *, implementation=None, **given):
    """`attn_ops.tensorflow.decode.attend_stacked` on JAX arrays: the same arguments and results."""
    name = "decode_attention"
    positions = jnp.broadcast_to(jnp.asarray(positions, "int32"), q.shape[:1])
    counts = given.get("query_seq_lengths")
    ends = positions + (q.shape[1] if counts is None else counts)
    options = {"is_causal": True, **given, "query_offset": positions, "key_value_seq_lengths": ends}

    def described(cache):
        return normalize(xp, name, q.astype(cache.dtype), cache[:, 0], cache[:, 1], **options)

    described(cache)  # what is refused leaves the cache as it was
    if k_new is not None:
        cache = append.append_to_cache(cache, k_new, v_new, positions)
    chosen = choice.choose(name, implementation)
    out = run.attention(name, described(cache), chosen, forced=implementation is not None)[0]
    return out.astype(q.dtype), cache

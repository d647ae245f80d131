"""decode_attention for TensorFlow: new rows attend to a cache, and become part of it."""

from __future__ import annotations

import functools

import tensorflow as tf

from attn_ops.call import public
from attn_ops.call.normalize import normalize
from attn_ops.generation import decode
from attn_ops.generation.cache import KVCache
from attn_ops.models import keras_tensors
from attn_ops.tensorflow import append, attention, choice, place, runtime_checks, xp
from attn_ops.tensorflow.as_written import as_written
from attn_ops.tensorflow.forms import custom_call, eager, graph, xla

rewound = functools.partial(decode.rewound, xp)


@as_written
def update(name, cache, k, v, lengths):
    """``cache`` with new rows: what `KVCache.update` says."""
    operations = keras_tensors.of_keras_2(cache, k, v, lengths)
    if operations is not None:
        return operations.updated(cache, k, v, lengths)
    return decode.update(xp, append.append, name, cache, k, v, lengths)


@as_written
@public.function(without=decode.NOT_TAKEN, is_causal=True, rotary=None, implementation=None)
def decode_attention(q, cache, k_new=None, v_new=None, **given):
    """Appends new keys and values to a cache, and attends to all that it has then.

    One call for all of generation: a prompt (as many rows as it has, or in parts), a token, a few at once (speculative
    decoding). Row i of a sequence stands behind what the cache had of that, and sees no later key: what a causal
    attention over the whole sequence gives it. Only keys that exist are read, and appending costs as much as the new
    rows (see `attn_ops.KVCache`). Works eagerly, in `tf.function`, `tf.while_loop` and XLA. Forward only.

    Args:
        q: floating [batch, rows, num_heads, head_dim], in the layout of the cache. The output has its dtype, and so
            has the attention, whatever that of the cache is (see `KVCache.create`).
        cache: an `attn_ops.KVCache`. The axis of keys, of a ``bias`` or ``mask``, is the cache's: [..., max_length].
        k_new, v_new: floating [batch, rows, num_kv_heads, head_dim] and [..., value_dim], as many rows as q, cast to
            the dtype of the cache. None: the rows of q are the last ones that the cache has already (or, with
            ``is_causal=False``, rows that have no place there, as in cross-attention).
        is_causal: whether a row sees no key behind its own. With False it sees those of the rows beside it too.
        rotary: None, True, or a dict of the options of `attn_ops.rotary_embedding` (base, rotary_dim, interleaved,
            scaling): turns q and k_new by their positions. The cache holds turned keys.
        {options}
        implementation: as in `attn_ops.scaled_dot_product_attention`.

    ``query_seq_lengths`` tells how many of the new rows each sequence has, where prompts are padded at their ends: the
    others are not appended.

    Returns:
        (out, cache), out [batch, rows, num_heads, value_dim]; with return_lse (out, lse, cache).

    Raises:
        TypeError: cache is no KVCache, or an argument of another kind.
        ValueError: shapes that do not fit the cache, or no room for the new rows: then the cache stays as it was.
            Options along the axis of keys (``bias``, masks by position) beside a cache with a window, or a wider
            window.
        tf.errors.InvalidArgumentError: the same, where only the running op can know; in XLA the attention finds it
            (of the composite such a sequence gets NaN).
    """
    operations = keras_tensors.of_keras_2(q, cache, k_new, v_new, *given.values())
    if operations is not None and isinstance(cache, KVCache):
        return operations.decode_attention(q, cache, k_new, v_new, given)
    name = "decode_attention"
    implementation = given.pop("implementation", None)
    q = xp.as_tensor(name, "q", q)
    decoding = decode.prepared(xp, name, q, cache, k_new, v_new, **given)
    chosen = choice.choose(name, decoding.call, implementation)
    choice.calls[chosen] += 1

    def run():  # only what nothing speaks against changes the cache
        call, cache = decoding.grown(xp, append.append)
        out, lse = attention.RUN[chosen](call)
        out = out if out.dtype == q.dtype else tf.cast(out, q.dtype)
        return (out, lse, cache) if call.return_lse else (out, cache)

    if chosen != "fused" or tf.executing_eagerly() or append.only_scatters():
        return run()
    return graph.by_device(run, run, run)  # one choice for the append and the attention


def attend_stacked(q, cache, k_new, v_new, positions, *, implementation=None, **given):
    """`decode_attention` with KerasHub's cache, keys and values in one tensor, which the kernels read where it lies.

    Args:
        q: floating [batch, rows, num_heads, head_dim].
        cache, k_new, v_new, positions: as in `append.append_to_cache`. The rows stand at ``positions``, and see what
            is there before them, and themselves.
        implementation: as in `decode_attention`.
        **given: options of `scaled_dot_product_attention`, but for those that the positions decide. ``is_causal`` is
            True unless given; ``query_seq_lengths`` tells how many of the new rows count.

    Returns:
        (out, cache). Where ``k_new`` is None the cache is as it was, and the rows are the ones at ``positions``.
    """
    name = "decode_attention"
    q, cache = xp.as_tensor(name, "q", q), xp.as_tensor(name, "cache", cache)
    positions = tf.cast(positions, tf.int32)
    counts = given.get("query_seq_lengths")
    ends = positions + (xp.extent(q, 1) if counts is None else tf.cast(counts, tf.int32))
    options = {
        "is_causal": True,
        **given,
        "query_offset": positions,
        "key_value_seq_lengths": tf.broadcast_to(ends, [xp.extent(q, 0)]),
    }

    def grown():
        return cache if k_new is None else append.append_to_cache(cache, k_new, v_new, positions)

    def described(cache):
        return normalize(xp, name, tf.cast(q, cache.dtype), cache[:, 0], cache[:, 1], **options)

    chosen = choice.choose(name, described(cache), implementation)
    choice.calls[chosen] += 1

    def by_slices():
        after = grown()
        return tf.cast(attention.RUN[chosen](described(after))[0], q.dtype), after

    def by_halves(forward):
        def run():
            after = grown()
            call = described(after)  # whose slices nothing reads: a graph drops them
            shape = runtime_checks.extents(after)
            both = tf.reshape(after, [shape[0], 2 * shape[2], *shape[3:]])
            return tf.cast(forward(call._replace(key=both, value=both), halves=True)[0], q.dtype), after

        return run

    if chosen != "fused" or tf.executing_eagerly() or append.only_scatters() and not place.in_xla():
        return by_slices()
    unknown = None in cache.shape.as_list() + q.shape.as_list() or custom_call.unavailable_reason()
    in_xla = by_slices if unknown else by_halves(xla.forward)
    if place.in_xla():
        return in_xla()
    native = by_halves(eager.forward)
    return graph.by_device(native, native, in_xla)

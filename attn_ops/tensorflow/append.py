"""New rows in the memory of a cache: by the operators AttnOps>AppendToCache and AttnOps>AppendToInt8Cache on CPUs, by
scatters elsewhere.

The operators are registered by csrc/bindings/tf_append.h, which says when they write in place. XLA and GPUs do so as well,
in loops and where arguments are donated.
"""

from __future__ import annotations

import tensorflow as tf

from attn_ops import kernels
from attn_ops.call import pages as paged
from attn_ops.call.attention_call import canonical
from attn_ops.generation import int8
from attn_ops.tensorflow import export, gpu, place, registration, runtime_checks, xp
from attn_ops.tensorflow.forms import custom_call, graph


def append_to_cache(cache, k_new, v_new, positions):
    """KerasHub's cache with new rows in it: what `AttnOps>AppendToCache` is where keys and values are one tensor.

    Args:
        cache: floating [batch, 2, max_length, num_kv_heads, head_dim], keys and then values.
        k_new, v_new: [batch, rows, num_kv_heads, head_dim], cast to the dtype of the cache.
        positions: integers [batch] or a scalar: where the first of the new rows goes.

    Returns:
        The shape and dtype of the cache. On CPUs it takes over the memory of ``cache`` where that is used nowhere
        else, as in `tf.while_loop`. It has no gradient.

    Raises:
        ValueError, tf.errors.InvalidArgumentError: rows that do not fit the cache, or lie beyond its end; the cache
            stays as it was.
    """
    cache = tf.convert_to_tensor(cache)
    k_new, v_new = (tf.cast(x, cache.dtype) for x in (k_new, v_new))
    positions = tf.cast(positions, tf.int32)
    if positions.shape.rank == 0:
        positions = positions[None]

    def scattered():
        return tuple(_scattered([(tf.stack([k_new, v_new], 1), cache)], positions, None, axis=2))

    def native():
        (grown,), _ = _operator([cache], k_new, v_new, positions, None, None, None, "B2SHD")
        grown.set_shape(cache.shape)
        return (grown,)

    return _on_its_device(native, scattered)[0]


def append(layout, memory, new, positions, counts, dropped, written):
    """(memory, written) with the new rows from ``positions`` on, int32 [batch].

    ``memory`` is the `KVCache.memory` of a cache in ``layout``, and ``new`` keys and values for it: of its dtype, or floats
    that int8 rounds. ``counts`` and ``dropped`` are int32 [batch] or None: how many of the new rows there are, and how many
    of the oldest make way, by which all others and ``positions`` move. ``written`` may be None.
    """

    def scattered():
        arrays, at = memory, positions
        rows = int8.rounded(xp, new) if len(memory) == 4 else new
        if dropped is not None:
            arrays = _moved_up(arrays, dropped, layout)
            at = at - dropped
        grown = _scattered(list(zip(rows, arrays)), at, counts, axis=1 if layout == "BSHD" else 2)
        # Nobody's lengths: in the memory of these others are at work.
        return (*grown, *([] if written is None else [written * 0 - 1]))

    def native():
        grown, marks = _operator(memory, *new, positions, counts, dropped, written, layout)
        for x, like in zip((*grown, *marks), (*memory, written)):
            x.set_shape(like.shape)
        return (*grown, *marks)

    found = _on_its_device(native, scattered)
    count = len(memory)
    return tuple(found[:count]), found[count] if written is not None else None


def append_to_pages(memory, new, table, positions, counts, layout, in_place):
    """The ``memory`` of pages (keys, values, and in int8 the scales of both) with the new rows where ``table`` says.

    Args:
        new: as many arrays [batch, rows, num_kv_heads, …] in ``layout``, of the dtypes of the memory; or keys and values in
            floats, that int8 rounds.
        table: int32 [batch, pages].
        positions, counts: int32 [batch]: where the first of the new rows goes, and how many there are; None: all.
        in_place: whether the operator writes into ``memory``, whoever else looks at it. False: where this is the last use
            of that.
    """
    if len(memory) > len(new):
        new = int8.rounded(xp, new)
    new = tuple(new)

    def scattered():
        total, _, size, _ = canonical(runtime_checks.extents(memory[0]), layout)
        rows = runtime_checks.extents(new[0])[1 if layout == "BSHD" else 2]
        page, row = paged.slots(xp, table, positions, counts, rows, size, total)
        kept = None if place.in_xla() else page < total  # XLA leaves out what goes nowhere, others refuse it
        return tuple(_scattered_to_pages(*x, page, row, kept, layout) for x in zip(memory, new))

    def native():
        grown = []
        for at in range(0, len(memory), 2):  # keys and values, and then their scales
            pair = [tf.expand_dims(x, 3) if at else x for x in (*memory[at : at + 2], *new[at : at + 2])]
            written = kernels.library().attn_ops_append_to_pages(
                *pair, table, positions, [] if counts is None else [counts], layout=layout, in_place=in_place
            )
            grown += [tf.squeeze(x, 3) if at else x for x in written]
        return tuple(grown)

    return _on_its_device(native, scattered)


def _scattered_to_pages(old, new, page, row, kept, layout):
    """Pages with the rows ``new``, of which those ``kept`` (None: all) go to the ``row`` of their ``page``."""
    if kept is None and _by_custom_call(old):
        return custom_call.append(old, new, page, row, axis=1 if layout == "BSHD" else 2)
    at = tf.stack([page, row], -1)  # [batch, rows, 2]
    turn = [0, 2, 1, 3][: new.shape.rank]
    if layout == "BHSD":
        old, new = (tf.transpose(x, turn) for x in (old, new))
    if kept is not None:
        at, new = (tf.boolean_mask(x, kept) for x in (at, new))
    grown = tf.tensor_scatter_nd_update(old, at, new)
    return grown if layout == "BSHD" else tf.transpose(grown, turn)


def empty(name, key_shape, value_shape, dtype):
    """The fields of an empty cache of these shapes."""
    key, value, *scales = zeros(name, key_shape, value_shape, dtype)
    return key, value, tf.zeros(key_shape[:1], tf.int32), _new(key_shape[:1], tf.int32), *scales


def zeros(name, key_shape, value_shape, dtype):
    """Keys and values of zeros, and in int8 their scales, in memory of their own."""
    try:
        dtype = tf.as_dtype(dtype)
    except TypeError as error:
        raise ValueError(f"{name}: dtype must be a floating one or int8, got {dtype!r}") from error
    if dtype not in (tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.int8):
        raise ValueError(f"{name}: dtype must be float16, bfloat16, float32, float64 or int8, got {dtype.name}")
    shapes = key_shape, value_shape
    scales = [_in_large_pages(shape[:3], tf.float32) for shape in shapes] if dtype == tf.int8 else []
    return *(_in_large_pages(shape, dtype) for shape in shapes), *scales


def copied(cache):
    """``cache`` in memory of its own."""
    written = _new(tf.shape(cache.lengths), tf.int32) - 1
    return cache.with_memory(owned(cache.memory), written=written)


def owned(memory):
    """These arrays in memory of their own."""
    return [_new(tf.shape(x), x.dtype) + x for x in memory]


def _in_large_pages(shape, dtype):
    """`_new`, on CPUs in large pages where the system has them: csrc/bindings/large_pages.h says what that brings."""

    def native():
        return kernels.library().attn_ops_zeros(shape=tf.cast(tf.stack(shape), tf.int32), T=dtype)

    return _with_shape(_on_its_device(native, lambda: _new(shape, dtype)), shape)


def _new(shape, dtype):
    """Zeros in memory that nothing else is given: graphs let equal constants share theirs."""
    known = isinstance(shape, tuple)
    x = tf.raw_ops.Empty(shape=tf.cast(tf.stack(shape) if known else shape, tf.int32), dtype=dtype, init=True)
    return _with_shape(x, shape) if known else x


def _with_shape(x, shape):
    x.set_shape([n if isinstance(n, int) else None for n in shape])
    return x


def only_scatters() -> bool:
    """Whether the operator cannot be in what is being computed or traced here."""
    return bool(kernels.unavailable_reason() or place.in_xla() or export.reasons_against_fused(forced=False))


def _on_its_device(native, scattered):
    if only_scatters():
        return scattered()
    if tf.executing_eagerly():
        return scattered() if gpu.takes_eager_ops() else native()
    return graph.by_device(native, scattered if gpu.any_visible() else native, scattered)


def _operator(caches, k_new, v_new, positions, counts, dropped, written, layout):
    library = kernels.library()
    optional = ([] if x is None else [x] for x in (counts, dropped, written))
    if len(caches) == 4:
        *grown, marks = library.attn_ops_append_to_int8_cache(*caches, k_new, v_new, positions, *optional, layout=layout)
        return grown, marks
    return library.attn_ops_append_to_cache(list(caches), k_new, v_new, positions, *optional, layout=layout)


def _scattered(pairs, positions, counts, axis):
    """Each ``old`` of the pairs (new, old), of rank 4 or 5, with its rows ``new`` at ``positions`` of ``axis``, of
    which there are ``counts``."""
    new, old = pairs[0]
    shape = runtime_checks.extents(new)
    at = tf.expand_dims(tf.range(shape[axis]), 0)  # [1, rows]
    start = tf.expand_dims(positions, 1)
    if all(_by_custom_call(old) for _, old in pairs):
        row = start + at
        if counts is not None:
            row = tf.where(at < tf.expand_dims(counts, 1), row, -1)  # where nothing is
        row = tf.broadcast_to(row, [shape[0], shape[axis]])
        page = tf.broadcast_to(tf.expand_dims(tf.range(shape[0]), 1), tf.shape(row))
        return [custom_call.append(old, new, page, row, axis) for new, old in pairs]
    if counts is not None:
        # Those that are not there repeat the last one that is; where there is none, what is there already.
        at = tf.minimum(at, tf.expand_dims(tf.maximum(counts - 1, 0), 1))
        last = runtime_checks.extents(old)[axis] - 1
        none = counts == 0
        there, chosen = tf.minimum(start + at, last), at
        start = tf.where(tf.expand_dims(none, 1), tf.minimum(start, last), start)

        def rows_of(new, old):
            new, old = (tf.gather(x, i, axis=axis, batch_dims=1) for x, i in ((new, chosen), (old, there)))
            return tf.where(tf.reshape(none, [-1] + [1] * (old.shape.rank - 1)), old, new)

        pairs = [(rows_of(*pair), pair[1]) for pair in pairs]
    at = start + at  # [batch or 1, rows]
    batch = tf.range(shape[0])
    if axis == 1:
        axes = [tf.expand_dims(batch, 1), at]
    else:
        axes = [tf.reshape(batch, [-1, 1, 1]), tf.expand_dims(tf.range(shape[1]), 1), tf.expand_dims(at, 1)]
    indices = tf.stack([tf.broadcast_to(x, shape[: axis + 1]) for x in axes], -1)
    return [tf.tensor_scatter_nd_update(old, indices, new) for new, old in pairs]


def _by_custom_call(old):
    """Whether XLA would copy ``old`` for new rows in it, and need not: on CPUs it has no scatter of bfloat16, but makes float32
    of it all, and back."""
    return old.dtype == tf.bfloat16 and place.in_xla() and not (
        kernels.unavailable_reason()
        or export.reasons_against_fused(forced=False)
        or custom_call.unavailable_reason()
        or gpu.any_visible()
    )


def _moved_up(memory, dropped, layout):
    """The arrays without their first ``dropped`` rows, and as many at the end that have no meaning."""
    axis = 1 if layout == "BSHD" else 2

    def move():
        last = tf.shape(memory[0])[axis] - 1
        rows = tf.minimum(tf.range(last + 1)[None] + dropped[:, None], last)
        return tuple(tf.gather(x, rows, axis=axis, batch_dims=1) for x in memory)

    return tf.cond(tf.reduce_any(dropped > 0), move, lambda: tuple(memory))


@registration.gradient_of("AttnOps>AppendToCache")
@registration.gradient_of("AttnOps>AppendToInt8Cache")
def _no_gradient(op, *_):
    raise NotImplementedError(
        "attn_ops: a KVCache is for generation, and has no gradient: train with scaled_dot_product_attention, or with the "
        "layers without cache="
    )

"""New rows in the memory of a cache: scatters, which XLA does in place in loops and where arguments are donated (but see
in_place.py)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attn_ops.call import pages as paged
from attn_ops.call.attention_call import canonical
from attn_ops.generation import int8
from attn_ops.jax import in_place, xp


def append_to_cache(cache, k_new, v_new, positions):
    """`attn_ops.tensorflow.append.append_to_cache` on JAX arrays. Memory is taken over in loops, and in functions whose
    argument the cache is, donated."""
    new = jnp.stack([k_new, v_new], 1).astype(cache.dtype)
    at = jnp.reshape(positions, (-1, 1)) + jnp.arange(k_new.shape[1])  # [batch or 1, rows]
    at = jnp.broadcast_to(at, (cache.shape[0], at.shape[1]))

    @jax.vmap
    def scattered(cache, new, at):
        return cache.at[:, at].set(new, mode="drop")

    return in_place.rows(scattered, 2, 3, cache, new, at)


def append(layout, memory, new, positions, counts, dropped, written):
    """(memory, None) with the new rows from ``positions`` on, int32 [batch].

    ``memory`` is the `KVCache.memory` of a cache in ``layout``, and ``new`` keys and values for it: of its dtype, or floats
    that int8 rounds. ``counts`` and ``dropped`` are int32 [batch] or None: how many of the new rows there are, and how many
    of the oldest make way, by which all others and ``positions`` move.
    """
    del written  # arrays of JAX are taken over whole
    memory, new = tuple(memory), tuple(new)
    arguments = memory, new, positions, counts, dropped
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arguments)):
        return _appended(layout, *arguments), None
    if any(map(xp.is_deleted, memory)):
        raise ValueError(
            "KVCache: this cache was taken over by an earlier update; go on with the one that returned, or copy() it first"
        )
    return _donated(layout, *arguments), None


def append_to_pages(memory, new, table, positions, counts, layout, in_place):
    """`attn_ops.tensorflow.append.append_to_pages` on JAX arrays. ``in_place`` counts outside of functions: there the
    arrays of ``memory`` are taken over, and deleted."""
    arguments = tuple(memory), tuple(new), table, positions, counts
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arguments))
    return (_donated_pages if in_place and not traced else _appended_to_pages)(layout, *arguments)


def empty(name, key_shape, value_shape, dtype):
    """The fields of an empty cache of these shapes."""
    key, value, *scales = zeros(name, key_shape, value_shape, dtype)
    return key, value, jnp.zeros(key_shape[:1], "int32"), None, *scales


def zeros(name, key_shape, value_shape, dtype):
    """Keys and values of zeros, and in int8 their scales."""
    if dtype is None:  # which NumPy takes for float64
        raise ValueError(f"{name}: dtype must be a floating one or int8, got None")
    try:
        dtype = jnp.dtype(getattr(dtype, "as_numpy_dtype", dtype))
    except TypeError as error:
        raise ValueError(f"{name}: dtype must be a floating one or int8, got {dtype!r}") from error
    if dtype not in xp.FLOATS and dtype != xp.int8:
        raise ValueError(f"{name}: dtype must be float16, bfloat16, float32, float64 or int8, got {dtype.name}")
    shapes = key_shape, value_shape
    scales = [jnp.zeros(shape[:3], "float32") for shape in shapes] if dtype == xp.int8 else []
    return *(jnp.zeros(shape, dtype) for shape in shapes), *scales


def copied(cache):
    """``cache`` in memory of its own, lengths too: whoever donates one of the two keeps the other."""
    return jax.tree.map(_own, cache)


def owned(memory):
    """These arrays in memory of their own."""
    return [*map(_own, memory)]


def _own(x):
    return jnp.array(x, copy=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _appended(layout, memory, new, positions, counts, dropped):
    axis = 1 if layout == "BSHD" else 2
    rows, added = memory[0].shape[axis], new[0].shape[axis]
    if len(memory) == 4:
        new = int8.rounded(xp, new)
    if dropped is not None:
        def move(*memory):
            kept = jnp.minimum(jnp.arange(rows)[None] + dropped[:, None], rows - 1)
            return tuple(xp.take_rows(x, kept, axis) for x in memory)

        memory = jax.lax.cond(jnp.any(dropped > 0), move, lambda *x: x, *memory)
        positions = positions - dropped
    at = positions[:, None] + jnp.arange(added)
    if counts is not None:
        at = jnp.where(jnp.arange(added) < counts[:, None], at, rows)  # where nothing is

    @jax.vmap  # so that arrays that are divided along the batch stay so
    def scattered(old, new, at):
        if axis == 1:
            return old.at[at].set(new, mode="drop")
        return old.at[:, at].set(new, mode="drop")

    at = jnp.broadcast_to(at, (memory[0].shape[0], added))
    return tuple(in_place.rows(scattered, axis, 3 - axis, *x, at) for x in zip(memory, new))


@_appended.defjvp
def _no_derivative(layout, primals, tangents):
    raise NotImplementedError(
        "attn_ops: a KVCache is for generation, and has no derivative: train with scaled_dot_product_attention, or with "
        "the layers without cache="
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _appended_to_pages(layout, memory, new, table, positions, counts):
    total, _, size, _ = canonical(memory[0].shape, layout)
    axis = 1 if layout == "BSHD" else 2
    if len(memory) > len(new):
        new = int8.rounded(xp, new)
    page, row = paged.slots(xp, table, positions, counts, new[0].shape[axis], size, total)

    def scattered(old, new, page, row):
        if axis == 1:
            return old.at[page, row].set(new, mode="drop")
        return old.at[page, :, row].set(new.swapaxes(1, 2), mode="drop")

    return tuple(in_place.rows(scattered, axis, 3 - axis, *x, page, row) for x in zip(memory, new))


_appended_to_pages.defjvp(_no_derivative)
_donated_pages = jax.jit(_appended_to_pages, static_argnums=0, donate_argnums=1)
_donated = jax.jit(_appended, static_argnums=0, donate_argnums=1)

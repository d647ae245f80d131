"""New rows in the memory of arrays of any dtype: the right rows, and no array but theirs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_ops.jax
from attn_ops.jax import append, forms

LENGTH, HEADS, DIM = 48, 2, 6
each_dtype = pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
each_layout = pytest.mark.parametrize("layout", ["BSHD", "BHSD"])


@pytest.fixture(params=["operator", "scatters"])
def way(request, monkeypatch):
    """With the library, and without it."""
    if request.param == "scatters":
        monkeypatch.setattr(forms, "unavailable_reason", lambda: "for this test")
        jax.clear_caches()  # of what was traced with it
    yield
    if request.param == "scatters":
        jax.clear_caches()


def numbers(rng, *shape):
    """What every dtype holds exactly."""
    return rng.integers(-100, 100, shape).astype("float32")


def turned(x, layout):
    return x if layout == "BSHD" else x.swapaxes(1, 2)


def exactly(found, right):
    np.testing.assert_array_equal(np.asarray(found.astype("float32")), right)


@each_dtype
@each_layout
@pytest.mark.parametrize("form", ["eager", "jit", "vmap", "scan"])
def test_rows_of_caches(way, form, layout, dtype, rng):
    """Some of whose rows do not exist; by `vmap` over three caches, by `scan` four times."""
    update = attn_ops.jax.KVCache.update
    cache = attn_ops.jax.KVCache.create(3, LENGTH, HEADS, DIM, dtype, layout=layout, framework="jax")
    right = np.zeros((3, LENGTH, HEADS, DIM), "float32")
    counts = np.int32([2, 0, 1])
    rows = numbers(rng, 4, 3, 2, HEADS, DIM)
    for step, new in enumerate(rows):
        for b, n in enumerate(counts):
            right[b, step * n : step * n + n] = new[b, :n]
    given = [jnp.asarray(turned(x, layout), dtype) for x in rows]
    if form == "scan":
        cache, _ = jax.lax.scan(lambda cache, x: (update(cache, x, x, counts), None), cache, jnp.stack(given))
    elif form == "vmap":
        many = jax.tree.map(lambda x: jnp.stack([x] * 3), cache)
        for x in given:
            many = jax.vmap(update, in_axes=(0, None, None, None))(many, x, x, counts)
        cache = jax.tree.map(lambda x: x[1], many)
    else:
        call = jax.jit(update) if form == "jit" else update
        for x in given:
            cache = call(cache, x, x, counts)
    for memory in cache.memory:
        exactly(turned(memory, layout), right)
    assert cache.lengths.tolist() == (4 * counts).tolist()


@each_dtype
@each_layout
def test_rows_of_pages(way, layout, dtype, rng):
    """Behind the end of a sequence and in pages that are none, nothing is written."""
    pages, table = numbers(rng, 5, 16, HEADS, DIM), np.int32([[4, 1], [2, 9]])
    new = numbers(rng, 2, 3, HEADS, DIM)
    positions, counts = np.int32([14, 15]), np.int32([3, 2])
    grown = append.append_to_pages(
        [jnp.asarray(turned(pages, layout), dtype)], [jnp.asarray(turned(new, layout), dtype)], table, positions, counts,
        layout, False,
    )  # fmt: skip
    right = pages.copy()
    right[4, 14:], right[1, 0], right[2, 15] = new[0, :2], new[0, 2], new[1, 0]
    exactly(turned(grown[0], layout), right)


@each_dtype
def test_rows_of_one_tensor_of_keys_and_values(way, dtype, rng):
    cache, new = numbers(rng, 2, 2, LENGTH, HEADS, DIM), numbers(rng, 2, 2, 3, HEADS, DIM)
    k, v = (jnp.asarray(new[:, i], dtype) for i in range(2))
    grown = append.append_to_cache(jnp.asarray(cache, dtype), k, v, jnp.asarray([5, LENGTH - 2]))
    cache[0, :, 5:8], cache[1, :, -2:] = new[0], new[1, :, :2]
    exactly(grown, cache)


@each_dtype
@pytest.mark.parametrize("kind", ["cache", "pages", "one tensor"])
def test_no_other_array_is_made(kind, dtype):
    """Of a donated cache the compiled function is the write alone, also where XLA's own would be by way of float32."""
    assert forms.unavailable_reason() is None
    if kind == "cache":
        memory, row = jax.ShapeDtypeStruct((2, 999, HEADS, DIM), dtype), jax.ShapeDtypeStruct((2, 1, HEADS, DIM), dtype)
        function = functools.partial(append._appended, "BSHD", counts=None, dropped=None)
        call = jax.jit(lambda memory, row, at: function((memory,), (row,), at), donate_argnums=0)
    elif kind == "pages":
        memory, row = jax.ShapeDtypeStruct((99, 16, HEADS, DIM), dtype), jax.ShapeDtypeStruct((2, 1, HEADS, DIM), dtype)
        table = np.zeros((2, 4), np.int32)
        function = functools.partial(append._appended_to_pages, "BSHD")
        call = jax.jit(lambda memory, row, at: function((memory,), (row,), table, at, None), donate_argnums=0)
    else:
        memory, row = (jax.ShapeDtypeStruct((2, *n, HEADS, DIM), dtype) for n in ((2, 999), (1,)))
        call = jax.jit(lambda memory, row, at: append.append_to_cache(memory, row, row, at), donate_argnums=0)
    compiled = call.lower(memory, row, jax.ShapeDtypeStruct((2,), np.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < memory.size


@each_dtype
def test_exported_functions_hold_no_custom_call(dtype):
    """Of ours, as long as the attention asks for none: `jax.export` refuses those that it does not know."""
    cache = attn_ops.jax.KVCache.create(2, LENGTH, HEADS, DIM, dtype, framework="jax")
    row = jnp.ones((2, 1, HEADS, DIM), dtype)

    def step(cache, row):
        return attn_ops.jax.decode_attention(row, cache, row, row, implementation="composite")

    out, grown = jax.export.export(jax.jit(step))(cache, row).call(cache, row)
    exactly(out, np.ones(out.shape, "float32"))
    assert grown.lengths.tolist() == [1, 1]

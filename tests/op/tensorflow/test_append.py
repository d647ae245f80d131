"""AttnOps>AppendToCache and what is made of it: rows in the memory of a cache, whose values stay values."""

import os

import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from attn_ops import kernels
from attn_ops.tensorflow import append

needs_operator = pytest.mark.skipif(kernels.unavailable_reason() is not None, reason="no compiled library")
FORMS = {
    "eager": lambda f: f,
    "graph": lambda f: tf.function(f, autograph=False),
    "xla": lambda f: tf.function(f, autograph=False, jit_compile=True),
}
each_form = pytest.mark.parametrize("form", FORMS)
each_layout = pytest.mark.parametrize("layout", ["BSHD", "BHSD"])


@pytest.fixture(params=["operator", "scatters"])
def way(request, monkeypatch):
    """With the operator, and without the library."""
    if request.param == "scatters":
        monkeypatch.setattr(append, "only_scatters", lambda: True)
    elif kernels.unavailable_reason() is not None:
        pytest.skip("no compiled library")


def address(tensor):
    return np.asarray(memoryview(tensor)).ctypes.data


def rows(count, value=1.0, batch=1, heads=1, dim=2):
    return tf.fill([batch, count, heads, dim], value)


def held(cache):
    """The rows of the first sequence that there are, by one of their numbers."""
    key = cache.key if cache.key_scale is None else tf.round(tf.cast(cache.key, tf.float32) * cache.key_scale[..., None])
    return key[0, : int(cache.lengths[0]), 0, 0].numpy().tolist()


@pytest.mark.wide(3)
@each_form
@each_layout
def test_rows_go_behind_those_of_their_sequence(way, form, layout, rng):
    """Other numbers of new rows in each sequence, of which some have none."""
    update = FORMS[form](lambda cache, k, v, n: cache.update(k, v, n))
    cache = attn_ops.KVCache.create(3, 10, 2, 4, tf.float64, layout=layout, value_dim=5)
    key, value, lengths = np.zeros((3, 10, 2, 4)), np.zeros((3, 10, 2, 5)), np.zeros(3, int)
    for counts in ([3, 0, 2], [0, 1, 4], [4, 4, 4], [3, 0, 0]):
        k, v = (rng.standard_normal((3, 4, 2, dim)) for dim in (4, 5))
        for b, n in enumerate(counts):
            key[b, lengths[b] : lengths[b] + n] = k[b, :n]
            value[b, lengths[b] : lengths[b] + n] = v[b, :n]
        lengths += counts
        axes = (0, 1, 2, 3) if layout == "BSHD" else (0, 2, 1, 3)
        cache = update(cache, tf.constant(k.transpose(axes)), tf.constant(v.transpose(axes)), tf.constant(counts))
    assert cache.lengths.numpy().tolist() == lengths.tolist()
    for found, right in ((cache.key, key), (cache.value, value)):
        found = found.numpy().transpose(axes)
        for b, n in enumerate(lengths):
            assert (found[b, :n] == right[b, :n]).all()


@pytest.mark.wide(3)
@each_form
@pytest.mark.parametrize("positions", [3, [1, 2, 6]])
def test_rows_of_one_tensor_of_keys_and_values(way, form, positions, rng):
    cache = rng.standard_normal((3, 2, 10, 2, 4))
    k, v = rng.standard_normal((2, 3, 4, 2, 4))
    right = cache.copy()
    for b, at in enumerate(np.broadcast_to(positions, 3)):
        right[b, :, at : at + 4] = k[b], v[b]
    given = tf.constant(cache)
    found = FORMS[form](append.append_to_cache)(given, tf.constant(k), tf.constant(v), tf.constant(positions))
    assert (found.numpy() == right).all() and (given.numpy() == cache).all()


@needs_operator
@pytest.mark.parametrize("form", ["eager", "graph"])
def test_memory_is_shared_along_a_line_and_copied_at_a_fork(form):
    update = FORMS[form](lambda cache, k: cache.update(k, -k))
    first = attn_ops.KVCache.create(1, 8, 1, 2)
    second = update(first, rows(2, 1.0))
    third = update(second, rows(1, 2.0))
    assert address(first.key) == address(second.key) == address(third.key)
    fork = update(second, rows(3, 5.0))
    assert address(fork.key) != address(second.key) and address(fork.value) != address(second.value)
    assert held(second) == [1, 1] and held(third) == [1, 1, 2] and held(fork) == [1, 1, 5, 5, 5]
    more = update(fork, rows(1, 6.0))
    assert address(more.key) == address(fork.key)
    assert held(update(third, rows(1, 7.0))) == [1, 1, 2, 7] and held(more) == [1, 1, 5, 5, 5, 6]
    assert held(update(first, rows(1, 9.0))) == [9] and held(third) == [1, 1, 2]


@pytest.mark.parametrize("by", ["custom call", "scatters"])
@pytest.mark.parametrize("kind", ["BSHD", "BHSD", "pages", "one tensor"])
def test_xla_writes_rows_of_bfloat16(by, kind, rng, monkeypatch):
    """Whose scatter it computes in float32, of all there is: by our custom call only the rows are touched."""
    if by == "scatters":
        monkeypatch.setattr(append, "_by_custom_call", lambda old: False)
    elif kernels.xla_unavailable_reason() is not None:
        pytest.skip("no custom calls")
    memory = rng.integers(-99, 99, (3, 2, 64, 2, 4) if kind == "one tensor" else (3, 64, 64, 4)).astype("float32")
    new, at = rng.integers(-99, 99, (3, 2, 64, 4)).astype("float32"), np.int32([5, 62, 0])
    right = memory.copy()
    if kind == "one tensor":
        new = new[..., :2, :]
        for b in range(3):
            right[b, :, at[b] : at[b] + 2] = new[b]
        function = lambda memory, new, at: append.append_to_cache(memory, new, new, at)  # noqa: E731
    elif kind == "pages":
        table = np.int32([[2, 0], [1, 7], [1, 7]])  # behind the end of the second there is no page
        right[2, 5:7], right[1, 62:], right[1, :2] = new[0], new[1], new[2]
        function = lambda memory, new, at: append.append_to_pages([memory], [new], table, at, None, "BSHD", False)[0]  # noqa: E731
    else:
        turned = (lambda x: x) if kind == "BSHD" else (lambda x: x.swapaxes(1, 2))
        counts = np.int32([2, 1, 0])
        for b, n in enumerate(counts):
            right[b, at[b] : at[b] + n] = new[b, :n]
        memory, new, right = map(turned, (memory, new, right))
        function = lambda memory, new, at: append.append(kind, [memory] * 2, [new] * 2, at, counts, None, None)[0][1]  # noqa: E731
    compiled = tf.function(function, autograph=False, jit_compile=True)
    given = [tf.cast(memory, tf.bfloat16), tf.cast(new, tf.bfloat16), tf.constant(at)]
    np.testing.assert_array_equal(tf.cast(compiled(*given), tf.float32), right)
    text = compiled.experimental_get_compiler_ir(*given)(stage="optimized_hlo")
    whole = f"f32[{','.join(map(str, memory.shape))}]"
    assert (whole in text) == (by == "scatters")


def share_in_large_pages(tensor):
    """How much of its memory somebody advised large pages for."""
    begin = address(tensor)
    end = begin + tensor.shape.num_elements() * tensor.dtype.size
    advised, first, last = 0, 0, 0
    with open("/proc/self/smaps") as maps:
        for line in maps:
            name, *rest = line.split()
            if "-" in name and not name.endswith(":"):
                first, last = (int(x, 16) for x in name.split("-"))
            elif name == "VmFlags:" and "hg" in rest:
                advised += max(0, min(last, end) - max(first, begin))
    return advised / (end - begin)


@needs_operator
@pytest.mark.skipif(not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="pages of one size")
@pytest.mark.parametrize("form", ["eager", "graph"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_large_cache_lies_in_large_pages(form, dtype):
    create = FORMS[form](lambda: attn_ops.KVCache.create(2, 8192, 8, 128, dtype).memory)
    memory = create()
    large = [x for x in memory if x.shape.num_elements() * x.dtype.size >= 4 << 20]
    assert len(large) == 2
    assert all(share_in_large_pages(x) > 0.99 for x in large)
    assert all(not np.any(x.numpy()) for x in memory)
    copy = attn_ops.KVCache.create(2, 8192, 8, 128, dtype).copy()  # and its own memory
    assert all(address(x) != address(y) for x, y in zip(memory, copy.memory))


@needs_operator
@pytest.mark.parametrize("shape", [[-1], [2**31 - 1] * 3, [[1]]])
def test_memory_that_cannot_be_is_refused(shape):
    with pytest.raises(tf.errors.InvalidArgumentError, match="AttnOps>Zeros.*shape"):
        kernels.library().attn_ops_zeros(shape=shape, T=tf.float32)
    assert kernels.library().attn_ops_zeros(shape=[3, 0], T=tf.int8).shape == (3, 0)


@each_form
def test_forks_inside_a_function(form):
    def both(k):
        cache = attn_ops.KVCache.create(1, 4, 1, 2)
        one = cache.update(k, k)
        return one.update(2 * k, k), one.update(3 * k, k), cache.update(4 * k, -k), attn_ops.KVCache.create(1, 4, 1, 2)

    run = FORMS[form](both)
    for _ in range(2):  # what a graph holds is not what its first run left
        a, b, c, empty = run(rows(1))
        assert [held(x) for x in (a, b, c)] == [[1, 2], [1, 3], [4]]
        assert c.value[0, 0, 0, 0] == -1 and (empty.key.numpy() == 0).all() and (empty.value.numpy() == 0).all()


@pytest.mark.wide(2)
@each_form
def test_loops(way, form):
    def loop(count):
        def body(i, cache):
            return i + 1, cache.update(rows(1) * tf.cast(i, tf.float32), rows(1))

        start = attn_ops.KVCache.create(1, 6, 1, 2)
        return tf.while_loop(lambda i, _: i < count, body, (0, start), maximum_iterations=6)[1]

    run = FORMS[form](loop)
    assert held(run(tf.constant(4))) == [0, 1, 2, 3] and held(run(tf.constant(6))) == [0, 1, 2, 3, 4, 5]


def test_structures_of_tensorflow_take_a_cache():
    cache = attn_ops.KVCache.create(2, 4, 1, 2, layout="BHSD", window=3)
    assert type(tf.nest.map_structure(tf.identity, cache)) is type(cache)
    traces = []

    @tf.function(autograph=False)
    def function(cache):
        traces.append(cache.layout)
        return cache

    again = function(function(cache))
    assert again.layout == "BHSD" and again.window == 3 and len(traces) == 1
    assert function(attn_ops.KVCache.create(2, 4, 1, 2)).layout == "BSHD" and len(traces) == 2
    reordered = tf.nest.map_structure(lambda x: tf.gather(x, [1, 0]), cache.update(*[tf.ones([2, 1, 1, 2])] * 2))
    assert reordered.update(*[tf.ones([2, 1, 1, 2])] * 2).lengths.numpy().tolist() == [2, 2]


def test_copies_and_rewound_ones_are_their_own():
    cache = attn_ops.KVCache.create(1, 8, 1, 2).update(rows(3), rows(3))
    copy, short = cache.copy(), cache.rewind([1])
    longer = cache.update(rows(1, 2.0), rows(1))
    assert held(copy.update(rows(1, 3.0), rows(1))) == [1, 1, 1, 3]
    assert held(short.update(rows(1, 4.0), rows(1))) == [1, 4]
    assert held(longer) == [1, 1, 1, 2] and held(cache) == [1, 1, 1]
    with pytest.raises(ValueError, match=r"KVCache.rewind: lengths must not exceed those of the cache, \[3\], got \[4\]"):
        cache.rewind(4)


@needs_operator
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("form", ["eager", "graph"])
def test_what_does_not_fit_leaves_the_cache_as_it_was(form, dtype):
    """In the operator, where only that can know."""

    def grow(cache, k, lengths):
        memory, written = append.append(cache.layout, cache.memory, (k, k), lengths, None, None, cache.written)
        return cache.with_memory(memory, written=written)

    cache = attn_ops.KVCache.create(2, 4, 1, 2, dtype).update(rows(2, batch=2), rows(2, batch=2))
    before = [x.numpy() for x in cache]
    grow = FORMS[form](grow)
    with pytest.raises(tf.errors.InvalidArgumentError, match="sequence 1 has 3 rows, of a cache for 4, which has no room for 2"):
        grow(cache, rows(2, 5.0, batch=2), tf.constant([2, 3]))
    with pytest.raises(tf.errors.InvalidArgumentError, match="sequence 0 has -1 rows"):
        grow(cache, rows(2, 5.0, batch=2), tf.constant([-1, 2]))
    assert all((x.numpy() == right).all() for x, right in zip(cache, before))
    assert held(cache.update(rows(1, 3.0, batch=2), rows(1, batch=2))) == [1, 1, 3]


@needs_operator
@pytest.mark.parametrize(
    "shapes, rule",
    [
        (((2, 5, 1, 2), (2, 1, 3, 2)), "k_new must have the shape of the cache"),
        (((2, 5, 1, 2), (1, 1, 1, 2)), "k_new must have the shape of the cache"),
        (((2, 5, 2), (2, 1, 2)), r"the cache must have the shape \[batch, max_length, heads, dim\]"),
    ],
)
def test_the_operator_checks_shapes(shapes, rule):
    cache, new = (tf.zeros(shape) for shape in shapes)
    with pytest.raises(tf.errors.InvalidArgumentError, match=rule):
        kernels.library().attn_ops_append_to_cache([cache, cache], new, new, [0], [], [], [])


def test_what_is_no_new_row_is_refused():
    cache = attn_ops.KVCache.create(1, 4, 2, 2, tf.float16)
    new = tf.ones([1, 1, 2, 2])
    for bad, error, message in (
        ((new, tf.ones([1, 1, 3, 2])), ValueError, r"v_new must have shape \(1, any number, 2, 2\)"),
        ((new[0], new), ValueError, r"k_new must have shape"),
        ((tf.ones([1, 1, 2, 2], tf.int32), new), TypeError, "k_new must be floating, got int32"),
        ((tf.ones([1, 2, 2, 2]), new), ValueError, "k_new and v_new must have the same number of rows, got 2 and 1"),
        ((tf.ones([1, 5, 2, 2]),) * 2, ValueError, "the cache is full: sequence 0 has 0 of 4 positions, and 5 more"),
        ((new, new, [2]), ValueError, "lengths must be between 0 and 1, got 2"),
        ((new, new, [0.5]), TypeError, "lengths must hold integers"),
    ):
        with pytest.raises(error, match=f"KVCache.update: {message}"):
            cache.update(*bad)
    assert cache.update(new, new).key.dtype == tf.float16


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((0, 4, 1, 2), ValueError, "batch must be at least 1, got 0"),
        ((1, 4.0, 1, 2), TypeError, "max_length must be an integer, got 4.0"),
        ((1, 4, 1, 2, tf.int32), ValueError, "dtype must be float16, bfloat16, float32, float64 or int8, got int32"),
        ((1, 4, 1, 2, "floaty"), ValueError, "dtype must be a floating one or int8, got 'floaty'"),
        ((1, 4, 1, 2, "float32", "SBHD"), ValueError, "layout must be 'BSHD' or 'BHSD', got 'SBHD'"),
        ((1, 4, 1, 2, "float32", "BSHD", 0), ValueError, "window must be at least 1, got 0"),
    ],
)
def test_what_is_no_cache_is_refused(arguments, error, message):
    named = dict(zip(("layout", "window"), arguments[5:]))
    with pytest.raises(error, match=f"KVCache.create: {message}"):
        attn_ops.KVCache.create(*arguments[:5], **named)


@needs_operator
@pytest.mark.parametrize("form", ["eager", "graph"])
def test_there_is_no_gradient(form):
    cache = attn_ops.KVCache.create(1, 4, 1, 2)

    def gradient(k):
        with tf.GradientTape() as tape:
            tape.watch(k)
            loss = tf.reduce_sum(cache.update(k, k).key)
        return tape.gradient(loss, k)

    with pytest.raises(NotImplementedError, match="a KVCache is for generation, and has no gradient"):
        FORMS[form](gradient)(rows(1))

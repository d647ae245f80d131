"""attn_ops.jax.decode_attention and caches of JAX arrays: rows in parts are the rows of one causal attention."""

import functools

import jax
import numpy as np
import pytest

import attn_ops.jax
import children
import jax_caches
from cached_calls import (
    BATCH, HEADS, KEY, OPTIONS, QUERY, TOKENS, VALUE, in_parts, laid_out, turned, whole,
)  # fmt: skip
from jax_caches import FORMS, TWO, array, close, each_form, each_layout, in_scan, step_of

new_cache = functools.partial(jax_caches.new_cache, dtype="float32")


@pytest.mark.wide(40)
@pytest.mark.parametrize("forced", [None, "composite"])
@pytest.mark.parametrize("name", OPTIONS)
@each_layout
@each_form
def test_options(form, layout, name, forced):
    options = {what: array(x) if what == "bias" else x for what, x in OPTIONS[name][0].items()}
    out, cache = in_parts(step_of(form, implementation=forced, **options), new_cache(layout=layout), layout, TWO, array)
    close(out, whole(name))
    assert cache.lengths.tolist() == [TOKENS] * BATCH


def test_rotary_and_another_dtype():
    out, cache = in_parts(step_of("jit", rotary=True), new_cache(dtype="bfloat16"), parts=TWO, array=array)
    assert cache.key.dtype == "bfloat16" and out.dtype == np.float32
    close(out, whole("plain", rotary=True), 0.1)
    close(cache.key[:, :TOKENS], turned(KEY), 0.05)


@pytest.mark.wide(12)
@pytest.mark.parametrize("window", [1, 5, 40])
@each_layout
@each_form
def test_window(form, layout, window, monkeypatch):
    for module in ("cache", "growth", "decode"):
        monkeypatch.setattr(f"attn_ops.generation.{module}.step", lambda window: 3)
    cache = new_cache(window=window, layout=layout, length=1000)
    assert cache.rows == window + 6
    close(in_parts(step_of(form), cache, layout, (5, *[2] * 9), array)[0], whole("plain", window=window))


@pytest.mark.wide(2)
@each_form
def test_prompts_of_different_lengths(form):
    prompts = np.array([3, 7])
    step = FORMS[form](lambda q, cache, k, v, n: attn_ops.jax.decode_attention(q, cache, k, v, query_seq_lengths=n))
    out, cache = step(array(QUERY[:, :7]), new_cache(), array(KEY[:, :7]), array(VALUE[:, :7]), prompts)
    for b, n in enumerate(prompts):
        close(out[b, :n], whole("plain")[b, :n])
        assert not out[b, n:].any()
        close(cache.key[b, :n], KEY[b, :n])
        assert not cache.key[b, n:].any()


def test_scan():
    close(in_scan(new_cache(), (QUERY, KEY, VALUE))[1], whole("plain"))


def test_memory_is_taken_over_and_a_copy_is_not():
    first = new_cache()
    copy = first.copy()
    address = first.key.unsafe_buffer_pointer()
    second = first.update(array(KEY[:, :2]), array(VALUE[:, :2]))
    assert first.key.is_deleted() and second.key.unsafe_buffer_pointer() == address
    with pytest.raises(ValueError, match="this cache was taken over by an earlier update"):
        first.update(array(KEY[:, :2]), array(VALUE[:, :2]))
    third = jax.jit(lambda cache, k, v: cache.update(k, v), donate_argnums=0)(second, array(KEY[:, 2:3]), array(VALUE[:, 2:3]))
    assert third.key.unsafe_buffer_pointer() == address
    close(third.key[:, :3], KEY[:, :3])
    assert not copy.key.any()
    assert jax.jit(lambda cache, n: cache.rewind(n))(third, 2).lengths.tolist() == [2] * len(KEY)
    rewound = third.rewind(1).update(array(KEY[:, 5:6]), array(VALUE[:, 5:6]))
    close(rewound.key[:, :2], KEY[:, [0, 5]])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_copy_may_be_donated(dtype):
    first = jax_caches.new_cache(dtype, window=3).update(array(KEY[:, :2]), array(VALUE[:, :2]))
    step = step_of("jit")
    step(array(QUERY[:, 2:3]), first.copy(), array(KEY[:, 2:3]), array(VALUE[:, 2:3]))
    assert first.lengths.tolist() == [2] * len(KEY) and not any(x.is_deleted() for x in jax.tree.leaves(first))
    step(array(QUERY[:, 2:3]), first, array(KEY[:, 2:3]), array(VALUE[:, 2:3]))


def test_pytrees():
    cache = new_cache(layout="BHSD", window=3)
    assert len(jax.tree_util.tree_leaves(cache)) == 3
    again = jax.jit(lambda cache: cache)(cache)
    assert again.layout == "BHSD" and again.window == 3


KINDS = {
    "plain": {},
    "heads first": {"layout": "BHSD"},
    "int8": {"dtype": "int8"},
    "int8, a window": {"dtype": "int8", "window": 3},
}
READER = """
import sys
import jax
import attn_ops.jax
exported = jax.export.deserialize(open(sys.argv[1], "rb").read())
cache = exported.call(attn_ops.KVCache.create(2, 9, 2, 8, layout="BHSD", framework="jax"))
assert (type(cache).__name__, cache.layout, cache.lengths.tolist()) == ("KVCache_BHSD", "BHSD", [2, 2]), cache
"""


@pytest.mark.wide(2)
@pytest.mark.parametrize("kind", KINDS)
def test_exported_functions_take_and_give_a_cache(kind):
    """Written to a file and read, with any batch: of no type that a user would have to register first."""
    batch, layout = jax.export.symbolic_shape("batch")[0], KINDS[kind].get("layout", "BSHD")
    cache = new_cache(**{"dtype": "float32", **KINDS[kind]})
    rows = [array(laid_out(x[:, :1], layout)) for x in (QUERY, KEY, VALUE)]
    step = jax.jit(functools.partial(attn_ops.jax.decode_attention, implementation="composite"))
    given = rows[0], cache, *rows[1:]
    open_batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), given)
    exported = jax.export.deserialize(jax.export.export(step)(*open_batch).serialize())
    found, right = exported.call(*given), step(*given)
    assert jax.tree.structure(found) == jax.tree.structure(right) and type(found[1]) is type(cache)
    jax.tree.map(close, found, right)


def test_an_exported_function_is_read_by_another_process(tmp_path):
    cache = attn_ops.KVCache.create(2, 9, 2, 8, layout="BHSD", framework="jax")
    grown = jax.jit(lambda cache: cache._replace(lengths=cache.lengths + 2))
    (tmp_path / "grown").write_bytes(jax.export.export(grown)(cache).serialize())
    read = children.run(READER, str(tmp_path / "grown"), without=("tensorflow",))
    assert read.returncode == 0, read.stderr[-2000:]


def test_an_exported_function_takes_a_relative_bias():
    bias = attn_ops.T5RelativeBias(array(np.ones((8, 2))), False, 20)
    exported = jax.export.export(jax.jit(lambda bias: jax.tree.map(lambda x: 2 * x, bias)))(bias)
    twice = jax.export.deserialize(exported.serialize()).call(bias)
    assert (twice.bidirectional, twice.max_distance) == (False, 20) and (twice.table == 2).all()


def test_what_is_wrong_is_said_and_changes_nothing():
    cache = new_cache(length=4).update(array(KEY[:, :3]), array(VALUE[:, :3]))
    q, k, v = (array(x[:, :2]) for x in (QUERY, KEY, VALUE))
    for given, error, message in (
        ((q, cache, k, v), ValueError, "the cache is full: sequence 0 has 3 of 4 positions, and 2 more do not fit"),
        ((q[:, :1, :3], cache, k[:, :1], v[:, :1]), ValueError, "num_heads"),
        ((q, 3), TypeError, "cache must be an attn_ops.KVCache, got int"),
        ((q, cache._replace(lengths=[5, 1])), ValueError, "cache.lengths must be between 0 and 4, got 5"),
    ):
        with pytest.raises(error, match=f"decode_attention: .*{message}"):
            attn_ops.jax.decode_attention(*given)
    close(cache.key[:, :3], KEY[:, :3])
    step = jax.jit(attn_ops.jax.decode_attention)
    with pytest.raises(jax.errors.JaxRuntimeError, match="lengths"):
        step(q, cache, k, v)[0].block_until_ready()


@pytest.mark.parametrize("grown", [False, True])
def test_a_full_cache_is_never_taken_for_one_with_room(grown):
    """In compiled functions the composite has no errors, and `update` by itself has none: the sequence without room gets NaN."""
    cache = new_cache(length=4).update(array(KEY[:, :3]), array(VALUE[:, :3]), [3] + [2] * (BATCH - 1))
    q, k, v = (array(x[:, :2]) for x in (QUERY, KEY, VALUE))
    step = jax.jit(functools.partial(attn_ops.jax.decode_attention, implementation="composite"))
    if grown:
        cache = jax.jit(attn_ops.KVCache.update)(cache, k, v)
        assert cache.lengths.tolist() == [5] + [4] * (BATCH - 1)
        with pytest.raises(ValueError, match="cache.lengths must be between 0 and 4, got 5"):
            attn_ops.jax.decode_attention(q, cache)
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="lengths.*5"):
            jax.block_until_ready(jax.jit(attn_ops.jax.decode_attention)(q, cache))
        out, _ = step(q, cache)
    else:
        out, _ = step(q, cache, k, v)
    assert np.isnan(out[0]).all() and np.isfinite(out[1:]).all()


def test_there_is_no_derivative():
    cache = new_cache()
    with pytest.raises(NotImplementedError, match="a KVCache is for generation, and has no derivative"):
        jax.grad(lambda k: cache.update(k, array(VALUE[:, :2])).key.sum())(array(KEY[:, :2]))
    assert not cache.key.is_deleted() and HEADS == QUERY.shape[2]

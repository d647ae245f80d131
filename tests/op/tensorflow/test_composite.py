"""What is the composite's own: chunks, bounded memory, weights, checks in running graphs.

That it computes every feature is tested with the other implementations (op/), and its derivatives
of higher order in test_composite_derivatives.py.
"""

import gc
import os
import sys

import numpy as np
import pytest
import tensorflow as tf

from attn_ops import reference
from attn_ops.tensorflow import composite, rows

import children
from composite_calls import MODES, assert_same, compiled, make_call, run, specification, split
from reference_cases import CASES, Case

each_case = pytest.mark.parametrize("case", CASES, ids=repr)


@each_case
@pytest.mark.wide(2)
@pytest.mark.parametrize("query_chunk", [None, 1, 3, "auto"])
def test_chunks_are_the_specification(case, query_chunk):
    assert_same(run(case, query_chunk), specification(case))


SOME = [case for case in CASES if case.name in ("everything", "bias", "causal, more queries", "every score and mask")]


@pytest.mark.wide(16)
@pytest.mark.parametrize("case", SOME, ids=repr)
@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("query_chunk", [None, 3])
def test_chunks_in_graphs(case, mode, query_chunk):
    assert_same(run(case, query_chunk, mode), specification(case))


@pytest.mark.wide(8)
@pytest.mark.parametrize("query_chunk", [2, "auto"])
@pytest.mark.parametrize("mode", MODES)
def test_empty_extents_in_chunks(query_chunk, mode):
    for sizes in ({"seqlen_q": 0}, {"seqlen_k": 0}, {"batch": 0})[: 1 if mode.startswith("xla") else 3]:
        case = Case("empty", lambda c: {"is_causal": True, "bias": c.bias(2, 3)}, **sizes)
        assert_same(run(case, query_chunk, mode), specification(case))


def chunks_taken(monkeypatch, shape, mode):
    """How many rows each block of a forward pass in float32 has."""
    taken = []
    forward_block = rows.Problem.forward_block

    def spy(self, block, k, v):
        taken.append(block.q.shape[2])
        return forward_block(self, block, k, v)

    monkeypatch.setattr(rows.Problem, "forward_block", spy)
    x = tf.ones(shape)
    step = compiled(lambda x: composite.attention(make_call(x, x, x))[0], mode, x)
    np.testing.assert_allclose(step(x), np.ones(shape), atol=1e-6)
    return taken


def test_auto_takes_chunks_only_when_there_are_many_scores(monkeypatch):
    monkeypatch.setattr(composite, "UNCHUNKED_SCORES", 2 * 3 * 10 * 10)
    monkeypatch.setattr(composite, "CHUNK_SCORES", 2 * 3 * 11 * 4)
    assert chunks_taken(monkeypatch, (2, 10, 3, 4), "eager") == [10]
    assert chunks_taken(monkeypatch, (2, 11, 3, 4), "eager") == [4, 4, 3]


def test_auto_in_graphs_of_unknown_shapes(monkeypatch):
    """One trace serves small and large inputs."""
    monkeypatch.setattr(composite, "UNCHUNKED_SCORES", 100)
    monkeypatch.setattr(composite, "CHUNK_SCORES", 30)
    step = tf.function(
        lambda q, k: composite.attention(make_call(q, k, k, is_causal=True))[0],
        input_signature=[tf.TensorSpec([None] * 4, tf.float64)] * 2,
    )
    rng = np.random.default_rng(0)
    for seqlen_q, seqlen_k in ((3, 4), (10, 9), (50, 3), (2, 100)):
        q, k = rng.standard_normal((1, seqlen_q, 2, 4)), rng.standard_normal((1, seqlen_k, 2, 4))
        expected, _ = reference.attention(q, k, k, is_causal=True)
        np.testing.assert_allclose(step(q, k), expected, atol=1e-13)


@pytest.mark.parametrize("query_chunk", [0, -1, 2.0, "all"])
def test_bad_chunk(query_chunk):
    x = tf.ones((1, 2, 1, 2))
    with pytest.raises(ValueError, match="query_chunk must be None, 'auto' or at least 1, got"):
        composite.attention(make_call(x, x, x), query_chunk)


PEAK = """
import resource, sys
import tensorflow as tf
from composite_calls import composite, make_call

def step(x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = x
        for _ in range(2):
            y = composite.attention(make_call(y, y, y, is_causal=True))[0]
    return tape.gradient(y, x)

if sys.argv[1] == "graph":
    step = tf.function(step, input_signature=[tf.TensorSpec([None] * 4)])

def peak(seqlen):
    step(tf.ones((1, seqlen, 8, 8))).numpy()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak(64)
print(peak(3072) - before)
"""


@pytest.mark.wide(4)
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_memory_stays_below_one_score_matrix(mode):
    """Two layers, forward and backward: stock attention keeps at least one such matrix for each."""
    child = children.run(PEAK, mode, PYTHONPATH=os.pathsep.join(sys.path))
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 8 * 3072 * 3072 * 4


def test_eager_tapes_keep_no_scores():
    """What lives between forward and backward is linear in seqlen: nothing of the inside is recorded."""

    def scores():
        tensors = [t for t in gc.get_objects() if isinstance(t, tf.Tensor) and t.shape.rank and t.dtype == tf.float32]
        return {id(t): t.shape for t in tensors if t.shape[-2:] == (8, 8)}

    x = tf.ones((1, 8, 2, 4))
    before = scores()  # of whatever ran in this process
    with tf.GradientTape() as tape:
        tape.watch(x)
        composite.attention(make_call(x, x, x, is_causal=True), None)
        assert not scores().keys() - before.keys()


POISONED = ("key", "value", "query", "d_out")


@pytest.mark.wide(4)
@pytest.mark.parametrize("name", POISONED)
@pytest.mark.parametrize("mode, query_chunk", [("eager", None), ("eager", 2), ("graph", None), ("xla", 2)])
def test_nan_stays_where_the_specification_has_it(name, mode, query_chunk):
    """A single NaN under a causal mask, where every tile has both rows that see it and rows that do not."""
    case = Case("causal", {"is_causal": True, "key_value_seq_lengths": [5, 4]}, seqlen_q=5, heads=(4, 2))
    (case.d_out if name == "d_out" else case.inputs[name])[0, 2, 1, 1] = np.nan
    found, expected = run(case, query_chunk, mode), specification(case)
    assert np.isnan(expected[3]).any() and not np.isnan(expected[3]).all(), "dk tells rows apart"
    assert_same(found, expected)


def test_logits_that_overflow_float16():
    query = np.full((1, 1, 1, 64), 300.0, np.float16)
    key = np.float16([300.0, 150.0])[None, :, None, None] * np.ones((1, 2, 1, 64), np.float16)
    value = np.float16([1.0, 2.0]).reshape(1, 2, 1, 1)
    out, lse = composite.attention(make_call(*map(tf.constant, (query, key, value))))
    assert out.numpy().item() == 1.0 and lse.numpy().item() == 720000.0


def test_huge_logits_have_finite_gradients():
    rng = np.random.default_rng(0)
    inputs = [tf.constant(1e4 * rng.standard_normal((1, 8, 2, 16)), tf.float32) for _ in range(3)]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        out, _ = composite.attention(make_call(*inputs, is_causal=True))
    for x in (out, *tape.gradient(out, inputs)):
        assert np.isfinite(x).all()
    assert np.abs(out).max() <= np.abs(inputs[2]).max(), "weights must not exceed 1"


@pytest.mark.parametrize("case", [c for c in CASES if not c.options.get("dropout_rate")], ids=repr)
def test_attention_weights(case):
    inputs, call_of = split(case)
    call = call_of(*inputs)
    _, lse = composite.attention(call)
    found = composite.attention_weights(call, lse)
    expected = reference.attention_weights(case.inputs["query"], case.inputs["key"], **case.options)
    np.testing.assert_allclose(found, expected, atol=1e-13)


def test_weights_have_the_dtype_of_the_query():
    x = tf.ones((1, 3, 1, 4), tf.bfloat16)
    call = make_call(x, x, x)
    weights = composite.attention_weights(call, composite.attention(call)[1])
    assert weights.dtype == tf.bfloat16
    np.testing.assert_allclose(tf.cast(weights, tf.float32), np.full((1, 1, 3, 3), 1 / 3), rtol=2**-8)


@pytest.mark.parametrize("lengths", [[6, 1], [-1, 1], [1, 1, 1]])
@pytest.mark.parametrize("which", ["query_seq_lengths", "key_value_seq_lengths"])
def test_lengths_that_only_a_running_graph_can_refuse(lengths, which):
    x = tf.ones((2, 5, 1, 2))
    step = tf.function(
        lambda lengths: composite.attention(make_call(x, x, x, **{which: lengths}))[0],
        input_signature=[tf.TensorSpec([None], tf.int32)],
    )
    assert step(tf.constant([5, 0])).shape == x.shape
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"scaled_dot_product_attention: {which} must"):
        step(tf.constant(lengths))


def misfits():
    """Shapes that broadcasting alone would accept, or turn into another result's."""
    ones = tf.ones
    q, k, v, mask = ones((2, 3, 4, 5)), ones((2, 6, 2, 5)), ones((2, 6, 2, 5)), ones((1, 1, 3, 6), tf.bool)
    agree = "query, key and value must agree in batch, .* multiple of num_kv_heads"
    yield "fits", (q, k, v, mask)
    for bad in ((q[:1], k, v), (q, k[:1], v[:1]), (q, k[:1], v), (q, k, v[:1]), (q[..., :4], k, v)):
        yield agree, (*bad, mask)
    for bad in ((q[:, :, :3], k, v), (q, k, v[:, :1]), (q, k, v[:, :, :1]), (q, k[:, :, :1], v), (q, k[:, :5], v)):
        yield agree, (*bad, mask)
    fit = r"masks and bias must broadcast to \[batch, num_heads, seqlen_q, seqlen_k\]"
    for shape in ((3, 1, 3, 6), (1, 3, 3, 6), (1, 1, 2, 6), (1, 1, 3, 5)):
        yield fit, (q, k, v, ones(shape, tf.bool))
    for bad in ((q[:, :1], k, v), (q, k[:, :1], v[:, :1]), (q[:1], k[:1], v[:1])):
        yield fit, (*bad, ones((2, 1, 3, 6), tf.bool))


@pytest.mark.wide(4)
@pytest.mark.parametrize("query_chunk", [None, 2, "auto"])
@pytest.mark.parametrize("mode", ["unknown shapes", "xla, unknown shapes"])
def test_shapes_that_only_a_running_graph_can_refuse(mode, query_chunk):
    (_, good), *bad = misfits()

    def attend(q, k, v, mask):
        return composite.attention(make_call(q, k, v, mask=mask), query_chunk)[0]

    step = compiled(attend, mode, *good)
    assert step(*good).shape == good[0].shape
    if mode.startswith("xla"):
        bad = bad[::4]
    for message, arguments in bad:
        # XLA drops assertions, and with them the message; it may not compile something else.
        message = None if mode.startswith("xla") else message
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            step(*arguments)

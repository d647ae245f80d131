"""Eager calls of query, key and value alone that are like one before go straight to `AttnOps>Plain`: the same answers and
derivatives, and nothing else takes that way."""

import numpy as np
import pytest
import tensorflow as tf

import attn_ops
from attn_ops import kernels, reference, scaled_dot_product_attention
from attn_ops.call import checked_before, precision
from attn_ops.tensorflow import choice, place
from attn_ops.tensorflow.forms import plain

OPTIONS = [
    {},
    {"is_causal": True, "scale": 0.3},
    {"is_causal": True, "causal_alignment": "bottom_right"},
    {"layout": "BHSD", "implementation": "fused", "is_causal": True},
]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(plain, "_given", {})


@pytest.fixture(params=["private", "public"])
def executor(request, monkeypatch):
    """With TensorFlow's private function that runs an eager operation, and without it."""
    if request.param == "public":
        monkeypatch.setattr(place, "eager_executor", lambda: None)


def inputs(layout="BSHD", dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(2, length, heads, 8)) for length, heads in [(5, 4), (7, 2), (7, 2)]]
    return [tf.constant(a if layout == "BSHD" else a.swapaxes(1, 2), dtype) for a in arrays]


@pytest.mark.parametrize("given", OPTIONS, ids=str)
def test_the_second_call_answers_like_the_first(given, executor):
    layout = given.get("layout", "BSHD")
    scaled_dot_product_attention(*inputs(layout), **given)
    assert len(plain._given) == 1
    before = choice.calls.copy()
    others = inputs(layout, seed=1)
    tape = tf.GradientTape(persistent=True)
    with tape:
        tape.watch(others)
        out = scaled_dot_product_attention(*others, **given)
        loss = tf.reduce_sum(tf.sin(out))
    assert choice.calls - before == {"fused": 1}
    options = {name: x for name, x in given.items() if name != "implementation"}
    arrays = [x.numpy() for x in others]
    expected = reference.attention(*arrays, **options)[0]
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-14)
    wanted = reference.attention_gradients(*arrays, d_out=np.cos(expected), **options)
    for found, right in zip(tape.gradient(loss, others), wanted):
        np.testing.assert_allclose(found, right, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_other_dtypes(dtype):
    for seed in range(2):
        q, k, v = inputs(dtype=dtype, seed=seed)
        out = scaled_dot_product_attention(q, k, v)
    expected = reference.attention(*(tf.cast(x, tf.float64).numpy() for x in (q, k, v)))[0]
    assert len(plain._given) == 1 and out.dtype == dtype
    np.testing.assert_allclose(tf.cast(out, tf.float64), expected, atol={"float32": 1e-6, "float16": 1e-3}.get(dtype, 1e-2))


@pytest.mark.parametrize("dtypes", [("float64", "float32", "float32"), ("float16", "float16", "bfloat16")], ids="-".join)
def test_dtypes_that_differ_are_promoted_in_the_second_call_too(dtypes):
    tensors = [tf.cast(x, dtype) for x, dtype in zip(inputs(), dtypes)]
    expected = reference.attention(*(tf.cast(x, tf.float64).numpy() for x in tensors))[0]
    for _ in range(2):
        out = scaled_dot_product_attention(*tensors)
        np.testing.assert_allclose(out, expected, atol=1e-6)
        assert out.dtype == ("float64" if "float64" in dtypes else "float32")


def test_second_order_and_forward_mode(executor):
    """Against the composite, which has no operators of ours."""

    def derivatives(implementation):
        q, k, v = inputs(seed=2)
        with tf.GradientTape() as outer:
            outer.watch(q)
            with tf.GradientTape() as inner:
                inner.watch(q)
                loss = tf.reduce_sum(tf.sin(scaled_dot_product_attention(q, k, v, implementation=implementation)))
            first = inner.gradient(loss, q)
            norm = tf.reduce_sum(first**2)
        with tf.autodiff.ForwardAccumulator(k, tf.ones_like(k)) as accumulator:
            out = scaled_dot_product_attention(q, k, v, implementation=implementation)
        return outer.gradient(norm, q), accumulator.jvp(out)

    scaled_dot_product_attention(*inputs(), implementation="fused")
    assert len(plain._given) == 1
    for found, right in zip(derivatives("fused"), derivatives("composite")):
        np.testing.assert_allclose(found, right, rtol=1e-10, atol=1e-12)


NOT_KEPT = [
    {"return_lse": True},
    {"dropout_rate": 0.5, "dropout_seed": 1},
    {"logits_soft_cap": 3.0},
    {"implementation": "composite"},
    {"mask": attn_ops.masks.causal()},
    {"bias": np.zeros((1, 1, 5, 7))},
    {"sinks": np.zeros(4)},
    {"window": (1, 0)},  # a tuple: (True, 0) would be the same, and is an error
]


@pytest.mark.parametrize("given", NOT_KEPT, ids=lambda given: next(iter(given)))
def test_what_is_not_plain_is_not_kept(given):
    scaled_dot_product_attention(*inputs(), **given)
    assert not plain._given


def test_neither_are_fewer_axes_variables_and_traced_calls():
    q, k, v = (x[:, :, 0] for x in inputs())
    assert scaled_dot_product_attention(q, k, v).shape == (2, 5, 8)
    scaled_dot_product_attention(*map(tf.Variable, inputs()))
    tf.function(scaled_dot_product_attention)(*inputs())
    assert not plain._given


def test_wrong_calls_stay_wrong():
    q, k, v = inputs()
    scaled_dot_product_attention(q, k, v)
    for wrong, error in (((q, k, v[:1]), "batch"), ((q, k[..., :4], v), "head_dim"), ((q[:, :, :3], k, v), "num_heads")):
        with pytest.raises(ValueError, match=error):
            scaled_dot_product_attention(*wrong)
    with pytest.raises(TypeError):
        scaled_dot_product_attention(q, k, v, is_causal="yes")
    assert len(plain._given) == 1


def test_the_choice_of_tf32_is_part_of_a_call(monkeypatch):
    q, k, v = inputs(dtype="float32")
    scaled_dot_product_attention(q, k, v)
    monkeypatch.setattr(precision, "_allowed", True)
    scaled_dot_product_attention(q, k, v)
    assert [("allow_tf32" in given) for given in plain._given.values()] == [False, True]


def test_not_too_many_are_kept(monkeypatch):
    monkeypatch.setattr(checked_before, "_LARGEST", 3)
    for length in range(1, 9):
        x = tf.ones([1, length, 1, 4])
        np.testing.assert_allclose(scaled_dot_product_attention(x, x, x), x, rtol=1e-6)
        assert len(plain._given) <= 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layout": "BHSD"}, "num_heads"),
        ({"scale": "one"}, "scale"),
        ({"k": np.zeros((2, 7, 2, 4), "float32")}, "head_dim"),
        ({"v": np.zeros((2, 6, 2, 8), "float32")}, "seqlen_k"),
        ({"Tlse": tf.float64}, "Tlse must be"),
    ],
    ids=["layout", "scale", "head_dim", "seqlen", "Tlse"],
)
def test_the_operator_alone(change, message):
    """Called without anything of ours in between."""
    q, k, v = (x.numpy() for x in inputs(dtype="float32"))
    operator = kernels.library().attn_ops_plain
    out, statistics = operator(q=q, k=k, v=v)
    assert out.shape == (2, 5, 4, 8) and statistics.shape == (2, 4, 5, 2)
    np.testing.assert_allclose(out, reference.attention(q, k, v)[0], atol=1e-6)
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"AttnOps>Plain: .*{message}"):
        operator(**{"q": q, "k": k, "v": v, **change})

"""Which layers convert(), patched() and explain() take for attention, and what they say of those that are left."""

import logging
import warnings

import keras
import numpy as np
import pytest

import attn_ops

from attn_ops.models import seams
from attn_ops.tensorflow import choice

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 6, 8)).astype("float32")
PADDING = np.arange(6) < np.array([[6], [4]])


class Cached(keras.layers.MultiHeadAttention):
    """A `call` of its own, as KerasHub's."""

    def call(self, query, value, key=None, attention_mask=None, training=None, **more):
        query, key, value = self._query_dense(query), self._key_dense(value), self._value_dense(value)
        out, _ = self._compute_attention(query, key, value, attention_mask=attention_mask, training=training, **more)
        return self._output_dense(out)


class Own(keras.layers.MultiHeadAttention):
    def _compute_attention(self, *args, **kwargs):
        return super()._compute_attention(*args, **kwargs)


class Plain(keras.layers.Layer):
    """An attention that nobody knows."""

    def __init__(self, scale=0.5, **kwargs):
        super().__init__(**kwargs)
        self.scale, self.num_heads = scale, 2

    def call(self, x):
        return keras.ops.reshape(self._attend(*[keras.ops.reshape(x, (-1, x.shape[1], 2, 4))] * 3), keras.ops.shape(x))

    def _attend(self, query, key, value):
        scores = keras.ops.softmax(self.scale * keras.ops.einsum("bqhd,bkhd->bhqk", query, key))
        return keras.ops.einsum("bhqk,bkhd->bqhd", scores, value)


class PlainAttention(Plain):
    pass


def attend(layer, stock, query, key, value):
    return attn_ops.scaled_dot_product_attention(query, key, value, scale=layer.scale)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(seams, "registered", {})


def fused(function):
    before = choice.calls["fused"]
    return function(), choice.calls["fused"] - before


MASKS = {
    "none": None,
    "padding": PADDING[:, None, :],
    "rows without keys": PADDING[:, :, None] & PADDING[:, None, :],
    "per head": RNG.random((2, 2, 6, 6)) > 0.4,
    "integers": (RNG.random((2, 6, 6)) > 0.3).astype("int32"),
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mask", MASKS)
def test_subclasses_of_stock_layers(mask, dropout):
    """In inference: the same, for every row; converted, and in a patched process."""
    layer = Cached(2, 4, dropout=dropout)
    expected = layer(X, X, attention_mask=MASKS[mask])
    with attn_ops.patched():
        out, count = fused(lambda: layer(X, X, attention_mask=MASKS[mask]))
    assert count == 1
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert type(attn_ops.convert(layer)) is Cached
    out, count = fused(lambda: layer(X, X, attention_mask=MASKS[mask]))
    assert count == 1
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_subclasses_drop_in_training():
    layer = attn_ops.convert(Cached(2, 4, dropout=0.5))
    outs, count = fused(lambda: [layer(X, X, training=True) for _ in range(2)])
    assert count == 2
    assert np.max(np.abs(outs[0] - outs[1])) > 1e-3


def test_grouped_subclasses():
    class Mine(keras.layers.GroupQueryAttention):
        pass

    layer = Mine(4, 4, 2, dropout=0.1)
    expected, scores = layer(X, X, use_causal_mask=True, return_attention_scores=True)
    (out, weights), count = fused(
        lambda: attn_ops.convert(layer)(X, X, use_causal_mask=True, return_attention_scores=True)
    )
    assert count == 1
    np.testing.assert_allclose(out, expected, atol=1e-6)
    np.testing.assert_allclose(weights, scores, atol=1e-6)


def test_stock_layers_with_dropout_run_fused_in_a_patched_process():
    layers = keras.layers.MultiHeadAttention(2, 4, dropout=0.3), keras.layers.GroupQueryAttention(4, 4, 2, dropout=0.3)
    for layer in layers:
        expected = layer(X, X, use_causal_mask=True)
        with attn_ops.patched():
            out, count = fused(lambda: layer(X, X, use_causal_mask=True))
            fused(lambda: layer(X, X, training=True))
        assert count == 1
        np.testing.assert_allclose(out, expected, atol=1e-6)


def test_what_is_left_is_said(caplog):
    inputs = keras.Input((6, 8))
    x = keras.layers.MultiHeadAttention(2, 4, name="stock")(inputs, inputs)
    x = Own(2, 4, name="own")(x, x)
    x = keras.layers.AdditiveAttention(name="additive")([x, x])
    model = keras.Model(inputs, PlainAttention(name="plain")(x), name="mixed")
    for layer in attn_ops.explain(model).layers:
        assert not layer.fused and layer.eager == "keras"
    with caplog.at_level(logging.INFO, "attn_ops"):
        attn_ops.convert(model)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "1 of 4 attention layers of mixed fused" in record.message
    assert "own (Own overrides _compute_attention)" in record.message
    assert "plain (attn_ops does not know PlainAttention)" in record.message
    rows = {row["layer"]: row for row in attn_ops.explain(model).to_dict()["layers"]}
    assert {name for name, row in rows.items() if row["eager"] == row["xla"] == row["training"] == "fused"} == {"stock"}
    assert rows["own"]["reason"] == "Own overrides _compute_attention" and "register" in rows["own"]["remedy"]
    assert rows["additive"]["remedy"] is None
    table = str(attn_ops.explain(model))
    assert "mixed: 1 of 4 attention layers run fused" in table and "PlainAttention" in table
    caplog.clear()
    with caplog.at_level(logging.INFO, "attn_ops"):
        attn_ops.convert(keras.layers.MultiHeadAttention(2, 4, name="alone"))
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_explanation_of_our_layers():
    layer = attn_ops.layers.MultiHeadAttention(2, 4, flash_attention=False)
    (row,) = attn_ops.explain(layer).layers
    assert row.eager == row.graph == "composite" and row.reason == "flash_attention=False" and row.heads == 2
    (row,) = attn_ops.explain(attn_ops.layers.GroupedQueryAttention(4, 4, 2)).layers
    assert row.fused and row.reason is None and row.heads == 4
    assert str(attn_ops.explain(keras.layers.Dense(3, name="dense"))) == "dense: 0 of 0 attention layers run fused"
    with pytest.raises(TypeError, match="query, key and value, or a Keras layer"):
        attn_ops.explain(X[:, :, None])


def replace(layer, name):
    """Puts a method into one layer, as is done to see or to change what a step of the computation gives."""
    step = getattr(layer, name)

    def replacement(*args, **kwargs):
        return keras.tree.map_structure(lambda x: x if x is None or x.dtype == bool else 2 * x, step(*args, **kwargs))

    setattr(layer, name, replacement)
    return layer


REPLACED = {
    "_compute_attention": lambda: keras.layers.MultiHeadAttention(2, 4),
    "_masked_softmax": lambda: keras.layers.MultiHeadAttention(2, 4, dropout=0.1),
    "_compute_attention, grouped": lambda: keras.layers.GroupQueryAttention(4, 4, 2),
    "_compute_attention, subclass": lambda: Cached(2, 4),
    "_masked_softmax, subclass": lambda: Cached(2, 4, dropout=0.1),
    "_apply_scores": lambda: keras.layers.Attention(),
}


@pytest.mark.parametrize("when", ["before", "after", "patched"])
@pytest.mark.parametrize("replaced", REPLACED)
def test_methods_that_were_replaced_in_one_layer_count(replaced, when):
    name = replaced.partition(",")[0]
    mask = np.tril(np.ones((2, 6, 6), bool))

    def call(layer):
        return layer([X, X], mask=[None, mask]) if name == "_apply_scores" else layer(X, X, attention_mask=mask)

    layer, other = REPLACED[replaced](), REPLACED[replaced]()
    call(layer), call(other)
    other.set_weights(layer.get_weights())
    expected = call(replace(layer, name))
    if when == "before":
        assert f"{name} of {layer.name} itself was replaced" in str(attn_ops.explain(attn_ops.convert(layer)))
        out = call(layer)
    elif when == "after":
        out = call(replace(attn_ops.convert(other), name))
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing ran fused
            with attn_ops.patched():
                out = call(layer)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_registered_classes():
    layer = PlainAttention()
    expected = layer(X)
    attn_ops.models.register(Plain, attend, method="_attend")
    assert attn_ops.explain(layer).layers[0].remedy == "attn_ops.convert(model)"
    with attn_ops.patched():
        out, count = fused(lambda: layer(X))
    assert count == 1
    np.testing.assert_allclose(out, expected, atol=1e-6)
    _, count = fused(lambda: layer(X))
    assert count == 0
    out, count = fused(lambda: attn_ops.convert(layer)(X))
    assert count == 1 and attn_ops.explain(layer).layers[0].fused
    np.testing.assert_allclose(out, expected, atol=1e-6)
    _, count = fused(lambda: attn_ops.revert(layer)(X))
    assert count == 0

    class Override(Plain):
        def _attend(self, query, key, value):
            return query

    mine = Override()
    np.testing.assert_array_equal(attn_ops.convert(mine)(X), X)
    assert attn_ops.explain(mine).layers[0].reason == "Override overrides _attend"
    calls = []
    attn_ops.models.register(Plain, lambda layer, stock, *args: calls.append(layer) or stock(*args), method="_attend")
    np.testing.assert_allclose(attn_ops.convert(layer)(X), expected, atol=1e-6)
    assert calls == [layer]


def test_a_method_that_is_the_call():
    attn_ops.models.register(Plain, lambda layer, stock, x: stock(x) + 1)
    layer = Plain()
    expected = layer(X) + 1
    inputs = keras.Input((6, 8))
    model = attn_ops.convert(keras.Model(inputs, layer(inputs)))
    np.testing.assert_allclose(model.predict(X, verbose=0), expected, atol=1e-6)


def test_bad_registrations():
    with pytest.raises(TypeError, match="cls must be a class"):
        attn_ops.models.register(Plain(), attend)
    with pytest.raises(TypeError, match="adapter must be callable"):
        attn_ops.models.register(Plain, "attend")
    with pytest.raises(ValueError, match="Plain has no method 'attention'"):
        attn_ops.models.register(Plain, attend, method="attention")


def test_a_block_without_a_fused_call_warns():
    inputs = keras.Input((6, 8))
    model = keras.Model(inputs, keras.layers.MultiHeadAttention(2, 4)(inputs, inputs))
    model.predict(X, verbose=0)
    with pytest.warns(UserWarning, match="no attention ran fused"), attn_ops.patched():
        model.predict(X, verbose=0)  # traced before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attn_ops.patched(model):
            model.predict(X, verbose=0)
    with pytest.raises(TypeError, match="attn_ops.patched: model must be a Keras layer"), attn_ops.patched(3):
        pass


def test_patched_classes_are_as_before_afterwards():
    before = {cls: dict(vars(cls)) for cls in (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention, Own, Cached)}
    with attn_ops.patched(), attn_ops.patched():
        assert vars(keras.layers.MultiHeadAttention) != before[keras.layers.MultiHeadAttention]
        Cached(2, 4)(X, X)
    for cls, members in before.items():
        assert dict(vars(cls)) == members


@pytest.mark.parametrize("cap", [3.0, 0.5])
def test_soft_caps_of_the_op(cap):
    q, k, v = (RNG.normal(size=(2, n, 2, 8)) for n in (5, 7, 7))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * 0.7
    weights = np.exp(cap * np.tanh(scores / cap))
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    from keras.src.backend.tensorflow import nn

    with attn_ops.patched():
        out, count = fused(lambda: nn.dot_product_attention(q, k, v, scale=0.7, attn_logits_soft_cap=cap))
    assert count == 1
    np.testing.assert_allclose(out, expected, rtol=1e-9)

"""The weights of models of KerasHub: those that their own softmax layers give."""

import hub
import keras
import numpy as np
import pytest

import attn_ops
from attn_ops import visualize

SHOWN = ("BERT", "GPT-2", "Llama")
OTHERS = sorted({*hub.LANGUAGE_MODELS} - {*SHOWN})
_WITH_DROPOUT = ("BERT", "GPT-2")  # without it, the op of Keras computes the weights


def softmaxes(monkeypatch, model, values):
    """What the softmax layers of the stock model gave."""
    given, stock = [], keras.layers.Softmax.call

    def call(self, x, mask=None):
        given.append(stock(self, x, mask))
        return given[-1]

    with monkeypatch.context() as patch:
        patch.setattr(keras.layers.Softmax, "call", call)
        model(values, training=False)
    return [np.asarray(keras.ops.cast(x, "float32")) for x in given]


@pytest.mark.wide(3)
@pytest.mark.parametrize("name", SHOWN)
def test_weights_are_those_of_the_stock_model(keras_hub, name, monkeypatch):
    model = hub.make(keras_hub, name, **({"dropout": 0.1} if name in _WITH_DROPOUT else {}))
    values, real = hub.inputs(model)
    expected = softmaxes(monkeypatch, model, values)
    found = visualize.attention(model, values)
    assert len(found) == len(expected) == hub.LANGUAGE_MODELS[name][2] and not found.left_out
    rows = real[:, None].astype(bool)  # those of padding see what padding leaves
    for layer, stock in zip(found, expected):
        np.testing.assert_allclose(np.where(rows, layer.weights, 0), np.where(rows, stock, 0), atol=2e-5)
        np.testing.assert_array_equal(layer.real_keys, real[..., 0].astype(bool))
        if name != "BERT":
            assert (layer.hidden | np.tri(hub.LENGTH, dtype=bool)).all()  # causal
    attn_ops.convert(model)
    for a, b in zip(found, visualize.attention(model, values)):
        np.testing.assert_array_equal(a.weights, b.weights)
        assert a.name == b.name


@pytest.mark.wide(24)
@pytest.mark.parametrize("name", OTHERS)
def test_every_language_model_is_read(keras_hub, name):
    model = hub.make(keras_hub, name)
    values, _ = hub.inputs(model)
    found = visualize.attention(model, values)
    assert len(found) == hub.LANGUAGE_MODELS[name][2] and not found.left_out
    for layer in found:
        sums = layer.weights.sum(-1)
        assert sums.max() < 1 + 1e-4 and (name == "GPT-OSS" or sums[:, :, 0].min() > 1 - 1e-4)
        assert not layer.weights[np.broadcast_to(layer.hidden, layer.weights.shape)].any()

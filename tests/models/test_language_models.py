"""Every language model of KerasHub that is known: converted against stock."""

import re

import hub
import keras
import numpy as np
import pytest

import attn_ops


MODELS = list(hub.LANGUAGE_MODELS)


@pytest.mark.wide(5)
@pytest.mark.parametrize("name", MODELS)
def test_converted_models_answer_as_stock_ones(keras_hub, name):
    """The output and all gradients at real positions, every attention fused; and afterwards stock again."""
    model = hub.make(keras_hub, name)
    values, real = hub.inputs(model)
    expected, expected_gradients = hub.results(model, values, real)
    assert attn_ops.convert(model) is model
    explained = hub.explain(model)
    count = hub.LANGUAGE_MODELS[name][2]
    assert len(explained.layers) == count and all(layer.fused for layer in explained.layers)
    (out, gradients), fused = hub.fused_calls(lambda: hub.results(model, values, real))
    assert fused == count
    assert hub.error(out, expected) < 1e-5
    assert hub.gradient_error(gradients, expected_gradients) < 5e-5
    attn_ops.revert(model)
    (again, _), fused = hub.fused_calls(lambda: hub.results(model, values, real))
    assert fused == 0
    np.testing.assert_array_equal(again, expected)


@pytest.mark.wide(8)
@pytest.mark.parametrize("padding", ["left", "holes"])
@pytest.mark.parametrize("name", MODELS)
def test_other_padding(keras_hub, name, padding):
    """Padding on the left and in the middle; what padding rows get, real tokens of the next layer do not see."""
    model = hub.make(keras_hub, name)
    values, real = hub.inputs(model, padding="left")
    if padding == "holes":
        real[1, :3] = 1
        for key in values:
            if "padding_mask" in key:
                values[key][1, :3] = 1
    expected = hub.output(model, values) * real
    out = hub.output(attn_ops.convert(model), values) * real
    assert hub.error(out, expected) < 1e-5


@pytest.mark.wide(10)
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_mixed_precision(keras_hub, name, policy):
    """Against stock in float32: not further off than stock in the same precision, but for rounding.

    In float16 stock T5 is NaN: it multiplies 0 and -1e9, which is infinite there.
    """
    exact = hub.make(keras_hub, name)
    values, real = hub.inputs(exact)
    expected = hub.output(exact, values) * real
    model = hub.make(keras_hub, name, dtype=policy)
    stock = hub.error(hub.output(model, values) * real, expected)
    out, fused = hub.fused_calls(lambda: hub.output(attn_ops.convert(model), values) * real)
    assert fused == hub.LANGUAGE_MODELS[name][2]
    assert hub.error(out, expected) < (5e-3 if np.isnan(stock) else 1.5 * stock + 1e-3)


@pytest.mark.wide(12)
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("name", ["BERT", "GPT-2", "GPT-OSS", "Gemma 2", "Llama", "T5"])
def test_training(keras_hub, name, jit):
    """`fit`, before and after the conversion of a model that was traced."""
    losses = []
    for converted in (False, True):
        model = hub.make(keras_hub, name)
        values, real = hub.inputs(model)
        x = keras.layers.Lambda(lambda out: out)(_sequence(model.output))
        whole = keras.Model(model.input, x)
        whole.compile(keras.optimizers.SGD(1e-3), "mse", jit_compile=jit)
        target = np.zeros((2, x.shape[1] or hub.LENGTH, x.shape[2]), "float32")
        whole.fit(values, target, verbose=0, sample_weight=real[..., 0])
        if converted:
            _, fused = hub.fused_calls(lambda: attn_ops.convert(whole).fit(values, target, verbose=0, sample_weight=real[..., 0]))
            assert fused >= hub.LANGUAGE_MODELS[name][2]
        losses.append(whole.fit(values, target, verbose=0, sample_weight=real[..., 0]).history["loss"][0])
        if not converted:
            losses.append(whole.fit(values, target, verbose=0, sample_weight=real[..., 0]).history["loss"][0])
    first_stock, second_stock, second = losses
    assert first_stock != second_stock
    np.testing.assert_allclose(second, second_stock, rtol=1e-4)


def _sequence(outputs):
    return outputs.get("sequence_output", outputs.get("decoder_sequence_output")) if isinstance(outputs, dict) else outputs


def test_dropout_runs_fused_in_training(keras_hub):
    model = hub.make(keras_hub, "GPT-2", dropout=0.5)
    values, _ = hub.inputs(model)
    attn_ops.convert(model)
    outs, fused = hub.fused_calls(lambda: [hub.output(model, values, training=True) for _ in range(2)])
    assert fused == 4
    assert hub.error(outs[0], outs[1]) > 0.01  # other weights are dropped each time
    np.testing.assert_array_equal(hub.output(model, values), hub.output(model, values))


@pytest.mark.wide(2)
@pytest.mark.parametrize("name", ["Llama", "T5", "GPT-2", "ALBERT"])
def test_saved_files_are_those_of_stock_models(keras_hub, name, tmp_path):
    model = hub.make(keras_hub, name)
    values, real = hub.inputs(model)
    expected = hub.output(model, values)
    attn_ops.convert(model)
    if name != "ALBERT":  # whose stock layers of Keras become ours
        model.save(tmp_path / "converted.keras")
        loaded = keras.saving.load_model(tmp_path / "converted.keras")
        out, fused = hub.fused_calls(lambda: hub.output(loaded, values))
        assert fused == 0
        np.testing.assert_array_equal(out, expected)
    attn_ops.revert(model)
    model.save(tmp_path / "reverted.keras")
    np.testing.assert_array_equal(hub.output(keras.saving.load_model(tmp_path / "reverted.keras"), values), expected)


@pytest.mark.wide(8)
@pytest.mark.parametrize("name", ["BERT", "Llama", "Gemma 2", "T5", "BLOOM", "Qwen", "GPT-OSS", "BART"])
def test_patched_process(keras_hub, name):
    """As converted, for the duration of a block; also what `predict` had traced before it."""
    model = hub.make(keras_hub, name)
    values, real = hub.inputs(model)
    expected = _sequence(model.predict(values, verbose=0)) * real
    with attn_ops.patched(model):
        assert all(layer.fused for layer in hub.explain(model).layers)
        out, fused = hub.fused_calls(lambda: _sequence(model.predict(values, verbose=0)) * real)
        assert fused >= hub.LANGUAGE_MODELS[name][2]
    assert hub.error(out, expected) < 1e-5
    out, fused = hub.fused_calls(lambda: _sequence(model.predict(values, verbose=0)) * real)
    assert fused == 0
    np.testing.assert_array_equal(out, expected)


def test_a_changed_release_is_left_alone(keras_hub, monkeypatch):
    from keras_hub.src.models.llama.llama_attention import LlamaAttention

    model = hub.make(keras_hub, "Llama")
    values, real = hub.inputs(model)

    def other_arguments(self, query, key, value, mask=None):
        return query

    def other_code(self, query, key, value, attention_mask=None):
        return query

    for method, reason in ((other_arguments, "takes \\(query, key, value, mask\\)"), (other_code, "code")):
        monkeypatch.setattr(LlamaAttention, "_compute_attention", method)
        expected = hub.output(model, values)
        with attn_ops.patched():
            np.testing.assert_array_equal(hub.output(model, values), expected)
        attn_ops.convert(model)
        np.testing.assert_array_equal(hub.output(model, values), expected)
        for layer in hub.explain(model).layers:
            assert layer.eager == "keras"
            assert re.search(reason, layer.reason)


def test_left_padding_of_decoders_that_share_a_mask_is_not_lost(keras_hub):
    """A mask of the user's beside the causal one: nothing is known of it, and it counts."""
    decoder = keras_hub.layers.TransformerDecoder(16, 4)
    x = np.random.default_rng(0).normal(size=(2, 6, 8)).astype("float32")
    mask = np.random.default_rng(1).random((2, 6, 6)) > 0.4
    mask |= np.eye(6, dtype=bool)
    expected = decoder(x, decoder_attention_mask=mask)
    attn_ops.convert(decoder)
    np.testing.assert_allclose(decoder(x, decoder_attention_mask=mask), expected, atol=1e-5)
    free = decoder(x, use_causal_mask=False)
    np.testing.assert_allclose(free, attn_ops.revert(decoder)(x, use_causal_mask=False), atol=1e-5)


def test_rows_that_a_mask_of_the_users_empties(keras_hub):
    """They are 0 where the stock layer computes its softmax itself, and the mean of the values where it calls Keras's op."""
    from keras_hub.src.models.llama.llama_decoder import LlamaTransformerDecoder

    decoder = LlamaTransformerDecoder(32, 4, 2)
    x = np.random.default_rng(0).normal(size=(2, 6, 16)).astype("float32")
    mask = np.arange(6)[:, None] > np.arange(6) + np.array([1, 3])[:, None, None]
    expected = decoder(x, decoder_attention_mask=mask)
    attn_ops.convert(decoder)
    np.testing.assert_allclose(decoder(x, decoder_attention_mask=mask), expected, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_biases_of_falcon_are_slopes_where_no_key_is_padding(keras_hub, padded, monkeypatch):
    """Its biases count real keys: where padding has holes, slopes would not."""
    from keras_hub.src.models.falcon.falcon_transformer_decoder import FalconTransformerDecoder

    from attn_ops.models.adapters import by_distance

    given = []
    attention = by_distance.heads.attention
    monkeypatch.setattr(by_distance.heads, "attention", lambda *x, **more: given.append(more) or attention(*x, **more))
    layer = FalconTransformerDecoder(4, 32)
    x = np.random.default_rng(0).standard_normal((2, 9, 16)).astype("float32")
    real = np.array([[1, 0, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1]]) if padded else None
    expected = keras.ops.convert_to_numpy(layer(x, real))
    out = attn_ops.convert(layer)(x, real)
    [options] = given
    assert ("bias" in options, "alibi_slopes" in options) == (padded, not padded)
    shown = np.ones((2, 9), bool) if real is None else real.astype(bool)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(out)[shown], expected[shown], rtol=1e-5, atol=1e-5)

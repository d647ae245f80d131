"""Every language model of KerasHub that is known: converted against stock."""

import re

import hub
import keras
import numpy as np
import pytest
import tensorflow as tf

import attn_ops

from attn_ops.tensorflow import choice

MODELS = list(hub.LANGUAGE_MODELS)


@pytest.fixture(scope="module")
def keras_hub():
    return pytest.importorskip("keras_hub")


def fused_calls(function):
    """The result of a function, and how many attentions ran fused in it, if no other ran otherwise."""
    before = choice.calls.copy()
    result = function()
    ran = choice.calls - before
    assert set(ran) <= {"fused"}
    return result, ran["fused"]


@pytest.mark.wide(5)
@pytest.mark.parametrize("name", MODELS)
def test_converted_models_answer_as_stock_ones(keras_hub, name):
    """The output and all gradients at real positions, every attention fused; and afterwards stock again."""
    model = hub.make(keras_hub, name)
    values, real = hub.inputs(model)
    expected, expected_gradients = hub.results(model, values, real)
    assert attn_ops.convert(model) is model
    explained = attn_ops.explain(model)
    count = hub.LANGUAGE_MODELS[name][2]
    assert len(explained.layers) == count and all(layer.fused for layer in explained.layers)
    (out, gradients), fused = fused_calls(lambda: hub.results(model, values, real))
    assert fused == count
    assert hub.error(out, expected) < 1e-5
    assert hub.gradient_error(gradients, expected_gradients) < 5e-5
    attn_ops.revert(model)
    (again, _), fused = fused_calls(lambda: hub.results(model, values, real))
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
    out, fused = fused_calls(lambda: hub.output(attn_ops.convert(model), values) * real)
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
            _, fused = fused_calls(lambda: attn_ops.convert(whole).fit(values, target, verbose=0, sample_weight=real[..., 0]))
            assert fused >= hub.LANGUAGE_MODELS[name][2]
        losses.append(whole.fit(values, target, verbose=0, sample_weight=real[..., 0]).history["loss"][0])
        if not converted:
            losses.append(whole.fit(values, target, verbose=0, sample_weight=real[..., 0]).history["loss"][0])
    first_stock, second_stock, second = losses
    assert first_stock != second_stock
    np.testing.assert_allclose(second, second_stock, rtol=1e-4)


def _sequence(outputs):
    return outputs.get("sequence_output", outputs.get("decoder_sequence_output")) if isinstance(outputs, dict) else outputs


CAUSAL = {
    "BLOOM": "BloomCausalLM",
    "Falcon": "FalconCausalLM",
    "GPT-2": "GPT2CausalLM",
    "GPT-NeoX": "GPTNeoXCausalLM",
    "GPT-OSS": "GptOssCausalLM",
    "Gemma": "GemmaCausalLM",
    "Gemma 2": "GemmaCausalLM",
    "Llama": "LlamaCausalLM",
    "Mistral": "MistralCausalLM",
    "Mixtral": "MixtralCausalLM",
    "OPT": "OPTCausalLM",
    "Phi-3": "Phi3CausalLM",
    "Qwen 3": "Qwen3CausalLM",
    "Qwen 3 MoE": "Qwen3MoeCausalLM",
    "SmolLM3": "SmolLM3CausalLM",
}


@pytest.mark.wide(30)
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("name", CAUSAL)
def test_text_generation(keras_hub, name, jit):
    """The same tokens with a cache, by a function traced before the conversion; and the same logits."""
    model = hub.make(keras_hub, name)
    lm = getattr(keras_hub.models, CAUSAL[name])(backbone=model, preprocessor=None)
    lm.compile(sampler="greedy", jit_compile=jit)
    values, _ = hub.inputs(model)
    values["padding_mask"] = np.ones_like(values["padding_mask"])
    values["padding_mask"][:, 10:] = 0

    def generate():
        return np.asarray(lm.generate(values, stop_token_ids=None)["token_ids"])

    expected = generate()
    attn_ops.convert(lm)
    tokens, fused = fused_calls(generate)
    assert fused >= hub.LANGUAGE_MODELS[name][2]
    np.testing.assert_array_equal(tokens, expected)
    assert name == "BLOOM" or len(np.unique(tokens[:, 10:])) > 1  # with these weights it repeats itself


def test_dropout_runs_fused_in_training(keras_hub):
    model = hub.make(keras_hub, "GPT-2", dropout=0.5)
    values, _ = hub.inputs(model)
    attn_ops.convert(model)
    outs, fused = fused_calls(lambda: [hub.output(model, values, training=True) for _ in range(2)])
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
        out, fused = fused_calls(lambda: hub.output(loaded, values))
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
        assert all(layer.fused for layer in attn_ops.explain(model).layers)
        out, fused = fused_calls(lambda: _sequence(model.predict(values, verbose=0)) * real)
        assert fused >= hub.LANGUAGE_MODELS[name][2]
    assert hub.error(out, expected) < 1e-5
    out, fused = fused_calls(lambda: _sequence(model.predict(values, verbose=0)) * real)
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
        for layer in attn_ops.explain(model).layers:
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


@pytest.mark.parametrize("name", ["BLOOM", "Falcon"])
def test_cached_calls_with_biases_by_distance(keras_hub, name):
    compare_cached_calls(keras_hub, name, batch=2)


@pytest.mark.wide(8)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Mistral", "Mixtral", "Phi-3", "Qwen 3", "Qwen 3 MoE", "Gemma 2"])
def test_cached_calls_from_any_position(keras_hub, name, batch):
    compare_cached_calls(keras_hub, name, batch)


def compare_cached_calls(keras_hub, name, batch):
    """Several new tokens at once, at a position that is a tensor: converted against stock."""
    model = hub.make(keras_hub, name)
    lm = getattr(keras_hub.models, CAUSAL[name])(backbone=model, preprocessor=None)
    values, _ = hub.inputs(model)
    tokens = tf.constant(values["token_ids"])[:batch]
    heads = 4 if name in ("BLOOM", "Falcon", "GPT-2") else 2

    def steps():
        logits, _, cache = lm.call_with_cache(tokens[:, :8], tf.zeros([batch, 2, 2, hub.LENGTH, heads, 8]), 0)
        more, _, cache = lm.call_with_cache(tokens[:, 8:12], cache, tf.constant(8))
        return logits, more, *lm.call_with_cache(tokens[:, 12:13], cache, tf.constant(12))

    expected = steps()
    attn_ops.convert(lm)
    actual, fused = fused_calls(steps)
    assert fused == 6
    for a, e in zip(actual, expected):
        assert hub.error(a, e) < 5e-5


def test_t5_with_a_cache(keras_hub):
    """One layer that has the table and one that is handed its bias, token by token after a prompt."""
    from keras_hub.src.models.t5.t5_multi_head_attention import T5MultiHeadAttention

    first, second = (hub.randomize(_built(T5MultiHeadAttention(True, 32, 8, 4, 0.0, first))) for first in (True, False))
    x = np.random.default_rng(0).normal(size=(2, 12, 32)).astype("float32")

    def steps():
        outs, caches = [], [tf.zeros([2, 2, 16, 4, 8])] * 2
        for start, end in ((0, 7), (7, 10), (10, 11)):
            mask = tf.range(16)[None, None] <= tf.range(start, end)[None, :, None]
            at = {"mask": mask, "cache_update_index": tf.constant(start)}
            out, bias, caches[0] = first(x[:, start:end], cache=caches[0], **at)
            out, _, caches[1] = second(out, cache=caches[1], position_bias=bias, cache_update_index=at["cache_update_index"])
            outs.append(out)
        return [*outs, *caches]

    expected = steps()
    for layer in (first, second):
        attn_ops.convert(layer)
    actual, fused = fused_calls(steps)
    assert fused == 6
    for a, e in zip(actual, expected):
        assert hub.error(a, e) < 1e-5


def _built(layer):
    layer(np.zeros((1, 2, 32), "float32"))
    return layer

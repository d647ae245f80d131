"""Small random models of KerasHub, and what they compute: for the tests that convert them."""

from __future__ import annotations

import keras
import numpy as np

import attn_ops
from attn_ops.layers.backend import backend

LENGTH = 24
_SIZES = {"vocabulary_size": 50, "num_layers": 2, "hidden_dim": 32, "intermediate_dim": 48}
_HEADS = {**_SIZES, "num_heads": 4}
_GROUPS = {**_SIZES, "num_query_heads": 4, "num_key_value_heads": 2}
_EXPERTS = {"moe_intermediate_dim": 16, "num_experts": 4}
_WINDOW = {"sliding_window_size": 5}
_GEMMA = {**_GROUPS, "head_dim": 8}
_GEMMA_3 = {
    **_GEMMA,
    **_WINDOW,
    "num_layers": 6,
    "image_size": 16,
    "use_sliding_window_attention": True,
    "query_head_dim_normalize": True,
    "use_query_key_norm": True,
    "vision_encoder": None,
}
_LEARNED = {**_HEADS, "dropout": 0.0, "max_sequence_length": 64}
_T5_GEMMA = {
    f"{half}_{name}": x
    for half in ("encoder", "decoder")
    for name, x in {
        "hidden_dim": 32,
        "intermediate_dim": 48,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }.items()
}

# By name: the class of the backbone, its arguments, and how many attentions it has.
LANGUAGE_MODELS = {
    "ALBERT": (
        "AlbertBackbone",
        {**_LEARNED, "num_layers": 1, "embedding_dim": 16, "num_groups": 1, "num_inner_repetitions": 1},
        1,
    ),
    "BART": ("BartBackbone", _LEARNED, 6),
    "BERT": ("BertBackbone", _LEARNED, 2),
    "BLOOM": ("BloomBackbone", {**_HEADS, "dropout": 0.0, "max_sequence_length": 64}, 2),
    "DistilBERT": ("DistilBertBackbone", _LEARNED, 2),
    "ELECTRA": ("ElectraBackbone", {"vocab_size": 50, **_LEARNED, "embedding_dim": 32}, 2),
    "Falcon": (
        "FalconBackbone",
        {**_SIZES, "num_attention_heads": 4, "attention_dropout_rate": 0.0, "feedforward_dropout_rate": 0.0},
        2,
    ),
    "GPT-2": ("GPT2Backbone", _LEARNED, 2),
    "GPT-NeoX": ("GPTNeoXBackbone", _LEARNED, 2),
    "GPT-OSS": ("GptOssBackbone", {**_GEMMA, "num_experts": 4, "top_k": 2, "sliding_window": 5}, 2),
    "Gemma": ("GemmaBackbone", _GEMMA, 2),
    "Gemma 2": (
        "GemmaBackbone",
        {
            **_GEMMA,
            **_WINDOW,
            "query_head_dim_normalize": False,
            "use_post_ffw_norm": True,
            "use_post_attention_norm": True,
            "final_logit_soft_cap": 30,
            "attention_logit_soft_cap": 5,
            "use_sliding_window_attention": True,
        },
        2,
    ),
    "Gemma 3": ("Gemma3Backbone", _GEMMA_3, 6),
    "EmbeddingGemma": ("Gemma3Backbone", {**_GEMMA_3, "use_bidirectional_attention": True}, 6),
    "Llama": ("LlamaBackbone", _GROUPS, 2),
    "Llama 3": ("Llama3Backbone", _GROUPS, 2),
    "Mistral": ("MistralBackbone", {**_GROUPS, "sliding_window": 5}, 2),
    "Mixtral": ("MixtralBackbone", {**_GROUPS, "num_experts": 4, "sliding_window": 5}, 2),
    "OPT": ("OPTBackbone", _LEARNED, 2),
    "Phi-3": ("Phi3Backbone", _GROUPS, 2),
    "Qwen": ("QwenBackbone", {**_GROUPS, **_WINDOW, "use_sliding_window_attention": True}, 2),
    "Qwen 3": ("Qwen3Backbone", {**_GEMMA, **_WINDOW}, 2),
    "Qwen 3 MoE": ("Qwen3MoeBackbone", {**_GEMMA, **_EXPERTS, **_WINDOW, "num_experts_per_tok": 2}, 2),
    "Qwen MoE": (
        "QwenMoeBackbone",
        {
            **_GROUPS,
            **_EXPERTS,
            **_WINDOW,
            "shared_expert_intermediate_dim": 16,
            "top_k": 2,
            "use_sliding_window_attention": True,
        },
        2,
    ),
    "RoBERTa": ("RobertaBackbone", _LEARNED, 2),
    "SmolLM3": (
        "SmolLM3Backbone",
        {
            **_SIZES,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rope_layer_enabled_list": [True, False],
            "layer_types": ["full_attention"] * 2,
            "mlp_bias": False,
            "layer_norm_epsilon": 1e-5,
            "max_position_embeddings": 64,
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
        },
        2,
    ),
    "T5": ("T5Backbone", {**_HEADS, "key_value_dim": 8, "dropout": 0.0}, 6),
    "T5Gemma": (
        "T5GemmaBackbone",
        {
            **_T5_GEMMA,
            "vocabulary_size": 50,
            "dropout_rate": 0.0,
            "attention_dropout": 0.0,
            "rms_norm_eps": 1e-6,
            "query_pre_attn_scalar": 8.0,
            "attention_bias": False,
            "hidden_activation": "gelu_approximate",
            "sliding_window": 5,
            "cross_attention_hidden_size": 32,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 30.0,
            "rope_max_wavelength": 1e4,
        },
        6,
    ),
    "Whisper": (
        "WhisperBackbone",
        {**_HEADS, "num_mels": 8, "dropout": 0.0, "max_encoder_sequence_length": 48, "max_decoder_sequence_length": 24},
        6,
    ),
}


def make(hub, name, **changes):
    """A model with random weights, under which attention is far from uniform."""
    cls, arguments, _ = LANGUAGE_MODELS[name]
    arguments = {**arguments, **changes}
    if "vocab_size" in arguments:  # ELECTRA's name for it
        del arguments["vocabulary_size"]
    return randomize(getattr(hub.models, cls)(**arguments))


def randomize(model, seed=0):
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if "float" in weight.dtype:
            fan_in = np.prod(weight.shape[:-1]) if len(weight.shape) != 2 else weight.shape[0]
            spread = 1.5 / np.sqrt(max(fan_in, 1)) if len(weight.shape) > 1 else 0.4
            weight.assign(rng.normal(size=weight.shape, scale=spread))
    return model


def inputs(model, padding="right", seed=1):
    """Two sequences, the second one shorter, and which positions of the output are real, `[2, LENGTH, 1]`."""
    rng = np.random.default_rng(seed)
    real = np.ones((2, LENGTH), "int32")
    real[1, slice(15, None) if padding == "right" else slice(0, 9)] = 0
    values = {}
    for name in model.input:
        if "token_ids" in name:
            values[name] = rng.integers(1, 50, (2, LENGTH)).astype("int32") * real
        elif "padding_mask" in name:
            values[name] = real
        elif "segment" in name:
            values[name] = np.zeros((2, LENGTH), "int32")
        elif "features" in name:
            values[name] = rng.normal(size=(2, 2 * LENGTH, 8)).astype("float32")
    return values, real[..., None].astype("float32")


def output(model, values, training=False):
    out = model(values, training=training)
    if isinstance(out, dict):
        out = out.get("sequence_output", out.get("decoder_sequence_output"))
    return keras.ops.cast(out, "float32")


def explain(model):
    """`attn_ops.explain` of a model, also where TensorFlow is not installed."""
    return (attn_ops.jax if keras.config.backend() == "jax" else attn_ops).explain(model)


def results(model, values, real):
    """The output at real positions, and the gradients of a random projection of it, as arrays."""

    def loss(out):
        return keras.ops.sum(out * real * np.random.default_rng(5).normal(size=out.shape).astype("float32"))

    return (_results_on_jax if keras.config.backend() == "jax" else _results_on_tensorflow)(model, values, real, loss)


def _results_on_tensorflow(model, values, real, loss):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        out = output(model, values)
        total = loss(out)
    weights = [weight.value for weight in model.trainable_weights]
    gradients = tape.gradient(total, weights, unconnected_gradients="zero")
    return (out * real).numpy(), [np.asarray(tf.convert_to_tensor(g)) for g in gradients]


def _results_on_jax(model, values, real, loss):
    import jax

    def of_weights(trainable):
        with keras.StatelessScope(state_mapping=list(zip(model.trainable_variables, trainable))):
            out = output(model, values)
        return loss(out), out

    trainable = [weight.value for weight in model.trainable_variables]
    gradients, out = jax.jit(jax.grad(of_weights, has_aux=True))(trainable)  # one program: quicker to compile than its operations
    return np.asarray(out * real), [np.asarray(g) for g in gradients]


def error(actual, expected, scale=None):
    """The largest difference, relative to the largest value."""
    return np.max(np.abs(actual - expected)) / (np.max(np.abs(expected)) if scale is None else scale)


def gradient_error(actual, expected):
    """Over all weights, relative to the largest of all gradients: that of a key's bias is 0 but for rounding."""
    scale = max(np.max(np.abs(g)) for g in expected)
    return max(error(a, e, scale) for a, e in zip(actual, expected))


def fused_calls(function):
    """The result of a function, and how many attentions ran fused in it, if no other ran otherwise."""
    before = backend.choice.calls.copy()
    result = function()
    ran = backend.choice.calls - before
    assert set(ran) <= {"fused"}
    return result, ran["fused"]

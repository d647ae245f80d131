"""All the seams that are known. Which releases of Keras and KerasHub have them so: tests/compat/seams.py."""

from __future__ import annotations

from attn_ops.models.adapters import multi_head, other_models
from attn_ops.models.adapters.hub_seam import hub_seam
from attn_ops.models.adapters.projected import Projected, gemma_scale, symmetric
from attn_ops.models.adapters.structure import causal_decoder
from attn_ops.models.seams import Seam


def _attention(module, name, parameters, method="_compute_attention", steps=(), **attributes):
    parameters = tuple(parameters.split())
    known = tuple(p for p in parameters if p != "kwargs")
    return hub_seam(module, name, method, parameters, Projected(known, **attributes), steps)


def _decoder(module, name, parameters, sequence, padding, index, method="_compute_self_attention_mask", **more):
    parameters = tuple(parameters.split())
    adapter = causal_decoder(parameters, sequence, padding, index, **more)
    return hub_seam(module, name, method, parameters, adapter, attends=False)


_QKV = "query key value attention_mask"
_QKV_GEMMA = "q k v attention_mask training cache_update_index"
_MASKED = ("_masked_softmax",)
_WINDOWED = ("_masked_softmax", "_mask_sliding_window")

_ATTENTIONS = (
    _attention("models.llama.llama_attention", "LlamaAttention", _QKV, steps=_MASKED, groups="num_key_value_groups"),
    _attention("models.mistral.mistral_attention", "CachedMistralAttention", _QKV, steps=_MASKED, groups="_num_key_value_groups"),
    _attention("models.mixtral.mixtral_attention", "CachedMixtralAttention", _QKV, steps=_MASKED, groups="num_key_value_groups"),
    _attention("models.phi3.phi3_attention", "Phi3Attention", _QKV, steps=_MASKED, groups="num_key_value_groups"),
    _attention(
        "models.smollm3.smollm3_layers",
        "SmolLM3Attention",
        f"{_QKV} cache_update_index",
        steps=_MASKED,
        groups="num_key_value_groups",
    ),
    _attention(
        "models.gpt_neo_x.gpt_neo_x_attention",
        "GPTNeoXAttention",
        f"{_QKV} training",
        steps=_MASKED,
        dropout=("dropout", "_attn_dropout_layer"),
    ),
    *(
        _attention(
            f"models.{model}.{model}_attention",
            name,
            f"{_QKV} cache_update_index" + more,
            steps=_WINDOWED,
            groups="num_key_value_groups",
            window=symmetric(enabled),
        )
        for model, name, enabled, more in (
            ("qwen", "QwenAttention", "use_sliding_window_attention", ""),
            ("qwen_moe", "QwenMoeAttention", "use_sliding_window_attention", " kwargs"),
            ("qwen3", "Qwen3Attention", "sliding_window_size", ""),
            ("qwen3_moe", "Qwen3MoeAttention", "sliding_window_size", ""),
            ("qwen3_5", "Qwen3_5Attention", "sliding_window_size", ""),
        )
    ),
    _attention(
        "models.gemma.gemma_attention",
        "CachedGemmaAttention",
        _QKV_GEMMA,
        steps=("_mask_sliding_window",),
        scale=gemma_scale,
        window=symmetric("use_sliding_window_attention"),
        soft_cap="logit_soft_cap",
        dropout=("dropout", "dropout_layer"),
    ),
    _attention(
        "models.gpt_oss.gpt_oss_attention",
        "GptOssAttention",
        f"{_QKV} start_index",
        groups="num_key_value_groups",
        window=lambda layer: (layer.sliding_window, None) if (layer.sliding_window or 0) > 0 else None,
        sinks="sinks",
    ),
)

_DECODER = "decoder_sequence decoder_padding_mask decoder_attention_mask"
_CACHE = "self_attention_cache self_attention_cache_update_index"
_DECODER_ROLES = {
    "sequence": "decoder_sequence",
    "padding": "decoder_padding_mask",
    "index": "self_attention_cache_update_index",
    "unknown": ("decoder_attention_mask",),
}

_DECODERS = (
    *(
        _decoder(f"models.{module}", name, f"{_DECODER} {_CACHE}", **_DECODER_ROLES)
        for module, name in (
            ("llama.llama_decoder", "LlamaTransformerDecoder"),
            ("smollm3.smollm3_layers", "SmolLM3DecoderLayer"),
            ("gpt_neo_x.gpt_neo_x_decoder", "GPTNeoXDecoder"),
            ("qwen.qwen_decoder", "QwenTransformerDecoder"),
            ("qwen_moe.qwen_moe_decoder", "QwenMoeTransformerDecoder"),
            ("qwen3.qwen3_decoder", "Qwen3TransformerDecoder"),
            ("qwen3_moe.qwen3_moe_decoder", "Qwen3MoeTransformerDecoder"),
            ("qwen3_5.qwen3_5_decoder", "Qwen3_5TransformerDecoder"),
            ("qwen3_5_moe.qwen3_5_moe_decoder", "Qwen3_5MoeTransformerDecoder"),
            ("gpt_oss.gpt_oss_decoder", "GptOssTransformerDecoder"),
        )
    ),
    *(
        _decoder(
            f"models.{module}", name, f"{_DECODER} {_CACHE}", size=lambda layer: layer.sliding_window, **_DECODER_ROLES
        )
        for module, name in (
            ("mistral.mistral_transformer_decoder", "MistralTransformerDecoder"),
            ("mixtral.mixtral_decoder", "MixtralTransformerDecoder"),
        )
    ),
    _decoder(
        "models.phi3.phi3_decoder",
        "Phi3Decoder",
        f"{_DECODER} attention_cache attention_cache_update_index",
        **{**_DECODER_ROLES, "index": "attention_cache_update_index"},
    ),
    _decoder(
        "layers.modeling.transformer_decoder",
        "TransformerDecoder",
        f"{_DECODER} use_causal_mask {_CACHE}",
        causal=lambda layer, given: given.get("use_causal_mask"),
        **_DECODER_ROLES,
    ),
    _decoder(
        "models.gemma.gemma_decoder_block",
        "GemmaDecoderBlock",
        "x padding_mask cache cache_update_index",
        "x",
        "padding_mask",
        "cache_update_index",
        method="_compute_attention_mask",
    ),
)

SEAMS = (
    Seam(
        "keras.src.layers.attention.multi_head_attention",
        "MultiHeadAttention",
        "_compute_attention",
        ("query", "key", "value", "attention_mask", "training", "return_attention_scores", "use_causal_mask"),
        multi_head.attention,
        ("_masked_softmax",),
    ),
    *_ATTENTIONS,
    *_DECODERS,
    *other_models.SEAMS,
)

BY_CLASS: dict[tuple[str, str], tuple[Seam, ...]] = {}
for seam in SEAMS:
    BY_CLASS[seam.module, seam.name] = (*BY_CLASS.get((seam.module, seam.name), ()), seam)

"""The seams of KerasHub's language models."""

from __future__ import annotations

import dataclasses

from attn_ops.models.adapters import by_distance, cached_calls, structure
from attn_ops.models.adapters.hub_seam import hub_seam
from attn_ops.models.adapters.projected import Projected, calls_op, gemma3_window, gemma_scale, symmetric, where_not_in_op


def _attention(module, name, parameters, method="_compute_attention", steps=(), **attributes):
    parameters = tuple(parameters.split())
    known = tuple(p for p in parameters if p != "kwargs")
    return hub_seam(module, name, method, parameters, Projected(known, **attributes), steps)


def _decoder(module, name, parameters, sequence, padding, index, method="_compute_self_attention_mask", **more):
    parameters = tuple(parameters.split())
    adapter = structure.causal_decoder(parameters, sequence, padding, index, **more)
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
        dropout="_attn_dropout_layer",
        in_op=lambda layer: layer.dropout == 0 and calls_op(layer),
    ),
    *(
        _attention(
            f"models.{model}.{model}_attention",
            name,
            f"{_QKV} cache_update_index" + more,
            steps=_WINDOWED,
            groups="num_key_value_groups",
            window=where_not_in_op(symmetric(enabled)),
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
        dropout="dropout_layer",
    ),
    _attention(
        "models.gemma3.gemma3_attention",
        "CachedGemma3Attention",
        _QKV_GEMMA,
        steps=("_mask_sliding_window", "_compute_bidirectional_sliding_mask"),
        scale=gemma_scale,
        window=gemma3_window,
        soft_cap="logit_soft_cap",
        dropout="dropout_layer",
    ),
    _attention(
        "models.gemma4.gemma4_attention",
        "Gemma4TextAttention",
        _QKV_GEMMA,
        scale=lambda layer: 1.0,  # queries and keys are normalized
        soft_cap="logit_soft_cap",
        dropout="dropout_layer",
    ),
    *(
        _attention(
            f"models.{model}.{model}_attention",
            name,
            "query_states key_states value_states attention_mask training",
            steps=("_compute_attention_without_fused_op",),
            scale="scaling",
            groups="num_key_value_groups",
            soft_cap="logit_soft_cap",
            dropout="dropout_layer",
            additive=True,
        )
        for model, name in (
            ("t5gemma", "T5GemmaAttention"),
            ("t5gemma2", "T5Gemma2Attention"),
            ("t5gemma2", "T5Gemma2MergedAttention"),
        )
    ),
    _attention(
        "models.gpt_oss.gpt_oss_attention",
        "GptOssAttention",
        f"{_QKV} start_index",
        groups="num_key_value_groups",
        window=lambda layer: (layer.sliding_window, None) if (layer.sliding_window or 0) > 0 else None,
        sinks="sinks",
        in_op=lambda layer: False,
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



def _gemma4_size(layer):
    sliding = layer.use_sliding_window_attention and not layer.is_global_attention
    return layer.sliding_window_size if sliding else None


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
    _decoder(
        "models.pali_gemma.pali_gemma_decoder_block",
        "PaliGemmaDecoderBlock",
        "x padding_mask cache cache_update_index response_mask",
        "x",
        "padding_mask",
        "cache_update_index",
        method="_compute_attention_mask",
        unknown=("padding_mask", "response_mask"),  # images and prompts are seen in both directions
        keras_masks=False,
    ),
    *(
        _decoder(
            f"models.{model}.{model}_decoder_block",
            name,
            "x padding_mask vision_mask cache cache_update_index",
            "x",
            "padding_mask",
            "cache_update_index",
            method="_compute_attention_mask",
            unknown=("vision_mask",),
            causal=lambda layer, given: not getattr(layer, "use_bidirectional_attention", False),
            size=size,
        )
        for model, name, size in (
            ("gemma3", "Gemma3DecoderBlock", None),
            ("gemma4", "Gemma4TextDecoderBlock", _gemma4_size),
        )
    ),
    _decoder(
        "models.t5.t5_transformer_layer",
        "T5TransformerLayer",
        f"hidden_states attention_mask {_CACHE}",
        "hidden_states",
        "attention_mask",
        "self_attention_cache_update_index",
        keras_masks=False,
    ),
    _decoder(
        "models.bloom.bloom_decoder",
        "BloomDecoder",
        f"{_DECODER} use_causal_mask cache cache_update_index",
        method="_compute_attention_mask",
        causal=lambda layer, given: given.get("use_causal_mask"),
        **{**_DECODER_ROLES, "index": "cache_update_index"},
    ),
    _decoder(
        "models.falcon.falcon_transformer_decoder",
        "FalconTransformerDecoder",
        f"{_DECODER} attention_cache attention_cache_update_index",
        method="_compute_attention_mask",
        **{**_DECODER_ROLES, "index": "attention_cache_update_index"},
    ),
    _decoder(
        "models.moonshine.moonshine_decoder",
        "MoonshineDecoderBlock",
        f"decoder_sequence decoder_padding_mask {_CACHE}",
        "decoder_sequence",
        "decoder_padding_mask",
        "self_attention_cache_update_index",
        causal=lambda layer, given: layer.self_attention.use_causal_mask,
    ),
    _decoder(
        "models.t5gemma.t5gemma_decoder",
        "T5GemmaDecoderLayer",
        "hidden_states padding_mask cache cache_update_index",
        "hidden_states",
        "padding_mask",
        "cache_update_index",
        method="_make_self_attention_mask",
        unknown=("cache",),  # whose padding mask may be longer
        size=lambda layer: layer.sliding_window + 1 if layer.layer_type == "sliding_attention" else None,
        keras_masks=False,
    ),
    *(
        hub_seam(module, name, method, parameters, structure.padding(parameters, "padding_mask"), attends=False)
        for module, name, method in (
            ("models.t5gemma.t5gemma_decoder", "T5GemmaDecoderLayer", "_make_cross_attention_mask"),
            ("models.t5gemma.t5gemma_encoder", "T5GemmaEncoderLayer", "_make_attention_mask"),
        )
        for parameters in (("hidden_states", "padding_mask"),)
    ),
)

_CALL = "attention_mask cache cache_update_index"

_CALLS = (
    hub_seam("models.bloom.bloom_attention", "BloomAttention", "call", f"hidden_states {_CALL}".split(), by_distance.bloom),
    hub_seam("models.falcon.falcon_attention", "FalconAttention", "call", f"inputs alibi {_CALL}".split(), by_distance.falcon),
    hub_seam(
        "models.falcon.falcon_transformer_decoder",
        "FalconTransformerDecoder",
        "_build_alibi_tensor",
        ("num_heads", "mask"),
        by_distance.falcon_alibi,
        ("_get_slopes",),
        attends=False,
        needed=False,
    ),
    hub_seam(
        "models.t5.t5_multi_head_attention",
        "T5MultiHeadAttention",
        "call",
        "hidden_states mask key_value_states position_bias cache cache_update_index training".split(),
        by_distance.t5,
        ("compute_bias", "_relative_position_bucket"),
    ),
)

# Beside the seams of the same classes above, for calls with a cache alone.
_PUBLIC = {"query": "query_dense", "key": "key_dense", "value": "value_dense", "output": "output_dense"}
_NORMS = {"norms": ("_query_dense_layer_norm", "_key_dense_layer_norm")}
_GEMMA = {**_PUBLIC, "rotary": "_apply_rope", "dropout": None}
_CACHED_NAMES = {
    "LlamaAttention": {},
    "CachedGemmaAttention": _GEMMA,
    "CachedGemma3Attention": {**_GEMMA, "norms": ("query_norm", "key_norm"), "normed": "use_query_key_norm"},
    "CachedMistralAttention": {},
    "CachedMixtralAttention": {**_PUBLIC, "dropout": "dropout_layer"},
    "GptOssAttention": {**_PUBLIC, "rotary": cached_calls.partly_rotary, "dropout": "dropout_layer"},
    "Phi3Attention": {**_PUBLIC, "dropout": "dropout_layer"},
    "QwenAttention": {},
    "QwenMoeAttention": {name: _PUBLIC[name] for name in ("query", "key", "value")},
    "Qwen3Attention": _NORMS,
    "Qwen3MoeAttention": _NORMS,
}
_CACHED_PARAMETERS = {
    "CachedGemmaAttention": f"x {_CALL} training",
    "CachedGemma3Attention": f"x {_CALL} cache_update_mask training",
}

_CACHED = (
    dataclasses.replace(
        hub_seam(
            "layers.modeling.cached_multi_head_attention",
            "CachedMultiHeadAttention",
            "call",
            f"query value key {_CALL} return_attention_scores training".split(),
            cached_calls.multi_head_call,
        ),
        needed=False,
    ),
    *(
        dataclasses.replace(
            hub_seam(
                seam.module.removeprefix("keras_hub.src."),
                seam.name,
                "call",
                _CACHED_PARAMETERS.get(seam.name, f"hidden_states {_CALL} training").split(),
                cached_calls.CachedCall(seam.adapter, **_CACHED_NAMES[seam.name]),
            ),
            needed=False,
        )
        for seam in _ATTENTIONS
        if seam.name in _CACHED_NAMES
    ),
)

SEAMS = (*_ATTENTIONS, *_DECODERS, *_CALLS, *_CACHED)

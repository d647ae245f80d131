"""The seams of models that are not plain language models: images, video, diffusion, proteins, relative scores."""

from __future__ import annotations

import inspect

from attn_ops.models.adapters import detection, diffusion, disentangled, feature_maps, gemma3n, keras_op, vision
from attn_ops.models.adapters.hub_seam import hub_seam
from attn_ops.models.adapters.structure import causal_decoder


def _seam(module, name, adapter, method="call", steps=(), **more):
    """Of a method that takes what the adapter takes, after the layer and the stock method."""
    parameters = tuple(inspect.signature(adapter).parameters)[2:]
    return hub_seam(f"models.{module}", name, method, parameters, adapter, steps, **more)


def _masks(module, name, method, parameters, **roles):
    parameters = tuple(parameters.split())
    adapter = causal_decoder(parameters, padding="padding_mask", **roles)
    return hub_seam(f"models.{module}", name, method, parameters, adapter, attends=False)


SEAMS = (
    _seam("stable_diffusion_3.mmdit", "MMDiTBlock", diffusion.joint_blocks, "_compute_attention"),
    _seam("flux.flux_maths", "FluxRoPEAttention", diffusion.flux, beside=("scaled_dot_product_attention",)),
    _seam("vae.vae_layers", "Conv2DMultiHeadAttention", diffusion.feature_map),
    _seam("pali_gemma.pali_gemma_vit", "PaliGemmaVitAttention", vision.paligemma, steps=("_transpose_for_scores",)),
    _seam("gemma3.gemma3_vision_encoder", "Gemma3VisionAttention", vision.paligemma, steps=("_transpose_for_scores",)),
    _seam("gemma4.gemma4_attention", "Gemma4VisionAttention", vision.gemma4, "_compute_attention"),
    _seam("qwen3_5.qwen3_5_vision_encoder", "Qwen3_5VisionAttention", vision.qwen),
    _seam("dinov3.dinov3_layers", "DINOV3Attention", vision.dinov3),
    _seam("video_prism.video_prism_layers", "VideoPrismAttention", vision.video_prism),
    _masks(
        "video_prism.video_prism_layers",
        "VideoPrismEncoderBlock",
        "_compute_attention_mask",
        "x padding_mask",
        sequence="x",
        index=None,
        causal=lambda layer, given: layer.is_causal,
        keras_masks=False,
    ),
    _seam(
        "sam.sam_layers",
        "MultiHeadAttentionWithDownsampling",
        detection.downsampled,
        steps=("_separate_heads", "_recombine_heads"),
    ),
    _seam(
        "vit_det.vit_layers",
        "MultiHeadAttentionWithRelativePE",
        feature_maps.vit_det,
        beside=("AddRelativePositionalEmbedding.call",),
    ),
    _seam("sam3.sam3_layers", "SAM3Attention", keras_op.sam3),
    _seam("sam3.sam3_layers", "SAM3RoPEAttention", keras_op.sam3_rotary),
    _seam("d_fine.d_fine_attention", "DFineMultiheadAttention", detection.d_fine),
    _seam("swin_transformer.swin_transformer_layers", "WindowAttention", feature_maps.swin),
    _seam("mit.mit_layers", "SegFormerMultiheadAttention", feature_maps.segformer),
    _seam("mobilenetv5.mobilenetv5_attention", "Attention2d", feature_maps.mobile),
    _seam("mobilenetv5.mobilenetv5_attention", "MultiQueryAttention2d", feature_maps.mobile_multi_query),
    _seam(
        "deberta_v3.disentangled_self_attention",
        "DisentangledSelfAttention",
        disentangled.deberta,
        steps=("_compute_attention", "_masked_softmax"),
    ),
    _seam("xlnet.relative_attention", "TwoStreamRelativeAttention", disentangled.xlnet, "compute_attention"),
    _seam("roformer_v2.roformer_v2_attention", "RoformerAttention", keras_op.roformer),
    _seam("esm.esm_attention", "EsmSelfAttention", keras_op.roformer),
    _seam(
        "gemma3n.gemma3n_attention",
        "Gemma3nTextAttention",
        gemma3n.attention,
        "_compute_attention",
        steps=("repeat_kv",),
    ),
    _seam(
        "gemma3n.gemma3n_attention",
        "Gemma3nTextAttention",
        gemma3n.sliding_window,
        "_mask_sliding_window",
        attends=False,
    ),
    _masks(
        "gemma3n.gemma3n_text_decoder",
        "Gemma3nTextDecoderBlock",
        "_compute_attention_mask",
        "x padding_mask cache cache_update_index",
        sequence="x",
        index="cache_update_index",
    ),
)

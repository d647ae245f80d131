"""Small random models of KerasHub that are not plain language models, converted: every attention fused, as stock."""

import importlib

import attn_ops
import keras
import numpy as np
import pytest
import tensorflow as tf
from hub_comparison import Fused, assert_close, random, randomize, results

pytestmark = [
    pytest.mark.xdist_group("keras_hub"),
    pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask"),
    pytest.mark.filterwarnings("ignore:.build... was called on layer"),
]
PADDING = np.array([[1] * 12, [1] * 7 + [0] * 5], "int32")
TOKENS = {"token_ids": np.random.default_rng(0).integers(1, 50, (2, 12)).astype("int32") * PADDING}
PADDED = {**TOKENS, "padding_mask": PADDING}
SEGMENTS = {**TOKENS, "segment_ids": np.array([[0] * 6 + [1] * 6] * 2, "int32")}
SMALL = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 32}
WORDS = {"vocabulary_size": 50, **SMALL}
VIT = {"patch_size": 8, **SMALL}
MODELS = {}


def hub(module, name, /, *args, **kwargs):
    """A class of KerasHub's made, or the test skipped where it has none."""
    try:
        module = importlib.import_module(f"keras_hub.src.models.{module}")
    except ImportError as error:
        pytest.skip(str(error))
    return getattr(module, name)(*args, **kwargs)


def images(side, *more):
    return random(2, *more, side, side, 3)


def model(fused):
    """Registers a function that makes a model and its inputs, with ``fused`` attentions in a call."""
    return lambda make: MODELS.setdefault(make.__name__, (make, fused)) and make


@model(4)
def flux():
    shapes = {"image_shape": (12, 32), "text_shape": (6, 32), "image_ids_shape": (12, 3), "text_ids_shape": (6, 3)}
    sizes = {"input_channels": 32, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 4, "depth": 2}
    more = {"depth_single_blocks": 2, "axes_dim": [2, 2, 4], "theta": 1000, "use_bias": True, "guidance_embed": True}
    made = hub("flux.flux_model", "FluxBackbone", **sizes, **more, **shapes, y_shape=(32,))
    inputs = {what: random(2, *x.shape[1:]) for what, x in made.input.items()}
    return made, inputs


def autoencoder(name="autoencoder"):
    return hub(
        "vae.vae_backbone", "VAEBackbone", [32] * 4, [1] * 4, [32] * 4, [1] * 4, sampler_method="mode", name=name
    )


@model(2)
def vae():
    return autoencoder(), images(32)


@model(13)
def stable_diffusion_3():
    def clip(name):
        options = {"intermediate_output_index": 0, "max_sequence_length": 12, "name": name}
        return hub("clip.clip_text_encoder", "CLIPTextEncoder", 50, 16, 16, 2, 2, 32, "quick_gelu", **options)

    args = 2, 16, 2, 2, 192, "rms_norm", (0,), autoencoder("vae"), clip("clip_l"), clip("clip_g")
    module = "stable_diffusion_3.stable_diffusion_3_backbone"
    made = hub(module, "StableDiffusion3Backbone", *args, image_shape=(64, 64, 3))
    rng = np.random.default_rng(0)
    inputs = {}
    for what, x in made.input.items():
        shape = [2, *(4 if extent is None else extent for extent in x.shape[1:])]
        inputs[what] = rng.normal(size=shape).astype("float32") if "float" in x.dtype else rng.integers(0, 2, shape)
    return made, inputs


@model(2)
def deberta():
    more = {"dropout": 0.0, "max_sequence_length": 24, "bucket_size": 4}
    return hub("deberta_v3.deberta_v3_backbone", "DebertaV3Backbone", **WORDS, **more), PADDED


@model(2)
def xlnet():
    return hub("xlnet.xlnet_backbone", "XLNetBackbone", **WORDS), {**PADDED, "segment_ids": SEGMENTS["segment_ids"]}


@model(2)
def roformer():
    more = {"head_size": 8, "dropout": 0.0, "max_wavelength": 1000}
    return hub("roformer_v2.roformer_v2_backbone", "RoformerV2Backbone", **WORDS, **more), SEGMENTS


@model(2)
def esm():
    return hub("esm.esm_backbone", "ESMBackbone", **WORDS, dropout=0.0, max_sequence_length=24), TOKENS


@model(2)
def paligemma():
    return hub("pali_gemma.pali_gemma_vit", "PaliGemmaVit", image_size=32, num_classes=8, **VIT), images(32)


@model(2)
def gemma_3():
    more = {"image_size": 32, "output_dim": 16, "pool_size": 2}
    return hub("gemma3.gemma3_vision_encoder", "Gemma3VisionEncoder", **VIT, **more), images(32, 1)


@model(2)
def gemma_4():
    more = {"image_size": 32, "output_dim": 16, "pool_size": 2, "head_dim": 8, "use_clipped_linears": False}
    made = hub("gemma4.gemma4_vision_encoder", "Gemma4VisionEncoder", **VIT, **more)
    places = np.stack(np.meshgrid(np.arange(4), np.arange(4)), -1).reshape(1, 1, 16, 2).astype("int32")
    return made, {"pixel_values": random(2, 1, 16, 192), "pixel_position_ids": np.tile(places, (2, 1, 1, 1))}


@model(2)
def qwen_3_5():
    class Encoder(keras.Model):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def call(self, pixels):  # two frames of 4 x 4 patches
            return self.encoder(pixels, np.array([[2, 4, 4]], "int32"))

    more = {"patch_size": 4, "out_hidden_size": 16, "num_position_embeddings": 16}
    made = hub("qwen3_5.qwen3_5_vision_encoder", "Qwen3_5VisionEncoder", 2, 16, 2, 32, **more)
    return Encoder(made), random(32, 2, 4, 4, 3)


@model(2)
def dinov2():
    shapes = {"image_shape": (32, 32, 3), "position_embedding_shape": (32, 32, 3)}
    return hub("dinov2.dinov2_backbone", "DINOV2Backbone", **VIT, **shapes), {"images": images(32)}


@model(2)
def dinov3():
    return hub("dinov3.dinov3_backbone", "DINOV3Backbone", **VIT, image_shape=(32, 32, 3)), {"pixel_values": images(32)}


@model(5)
def siglip():
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 32}
    encoder = hub("siglip.siglip_vision_encoder", "SigLIPVisionEncoder", patch_size=8, image_shape=(32, 32, 3), **sizes)
    text = {"vocabulary_size": 50, "embedding_dim": 16, "max_sequence_length": 12, **sizes}
    made = hub(
        "siglip.siglip_backbone",
        "SigLIPBackbone",
        encoder,
        hub("siglip.siglip_text_encoder", "SigLIPTextEncoder", **text),
    )
    return made, {"images": images(32), **TOKENS}


@model(3)
def blip2():
    args = 4, 2, 2, 16, 32, 16, 2, 0.0, 1e-6
    return hub("blip2.blip2_qformer", "BLIP2QFormer", *args), random(2, 9, 16)


@model(7)
def video_prism():
    layers = {"num_spatial_layers": 2, "num_temporal_layers": 1, "num_auxiliary_layers": 1, "num_text_layers": 2}
    sizes = {"num_frames": 2, "patch_size": 8, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 32}
    more = {"vocabulary_size": 50, "attention_logit_soft_cap": 5.0, "image_shape": (16, 16, 3)}
    made = hub("video_prism.video_prism_backbone", "VideoPrismBackbone", **layers, **sizes, **more)
    return made, {"pixel_values": images(16, 2), **PADDED}


@model(9)
def sam():
    encoder = hub(
        "vit_det.vit_det_backbone",
        "ViTDetBackbone",
        hidden_size=16,
        num_layers=2,
        intermediate_dim=32,
        num_heads=2,
        global_attention_layer_indices=[1],
        patch_size=16,
        num_output_channels=8,
        window_size=2,
        image_shape=(64, 64, 3),
    )
    sizes = {"hidden_size": 8, "image_embedding_size": (4, 4), "input_image_size": (64, 64), "mask_in_channels": 16}
    prompts = hub("sam.sam_prompt_encoder", "SAMPromptEncoder", **sizes)
    sizes = {"hidden_size": 8, "num_layers": 2, "intermediate_dim": 32, "num_heads": 2, "embedding_dim": 8}
    decoder = hub("sam.sam_mask_decoder", "SAMMaskDecoder", **sizes, num_multimask_outputs=3, iou_head_hidden_dim=8)
    inputs = {"images": images(64), "points": random(2, 1, 2) * 20 + 30, "labels": np.ones((2, 1), "float32")}
    inputs |= {"boxes": abs(random(2, 1, 2, 2)) * 20, "masks": np.zeros((2, 0, 64, 64, 1), "float32")}
    backbone = hub("sam.sam_backbone", "SAMBackbone", encoder, prompts, decoder)
    return hub("sam.sam_image_segmenter", "SAMImageSegmenter", backbone), inputs


@model(15)
def sam_3():
    small = {"hidden_dim": 16, "intermediate_dim": 32, "num_heads": 2}
    scales = {"fpn_hidden_dim": 16, "fpn_scale_factors": [4.0, 2.0, 1.0, 0.5], "pretrain_image_shape": (28, 28, 3)}
    picture = {"image_shape": (56, 56, 3), "patch_size": 14}
    windows = {"window_size": 2, "global_attn_indexes": [1]}
    parts = (
        hub("sam3.sam3_vision_encoder", "SAM3VisionEncoder", num_layers=2, **picture, **scales, **windows, **small),
        hub("sam3.sam3_text_encoder", "SAM3TextEncoder", vocabulary_size=64, embedding_dim=16, num_layers=2, **small),
        hub("sam3.sam3_geometry_encoder", "SAM3GeometryEncoder", num_layers=1, roi_size=7, **small),
        hub("sam3.sam3_detr_encoder", "SAM3DetrEncoder", num_layers=1, **small),
        hub("sam3.sam3_detr_decoder", "SAM3DetrDecoder", num_layers=2, num_queries=5, **picture, **small),
        hub("sam3.sam3_mask_decoder", "SAM3MaskDecoder", num_upsampling_stages=3, hidden_dim=16, num_heads=2),
    )
    inputs = {"pixel_values": images(56), "token_ids": np.ones((2, 32), "int32")}
    inputs |= {"padding_mask": np.arange(32) < np.array([[32], [9]]), "boxes": abs(random(2, 1, 5))}
    inputs |= {"box_labels": np.zeros((2, 1), "int32")}
    return hub("sam3.sam3_pc_backbone", "SAM3PromptableConceptBackbone", *parts), inputs


@model(3)
def d_fine():
    stages = [[8, 8, 16, 1, 3, 3], [16, 8, 16, 1, 3, 3], [16, 8, 32, 1, 3, 5], [32, 8, 32, 1, 3, 5]]
    features = hub(
        "hgnetv2.hgnetv2_backbone",
        "HGNetV2Backbone",
        stem_channels=[3, 8, 8],
        stackwise_stage_filters=stages,
        apply_downsample=[False, True, True, True],
        use_lightweight_conv_block=[False, False, True, True],
        depths=[1] * 4,
        hidden_sizes=[16, 16, 32, 32],
        embedding_size=8,
        use_learnable_affine_block=True,
        hidden_act="relu",
        image_shape=(None, None, 3),
        out_features=["stage3", "stage4"],
        data_format="channels_last",
    )
    made = hub(
        "d_fine.d_fine_backbone",
        "DFineBackbone",
        backbone=features,
        decoder_in_channels=[16, 16],
        encoder_hidden_dim=16,
        num_denoising=0,
        num_labels=8,
        hidden_dim=16,
        learn_initial_query=False,
        num_queries=10,
        feat_strides=[16, 32],
        anchor_image_size=(64, 64),
        num_feature_levels=2,
        encoder_in_channels=[32, 32],
        encode_proj_layers=[1],
        num_attention_heads=2,
        encoder_ffn_dim=32,
        num_encoder_layers=1,
        hidden_expansion=0.34,
        depth_multiplier=0.5,
        eval_idx=-1,
        num_decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        decoder_n_points=[2, 2],
        lqe_hidden_dim=16,
        num_lqe_layers=2,
        out_features=["stage3", "stage4"],
        image_shape=(64, 64, 3),
        seed=0,
    )
    return made, images(64)


@model(4)
def swin():
    sizes = {
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 4,
        "patch_size": 4,
        "drop_path": 0.0,
    }
    module = "swin_transformer.swin_transformer_backbone"
    return hub(module, "SwinTransformerBackbone", image_shape=(64, 64, 3), **sizes), images(64)


@model(2)
def segformer():
    layers = {"layerwise_depths": [1, 1], "num_layers": 2, "layerwise_num_heads": [1, 2], "layerwise_sr_ratios": [2, 1]}
    patches = {"layerwise_patch_sizes": [7, 3], "layerwise_strides": [4, 2], "image_shape": (32, 32, 3)}
    made = hub("mit.mit_backbone", "MiTBackbone", **layers, **patches, hidden_dims=[8, 16], max_drop_path_rate=0.0)
    return made, images(32)


@model(2)
def mobilenet():
    def stages(first, others):
        return [[first], [others, others]]

    sizes = {
        "num_blocks": [1, 2],
        "num_filters": stages(16, 16),
        "strides": [[2], [2, 1]],
        "act_layers": stages("relu", "relu"),
    }
    sizes |= {"exp_ratios": stages(4.0, 4.0), "se_ratios": stages(0.0, 0.0), "dw_kernel_sizes": stages(0, 3)}
    sizes |= {
        "dw_start_kernel_sizes": stages(0, 0),
        "dw_end_kernel_sizes": stages(0, 0),
        "exp_kernel_sizes": stages(3, 0),
    }
    sizes |= {
        "pw_kernel_sizes": stages(1, 0),
        "num_heads": stages(0, 2),
        "key_dims": stages(0, 8),
        "value_dims": stages(0, 8),
    }
    sizes |= {"kv_strides": [[0], [2, 1]], "use_cpe": stages(False, False), "block_types": stages("er", "mqa")}
    sizes = {f"stackwise_{what}": x for what, x in sizes.items()}
    module = "mobilenetv5.mobilenetv5_backbone"
    return hub(module, "MobileNetV5Backbone", **sizes, use_msfa=False, image_shape=(32, 32, 3)), images(32)


@model(4)
def parseq():
    encoder = hub("vit.vit_backbone", "ViTBackbone", (16, 32, 3), (8, 8), 2, 2, 16, 32, use_class_token=False)
    sizes = {"decoder_hidden_dim": 16, "num_decoder_layers": 1, "num_decoder_heads": 2, "decoder_mlp_dim": 32}
    sizes |= {"vocabulary_size": 20, "max_label_length": 5, "image_encoder": encoder}
    made = hub("parseq.parseq_backbone", "PARSeqBackbone", **sizes)
    return made, {
        "images": random(2, 16, 32, 3),
        "token_ids": np.ones((2, 6), "int32"),
        "padding_mask": PADDING[:, 3:9],
    }


@model(3)
def gemma_3n():
    window, full = "sliding_attention", "full_attention"
    made = hub(
        "gemma3n.gemma3n_backbone",
        "Gemma3nBackbone",
        text_vocab_size=50,
        text_hidden_size=16,
        num_hidden_layers=3,
        pad_token_id=0,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=[32] * 3,
        rope_theta=1e4,
        hidden_activation="gelu_approximate",
        layer_types=[window, full, window],
        sliding_window=4,
        max_position_embeddings=32,
        vocab_size_per_layer_input=50,
        hidden_size_per_layer_input=4,
        altup_num_inputs=2,
        laurel_rank=4,
    )
    return made, PADDED


@pytest.fixture
def fused(monkeypatch):
    return Fused(monkeypatch)


def made(name):
    pytest.importorskip("keras_hub")
    model, inputs = MODELS[name][0]()
    model(inputs)
    randomize(model)
    return model, inputs


def of_tokens(inputs):
    """Where an output that has the tokens' rows counts: not at padding."""

    def at(x):
        padding = inputs.get("padding_mask") if isinstance(inputs, dict) else None
        per_token = padding is not None and len(x.shape) == 3 and x.shape[1] == padding.shape[1]
        return tf.cast(padding[..., None], x.dtype) if per_token else 1.0

    return at


@pytest.mark.wide(9)
@pytest.mark.parametrize("name", MODELS)
def test_all_attention_runs_fused_and_computes_the_same(fused, name):
    model, inputs = made(name)
    options = {"weights": model.trainable_weights, "at": of_tokens(inputs)}
    stock = results(lambda: model(inputs), **options)
    ours = results(lambda: attn_ops.convert(model)(inputs), **options)
    assert fused.calls == MODELS[name][1]
    assert_close(ours, stock, 2e-5, 2e-5)


@pytest.mark.wide(5)
@pytest.mark.parametrize("name", ["deberta", "esm", "dinov3", "swin", "roformer"])
def test_converted_models_train_and_are_saved_without_us(fused, tmp_path, name):
    model, inputs = made(name)
    answers = np.zeros_like(model(inputs))
    model.compile("sgd", "mse", jit_compile=False)
    attn_ops.convert(model)
    losses = model.fit(inputs, answers, verbose=0, epochs=2).history["loss"]
    assert losses[1] < losses[0] and fused.calls == MODELS[name][1]  # traced once
    ours = model(inputs)
    attn_ops.revert(model).save(tmp_path / "model.keras")
    stock = keras.models.load_model(tmp_path / "model.keras")(inputs)
    np.testing.assert_allclose(ours, stock, rtol=0, atol=1e-5 * np.abs(stock).max())


def test_gemma_3n_decodes_with_a_cache_as_stock(fused):
    """Windows and causality as structure, at a position in the cache."""
    backbone, inputs = made("gemma_3n")
    lm = hub("gemma3n.gemma3n_causal_lm", "Gemma3nCausalLM", preprocessor=None, backbone=backbone)
    tokens = inputs["token_ids"]

    def logits():
        cache = np.zeros((2, 3, 2, 2, 12, 8), "float32")
        steps = [(tokens, 0), (tokens[:, 4:5], 4), (tokens[:, 5:6], 5)]
        found = []
        for given, index in steps:
            out, _, cache = lm.call_with_cache(given, cache, index)
            found.append(np.asarray(out))
        return np.concatenate(found, 1)

    stock = logits()
    attn_ops.convert(lm)
    ours = logits()
    assert fused.calls == 9
    np.testing.assert_allclose(ours, stock, rtol=0, atol=1e-5 * abs(stock).max())

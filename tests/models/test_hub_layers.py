"""The attention layers of KerasHub that are not plain language models', each alone, converted against stock."""

import dataclasses
import importlib

import attn_ops
import keras
import numpy as np
import pytest
from hub_comparison import Fused, assert_close, random, randomize, results

pytestmark = pytest.mark.xdist_group("keras_hub")
KEYS = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]], "int32")
NO_ROW = np.array([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]], "int32")
X = random(2, 7, 16)


@dataclasses.dataclass
class Case:
    """A layer `module.name(**config)`, called with arrays by position and by name.

    `dropout` sets the rate of a layer that is made without dropout otherwise, "" where it always has some. `fused` is how
    many attentions a call has, `read` which of the results anybody reads, `shared` which arguments are not per example.
    Without `gradients`, stock has some where no key is visible.
    """

    module: str
    name: str
    config: dict
    args: tuple
    kwargs: dict = dataclasses.field(default_factory=dict)
    fused: int = 1
    dropout: str | None = None
    read: tuple | None = None
    shared: tuple = ()
    gradients: bool = True

    def make(self, **more):
        module = pytest.importorskip("keras_hub") and importlib.import_module(f"keras_hub.src.models.{self.module}")
        if not hasattr(module, self.name):
            pytest.skip(f"this KerasHub has no {self.name}")
        layer = getattr(module, self.name)(**self.config, **more)
        layer(*self.args, **self.kwargs)
        randomize(layer)
        return layer

    def call(self, layer, **options):
        def call(*args):
            out = layer(*args, **self.kwargs, **options)
            return out if self.read is None else [out[i] for i in self.read]

        return call

    def repeated(self, times):
        """With this many times as many examples."""
        batch = len(self.args[0])

        def tile(what, x):
            alone = what in self.shared or not isinstance(x, np.ndarray) or len(x) != batch
            return x if alone else np.tile(x, (times, *(1,) * (x.ndim - 1)))

        args = tuple(tile(*pair) for pair in enumerate(self.args))
        return dataclasses.replace(self, args=args, kwargs={what: tile(what, x) for what, x in self.kwargs.items()})


def angles(*shape):
    return np.cos(random(*shape)), np.sin(random(*shape))


def added(*shape, hidden):
    mask = random(*shape)
    mask[..., hidden:] = -1e9
    return mask


VIT = {"hidden_dim": 16, "num_heads": 2}
PALIGEMMA, GEMMA_3 = (
    ("pali_gemma.pali_gemma_vit", "PaliGemmaVitAttention"),
    ("gemma3.gemma3_vision_encoder", "Gemma3VisionAttention"),
)
DIM_16 = {"hidden_dim": 16, "num_heads": 2}
VIDEO = {"hidden_dim": 16, "num_heads": 2, "key_dim": 8}
GEMMA_4 = {
    "head_dim": 8,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "logit_soft_cap": 2.0,
    "use_clipped_linears": False,
}
GEMMA_3N = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_dropout": 0.0,
}
GEMMA_3N |= {"attention_bias": False, "rms_norm_eps": 1e-6}
CAUSAL = (np.tril(np.ones((7, 7), "int32"))[None] & KEYS[:, None]).astype("int32")
XLNET = {
    "segment_matrix": random(2, 7, 7) > 0,
    "segment_encoding": random(2, 2, 8, seed=1),
    "segment_attention_bias": random(2, 8, seed=2),
    "content_attention_mask": CAUSAL.astype("float32"),
}
MOBILE = {"filters": 16, "num_heads": 2, "channel_axis": -1, "data_format": "channels_last"}

CASES = {
    "sd3": Case(
        "stable_diffusion_3.mmdit",
        "MMDiTBlock",
        {"num_heads": 2, "hidden_dim": 16, "qk_norm": "rms_norm", "use_dual_attention": True},
        (X, random(2, 5, 16), random(2, 16)),
        fused=2,
    ),
    "flux": Case(
        "flux.flux_maths",
        "FluxRoPEAttention",
        {},
        (*(random(2, 3, 7, 8, seed=i) for i in range(3)), random(2, 7, 4, 2)),
    ),
    "autoencoder": Case(
        "vae.vae_layers", "Conv2DMultiHeadAttention", {"filters": 8, "groups": 4}, (random(2, 3, 4, 8),)
    ),
    "paligemma": Case(*PALIGEMMA, VIT, (X,), dropout="dropout", read=(0,)),
    "paligemma, mask": Case(*PALIGEMMA, VIT, (X, added(2, 1, 1, 7, hidden=5)), {"return_attention_scores": True}),
    "gemma 3": Case(*GEMMA_3, VIT, (X,), dropout="dropout", read=(0,)),
    "gemma 3, mask": Case(*GEMMA_3, VIT, (X, added(7, 7, hidden=5)), {"return_attention_scores": True}),
    "gemma 4": Case(
        "gemma4.gemma4_attention",
        "Gemma4VisionAttention",
        GEMMA_4,
        (random(2, 7, 32),),
        {"position_ids": np.arange(28).reshape(2, 7, 2) % 5},
        dropout="dropout",
    ),
    "gemma 4, mask": Case(
        "gemma4.gemma4_attention", "Gemma4VisionAttention", GEMMA_4, (random(2, 7, 32),), {"attention_mask": NO_ROW > 0}
    ),
    "qwen 3.5": Case(
        "qwen3_5.qwen3_5_vision_encoder",
        "Qwen3_5VisionAttention",
        {"hidden_size": 16, "num_heads": 2},
        (X[0],),
        {"position_embeddings": angles(7, 8)},
    ),
    "qwen 3.5, frames": Case(
        "qwen3_5.qwen3_5_vision_encoder",
        "Qwen3_5VisionAttention",
        {"hidden_size": 16, "num_heads": 2},
        (X[0],),
        {"position_embeddings": angles(7, 8), "cu_seqlens": np.array([0, 3, 7], "int32")},
    ),
    "dinov3": Case(
        "dinov3.dinov3_layers",
        "DINOV3Attention",
        DIM_16,
        (X,),
        {"position_embeddings": angles(5, 8), "num_prefix_tokens": 2},
    ),
    "dinov3, mask": Case(
        "dinov3.dinov3_layers", "DINOV3Attention", DIM_16, (X,), {"attention_mask": NO_ROW[:, None, None] > 0}
    ),
    "videoprism": Case(
        "video_prism.video_prism_layers",
        "VideoPrismAttention",
        {**VIDEO, "attention_logit_soft_cap": 2.0},
        (X, random(2, 7, 16, seed=3)),
        {"attention_mask": KEYS},
        dropout="dropout_rate",
    ),
    "videoprism, pooling": Case(
        "video_prism.video_prism_layers",
        "VideoPrismAttention",
        {**VIDEO, "use_per_dim_scale": True},
        (random(2, 3, 16, seed=3), X, X),
        {"attention_mask": NO_ROW[:, None, None]},
        gradients=False,
    ),
    "videoprism, text": Case(
        "video_prism.video_prism_layers",
        "VideoPrismEncoderBlock",
        {"num_heads": 2, "hidden_dim": 16, "intermediate_dim": 8, "is_causal": True},
        (X, KEYS),
    ),
    "sam": Case(
        "sam.sam_layers",
        "MultiHeadAttentionWithDownsampling",
        {"num_heads": 2, "key_dim": 8, "downsample_rate": 2},
        (random(2, 5, 16), X, random(2, 7, 16, seed=3)),
    ),
    "vitdet": Case(
        "vit_det.vit_layers",
        "MultiHeadAttentionWithRelativePE",
        {"num_heads": 2, "key_dim": 8, "use_rel_pos": True, "input_size": (3, 4)},
        (random(2, 3, 4, 16),),
    ),
    "vitdet, no positions": Case(
        "vit_det.vit_layers", "MultiHeadAttentionWithRelativePE", {"num_heads": 2, "key_dim": 8}, (random(2, 3, 4, 16),)
    ),
    "sam 3, bias": Case(
        "sam3.sam3_layers", "SAM3Attention", DIM_16, (random(2, 5, 16), X, X), {"attention_bias": random(2, 2, 5, 7)}
    ),
    "sam 3, mask": Case(
        "sam3.sam3_layers", "SAM3Attention", DIM_16, (random(2, 5, 16), X, X), {"attention_mask": NO_ROW[:, None, None]}
    ),
    "sam 3, rotary": Case(
        "sam3.sam3_layers", "SAM3RoPEAttention", DIM_16, (random(2, 3, 4, 16),), {"position_embeddings": angles(12, 8)}
    ),
    "d-fine": Case(
        "d_fine.d_fine_attention",
        "DFineMultiheadAttention",
        {"embedding_dim": 16, "num_heads": 2},
        (X,),
        {"position_embeddings": random(2, 7, 16, seed=3), "attention_mask": added(7, 7, hidden=5)},
        dropout="dropout",
    ),
    "d-fine, weights": Case(
        "d_fine.d_fine_attention",
        "DFineMultiheadAttention",
        {"embedding_dim": 16, "num_heads": 2},
        (X, random(2, 7, 16, seed=3), added(2, 7, 7, hidden=5)),
        {"output_attentions": True},
    ),
    "swin": Case(
        "swin_transformer.swin_transformer_layers",
        "WindowAttention",
        {"dim": 16, "num_heads": 2, "window_size": 3},
        (random(4, 9, 16),),
        dropout="attention_dropout",
    ),
    "swin, shifted": Case(
        "swin_transformer.swin_transformer_layers",
        "WindowAttention",
        {"dim": 16, "num_heads": 2, "window_size": 3},
        (random(8, 9, 16), random(4, 9, 9) * -100.0 * (random(4, 9, 9, seed=3) > 0)),
        dropout="attention_dropout",
    ),
    "segformer": Case(
        "mit.mit_layers",
        "SegFormerMultiheadAttention",
        {"project_dim": 16, "num_heads": 2, "sr_ratio": 2},
        (random(2, 36, 16),),
        dropout="",
    ),
    "mobilenet": Case(
        "mobilenetv5.mobilenetv5_attention",
        "Attention2d",
        MOBILE,
        (random(2, 3, 4, 16), added(12, 12, hidden=9)),
        dropout="attn_drop",
    ),
    "mobilenet, multi query": Case(
        "mobilenetv5.mobilenetv5_attention",
        "MultiQueryAttention2d",
        {**MOBILE, "query_strides": 2, "kv_stride": 2, "key_dim": 4, "value_dim": 8},
        (random(2, 4, 6, 16),),
    ),
    "deberta": Case(
        "deberta_v3.disentangled_self_attention",
        "DisentangledSelfAttention",
        {**DIM_16, "max_position_embeddings": 16, "bucket_size": 4, "dropout": 0.0},
        (X, random(1, 8, 16)),
        {"attention_mask": KEYS[:, None] > 0},
    ),
    "xlnet": Case(
        "xlnet.relative_attention",
        "TwoStreamRelativeAttention",
        {"num_heads": 2, "key_dim": 8},
        (X, random(2, 8), random(2, 8, seed=3), random(2, 14, 16)),
        XLNET,
        dropout="dropout",
        shared=(1, 2, "segment_encoding", "segment_attention_bias"),
    ),
    "xlnet, two streams": Case(
        "xlnet.relative_attention",
        "TwoStreamRelativeAttention",
        {"num_heads": 2, "key_dim": 8},
        (X, random(2, 8), random(2, 8, seed=3), random(2, 14, 16), random(2, 7, 16, seed=4)),
        {**XLNET, "query_attention_mask": CAUSAL.astype("float32") * (1 - np.eye(7, dtype="float32"))},
        fused=2,
    ),
    "roformer": Case(
        "roformer_v2.roformer_v2_attention", "RoformerAttention", {"heads": 2, "head_size": 8}, (X, KEYS > 0)
    ),
    "esm": Case("esm.esm_attention", "EsmSelfAttention", {"heads": 2, "head_size": 8}, (X, KEYS > 0)),
    "gemma 3n": Case(
        "gemma3n.gemma3n_attention",
        "Gemma3nTextAttention",
        GEMMA_3N,
        (X, CAUSAL),
        dropout="attention_dropout",
        read=(0, 2),
    ),
    "gemma 3n, window": Case(
        "gemma3n.gemma3n_attention",
        "Gemma3nTextAttention",
        {**GEMMA_3N, "sliding_window": 3},
        (X, CAUSAL[:, ::-1] * NO_ROW[:, None]),
        read=(0, 2),
    ),
}


@pytest.fixture
def fused(monkeypatch):
    return Fused(monkeypatch)


def compare(case, fused, layer, out, gradient, **options):
    """`layer` converted against stock, and back."""
    called = case.call(layer)
    stock = results(called, layer.trainable_weights, case.args, **options)
    attn_ops.convert(layer)
    ours = results(called, layer.trainable_weights, case.args, **options)
    assert fused.calls == case.fused
    assert_close(ours, stock, out, gradient if case.gradients else None)
    attn_ops.revert(layer)
    again = results(called, layer.trainable_weights, case.args, **options)
    assert fused.calls == case.fused
    for x, y in zip(again[0], stock[0], strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.wide(2)
@pytest.mark.parametrize("name", CASES)
def test_converted_computes_the_same(fused, name):
    case = CASES[name]
    compare(case, fused, case.make(), 5e-6, 2e-5)


@pytest.mark.wide(10)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dropout is not None])
def test_dropout_runs_fused_and_keeps_the_mean(fused, name):
    """What follows the weights is linear, so that the mean over many draws is the output without dropout."""
    times = 600
    case = CASES[name]
    case = dataclasses.replace(case, config={**case.config, case.dropout: 0.3} if case.dropout else case.config)
    layer = case.make()
    rate = 0.3 if case.dropout else layer.dropout.rate
    without = results(case.call(layer), [], case.args)[0]
    attn_ops.convert(layer)
    many = case.repeated(times)
    outs = results(many.call(layer, training=True), [], many.args)[0]
    assert fused.rates == [rate]
    for mean, x in zip(without[:1], outs):
        x = x.reshape(times, *mean.shape)
        assert (x.std(0) > 0).any()
        assert abs(x.mean(0) - mean).max() < 6 * x.std(0).max() / np.sqrt(times)
    results(case.call(layer, training=False), [], case.args)
    assert fused.rates == [rate, 0.0]
    again = results(many.call(layer, training=True), [], many.args)[0]
    assert abs(again[0] - outs[0]).max() > 0


# Stock reads where the frames begin as numbers, which a graph does not have.
IN_GRAPHS = [name for name in CASES if name != "qwen 3.5, frames"]


@pytest.mark.wide(35)
@pytest.mark.parametrize("name", IN_GRAPHS)
def test_converted_in_a_graph(fused, name):
    compare(CASES[name], fused, CASES[name].make(), 5e-6, 2e-5, jit_compile=False)


@pytest.mark.wide(35)
@pytest.mark.parametrize("name", IN_GRAPHS)
def test_converted_with_xla(fused, name):
    compare(CASES[name], fused, CASES[name].make(), 5e-6, 2e-5, jit_compile=True)


@pytest.fixture
def policy():
    """Sets the global dtype policy, which layers of KerasHub's layers follow."""
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


@pytest.mark.wide(36)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_converted_in_half_precision_is_no_worse_than_stock(fused, policy, name, dtype):
    case = CASES[name]
    layer = case.make()
    right, *_ = results(case.call(layer), [], case.args)
    policy(f"mixed_{dtype}")
    layer = case.make()
    stock, *_ = results(case.call(layer), layer.trainable_weights, case.args)
    ours, gradients = results(case.call(attn_ops.convert(layer)), layer.trainable_weights, case.args)
    assert fused.calls == case.fused
    unit = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]
    for x, y, z in zip(ours, stock, right, strict=True):
        assert abs(x - z).max() <= 1.5 * np.nanmax(abs(y - z)) + unit * abs(z).max()
    assert all(np.isfinite(x).all() for x in gradients)

"""The named workloads: attention as it occurs in models people run, and the shapes of the speed targets."""

from __future__ import annotations

import dataclasses

import numpy as np

FORWARD = "forward"
FORWARD_BACKWARD = "forward_backward"
LAYER = "layer"  # the Keras layer in inference: projections, attention, output projection
LAYER_TRAINING = "layer_training"  # forward, backward and an SGD update of its weights
MODES = (FORWARD, FORWARD_BACKWARD, LAYER, LAYER_TRAINING)


@dataclasses.dataclass(frozen=True)
class Workload:
    """Shapes of one self-attention call, float32.

    query is [batch, seqlen_q, num_heads, head_dim], key and value [batch, seqlen_k, num_kv_heads, head_dim].
    """

    name: str
    batch: int
    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    is_causal: bool = False

    @property
    def is_decode(self) -> bool:
        return self.seqlen_q == 1

    def flops(self, mode: str) -> float:
        """Useful floating-point operations: 2 products forward, 5 more backward, 2 flops per multiply-add.

        Causal counts half; recomputing scores in the backward pass is not counted. Layers add the projections
        (backward twice the forward of each).
        """
        pairs = self.batch * self.num_heads * self.seqlen_q * self.seqlen_k * (0.5 if self.is_causal else 1.0)
        attention = 4.0 * pairs * self.head_dim
        training = mode in (FORWARD_BACKWARD, LAYER_TRAINING)
        total = attention * (3.5 if training else 1.0)
        if mode in (LAYER, LAYER_TRAINING):
            width = self.num_heads * self.head_dim
            tokens = self.batch * self.seqlen_q
            projections = 2.0 * tokens * width * (2 * width + 2 * self.num_kv_heads * self.head_dim)
            total += projections * (3.0 if training else 1.0)
        return total

    def key_value_bytes(self) -> int:
        """What a decode step must read at least: keys and values once."""
        return 2 * self.batch * self.seqlen_k * self.num_kv_heads * self.head_dim * 4

    def quick(self) -> Workload:
        """A short version that runs in milliseconds, for trying the suite out."""
        longest = 1024 if self.is_decode else 256
        return dataclasses.replace(
            self,
            name=f"{self.name}-quick",
            seqlen_q=min(self.seqlen_q, longest),
            seqlen_k=min(self.seqlen_k, longest),
        )

    def miniature(self) -> Workload:
        """The same kind of work at a shape where the NumPy reference is instant; odd lengths."""
        group = self.num_heads // self.num_kv_heads
        return dataclasses.replace(
            self,
            name=f"{self.name}-miniature",
            batch=2,
            num_heads=2 * group,
            num_kv_heads=2,
            seqlen_q=1 if self.is_decode else 37,
            seqlen_k=37,
            head_dim=16,
        )

    def __str__(self) -> str:
        heads = str(self.num_heads)
        if self.num_kv_heads != self.num_heads:
            heads += f"/{self.num_kv_heads}"
        length = str(self.seqlen_k) if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q}x{self.seqlen_k}"
        return f"{self.name} ({self.batch},{heads},{length},{self.head_dim}){' causal' if self.is_causal else ''}"


def _self_attention(name, batch, heads, length, head_dim, is_causal=False):
    num_heads, num_kv_heads = heads if isinstance(heads, tuple) else (heads, heads)
    return Workload(name, batch, num_heads, num_kv_heads, length, length, head_dim, is_causal)


def _decode(name, batch, heads, length, head_dim):
    num_heads, num_kv_heads = heads
    return Workload(name, batch, num_heads, num_kv_heads, 1, length, head_dim)


_ALL = (
    _self_attention("small_128", 1, 8, 128, 64),
    _self_attention("bert_base_128", 8, 12, 128, 64),
    _self_attention("bert_base_512", 4, 12, 512, 64),
    _self_attention("vit_b16_197", 8, 12, 197, 64),
    _self_attention("gpt2_1024", 1, 12, 1024, 64, is_causal=True),
    _self_attention("long_2048", 1, 12, 2048, 64),
    _self_attention("long_2048_causal", 1, 12, 2048, 64, is_causal=True),
    _self_attention("long_4096", 1, 16, 4096, 64),
    _self_attention("llama8b_prefill_4k", 1, (32, 8), 4096, 128, is_causal=True),
    _decode("llama8b_decode_1k", 1, (32, 8), 1024, 128),
    _decode("llama8b_decode_8k", 1, (32, 8), 8192, 128),
    _decode("llama8b_decode_4k_batch8", 8, (32, 8), 4096, 128),
)
WORKLOADS = {workload.name: workload for workload in _ALL}
PREFILL = tuple(workload.name for workload in _ALL if not workload.is_decode)
DECODE = tuple(workload.name for workload in _ALL if workload.is_decode)
LAYERS = ("bert_base_128", "bert_base_512", "vit_b16_197", "gpt2_1024")


def default_names(mode: str) -> tuple[str, ...]:
    """The workloads that a mode is measured on. Training at 4096 is a question of memory: memory.py measures it."""
    if mode == FORWARD:
        return PREFILL + DECODE
    if mode == FORWARD_BACKWARD:
        return tuple(name for name in PREFILL if name not in ("long_4096", "llama8b_prefill_4k"))
    return LAYERS


def make_inputs(workload: Workload, seed: int = 0) -> dict[str, np.ndarray]:
    """Standard normal query, key, value and the gradient of the output, all [batch, seqlen, heads, head_dim]."""
    generator = np.random.default_rng(seed)
    rows = (workload.batch, workload.seqlen_q, workload.num_heads, workload.head_dim)
    keys = (workload.batch, workload.seqlen_k, workload.num_kv_heads, workload.head_dim)
    shapes = {"query": rows, "key": keys, "value": keys, "d_out": rows}
    return {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}

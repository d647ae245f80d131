"""The named workloads: attention as it occurs in models people run, and the shapes of the speed targets."""

from __future__ import annotations

import dataclasses

import numpy as np

FORWARD = "forward"
FORWARD_BACKWARD = "forward_backward"
LAYER = "layer"  # the Keras layer in inference: projections, attention, output projection
LAYER_TRAINING = "layer_training"  # forward, backward and an SGD update of its weights
MODES = (FORWARD, FORWARD_BACKWARD, LAYER, LAYER_TRAINING)

PADDING = "padding"  # of every sequence the first half of the keys is there
SEGMENTS = "segments"  # four documents of equal length, packed
BOOLEAN = "boolean"  # [1, 1, seqlen_q, seqlen_k], nine of ten keys visible
BIAS = "bias"  # [1, num_heads, seqlen_q, seqlen_k], added to the scores
MASKS = (PADDING, SEGMENTS, BOOLEAN, BIAS)
_SEGMENTS = 4


@dataclasses.dataclass(frozen=True)
class Workload:
    """Shapes and options of one attention call.

    query is [batch, seqlen_q, num_heads, head_dim], key and value [batch, seqlen_k, num_kv_heads, head_dim]. `mask` is
    one of MASKS or empty; `window` is (keys seen before, keys seen after) a query's own, or None.
    """

    name: str
    batch: int
    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    is_causal: bool = False
    dtype: str = "float32"
    mask: str = ""
    window: tuple[int, int] | None = None

    @property
    def options(self) -> str:
        """What is not plain float32 attention, in words."""
        words = ["causal"] * self.is_causal + [self.dtype] * (self.dtype != "float32") + [self.mask] * bool(self.mask)
        if self.window:
            words.append(f"window {self.window[0]}+{self.window[1]}")
        return " ".join(words)

    @property
    def is_decode(self) -> bool:
        return self.seqlen_q == 1

    def flops(self, mode: str) -> float:
        """Useful floating-point operations: 2 products forward, 5 more backward, 2 flops per multiply-add.

        What cannot be seen is not counted, and causal is half; nor is recomputing scores in the backward pass. Layers
        add the projections (backward twice the forward of each).
        """
        pairs = self.batch * self.num_heads * self.seqlen_q * self.seqlen_k * self.work_left()
        attention = 4.0 * pairs * self.head_dim
        training = mode in (FORWARD_BACKWARD, LAYER_TRAINING)
        total = attention * (3.5 if training else 1.0)
        if mode in (LAYER, LAYER_TRAINING):
            width = self.num_heads * self.head_dim
            tokens = self.batch * self.seqlen_q
            projections = 2.0 * tokens * width * (2 * width + 2 * self.num_kv_heads * self.head_dim)
            total += projections * (3.0 if training else 1.0)
        return total

    def work_left(self) -> float:
        """The part of the score matrix that a kernel could not skip; masks that are only dense skip none."""
        left = 0.5 if self.is_causal else 1.0
        if self.window:
            before, after = self.window
            row = np.arange(self.seqlen_q)
            seen = np.minimum(row + after, self.seqlen_k - 1) - np.maximum(row - before, 0) + 1
            left = float(np.maximum(seen, 0).mean() / self.seqlen_k)
        return left * {PADDING: 0.5, SEGMENTS: 1 / _SEGMENTS}.get(self.mask, 1.0)

    def key_value_bytes(self) -> int:
        """What a decode step must read at least: keys and values once."""
        return 2 * self.batch * self.seqlen_k * self.num_kv_heads * self.head_dim * numpy_dtype(self.dtype).itemsize

    def quick(self) -> Workload:
        """A version an eighth as long, for trying the suite out."""
        return dataclasses.replace(
            self,
            name=f"{self.name}-quick",
            batch=min(self.batch, 2),
            seqlen_q=-(-self.seqlen_q // 8),
            seqlen_k=-(-self.seqlen_k // 8),
            window=self.window and tuple(-(-n // 8) for n in self.window),
        )

    def miniature(self) -> Workload:
        """The same kind of work at a shape where the NumPy reference is instant; odd lengths."""
        group = self.num_heads // self.num_kv_heads
        return dataclasses.replace(
            self,
            name="miniature",
            batch=2,
            num_heads=2 * group,
            num_kv_heads=2,
            seqlen_q=1 if self.is_decode else 37,
            seqlen_k=37,
            head_dim=16,
            window=self.window and (5, self.window[1] and 3),
        )

    @property
    def shape(self) -> str:
        heads = str(self.num_heads)
        if self.num_kv_heads != self.num_heads:
            heads += f"/{self.num_kv_heads}"
        length = str(self.seqlen_k) if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q}x{self.seqlen_k}"
        return f"({self.batch},{heads},{length},{self.head_dim})"

    def __str__(self) -> str:
        return f"{self.name} {self.shape} {self.options}".rstrip()


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
# What only the report measures.
_LENGTHS = tuple(_self_attention(f"length_{n}", 1, 12, n, 64) for n in (128, 512, 1024, 4096))
_BASES = {workload.name: workload for workload in _ALL + _LENGTHS}


def _variant(base, suffix, **changes):
    return dataclasses.replace(_BASES[base], name=f"{base}_{suffix}", **changes)


_REPORT = (
    *_LENGTHS,
    _variant("small_128", "causal", is_causal=True),
    _variant("bert_base_128", "causal", is_causal=True),
    _variant("bert_base_512", "causal", is_causal=True),
    *(_variant("bert_base_512", dtype, dtype=dtype) for dtype in ("float16", "bfloat16", "float64")),
    # The same as their bases, under names of their own: they are measured in the rounds of what is compared with them.
    _variant("bert_base_512", "float32"),
    _variant("long_2048", "float32"),
    _variant("long_2048", "bfloat16", dtype="bfloat16"),
    _variant("long_2048", "unmasked"),
    _variant("length_1024", "unmasked"),
    _variant("long_2048", PADDING, mask=PADDING),
    _variant("long_2048", SEGMENTS, mask=SEGMENTS),
    _variant("long_2048", "window", window=(256, 0)),
    _variant("length_1024", BOOLEAN, mask=BOOLEAN),
    _variant("length_1024", BIAS, mask=BIAS),
    _self_attention("wide_heads_2048", 1, 8, 2048, 128),
    _self_attention("wide_heads_2048_causal", 1, 8, 2048, 128, is_causal=True),
    _self_attention("one_head_2048", 1, 1, 2048, 64),
    _self_attention("long_16384", 1, 8, 16384, 64),
    _self_attention("one_token", 1, 1, 1, 64),
    _self_attention("tiny_16", 1, 8, 16, 64),
    _self_attention("tiny_64", 1, 8, 64, 64),
    _decode("llama8b_decode_32k", 1, (32, 8), 32768, 128),
    _decode("llama8b_decode_1k_batch8", 8, (32, 8), 1024, 128),
)
WORKLOADS = {workload.name: workload for workload in _ALL + _REPORT}
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


def numpy_dtype(name: str) -> np.dtype:
    """Also bfloat16, which NumPy itself has not."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def make_inputs(workload: Workload, seed: int = 0) -> dict[str, np.ndarray]:
    """Standard normal query, key, value and the gradient of the output, all [batch, seqlen, heads, head_dim], and what
    the workload's mask is made of: key_lengths, segment_ids, boolean_mask or bias."""
    generator = np.random.default_rng(seed)
    rows = (workload.batch, workload.seqlen_q, workload.num_heads, workload.head_dim)
    keys = (workload.batch, workload.seqlen_k, workload.num_kv_heads, workload.head_dim)
    scores = (workload.seqlen_q, workload.seqlen_k)
    dtype = numpy_dtype(workload.dtype)
    shapes = {"query": rows, "key": keys, "value": keys, "d_out": rows}
    if workload.mask == BIAS:
        shapes["bias"] = (1, workload.num_heads, *scores)
    inputs = {name: generator.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()}
    if workload.mask == PADDING:
        inputs["key_lengths"] = np.full(workload.batch, (workload.seqlen_k + 1) // 2, np.int32)
    elif workload.mask == SEGMENTS:
        ids = (np.arange(workload.seqlen_k) * _SEGMENTS // workload.seqlen_k).astype(np.int32)
        inputs["segment_ids"] = np.tile(ids, (workload.batch, 1))
    elif workload.mask == BOOLEAN:
        inputs["boolean_mask"] = generator.random((1, 1, *scores)) < 0.9
        inputs["boolean_mask"][..., 0] = True  # stock implementations differ in what a row without keys gives
    return inputs


def dense_mask(workload: Workload, inputs: dict[str, np.ndarray]) -> np.ndarray | None:
    """Mask and window (not causal) as a bool array for implementations that know no other form; None without either.

    True = visible, broadcastable to [batch, heads, seqlen_q, seqlen_k].
    """
    masks = []
    if "key_lengths" in inputs:
        masks.append((np.arange(workload.seqlen_k) < inputs["key_lengths"][:, None])[:, None, None, :])
    if "segment_ids" in inputs:
        ids = inputs["segment_ids"]
        masks.append((ids[:, :, None] == ids[:, None, :])[:, None])
    if "boolean_mask" in inputs:
        masks.append(inputs["boolean_mask"])
    if workload.window:
        before, after = workload.window
        distance = np.arange(workload.seqlen_k) - np.arange(workload.seqlen_q)[:, None]
        masks.append(((distance >= -before) & (distance <= after))[None, None])
    return np.logical_and.reduce(masks) if len(masks) > 1 else masks[0] if masks else None

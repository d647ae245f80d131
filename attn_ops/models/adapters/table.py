"""All the seams that are known. Which releases of KerasHub have them so: tests/compat/seams.py."""

from __future__ import annotations

from attn_ops.models.adapters import generation, language_models, multi_head, other_models
from attn_ops.models.seams import Seam

_LAYERS = "keras.src.layers.attention"

SEAMS = (
    Seam(
        f"{_LAYERS}.multi_head_attention",
        "MultiHeadAttention",
        "_compute_attention",
        ("query", "key", "value", "attention_mask", "training", "return_attention_scores", "use_causal_mask"),
        multi_head.multi_head,
        ("_masked_softmax",),
    ),
    Seam(
        f"{_LAYERS}.grouped_query_attention",
        "GroupedQueryAttention",
        "_compute_attention",
        ("query", "key", "value", "attention_mask", "training", "use_causal_mask"),
        multi_head.grouped,
        ("_masked_softmax",),
    ),
    *language_models.SEAMS,
    *generation.SEAMS,
    *other_models.SEAMS,
)

BY_CLASS: dict[tuple[str, str], tuple[Seam, ...]] = {}
for seam in SEAMS:
    BY_CLASS[seam.module, seam.name] = (*BY_CLASS.get((seam.module, seam.name), ()), seam)

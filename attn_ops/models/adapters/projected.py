"""Methods that get projected queries, keys and values: the `_compute_attention` of the language models of KerasHub."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable

from keras import ops

from attn_ops.models.adapters import heads, structure

_GATE = "keras_hub.src.utils.keras_utils"
# What their arguments are called, and what they are.
_ROLES = {
    **dict.fromkeys(("query", "q", "query_states"), "query"),
    **dict.fromkeys(("key", "k", "key_states"), "key"),
    **dict.fromkeys(("value", "v", "value_states"), "value"),
    "attention_mask": "mask",
    "training": "training",
    **dict.fromkeys(("cache_update_index", "start_index"), "index"),
}


def calls_op(layer):
    """Whether the method calls `keras.ops.dot_product_attention`, as on JAX, instead of a softmax of its own: its rows
    without keys are the mean of the values then, not 0."""
    asks = getattr(layer, "_use_fused_attention_op", None) or sys.modules[_GATE].fused_attention_op_available
    return asks()


@dataclasses.dataclass(frozen=True)
class Projected:
    """The adapter of such a method, from the names of the layer's attributes that say what it computes.

    out = softmax(cap tanh(scale q k^T / cap), masked, beside sinks) v, with `[batch, seqlen, heads, head_dim]` tensors. Keys
    and values that were repeated for each query head are taken back to one per group.

    Attributes:
        parameters: the names of the method's arguments.
        scale: an attribute, or a function of the layer.
        groups: the attribute with the number of query heads for a key head, if the method gets repeated keys.
        window: a function of the layer: (keys before, keys after) that a row sees, or None.
        soft_cap, sinks: attributes, None or as attn_ops has them.
        dropout: the attribute with the layer of dropout on the weights.
        additive: whether masks are added to the scores, `[batch, num_heads or 1, seqlen_q, seqlen_k]`.
        in_op: a function of the layer: :func:`calls_op`.
    """

    parameters: tuple[str, ...]
    scale: str | Callable = "_inv_norm_factor"
    groups: str | None = None
    window: Callable | None = None
    soft_cap: str | None = None
    sinks: str | None = None
    dropout: str | None = None
    additive: bool = False
    in_op: Callable = calls_op

    def __call__(self, layer, stock, *args, **kwargs):
        given = dict(zip(self.parameters, args)) | kwargs
        if not set(given) <= _ROLES.keys():
            return stock(*args, **kwargs)
        call = {_ROLES[name]: x for name, x in given.items()}
        query, key, value = (ops.convert_to_tensor(call[what]) for what in ("query", "key", "value"))
        options = self.masks(layer, call.get("mask"), call.get("index"))
        if options is None or not query.dtype == key.dtype == value.dtype:
            return stock(*args, **kwargs)
        if self.groups is not None:
            key, value = heads.ungrouped(query, key, value, getattr(layer, self.groups))
        dropout = None if self.dropout is None else getattr(layer, self.dropout)
        more = {**options, **self.score_options(layer)}
        # Of what a mask is known to be made of, only padding has rows without keys. (A window at an offset leaves a key.)
        if structure.of(call.get("mask")) is None and "query_offset" not in options:
            more["means"] = self.in_op(layer)
        return heads.attention(query, key, value, dropout=dropout, training=call.get("training"), **more)[0]

    def masks(self, layer, mask, index):
        """The options for the ``mask`` of a call, and for the layer's window; None for a mask of another kind."""
        if self.additive and mask is not None and structure.of(mask) is None:
            return {"bias": mask}
        return structure.options(mask, None if self.window is None else self.window(layer), index)

    def score_options(self, layer):
        """The scale, the soft cap and the sinks of the layer, as options."""
        options = {"scale": self.scale(layer) if callable(self.scale) else getattr(layer, self.scale)}
        if self.sinks is not None:
            options["sinks"] = ops.convert_to_tensor(getattr(layer, self.sinks))
        if self.soft_cap is not None and getattr(layer, self.soft_cap) is not None:
            options["logits_soft_cap"] = getattr(layer, self.soft_cap)
        return options


def symmetric(enabled, size="sliding_window_size"):
    """The window of Qwen and Gemma: fewer than ``size`` keys away in both directions, where ``enabled`` says so."""

    def window(layer):
        return (getattr(layer, size) - 1,) * 2 if getattr(layer, enabled) else None

    return window


def where_not_in_op(window):
    """``window`` where the layer computes its softmax itself. Where it calls the op of Keras, Qwen's attention forgets its
    window; what a converted model answers is what the stock one does."""
    return lambda layer: None if calls_op(layer) else window(layer)


def gemma3_window(layer):
    """As :func:`symmetric`, but in models for embeddings a row sees half the window before it and half after."""
    size = layer.sliding_window_size
    if not layer.use_sliding_window_attention:
        return None
    both = getattr(layer, "use_bidirectional_attention", False)  # KerasHub >= 0.23
    return (size - size // 2 - 1, size // 2) if both else (size - 1, size - 1)


def gemma_scale(layer):
    """Gemma 2 of 27 billion weights scales by the width of the model per head, the others by that of a head."""
    return 1.0 / math.sqrt(layer.head_dim if layer.query_head_dim_normalize else layer.hidden_dim // layer.num_query_heads)

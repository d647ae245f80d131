"""All that a Keras layer is told about masks as one :class:`attn_ops.masks.Mask`."""

from __future__ import annotations

import functools
import operator

from keras import ops

from attn_ops.layers.axes import dims
from attn_ops.layers.inputs import boolean
from attn_ops.masks import constructors
from attn_ops.masks.mask import Mask


def combine(parts):
    """The conjunction of the masks that are not None, or None."""
    parts = [part for part in parts if part is not None]
    return functools.reduce(operator.and_, parts) if parts else None


def keras_mask(
    axes,
    query,
    key,
    *,
    query_mask=None,
    key_masks=(),
    attention_mask=None,
    is_causal=False,
    sliding_window=None,
    mask=None,
):
    """Everything that a Keras attention layer is told about masks, as one structured mask: nothing of it is combined
    into a dense `[batch, seqlen_q, seqlen_k]` tensor.

    Args:
        axes: The :class:`attn_ops.layers.axes.AttentionAxes` of `query` and `key`.
        query, key: The inputs, before or after projection.
        query_mask: Mask of the first axes of `query`: hidden rows see nothing (and give zeros).
        key_masks: Masks of the first axes of `key`, or Nones.
        attention_mask: Mask that Keras would broadcast to the scores, or an :class:`attn_ops.masks.Mask`.
        is_causal: Row i sees no key j > i (top left, also where the lengths differ).
        sliding_window: Row i sees the keys with `|i - j| < sliding_window`; None for all.
        mask: The :class:`attn_ops.masks.Mask` of the layer, or None.

    Returns:
        An :class:`attn_ops.masks.Mask` over the flattened axes, or None where there is nothing to hide.

    Raises:
        ValueError: A causal mask or a window is asked for over several attention axes, which have no order.
    """
    if (is_causal or sliding_window is not None) and len(axes.attended) != 1:
        raise ValueError(
            "attn_ops.layers: a causal mask or a sliding window needs exactly one attention axis, and there are "
            f"{len(axes.attended)}: {axes.attended}"
        )
    parts = [
        constructors.causal("top_left") if is_causal else None,
        None if sliding_window is None else constructors.window(sliding_window - 1, sliding_window - 1),
    ]
    if query_mask is not None:
        parts.append(constructors.query_padding(axes.flatten_padding(boolean(query_mask, "query_mask"), query)))
    # Keras fills both the mask of `value` and that of `key`, often with the same tensor.
    for key_mask in {id(x): x for x in key_masks if x is not None}.values():
        parts.append(constructors.key_padding(axes.flatten_padding(boolean(key_mask, "value_mask"), key)))
    if isinstance(attention_mask, Mask):
        parts.append(attention_mask)
    elif attention_mask is not None:
        attention_mask = boolean(attention_mask, "attention_mask")
        missing = 2 - len(attention_mask.shape)
        if missing > 0 and len(axes.attended) == 1 and any(part is not None for part in parts):
            # Alone it is refused; beside others Keras's conjunction broadcasts it.
            attention_mask = ops.reshape(attention_mask, [1] * missing + dims(attention_mask))
        parts.append(constructors.boolean(axes.flatten_mask(attention_mask, query, key)))
    return combine([*parts, mask])

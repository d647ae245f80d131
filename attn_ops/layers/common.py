"""What the layers share: the choice of implementation, Keras masks as one :class:`attn_ops.masks.Mask`, the call."""

from __future__ import annotations

import functools
import operator

import keras
from keras import ops

from attn_ops import masks
from attn_ops.layers.axes import dims
from attn_ops.layers.backend import backend

_IMPLEMENTATIONS = {None: None, True: "fused", False: "composite"}


class FlashAttention:
    """Mixin that reads `flash_attention` before the stock constructor does, and means it.

    `None` runs the fused op wherever it can and the composite elsewhere; `True` runs the fused op or raises ValueError
    with every reason why it cannot, with dropout and with scores too; `False` runs the composite. As in Keras, a layer
    made with `None` after `keras.config.disable_flash_attention()` behaves as with `False`: the switch is read by the
    constructor, since it is a setting of the thread and a replica may call the layer on another one.

    The argument is saved in the config only when it was given, so that the configs of the stock layers stay theirs.
    """

    # The defaults of a stock layer whose class was changed to ours (`attn_ops.convert`).
    flash_attention = None
    _flash_attention = None

    def __init__(self, *args, flash_attention=None, **kwargs):
        if flash_attention not in (None, True, False):
            raise ValueError(
                f"{type(self).__name__}: flash_attention must be None, True or False, not {flash_attention!r}"
            )
        super().__init__(*args, **kwargs)
        self.flash_attention = flash_attention
        enabled = keras.config.is_flash_attention_enabled()  # None or False
        self._flash_attention = enabled if flash_attention is None else flash_attention

    @property
    def implementation(self):
        """What the layer asks of :func:`attn_ops.scaled_dot_product_attention`: None (automatic), "fused" or
        "composite"."""
        return _IMPLEMENTATIONS[self._flash_attention]

    def get_config(self):
        config = super().get_config()
        if self.flash_attention is not None:
            config["flash_attention"] = self.flash_attention
        return config


def boolean(mask, name):
    """`mask` as a bool tensor. Integers are true where not 0, as in Keras; floats must all be 0 or 1.

    Keras would cast an additive mask of zeros and large negative numbers to bool, which inverts it. Raises instead:
    tf.errors.InvalidArgumentError, on JAX ValueError. Not inside XLA, which drops assertions, nor for what JAX traces
    (`jit`, and so `fit` and `predict`): there the mask is cast as Keras does.
    """
    mask = ops.convert_to_tensor(mask)
    dtype = keras.backend.standardize_dtype(mask.dtype)
    if "float" in dtype:
        mask = backend.with_0_and_1_only(
            mask,
            f"attn_ops.layers: {name} must be boolean, or hold only 0 and 1. An additive mask would be inverted: pass "
            f"`{name} > -1` instead, or attn_ops.scaled_dot_product_attention(bias=...). Received:",
        )
    return mask if dtype == "bool" else ops.cast(mask, "bool")


def combine(parts):
    """The conjunction of the masks that are not None, or None."""
    parts = [part for part in parts if part is not None]
    return functools.reduce(operator.and_, parts) if parts else None


def keras_mask(
    axes, query, key, *, query_mask=None, key_masks=(), attention_mask=None, is_causal=False, sliding_window=None
):
    """Everything that a Keras attention layer is told about masks, as one structured mask: nothing of it is combined
    into a dense `[batch, seqlen_q, seqlen_k]` tensor.

    Args:
        axes: The :class:`attn_ops.layers.axes.AttentionAxes` of `query` and `key`.
        query, key: The inputs, before or after projection.
        query_mask: Mask of the first axes of `query`: hidden rows see nothing (and give zeros).
        key_masks: Masks of the first axes of `key`, or Nones.
        attention_mask: Mask that Keras would broadcast to the scores.
        is_causal: Row i sees no key j > i (top left, also where the lengths differ).
        sliding_window: Row i sees the keys with `|i - j| < sliding_window`; None for all.

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
        masks.causal() if is_causal else None,
        None if sliding_window is None else masks.window(sliding_window - 1, sliding_window - 1),
    ]
    if query_mask is not None:
        parts.append(masks.query_padding(axes.flatten_padding(boolean(query_mask, "query_mask"), query)))
    # Keras fills both the mask of `value` and that of `key`, often with the same tensor.
    for mask in {id(mask): mask for mask in key_masks if mask is not None}.values():
        parts.append(masks.key_padding(axes.flatten_padding(boolean(mask, "value_mask"), key)))
    if attention_mask is not None:
        attention_mask = boolean(attention_mask, "attention_mask")
        parts.append(masks.boolean(axes.flatten_mask(attention_mask, query, key)))
    return combine(parts)


def dropout_seed(owner, rate, training):
    """The next seed of `owner.seed_generator` where dropout is to run, else None. Only a run with dropout advances the
    generator, as in Keras."""
    if not training or not rate:
        return None
    return backend.seed(owner.seed_generator.next())


def without_keras_mask(x):
    """`x` without its Keras mask, for a sublayer that would warn about it; the caller's tensor keeps it."""
    return backend.without_keras_mask(x)


def hide_rows(out, query_mask):
    """`out` `[*batch, seqlen, features]` with zeros where `query_mask` `[*batch, seqlen]` is False."""
    return ops.where(ops.expand_dims(query_mask, -1), out, ops.zeros((), out.dtype))


def attend(query, key, value, *, mask, scale, implementation, dropout_rate, dropout_seed, scores=None):
    """Attention of `[batch, seqlen, heads, dim]` tensors, and the attention weights if asked for.

    Args:
        query, key, value: As for :func:`attn_ops.scaled_dot_product_attention`.
        mask: An :class:`attn_ops.masks.Mask` or None.
        scale: Float or scalar tensor.
        implementation: None, "fused" or "composite".
        dropout_rate: The rate where `dropout_seed` is given, by `dropout_seed()`; no dropout where that is None.
        scores: None, "undropped" (the softmax) or "dropped" (what multiplied the values).

    Returns:
        The output and the scores `[batch, num_heads, seqlen_q, seqlen_k]` in the dtype of `query`, or None.
    """
    options = {"mask": mask, "scale": scale}
    dropout = {} if dropout_seed is None else {"dropout_rate": dropout_rate, "dropout_seed": dropout_seed}
    out = backend.attention.scaled_dot_product_attention(
        query, key, value, **options, **dropout, implementation=implementation
    )
    if scores is None:
        return out, None
    # Not from the log-sum-exp: -inf for a row that sees no key is what `tf.debugging.enable_check_numerics` looks for.
    weights = backend.attention.attention_weights(query, key, **options)
    if scores == "dropped" and dropout:
        keep = backend.kept(dropout_seed, dims(weights), dropout_rate)
        weights = ops.where(keep, weights / (1.0 - dropout_rate), ops.zeros((), weights.dtype))
    return out, weights


def attend_one_head(query, key, value, **options):
    """:func:`attend` for `[batch, seqlen, features]` tensors; the scores are `[batch, seqlen_q, seqlen_k]`."""
    out, scores = attend(*(ops.expand_dims(x, 2) for x in (query, key, value)), **options)
    return ops.squeeze(out, 2), scores if scores is None else ops.squeeze(scores, 1)

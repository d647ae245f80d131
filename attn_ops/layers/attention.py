"""Drop-in `keras.layers.Attention`."""

from __future__ import annotations

import math

import keras
from keras import ops

from attn_ops.call.shapes import compatible
from attn_ops.layers.attend import attend_one_head, dropout_seed, hide_rows, ragged_like
from attn_ops.layers.axes import AttentionAxes, dims
from attn_ops.layers.backend import backend
from attn_ops.layers.base import DropIn, overridden, refuse_if_forced
from attn_ops.layers.empty_rows import empty_rows
from attn_ops.layers.inputs import are_ragged, boolean, padding
from attn_ops.layers.keras_mask import combine
from attn_ops.masks import constructors

_Stock = keras.layers.Attention


@keras.saving.register_keras_serializable(package="attn_ops")
class Attention(DropIn, _Stock):
    """`keras.layers.Attention` (Luong, unscaled) whose attention runs in
    :func:`attn_ops.scaled_dot_product_attention`.

    Takes the constructor and call arguments of the installed Keras's layer (a list `[query, value]` or
    `[query, value, key]` of float `[batch, *dims, seqlen, features]`, a mask list) and has its weights, config and
    outputs. The scores are not divided by sqrt(features); `use_scale=True` learns a scalar factor instead.
    What differs:

    - `flash_attention`, as in :class:`attn_ops.layers.MultiHeadAttention`.
    - A query whose keys are all masked gives 0, where Keras gives about the mean of all values;
      `as_in_keras=True`, which `attn_ops.convert` sets, computes batches with such a query by Keras's code.
    - A value mask may accompany more than one axis before the sequence, and a `[batch, seqlen_q, seqlen_k]` one a causal
      mask.
    - `attention_bias` of a call, float, is added to the (scaled) scores, `[seqlen_q, seqlen_k]` or `[*batch, seqlen_q,
      seqlen_k]`, every extent may be 1. It has a gradient.
    - The inputs may be `tf.RaggedTensor`s `[batch, (seqlen), features]`, also of functional models
      (`keras.Input(ragged=True)`): no padding is made, and the output is ragged like the query. Causal masks go with it,
      and ragged masks `[batch, (seqlen)]`; `attention_bias` and scores do not.
    - `score_mode="concat"` and subclasses that override a step of the computation run Keras's code; with
      `flash_attention=True`, `attention_bias` or ragged inputs they raise ValueError.
    """

    def call(
        self,
        inputs,
        mask=None,
        training=False,
        return_attention_scores=False,
        use_causal_mask=False,
        attention_bias=None,
    ):
        self._validate_inputs(inputs=inputs, mask=mask)
        query, value = inputs[0], inputs[1]
        key = inputs[2] if len(inputs) > 2 else value
        query_mask, value_mask = mask[:2] if mask else (None, None)
        padded = {"query mask": query_mask, "value mask": value_mask, "attention_bias": attention_bias}
        padded["return_attention_scores"] = return_attention_scores
        ragged = are_ragged(self, padded, query=query, value=value, key=key)
        if ragged and value_mask is not None:
            value_mask = padding(self, value_mask, value, "the value mask")

        def in_keras():
            return super(Attention, self).call(
                inputs,
                mask=mask,
                training=training,
                return_attention_scores=return_attention_scores,
                use_causal_mask=use_causal_mask,
            )

        reason = self._stock_reason(query, key, value, value_mask)
        as_stock = reason or ("as_in_keras=True" if self.as_in_keras else None)
        if as_stock:
            self._refuse_beyond_stock(as_stock, attention_bias=attention_bias)
        if ragged:
            self._refuse_ragged_in_keras(as_stock)
        if reason:
            refuse_if_forced(self, reason)
            return in_keras()
        visible = combine([constructors.causal("top_left") if use_causal_mask else None, _value_mask(value_mask, value)])

        seed = dropout_seed(self, self.dropout, training)

        def here():
            return self._attend(query, key, value, query_mask, visible, seed, return_attention_scores, attention_bias)

        if self.as_in_keras and value_mask is not None:
            # Keras takes 1e9 from every score of such a row, and what is left of them decides: only its code has that.
            if not backend.can_branch(query, value):
                refuse_if_forced(self, "as_in_keras=True beside a value mask, where XLA has to compile unknown sizes")
                return in_keras()
            any_empty = ops.any(empty_rows(visible, dims(query)[-2], dims(key)[-2]))
            return ops.cond(any_empty, in_keras, here)
        return here()

    def _attend(self, query, key, value, query_mask, visible, seed, return_attention_scores, attention_bias):
        if attention_bias is not None:
            axes = AttentionAxes((len(query.shape) - 2,), len(query.shape) - 1)
            attention_bias = axes.flatten_mask(ops.convert_to_tensor(attention_bias), query, key, "attention_bias")
        ragged = backend.is_ragged(query)
        if ragged and query_mask is not None:
            hidden = constructors.query_padding(padding(self, query_mask, query, "the query mask"))
            visible = combine([visible, hidden])
        out, scores = attend_one_head(
            self,
            *((query, key, value) if ragged else (_one_batch_axis(x, 2) for x in (query, key, value))),
            mask=visible,
            scale=1.0 if self.scale is None else ops.convert_to_tensor(self.scale),
            dropout_seed=seed,
            scores="dropped" if return_attention_scores else None,
            attention_bias=attention_bias,
        )
        if ragged:
            return out
        leading = dims(query)[:-1]
        out = ops.reshape(out, [*leading, dims(out)[-1]])
        if query_mask is not None:
            out = hide_rows(out, boolean(query_mask, "the query mask"))
        if not return_attention_scores:
            return out
        return out, ops.reshape(scores, [*leading, dims(scores)[-1]])

    def compute_mask(self, inputs, mask=None):
        query_mask = mask[0] if mask else None
        return query_mask if backend.is_ragged(query_mask) else super().compute_mask(inputs, mask)

    def compute_output_spec(
        self,
        inputs,
        mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
        attention_bias=None,
    ):
        spec = super().compute_output_spec(
            inputs,
            mask=mask,
            return_attention_scores=return_attention_scores,
            training=training,
            use_causal_mask=use_causal_mask,
        )
        return spec if return_attention_scores else ragged_like(spec, inputs[0])

    def _stock_reason(self, query, key, value, value_mask):
        """Why this call has to run Keras's own code, or None."""
        if self.score_mode != "dot":
            return f"score_mode is {self.score_mode!r}, only 'dot' is a dot product"
        if self.scale is not None:  # without it integers are refused there too
            for x in (query, value, key):
                if "int" in keras.backend.standardize_dtype(x.dtype):
                    return f"the inputs are {x.dtype}"
        step = overridden(self, _Stock, "_calculate_scores", "_apply_scores", "_calculate_score_mask")
        if step:
            return f"{type(self).__name__} overrides {step}()"
        batch = tuple(query.shape[:-2])
        for x in (key, value):
            other = tuple(x.shape[:-2])
            if not compatible(other, batch) or any((a == 1) != (b == 1) for a, b in zip(other, batch)):
                return f"the axes before the sequence differ, {batch} and {other}, and would be broadcast"
        if value_mask is not None and len(query.shape) > 3 and len(value_mask.shape) != len(value.shape) - 1:
            return f"the value mask of shape {value_mask.shape} does not cover the axes {value.shape[:-1]}"
        return None


def _one_batch_axis(x, num_last):
    """`x` with all axes but the last `num_last` merged into one."""
    extents = dims(x)
    return ops.reshape(x, [math.prod(extents[:-num_last]), *extents[-num_last:]])


def _value_mask(mask, value):
    """A mask of the values, `[*batch, seqlen_k]`, or of the scores, `[batch, seqlen_q, seqlen_k]`."""
    if mask is None:
        return None
    mask = boolean(mask, "the value mask")
    if len(mask.shape) == len(value.shape):
        return constructors.boolean(ops.expand_dims(mask, 1))
    return constructors.key_padding(_one_batch_axis(mask, 1))

"""Drop-in `keras.layers.MultiHeadAttention`."""

from __future__ import annotations

import keras
from keras import ops

from attn_ops import masks
from attn_ops.layers.axes import AttentionAxes
from attn_ops.layers.common import FlashAttention, attend, combine, dropout_seed, keras_mask

_Stock = keras.layers.MultiHeadAttention


@keras.saving.register_keras_serializable(package="attn_ops")
class MultiHeadAttention(FlashAttention, _Stock):
    """`keras.layers.MultiHeadAttention` whose attention runs in :func:`attn_ops.scaled_dot_product_attention`.

    Takes the constructor and call arguments of the installed Keras's layer (`query, value, key`, in this order; float
    `[batch, *dims, features]`) and has its weights, config and outputs; files of one load into the other. Projections
    are inherited, and with them LoRA and quantization. What differs:

    - `flash_attention`: None runs the fused op where it can and the composite elsewhere; True runs the fused op or raises
      ValueError with the reasons; False runs the composite. Pass it by keyword.
    - Dropout, `return_attention_scores`, masks, windows and several attention axes do not leave the fused op. Scores are
      recomputed from its log-sum-exp; they are those before dropout, as in Keras.
    - A query that sees no key gives 0, where Keras gives the mean of all values without dropout and scores.
    - A causal mask or a window over one attention axis that is not the first works; over several axes it raises
      ValueError.
    - A float `attention_mask` must hold only 0 and 1: Keras inverts additive masks silently. Otherwise
      `tf.errors.InvalidArgumentError`, on JAX ValueError; in functions that XLA or JAX traces it goes unnoticed.
    - Masks stay structured. A subclass that overrides `call` or `_compute_attention` gets Keras's dense mask from
      `_compute_attention_mask`, and `_compute_attention` accepts it.
    """

    def _compute_attention_mask(
        self,
        query,
        value,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        use_causal_mask=False,
    ):
        cls = type(self)
        if cls.call is not _Stock.call or cls._compute_attention is not MultiHeadAttention._compute_attention:
            return super()._compute_attention_mask(
                query,
                value,
                query_mask=query_mask,
                value_mask=value_mask,
                key_mask=key_mask,
                attention_mask=attention_mask,
                use_causal_mask=use_causal_mask,
            )
        return keras_mask(
            AttentionAxes(self._attention_axes, len(query.shape) - 1),
            query,
            value,
            query_mask=query_mask,
            key_masks=(value_mask, key_mask),
            attention_mask=attention_mask,
            is_causal=use_causal_mask,
            sliding_window=getattr(self, "_sliding_window", None),  # Keras >= 3.15
        )

    def _compute_attention(
        self,
        query,
        key,
        value,
        attention_mask=None,
        training=None,
        return_attention_scores=False,
        use_causal_mask=False,
    ):
        """Attention of projected `[batch, *dims, num_heads, key_dim]` tensors.

        Returns the outputs `[batch, *dims, num_heads, value_dim]` and the scores `[batch, *free dims, num_heads,
        *attended dims of query, *attended dims of key]`, or None where they are not asked for.
        """
        query, key, value = (ops.convert_to_tensor(x) for x in (query, key, value))
        axes = AttentionAxes(self._attention_axes, len(query.shape) - 2)
        if not isinstance(attention_mask, masks.Mask):
            attention_mask = keras_mask(axes, query, key, attention_mask=attention_mask)
        if use_causal_mask:
            attention_mask = combine([attention_mask, keras_mask(axes, query, key, is_causal=True)])
        # Keras before 3.8 keeps the request in an attribute.
        wants_scores = return_attention_scores or getattr(self, "_return_attention_scores", False)
        out, scores = attend(
            axes.flatten(query),
            axes.flatten(key),
            axes.flatten(value),
            mask=attention_mask,
            scale=self._inverse_sqrt_key_dim,
            implementation=self.implementation,
            dropout_rate=self._dropout,
            dropout_seed=dropout_seed(self._dropout_layer, self._dropout, training),
            scores="undropped" if wants_scores else None,
        )
        if scores is not None:
            scores = axes.unflatten_scores(scores, query, key)
        return axes.unflatten(out, query), scores

    def compute_output_spec(
        self,
        query,
        value,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
    ):
        spec = super().compute_output_spec(query, value, key)
        if not return_attention_scores:
            return spec
        # Keras's own spec has the length of the query twice, and no more than one attention axis.
        axes = AttentionAxes(self._attention_axes, len(query.shape) - 1)
        shape = (
            *(query.shape[axis] for axis in axes.free),
            self._num_heads,
            *(query.shape[axis] for axis in axes.attended),
            *(value.shape[axis] for axis in axes.attended),
        )
        return spec, keras.KerasTensor(shape, dtype=self.compute_dtype)

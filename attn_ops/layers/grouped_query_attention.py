"""Drop-in `keras.layers.GroupQueryAttention` that does not repeat keys and values."""

from __future__ import annotations

import keras
from keras import ops

from attn_ops import masks
from attn_ops.layers.axes import AttentionAxes
from attn_ops.layers.common import FlashAttention, attend, combine, dropout_seed, keras_mask, without_keras_mask

_Stock = keras.layers.GroupQueryAttention
_AXES = AttentionAxes((1,), 2)


@keras.saving.register_keras_serializable(package="attn_ops")
class GroupedQueryAttention(FlashAttention, _Stock):
    """`keras.layers.GroupQueryAttention` whose attention runs in :func:`attn_ops.scaled_dot_product_attention`.

    Takes the constructor and call arguments of the installed Keras's layer (`query, value, key`, in this order; float
    `[batch, seqlen, features]`) and has its weights, config and outputs; files of one load into the other. What
    differs is what differs in :class:`attn_ops.layers.MultiHeadAttention`, and:

    - Keys and values keep `num_key_value_heads` heads: query head h reads head `h // (num_query_heads //
      num_key_value_heads)`. Keras repeats them, once per query head.
    - No warning that the projections destroy the mask of an input; the output has the query's, as in Keras.
    - A subclass that overrides `_compute_attention` gets Keras's call: a dense mask, keys and values repeated.
    """

    def call(
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
        if type(self)._compute_attention is not GroupedQueryAttention._compute_attention:
            return super().call(
                query,
                value,
                key=key,
                query_mask=query_mask,
                value_mask=value_mask,
                key_mask=key_mask,
                attention_mask=attention_mask,
                return_attention_scores=return_attention_scores,
                training=training,
                use_causal_mask=use_causal_mask,
            )
        self._return_attention_scores = return_attention_scores
        key = value if key is None else key
        attention_mask = keras_mask(
            _AXES,
            query,
            key,
            query_mask=query_mask,
            key_masks=(value_mask, key_mask),
            attention_mask=attention_mask,
            is_causal=use_causal_mask,
            sliding_window=getattr(self, "sliding_window", None),  # Keras >= 3.15
        )
        query, key, value = (without_keras_mask(x) for x in (query, key, value))
        output, scores = self._compute_attention(
            self._query_dense(query),
            self._key_dense(key),
            self._value_dense(value),
            attention_mask=attention_mask,
            training=training,
        )
        if getattr(self, "use_gate", False):  # Keras >= 3.14
            output = output * self._gate_dense(query)
        output = self._output_dense(output)
        return (output, scores) if return_attention_scores else output

    def _compute_attention(
        self, query, key, value, attention_mask=None, training=None, use_causal_mask=False
    ):
        """Attention of projected `[batch, seqlen, heads, head_dim]` tensors, where keys and values have
        `num_key_value_heads` heads or, as in Keras, already one per query head.

        Returns the outputs `[batch, seqlen_q, num_query_heads, head_dim]` and, where the layer was asked for them, the
        scores `[batch, num_query_heads, seqlen_q, seqlen_k]`, otherwise None.
        """
        query, key, value = (ops.convert_to_tensor(x) for x in (query, key, value))
        if not isinstance(attention_mask, masks.Mask):
            attention_mask = keras_mask(_AXES, query, key, attention_mask=attention_mask)
        return attend(
            query,
            key,
            value,
            mask=combine([attention_mask, masks.causal() if use_causal_mask else None]),
            scale=self._inverse_sqrt_head_dim,
            implementation=self.implementation,
            dropout_rate=self.dropout,
            dropout_seed=dropout_seed(self._dropout_layer, self.dropout, training),
            scores="undropped" if self._return_attention_scores else None,
        )

"""Drop-in `keras.layers.GroupQueryAttention` that does not repeat keys and values."""

from __future__ import annotations

import keras
from keras import ops

from attn_ops.layers import cached
from attn_ops.layers.attend import attend, dropout_seed, ragged_like
from attn_ops.layers.axes import AttentionAxes, dims
from attn_ops.layers.backend import set_keras_mask
from attn_ops.layers.base import dense_reason, refuse_if_forced
from attn_ops.layers.empty_rows import empty_rows, with_means
from attn_ops.layers.inputs import boolean, without_keras_mask
from attn_ops.layers.keras_mask import combine, keras_mask
from attn_ops.layers.score_options import ScoreOptions, present
from attn_ops.masks import constructors
from attn_ops.masks.mask import Mask

_Stock = keras.layers.GroupQueryAttention
_AXES = AttentionAxes((1,), 2)
# A subclass with its own one of these gets Keras's dense mask, and the second pair repeated keys and values too.
_MASK_STEPS = ("call", "_compute_attention_mask", "_compute_causal_mask", "_compute_sliding_window_mask")
_ATTENTION_STEPS = ("_compute_attention", "_masked_softmax")


@keras.saving.register_keras_serializable(package="attn_ops")
class GroupedQueryAttention(ScoreOptions, _Stock):
    """`keras.layers.GroupQueryAttention` whose attention runs in :func:`attn_ops.scaled_dot_product_attention`.

    Takes the constructor and call arguments of the installed Keras's layer (`query, value, key`, in this order; float
    `[batch, seqlen, features]`) and has its weights, config and outputs; files of one load into the other. What
    differs is what differs in :class:`attn_ops.layers.MultiHeadAttention`, and:

    - Keys and values keep `num_key_value_heads` heads: query head h reads head `h // (num_query_heads //
      num_key_value_heads)`. Keras repeats them, once per query head.
    - The options of the constructor and of calls that MultiHeadAttention has beyond Keras's: `attention_bias`,
      `query_offset`, `cache` and masks of `attn_ops.masks` in calls; `logits_soft_cap`, `sinks`, `position_bias`,
      `num_buckets`, `max_distance`, `bidirectional`, `mask` and `rotary`.
    - `as_in_keras=True`, which `attn_ops.convert` sets, keeps Keras's answers where masks make a difference.
    - No warning that the projections destroy the mask of an input. The output has the mask of the query, a given
      `query_mask` included.
    - A subclass that overrides `_compute_attention` gets Keras's call: a dense mask, keys and values repeated.
    """

    _SIZES = ("head_dim", "num_query_heads", "num_key_value_heads")

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
        attention_bias=None,
        query_offset=None,
        cache=None,
        cache_update_index=None,
    ):
        self._return_attention_scores = return_attention_scores
        if cache is not None:
            return cached.attend(
                self,
                GroupedQueryAttention,
                query,
                value,
                value if key is None else key,
                cache,
                cache_update_index,
                training=training,
                query_mask=query_mask,
                key_masks=(value_mask, key_mask),
                attention_mask=attention_mask,
                return_attention_scores=return_attention_scores,
                attention_bias=attention_bias,
                query_offset=query_offset,
            )
        given = present(attention_bias=attention_bias, query_offset=query_offset)
        key = value if key is None else key
        ragged = self._attend_if_ragged(
            GroupedQueryAttention,
            query,
            key,
            value,
            training,
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
            use_causal_mask=use_causal_mask,
            return_attention_scores=return_attention_scores,
            attention_bias=attention_bias,
            query_offset=query_offset,
        )
        if ragged is not None:
            return ragged
        self._refuse_in_keras(attention_mask, **given)
        query_mask = None if query_mask is None else boolean(query_mask, "query_mask")
        attention_mask = self._compute_attention_mask(
            query,
            value,
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
            use_causal_mask=use_causal_mask,
        )
        query, key, value = (without_keras_mask(x) for x in (query, key, value))
        keys, values = self._key_dense(key), self._value_dense(value)
        if dense_reason(self, GroupedQueryAttention, *_ATTENTION_STEPS):
            keys, values = (ops.repeat(x, self.num_repeats, axis=2) for x in (keys, values))
        output, scores = self._compute_attention(
            self._query_dense(query), keys, values, attention_mask=attention_mask, training=training, **given
        )
        if getattr(self, "use_gate", False):  # Keras >= 3.14
            output = output * self._gate_dense(query)
        output = self._output_dense(output)
        if query_mask is not None and not self.as_in_keras:
            set_keras_mask(output, query_mask)
        return (output, scores) if return_attention_scores else output

    def _own_settings(self, training):
        return {
            "scale": self._inverse_sqrt_head_dim,
            "rate": self.dropout,
            "seed": dropout_seed(self._dropout_layer, self.dropout, training),
            "window": getattr(self, "sliding_window", None),
            "gate": getattr(self, "use_gate", False),
        }

    def _attention_sizes(self):
        return self.num_query_heads, self.head_dim, 1

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
        reason = dense_reason(self, GroupedQueryAttention, *_MASK_STEPS, *_ATTENTION_STEPS)
        if reason:
            self._refuse_masks(reason, attention_mask)
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
            _AXES,
            query,
            value,
            query_mask=query_mask,
            key_masks=(value_mask, key_mask),
            attention_mask=attention_mask,
            is_causal=use_causal_mask,
            sliding_window=getattr(self, "sliding_window", None),  # Keras >= 3.15
            mask=self.mask,
        )

    def _compute_attention(
        self,
        query,
        key,
        value,
        attention_mask=None,
        training=None,
        use_causal_mask=False,
        attention_bias=None,
        query_offset=None,
    ):
        """Attention of projected `[batch, seqlen, heads, head_dim]` tensors, where keys and values have
        `num_key_value_heads` heads or, as in Keras, already one per query head.

        Returns the outputs `[batch, seqlen_q, num_query_heads, head_dim]` and, where the layer was asked for them, the
        scores `[batch, num_query_heads, seqlen_q, seqlen_k]`, otherwise None.
        """
        query, key, value = (ops.convert_to_tensor(x) for x in (query, key, value))
        in_softmax = self.dropout > 0 or self._return_attention_scores  # in Keras: beside its op
        reason = dense_reason(self, GroupedQueryAttention, "_masked_softmax") if in_softmax else None
        if reason:
            refuse_if_forced(self, reason)
            self._refuse_beyond_stock(reason, attention_bias=attention_bias, query_offset=query_offset)
            options = {"use_causal_mask": True} if use_causal_mask else {}
            return super()._compute_attention(query, key, value, attention_mask, training, **options)
        if not isinstance(attention_mask, Mask):
            attention_mask = keras_mask(_AXES, query, key, attention_mask=attention_mask)
        attention_mask = combine([attention_mask, constructors.causal("top_left") if use_causal_mask else None])
        if attention_bias is not None:
            attention_bias = _AXES.flatten_mask(ops.convert_to_tensor(attention_bias), query, key, "attention_bias")
        turned_query, turned_key = self._rotated(query, key, query_offset)
        out, scores = attend(
            turned_query,
            turned_key,
            value,
            mask=attention_mask,
            scale=self._inverse_sqrt_head_dim,
            implementation=self.implementation,
            dropout_rate=self.dropout,
            dropout_seed=dropout_seed(self._dropout_layer, self.dropout, training),
            scores="undropped" if self._return_attention_scores else None,
            **self._score_options(attention_bias, query_offset),
        )
        if scores is not None:
            scores = ops.cast(scores, self.compute_dtype)
        if self.as_in_keras and attention_mask is not None and not in_softmax:
            out = with_means(out, value, empty_rows(attention_mask, dims(query)[1], dims(key)[1]))
        return out, scores

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
        attention_bias=None,
        query_offset=None,
        cache=None,
        cache_update_index=None,
    ):
        self._refuse_symbolic_mask(attention_mask)
        if cache is not None:
            return cached.spec(super().compute_output_spec(query, value, key=key), cache)
        spec = super().compute_output_spec(
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
        if getattr(query, "ragged", False) and not return_attention_scores:
            return ragged_like(spec, query)
        if query_mask is not None and not self.as_in_keras:
            set_keras_mask(spec[0] if return_attention_scores else spec, query_mask)
        return spec


GroupQueryAttention = GroupedQueryAttention  # its name in Keras's public namespace

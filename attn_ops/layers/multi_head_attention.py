"""Drop-in `keras.layers.MultiHeadAttention`."""

from __future__ import annotations

import inspect

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
from attn_ops.masks.mask import Mask

_Stock = keras.layers.MultiHeadAttention
# Keras before 3.8 keeps the request for scores in an attribute, and its subclasses expect no such argument.
_ASKS_FOR_SCORES = "return_attention_scores" in inspect.signature(_Stock._compute_attention).parameters
# A subclass with its own one of these gets Keras's dense mask.
_STEPS = (
    "call",
    "_compute_attention",
    "_compute_attention_mask",
    "_compute_causal_mask",
    "_compute_sliding_window_mask",
    "_masked_softmax",
)


@keras.saving.register_keras_serializable(package="attn_ops")
class MultiHeadAttention(ScoreOptions, _Stock):
    """`keras.layers.MultiHeadAttention` whose attention runs in :func:`attn_ops.scaled_dot_product_attention`.

    Takes the constructor and call arguments of the installed Keras's layer (`query, value, key`, in this order; float
    `[batch, *dims, features]`) and has its weights, config and outputs; files of one load into the other. Projections
    are inherited, and with them LoRA and quantization. What differs:

    - `flash_attention`: None runs the fused op where it can and the composite elsewhere; True runs the fused op or
      raises ValueError with the reasons; False runs the composite.
    - Dropout, `return_attention_scores`, masks, windows and several attention axes do not leave the fused op. Scores
      are recomputed; they are those before dropout, as in Keras. Rematerialisation drops what the first run dropped.
    - The inputs keep their Keras masks, so that `Add()([x, layer(x, x)])` has one: Keras deletes them, and what follows
      attends to padding. A `query_mask`, `value_mask` or `key_mask` that is given counts instead of the input's own;
      Keras ignores a given `query_mask`. The output has the mask of the query.
    - A query that sees no key gives 0, where Keras gives the mean of all values without dropout and scores.
    - A causal mask or a window over one attention axis that is not the first works; over several axes it raises
      ValueError.
    - A float `attention_mask` must hold only 0 and 1: Keras inverts additive masks silently. Otherwise TypeError where its
      values are known, and `tf.errors.InvalidArgumentError` in a running graph; in functions that XLA or JAX compiles, what
      only the data decide goes unnoticed.
    - Masks stay structured. A subclass that overrides a step of the computation gets Keras's dense mask from
      `_compute_attention_mask`, and `_compute_attention` accepts it.
    - `dropout` outside [0, 1) is refused by the constructor.
    - `attention_bias` of a call, float, is added to the scores: `[seqlen_q, seqlen_k]`, `[batch, seqlen_q, seqlen_k]` or
      `[batch, num_heads, seqlen_q, seqlen_k]`, every extent may be 1. It has a gradient. `query_offset`, an integer or
      integers `[batch]`, is the position of the first query among the keys, which count from 0 (decoding with a cache):
      causal masks, windows, `position_bias` and `rotary` follow it.
    - `cache` of a call, an :class:`attn_ops.KVCache`, holds the keys and values of the tokens before; the call appends those of
      its own `[batch, rows, features]`, any number of them, attends causally to all, and returns `(output, cache)`. Masks and
      `attention_bias` have the cache's axis of keys; a `query_mask` tells how many of the rows are tokens, padding
      last; `rotary` follows the cache. Or `cache` is KerasHub's tensor `[batch, 2, max_length, num_heads, key_dim]`, with
      `cache_update_index`, an integer or integers `[batch]`, as the position of the first row. For generation: no gradient,
      dropout or scores.
    - An `attention_mask` may be an object of `attn_ops.masks`, which stays structured. Models in whose calls it stands are
      saved where it is made of Python values and NumPy arrays.
    - Query, value and key may be `tf.RaggedTensor`s `[batch, (seqlen), features]`, also of functional models
      (`keras.Input(ragged=True)`): no padding is made, and the output is ragged like the query. Causal masks and windows
      (and prefix and chunked ones of `attn_ops.masks`) go with it, by position in each sequence, `query_offset`, and ragged
      padding masks, as embeddings with `mask_zero=True` make them; dense masks, `attention_bias` and scores do not.
    - Options of the constructor, by keyword, that Keras does not have; with one of them, no stock layer can take the
      layer's place (`attn_ops.revert`), and where Keras's own code has to run there is a ValueError:
      `logits_soft_cap`: a number c; scores s become c tanh(s / c). `sinks=True`: a learned logit per head joins the
      denominator, a weight `sinks` `[num_heads]`, at first normal with deviation 0.02 as in gpt-oss; scores then sum to
      less than 1. `position_bias="alibi"` adds the usual slopes times the distance (`attn_ops.alibi_slopes`), which is
      made for causal attention; `"t5"` a learned table, the weight `relative_attention_bias` `[num_buckets, num_heads]`
      (`num_buckets=32`, `max_distance=128`; `bidirectional`, whether later keys have buckets of their own, is None for
      yes unless the `mask` of the constructor is causal: a causal mask of a call does not count). `mask`: an object of
      `attn_ops.masks` that hides keys in every call beside what the call says; it is saved where it is made of Python
      values and NumPy arrays. `rotary`: True, or a dict of the options of :func:`attn_ops.rotary_embedding` (base,
      rotary_dim, interleaved, scaling), turns queries and keys by their positions, for self-attention.
    - `as_in_keras=True`, which `attn_ops.convert` sets, keeps Keras's answers where these points change them: masks
      are deleted, a given `query_mask` is ignored, rows without a key get Keras's mean.
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
        attention_bias=None,
        query_offset=None,
        cache=None,
        cache_update_index=None,
    ):
        if cache is not None:
            return cached.attend(
                self,
                MultiHeadAttention,
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
            MultiHeadAttention,
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
        if self.as_in_keras:
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
        if _ASKS_FOR_SCORES:
            wants_scores = (return_attention_scores,)
        else:
            wants_scores, self._return_attention_scores = (), return_attention_scores
        output, scores = self._compute_attention(
            self._query_dense(query),
            self._key_dense(key),
            self._value_dense(value),
            attention_mask,
            training,
            *wants_scores,
            **given,
        )
        if getattr(self, "_use_gate", False):  # Keras >= 3.14
            output = output * self._gate_dense(query)
        output = self._output_dense(output)
        if query_mask is not None:
            set_keras_mask(output, query_mask)
        return (output, scores) if return_attention_scores else output

    def _own_settings(self, training):
        return {
            "scale": self._inverse_sqrt_key_dim,
            "rate": self._dropout,
            "seed": dropout_seed(self._dropout_layer, self._dropout, training),
            "window": getattr(self, "_sliding_window", None),
            "gate": getattr(self, "_use_gate", False),
        }

    def _attention_sizes(self):
        return self._num_heads, self._key_dim, len(self._attention_axes)

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
        reason = dense_reason(self, MultiHeadAttention, *_STEPS)
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
            AttentionAxes(self._attention_axes, len(query.shape) - 1),
            query,
            value,
            query_mask=query_mask,
            key_masks=(value_mask, key_mask),
            attention_mask=attention_mask,
            is_causal=use_causal_mask,
            sliding_window=getattr(self, "_sliding_window", None),  # Keras >= 3.15
            mask=self.mask,
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
        attention_bias=None,
        query_offset=None,
    ):
        """Attention of projected `[batch, *dims, num_heads, key_dim]` tensors.

        Returns the outputs `[batch, *dims, num_heads, value_dim]` and the scores `[batch, *free dims, num_heads,
        *attended dims of query, *attended dims of key]`, or None where they are not asked for.
        """
        query, key, value = (ops.convert_to_tensor(x) for x in (query, key, value))
        wants_scores = return_attention_scores or getattr(self, "_return_attention_scores", False)
        in_softmax = self._dropout > 0 or wants_scores or len(query.shape) != 4  # in Keras: beside its op
        reason = dense_reason(self, MultiHeadAttention, "_masked_softmax") if in_softmax else None
        if reason:
            refuse_if_forced(self, reason)
            self._refuse_beyond_stock(reason, attention_bias=attention_bias, query_offset=query_offset)
            options = {"return_attention_scores": return_attention_scores} if _ASKS_FOR_SCORES else {}
            options.update({"use_causal_mask": True} if use_causal_mask else {})
            return super()._compute_attention(query, key, value, attention_mask, training, **options)
        axes = AttentionAxes(self._attention_axes, len(query.shape) - 2)
        if not isinstance(attention_mask, Mask):
            attention_mask = keras_mask(axes, query, key, attention_mask=attention_mask)
        if use_causal_mask:
            attention_mask = combine([attention_mask, keras_mask(axes, query, key, is_causal=True)])
        if attention_bias is not None:
            attention_bias = axes.flatten_mask(ops.convert_to_tensor(attention_bias), query, key, "attention_bias")
        if query_offset is not None and len(axes.attended) != 1:
            raise ValueError(
                f"{type(self).__name__}: query_offset needs exactly one attention axis, and there are {len(axes.attended)}"
            )
        flat_query, flat_key = self._rotated(axes.flatten(query), axes.flatten(key), query_offset)
        out, scores = attend(
            flat_query,
            flat_key,
            axes.flatten(value),
            mask=attention_mask,
            scale=self._inverse_sqrt_key_dim,
            implementation=self.implementation,
            dropout_rate=self._dropout,
            dropout_seed=dropout_seed(self._dropout_layer, self._dropout, training),
            scores="undropped" if wants_scores else None,
            **self._score_options(attention_bias, query_offset),
        )
        if scores is not None:
            scores = ops.cast(axes.unflatten_scores(scores, query, key), self.compute_dtype)
        elif self.as_in_keras and attention_mask is not None and not in_softmax:
            out = with_means(out, value, empty_rows(attention_mask, dims(query)[1], dims(key)[1]))
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
        attention_bias=None,
        query_offset=None,
        cache=None,
        cache_update_index=None,
    ):
        self._refuse_symbolic_mask(attention_mask)
        if cache is not None:
            return cached.spec(super().compute_output_spec(query, value, key), cache)
        spec = super().compute_output_spec(query, value, key)
        if getattr(query, "ragged", False):
            return ragged_like(spec, query)
        if query_mask is not None and not self.as_in_keras:
            set_keras_mask(spec, query_mask)
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

"""Attention without weights, in the argument order of tutorials: query, key, value."""

from __future__ import annotations

import keras

from attn_ops.call.shapes import compatible
from attn_ops.layers.attend import attend_one_head, dropout_seed, hide_rows, ragged_like
from attn_ops.layers.backend import backend
from attn_ops.layers.base import FlashAttention, checked_dropout, checked_number
from attn_ops.layers.inputs import are_ragged, padding
from attn_ops.layers.keras_mask import combine
from attn_ops.masks import constructors


class _QueryKeyValue(FlashAttention, keras.layers.Layer):
    """What the two layers below share: everything but what they return."""

    def __init__(self, scale=None, dropout=0.0, seed=None, **kwargs):
        name = type(self).__name__
        scale = None if scale is None else checked_number(name, "scale", scale)
        dropout = checked_dropout(name, dropout)
        super().__init__(**kwargs)
        self.supports_masking = True
        self.scale = scale
        self.dropout = dropout
        self.seed = seed
        if dropout > 0:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        self._check_shapes(input_shape)

    def _attend(self, inputs, mask, training, use_causal_mask, attention_bias, scores):
        self._check_three(inputs, mask)
        query, key, value = inputs
        given = {f"{what} mask": x for what, x in zip(("query", "key", "value"), mask or ())}
        given["attention_bias"] = attention_bias
        ragged = are_ragged(self, given, query=query, key=key, value=value)
        padded = None
        if ragged and scores is not None:
            padded, ragged = backend.padded(type(self).__name__, inputs, mask), False
            inputs, mask = padded.inputs, padded.masks
            query, key, value = inputs
        self._check_shapes([x.shape for x in inputs])
        query_mask, *key_masks = (
            None if m is None else padding(self, m, x, "a mask") for m, x in zip(mask or [None] * 3, inputs)
        )
        parts = [constructors.causal("top_left") if use_causal_mask else None]
        parts += [constructors.key_padding(m) for m in key_masks if m is not None]
        if ragged and query_mask is not None:
            parts.append(constructors.query_padding(query_mask))
        out, weights = attend_one_head(
            self,
            query,
            key,
            value,
            mask=combine(parts),
            scale=1.0 if self.scale is None else self.scale,
            dropout_seed=dropout_seed(self, self.dropout, training),
            scores=scores,
            attention_bias=attention_bias,
        )
        if query_mask is not None and not ragged:
            out = hide_rows(out, query_mask)
        return (out, weights) if padded is None else padded.ragged(out, weights)

    def _check_three(self, inputs, mask=None):
        name = type(self).__name__
        if not isinstance(inputs, (list, tuple)) or len(inputs) != 3:
            raise ValueError(f"{name} must be called on [query, key, value], got {_shapes(inputs)}")
        if mask is not None and (not isinstance(mask, (list, tuple)) or len(mask) != 3):
            raise ValueError(f"{name} takes the masks [query_mask, key_mask, value_mask], got {_shapes(mask)}")

    def _check_shapes(self, shapes):
        """The shapes of query, key and value as tuples."""
        name = type(self).__name__
        if not isinstance(shapes, (list, tuple)) or len(shapes) != 3 or not all(map(_is_shape, shapes)):
            raise ValueError(f"{name} must be called on [query, key, value], got shapes {shapes}")
        query, key, value = shapes = [tuple(shape) for shape in shapes]
        for rule, holds in (
            ("query, key and value must be [batch, seqlen, features]", all(len(shape) == 3 for shape in shapes)),
            ("query, key and value must have the same batch size", _agree(query[:1], key[:1], value[:1])),
            ("query and key must have the same features", _agree(query[-1:], key[-1:])),
            ("key and value must have the same length", _agree(key[1:-1], value[1:-1])),
        ):
            if not holds:
                raise ValueError(f"{name}: {rule}, got shapes query {query}, key {key}, value {value}")
        return shapes

    def compute_mask(self, inputs, mask=None):
        return None if mask is None else mask[0]

    def compute_output_shape(self, input_shape):
        query, _, value = self._check_shapes(input_shape)
        return (*query[:-1], value[-1])

    def get_config(self):
        return {**super().get_config(), "scale": self.scale, "dropout": self.dropout, "seed": self.seed}


@keras.saving.register_keras_serializable(package="attn_ops")
class AttentionLayer(_QueryKeyValue):
    """`softmax(scale · query keyᵀ) value`, of the inputs as they are: a layer without weights.

    The order `[query, key, value]` is that of the tutorials; :class:`attn_ops.layers.Attention` takes Keras's
    `[query, value, key]`.

    Args:
        scale: Factor of the scores; None means 1 (unscaled), as in the tutorials. `features ** -0.5` is that of
            Vaswani et al. 2017 (arXiv:1706.03762).
        dropout: Rate in [0, 1) of the attention weights dropped in training.
        seed: Integer for reproducible dropout.
        flash_attention: None fuses where possible, True raises ValueError where not, False runs the composite.

    Call arguments:
        inputs: `[query, key, value]` of float `[batch, seqlen_q, features]`, `[batch, seqlen_k, features]` and
            `[batch, seqlen_k, value_features]`; on TensorFlow also three `tf.RaggedTensor`s `[batch, (seqlen), features]`,
            of which no padding is made, with ragged masks and without `attention_bias`.
        mask: `[query_mask, key_mask, value_mask]`, bool `[batch, seqlen]` or None each; filled from the inputs' Keras
            masks. Hidden keys and values take no part, hidden queries give 0.
        training: Whether dropout runs.
        use_causal_mask: Whether query i sees only the keys up to i.
        attention_bias: Float `[seqlen_q, seqlen_k]` or `[batch, seqlen_q, seqlen_k]`, every extent may be 1, or None: added
            to the scaled scores. It has a gradient.

    Returns:
        The context `[batch, seqlen_q, value_features]`, ragged like the query, with the mask of the query.

    Raises:
        ValueError: `inputs` or `mask` has not three elements, or the shapes do not agree; `dropout` is outside [0, 1)
            or `scale` not finite; or what does not go with ragged inputs.
        TypeError: `dropout` or `scale` is not a number, some inputs alone are ragged, or any on JAX.
    """

    def call(self, inputs, mask=None, training=False, use_causal_mask=False, attention_bias=None):
        return self._attend(inputs, mask, training, use_causal_mask, attention_bias, scores=None)[0]

    def compute_output_spec(self, inputs, mask=None, training=False, use_causal_mask=False, attention_bias=None):
        shape = self.compute_output_shape([x.shape for x in inputs])
        return ragged_like(keras.KerasTensor(shape, dtype=self.compute_dtype), inputs[0])


@keras.saving.register_keras_serializable(package="attn_ops")
class AttentionLayerWithWeights(_QueryKeyValue):
    """:class:`AttentionLayer` that also returns the attention weights, for plots.

    Args:
        scale, dropout, seed, flash_attention: As for :class:`AttentionLayer`.

    Call arguments:
        inputs, mask, training, use_causal_mask, attention_bias: As for :class:`AttentionLayer`; ragged inputs are padded,
            which XLA cannot do.

    Returns:
        The context `[batch, seqlen_q, value_features]` and the weights `[batch, seqlen_q, seqlen_k]`, ragged like the
        inputs, those that multiplied the values: after dropout, and each row sums to 1 without it (0 where no key is visible).
    """

    def call(self, inputs, mask=None, training=False, use_causal_mask=False, attention_bias=None):
        return self._attend(inputs, mask, training, use_causal_mask, attention_bias, scores="dropped")

    def compute_mask(self, inputs, mask=None):
        return super().compute_mask(inputs, mask), None

    def compute_output_spec(self, inputs, mask=None, training=False, use_causal_mask=False, attention_bias=None):
        if getattr(inputs[0], "ragged", False):
            self.supports_jit = False  # how long the longest rows are, only the data decide
        shapes = self.compute_output_shape([x.shape for x in inputs])
        return tuple(ragged_like(keras.KerasTensor(shape, dtype=self.compute_dtype), inputs[0]) for shape in shapes)

    def compute_output_shape(self, input_shape):
        query, key, _ = self._check_shapes(input_shape)
        return super().compute_output_shape(input_shape), (*query[:-1], key[-2])


def _is_shape(x):
    return not isinstance(x, (int, str)) and hasattr(x, "__len__")


def _agree(*extents):
    """Whether extents, None where unknown, can be the same."""
    return all(compatible(a, b) for i, a in enumerate(extents) for b in extents[:i])


def _shapes(x):
    """What an error shows of arrays: their shapes."""
    if isinstance(x, (list, tuple)):
        return f"[{', '.join(map(_shapes, x))}]"
    return f"shape {tuple(x.shape)}" if hasattr(x, "shape") else repr(x)

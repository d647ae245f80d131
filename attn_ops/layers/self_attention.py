"""Single-head self-attention with learned projections."""

from __future__ import annotations

import keras

from attn_ops.layers.attend import attend_one_head, dropout_seed, ragged_like
from attn_ops.layers.backend import backend
from attn_ops.layers.base import FlashAttention, checked_dropout, checked_number, checked_units
from attn_ops.layers.inputs import are_ragged, padding
from attn_ops.layers.keras_mask import combine
from attn_ops.masks import constructors


@keras.saving.register_keras_serializable(package="attn_ops")
class SelfAttention(FlashAttention, keras.layers.Layer):
    """Self-attention of one head: `softmax(scale · (x W_q)(x W_k)ᵀ) (x W_v)`.

    The layer of tutorials, to put after a recurrent layer with `return_sequences=True`. For several heads, biases and
    an output projection use :class:`attn_ops.layers.MultiHeadAttention`.

    Args:
        units: Features of the projections and of the output; None for those of the input.
        scale: Factor of the scores; None means 1 (unscaled), as in the tutorials. `units ** -0.5` is that of Vaswani
            et al. 2017 (arXiv:1706.03762) and keeps the gradients of wide layers alive.
        dropout: Rate in [0, 1) of the attention weights dropped in training.
        kernel_initializer, kernel_regularizer, kernel_constraint: For `W_q`, `W_k` and `W_v`.
        seed: Integer for reproducible dropout.
        flash_attention: None fuses where possible, True raises ValueError where not, False runs the composite.

    Call arguments:
        inputs: Float `[batch, seqlen, features]`, on TensorFlow also a `tf.RaggedTensor` `[batch, (seqlen), features]`, of
            which no padding is made; then without `return_attention_scores` and `attention_bias`, and the mask ragged too.
        mask: Bool `[batch, seqlen]` or None; filled from the input's Keras mask. Hidden positions are not seen, and
            give 0.
        training: Whether dropout runs.
        use_causal_mask: Whether position i sees only positions up to i.
        return_attention_scores: Whether to return the weights as well.
        attention_bias: Float `[seqlen, seqlen]` or `[batch, seqlen, seqlen]`, every extent may be 1, or None: added to the
            scaled scores. It has a gradient.

    Returns:
        The context sequence `[batch, seqlen, units]`, ragged like the input, with the mask of the input; with `return_attention_scores` also the
        weights `[batch, seqlen, seqlen]` after dropout.

    Weights:
        `W_q`, `W_k`, `W_v`: `[features, units]`.

    Raises:
        ValueError: `units` is not a positive integer, `dropout` outside [0, 1), `scale` not finite, the input not of
            rank 3 with known features, or what does not go with a ragged one.
        TypeError: `dropout` or `scale` is not a number, or the input is ragged on JAX.
    """

    def __init__(
        self,
        units=None,
        scale=None,
        dropout=0.0,
        kernel_initializer="glorot_uniform",
        kernel_regularizer=None,
        kernel_constraint=None,
        seed=None,
        **kwargs,
    ):
        name = type(self).__name__
        units = checked_units(name, units)
        scale = None if scale is None else checked_number(name, "scale", scale)
        dropout = checked_dropout(name, dropout)
        super().__init__(**kwargs)
        self.supports_masking = True
        self.input_spec = keras.layers.InputSpec(ndim=3)
        self.units = units
        self.scale = scale
        self.dropout = dropout
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.seed = seed
        if dropout > 0:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        features = input_shape[-1]
        if len(input_shape) != 3 or features is None:
            raise ValueError(
                f"{type(self).__name__}: the input must be [batch, seqlen, features] with known features, got shape "
                f"{tuple(input_shape)}"
            )
        for name in ("W_q", "W_k", "W_v"):
            weight = self.add_weight(
                name=name,
                shape=(features, self.units or features),
                # A copy for each: a seeded initializer would give all three the same values.
                initializer=keras.initializers.get(keras.initializers.serialize(self.kernel_initializer)),
                regularizer=self.kernel_regularizer,
                constraint=self.kernel_constraint,
            )
            setattr(self, name, weight)

    def call(
        self,
        inputs,
        mask=None,
        training=False,
        use_causal_mask=False,
        return_attention_scores=False,
        attention_bias=None,
    ):
        padded = {"mask": mask, "return_attention_scores": return_attention_scores, "attention_bias": attention_bias}
        are_ragged(self, padded, inputs=inputs)
        parts = [constructors.causal("top_left") if use_causal_mask else None]
        if mask is not None:
            mask = padding(self, mask, inputs, "mask")
            parts += [constructors.query_padding(mask), constructors.key_padding(mask)]
        query, key, value = (
            backend.with_values(inputs, keras.ops.matmul(backend.values(inputs), w)) for w in (self.W_q, self.W_k, self.W_v)
        )
        out, scores = attend_one_head(
            self,
            query,
            key,
            value,
            mask=combine(parts),
            scale=1.0 if self.scale is None else self.scale,
            dropout_seed=dropout_seed(self, self.dropout, training),
            scores="dropped" if return_attention_scores else None,
            attention_bias=attention_bias,
        )
        return (out, scores) if return_attention_scores else out

    def compute_output_spec(
        self,
        inputs,
        mask=None,
        training=False,
        use_causal_mask=False,
        return_attention_scores=False,
        attention_bias=None,
    ):
        out = keras.KerasTensor(self.compute_output_shape(inputs.shape), dtype=self.compute_dtype)
        if not return_attention_scores:
            return ragged_like(out, inputs)
        scores = (inputs.shape[0], inputs.shape[1], inputs.shape[1])
        return out, keras.KerasTensor(scores, dtype=self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units or input_shape[-1])

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.units,
            "scale": self.scale,
            "dropout": self.dropout,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "seed": self.seed,
        }

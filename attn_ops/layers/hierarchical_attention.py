"""Attention for documents: over the words of each sentence, then over the sentences."""

from __future__ import annotations

import keras
from keras import ops

from attn_ops.layers.attend import attend_one_head, dropout_seed, ragged_like
from attn_ops.layers.backend import backend, set_keras_mask
from attn_ops.layers.base import FlashAttention, checked_dropout, checked_units
from attn_ops.layers.inputs import are_ragged, boolean
from attn_ops.masks import constructors


@keras.saving.register_keras_serializable(package="attn_ops")
class HierarchicalAttention(FlashAttention, keras.layers.Layer):
    """Words make sentences, and sentences make the document, by attention on both levels.

    On each level a learned context `c` asks all items `x`, as in Yang et al. 2016, "Hierarchical attention networks for
    document classification": `softmax(c tanh(x W + b)ᵀ) x`. What encodes the words stands before this layer; what
    encodes the sentences, between the levels, is its ``sentence_encoder``.

    Args:
        units: Features of the contexts; None for those of the items.
        sentence_encoder: A Keras layer from `[batch, sentences, features]` to `[batch, sentences, other features]`, such
            as `keras.layers.Bidirectional(keras.layers.GRU(64, return_sequences=True))`, or None. It gets a Keras mask
            of the sentences that have words.
        dropout: Rate in [0, 1) of the attention weights dropped in training.
        kernel_initializer, kernel_regularizer, kernel_constraint: For the kernels `W` and the contexts.
        seed: Integer for reproducible dropout.
        flash_attention: None fuses where possible, True raises ValueError where not, False runs the composite.

    Call arguments:
        inputs: Float `[batch, sentences, words, features]`; on TensorFlow also a `tf.RaggedTensor` `[batch, (sentences),
            (words), features]`, with a ragged mask or none, which is padded. XLA cannot do that.
        mask: Bool `[batch, sentences, words]` or None; filled from the input's Keras mask, which
            `keras.layers.Embedding(mask_zero=True)` makes. Hidden words are not seen, nor are sentences of hidden words
            alone; a document without words gives 0.
        training: Whether dropout runs.
        return_attention_scores: Whether to return the weights as well.

    Returns:
        The document `[batch, features]`, of the features of the sentences; with `return_attention_scores` also the
        weights of the words, `[batch, sentences, words]`, and those of the sentences, `[batch, sentences]`, after dropout,
        ragged like the input.

    Weights:
        `word_kernel`, `sentence_kernel`: `[features, units]`; `word_bias`, `sentence_bias`, `word_context`,
        `sentence_context`: `[units]`; and those of the ``sentence_encoder``.

    Raises:
        ValueError: `units` is not a positive integer, `dropout` outside [0, 1), the input not of rank 4 with known
            features, the mask not of rank 3, or the ``sentence_encoder`` gives another rank than 3.
        TypeError: `dropout` is not a number, ``sentence_encoder`` no Keras layer, or the input ragged on JAX.
    """

    def __init__(
        self,
        units=None,
        sentence_encoder=None,
        dropout=0.0,
        kernel_initializer="glorot_uniform",
        kernel_regularizer=None,
        kernel_constraint=None,
        seed=None,
        **kwargs,
    ):
        name = type(self).__name__
        units = checked_units(name, units)
        if sentence_encoder is not None and not isinstance(sentence_encoder, keras.layers.Layer):
            raise TypeError(f"{name}: sentence_encoder must be None or a Keras layer, got {sentence_encoder!r}")
        dropout = checked_dropout(name, dropout)
        super().__init__(**kwargs)
        self.supports_masking = True
        self.units = units
        self.sentence_encoder = sentence_encoder
        self.dropout = dropout
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.seed = seed
        if dropout > 0:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        self._add_level("word", self._check_shape(input_shape)[-1])
        if self.sentence_encoder is not None and not self.sentence_encoder.built:
            self.sentence_encoder.build(_sentences(input_shape))
        self._add_level("sentence", self.compute_output_shape(input_shape)[-1])

    def _add_level(self, level, features):
        units = self.units or features
        kinds = {"kernel": (features, units), "bias": (units,), "context": (units,)}
        for kind, shape in kinds.items():
            options = {"initializer": "zeros"}
            if kind != "bias":
                options = {
                    # A copy for each: a seeded initializer would give all of them the same values.
                    "initializer": keras.initializers.get(keras.initializers.serialize(self.kernel_initializer)),
                    "regularizer": self.kernel_regularizer,
                    "constraint": self.kernel_constraint,
                }
            setattr(self, f"{level}_{kind}", self.add_weight(name=f"{level}_{kind}", shape=shape, **options))

    def call(self, inputs, mask=None, training=False, return_attention_scores=False):
        features = self._check_shape(inputs.shape)[-1]
        if are_ragged(self, {"mask": mask}, inputs=inputs):
            document = backend.padded_rows(type(self).__name__, inputs, mask)
            found = self.call(*document[:2], training, return_attention_scores)
            return (found[0], *document.cut(*found[1:])) if return_attention_scores else found
        if mask is not None:
            mask = boolean(mask, "mask")
            if len(mask.shape) != 3:
                raise ValueError(
                    f"{type(self).__name__}: mask must be [batch, sentences, words], got shape {tuple(mask.shape)}"
                )
        batch, sentences, words, _ = ops.shape(inputs)
        sentence, of_words = self._attend(
            "word",
            ops.reshape(inputs, (batch * sentences, words, features)),
            None if mask is None else ops.reshape(mask, (batch * sentences, words)),
            training,
            return_attention_scores,
        )
        sentence = ops.reshape(sentence, (batch, sentences, features))
        has_words = None if mask is None else ops.any(mask, axis=-1)
        if self.sentence_encoder is not None:
            if has_words is not None:
                set_keras_mask(sentence, has_words)
            sentence = self.sentence_encoder(sentence, training=training)
        document, of_sentences = self._attend("sentence", sentence, has_words, training, return_attention_scores)
        if not return_attention_scores:
            return document
        return document, ops.reshape(of_words, (batch, sentences, words)), of_sentences

    def _attend(self, level, x, mask, training, return_weights):
        """What the context of a level takes from items `[n, items, features]`, `[n, features]`; and the weights,
        `[n, items]`, or None."""
        kernel, bias, context = (getattr(self, f"{level}_{kind}") for kind in ("kernel", "bias", "context"))
        key = ops.tanh(ops.matmul(x, kernel) + bias)
        context = ops.cast(context, key.dtype)
        query = ops.broadcast_to(context, (ops.shape(x)[0], 1, context.shape[0]))
        out, weights = attend_one_head(
            self,
            query,
            key,
            x,
            mask=None if mask is None else constructors.key_padding(mask),
            scale=1.0,
            dropout_seed=dropout_seed(self, self.dropout, training),
            scores="dropped" if return_weights else None,
        )
        return ops.squeeze(out, 1), None if weights is None else ops.squeeze(weights, 1)

    def _check_shape(self, shape):
        if len(shape) != 4 or shape[-1] is None:
            raise ValueError(
                f"{type(self).__name__}: the input must be [batch, sentences, words, features] with known features, "
                f"got shape {tuple(shape)}"
            )
        return shape

    def compute_mask(self, inputs, mask=None):
        """A document has none: both levels have taken it in."""

    def compute_output_spec(self, inputs, mask=None, training=False, return_attention_scores=False):
        if getattr(inputs, "ragged", False):
            self.supports_jit = False  # how long the longest rows are, only the data decide
        document = keras.KerasTensor(self.compute_output_shape(inputs.shape), dtype=self.compute_dtype)
        if not return_attention_scores:
            return document
        weights = (keras.KerasTensor(inputs.shape[:rank], dtype=self.compute_dtype) for rank in (3, 2))
        return (document, *(ragged_like(x, inputs) for x in weights))

    def compute_output_shape(self, input_shape):
        sentences = _sentences(self._check_shape(input_shape))
        if self.sentence_encoder is not None:
            sentences = self.sentence_encoder.compute_output_shape(sentences)
            if len(sentences) != 3:
                raise ValueError(
                    f"{type(self).__name__}: sentence_encoder must give [batch, sentences, features], and gives shape "
                    f"{tuple(sentences)}"
                )
        return (input_shape[0], sentences[-1])

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.units,
            "sentence_encoder": keras.saving.serialize_keras_object(self.sentence_encoder),
            "dropout": self.dropout,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        encoder = keras.saving.deserialize_keras_object(config.get("sentence_encoder"))
        return cls(**{**config, "sentence_encoder": encoder})


def _sentences(shape):
    return (shape[0], shape[1], shape[3])

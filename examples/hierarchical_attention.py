#!/usr/bin/env python3
# %% [markdown]
"""Classifies documents by attention on two levels: words make sentences, sentences make the document.

    python examples/hierarchical_attention.py              # about a minute
    python examples/hierarchical_attention.py --epochs 8 --sentences 24

After Yang et al. 2016, "Hierarchical attention networks for document classification". The documents are documentation
strings of four Python libraries (see docstrings.py), and the question is which. On each level a learned query asks all
items, and what it attends to is what counts:

    words -> Embedding(mask_zero=True) -> attention over the words of each sentence -> sentences
          -> attention over the sentences -> document -> norm -> Dense

Sentences have other lengths, and documents other numbers of them: both are padded, and both levels have masks. In the
end the weights of both levels tell what a prediction rests on.
"""

# %%
from __future__ import annotations

import docstrings
import keras
import numpy as np
import shared
from keras import ops
from sequence_classification import classification

VOCABULARY = 4000


# %% Documents as sentences of words, padded with zeros
def load(per_library: int, sentences: int, words: int, seed: int):
    """((x, y) to learn from, (x, y) to test on, the texts of those); x is `[documents, sentences, words]`."""
    texts, labels = docstrings.load(per_library, seed)
    test = len(texts) // 5
    known = docstrings.vocabulary(texts[test:], VOCABULARY)
    x = np.zeros((len(texts), sentences, words), np.int32)
    for document, text in enumerate(texts):
        for i, sentence in enumerate(docstrings.sentences(text)[:sentences]):
            x[document, i] = docstrings.numbers(sentence, known, words)
    return (x[test:], labels[test:]), (x[:test], labels[:test]), texts[:test]


# %% The layers
class AttentionPooling(keras.layers.Layer):
    """`[batch, items, width]` to `[batch, width]`: what a learned query attends to, where the mask has items.

    Args:
        layers: `attn_ops.layers` or `keras.layers`.
        heads: How many parts of the width attend on their own.
    """

    def __init__(self, layers, heads: int, **kwargs):
        super().__init__(**kwargs)
        self.layers, self.heads = layers, heads

    def build(self, shape):
        width = shape[-1]
        self.query = self.add_weight(shape=(1, 1, width), initializer="glorot_uniform", name="query")
        self.attention = self.layers.MultiHeadAttention(self.heads, width // self.heads)
        self.attention.build((None, 1, width), shape)

    def call(self, x, mask, return_attention_scores=False):
        """With ``return_attention_scores`` also the weights, `[batch, items]`: means over the heads."""
        query = ops.broadcast_to(self.query, (ops.shape(x)[0], 1, x.shape[-1]))
        out = self.attention(query, x, attention_mask=mask[:, None], return_attention_scores=return_attention_scores)
        if not return_attention_scores:
            return out[:, 0]
        out, scores = out
        return out[:, 0], ops.mean(scores[:, :, 0], axis=1)


class HierarchicalAttention(keras.layers.Layer):
    """`[batch, sentences, words, width]` to `[batch, width]`, with a mask of the words, `[batch, sentences, words]`."""

    def __init__(self, layers, heads: int, **kwargs):
        super().__init__(**kwargs)
        self.of_words, self.of_sentences = (AttentionPooling(layers, heads) for _ in range(2))
        self.supports_masking = True

    def compute_mask(self, x, mask=None):
        """The document has none: both levels have taken it in."""

    def build(self, shape):
        for level in (self.of_words, self.of_sentences):
            level.build((None, None, shape[-1]))

    def call(self, x, mask=None):
        _, sentences, words, width = x.shape
        sentence = self.of_words(ops.reshape(x, (-1, words, width)), ops.reshape(mask, (-1, words)))
        return self.of_sentences(ops.reshape(sentence, (-1, sentences, width)), ops.any(mask, axis=-1))

    def weights_of(self, x, mask):
        """The weights of the words, `[batch, sentences, words]`, and those of the sentences, `[batch, sentences]`."""
        _, sentences, words, width = x.shape
        flat = ops.reshape(x, (-1, words, width)), ops.reshape(mask, (-1, words))
        sentence, of_words = self.of_words(*flat, return_attention_scores=True)
        sentence = ops.reshape(sentence, (-1, sentences, width))
        _, of_sentences = self.of_sentences(sentence, ops.any(mask, axis=-1), return_attention_scores=True)
        return ops.reshape(of_words, (-1, sentences, words)), of_sentences


# %% The model
def build_model(layers, sentences: int, words: int, width: int, heads: int) -> keras.Model:
    """``layers`` is `attn_ops.layers` or `keras.layers`."""
    inputs = keras.Input((sentences, words), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, width, mask_zero=True, name="words")(inputs)
    x = HierarchicalAttention(layers, heads, name="hierarchy")(x)
    x = keras.layers.Dropout(0.2)(keras.layers.LayerNormalization()(x))
    model = keras.Model(inputs, keras.layers.Dense(len(docstrings.LIBRARIES), activation="softmax")(x))
    model.compile(optimizer=keras.optimizers.Adam(2e-3), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


# %% What a prediction rests on
def tell(model: keras.Model, document: np.ndarray, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Prints the sentences that weigh most, and of each the words; returns the weights of words and of sentences."""
    embedding = model.get_layer("words")
    mask = embedding.compute_mask(document[None])
    of_words, of_sentences = model.get_layer("hierarchy").weights_of(embedding(document[None]), mask)
    of_words, of_sentences = (ops.convert_to_numpy(weights)[0] for weights in (of_words, of_sentences))
    there = docstrings.sentences(text)[: len(document)]
    print("\nWhat weighs most in a document of the test set:")
    for i in of_sentences[: len(there)].argsort()[::-1][:3]:
        words = docstrings.words(there[i])[: document.shape[1]]
        heaviest = of_words[i, : len(words)].argsort()[::-1][:4]
        print(f"  {of_sentences[i]:.2f}  {' '.join(words)[:70]}")
        print(f"        {', '.join(f'{words[j]} {of_words[i, j]:.2f}' for j in heaviest)}")
    return of_words, of_sentences


# %% Both models learn
def main(argv=None) -> dict[str, dict[str, float]]:
    parser = shared.parser(__doc__, epochs=4, batch_size=32, texts=500, sentences=12, words=24, width=64, heads=4)
    arguments = shared.parse(parser, argv, epochs=1, texts=100, sentences=5, words=12, width=16)
    sizes = arguments.sentences, arguments.words
    learn, test, texts = load(arguments.texts, *sizes, arguments.seed)
    print(
        f"{len(learn[0])} documents to learn from and {len(test[0])} to test on, {sizes[0]} x {sizes[1]} words each"
    )
    models = shared.twins(lambda layers: build_model(layers, *sizes, arguments.width, arguments.heads), arguments.seed)
    results = shared.compare(models, learn, test, classification, arguments)
    tell(models[0], test[0][0], texts[0])
    return results


if __name__ == "__main__":
    main()

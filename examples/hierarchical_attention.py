#!/usr/bin/env python3
# %% [markdown]
"""Classifies documents by attention on two levels: words make sentences, sentences make the document.

    python examples/hierarchical_attention.py              # under a minute
    python examples/hierarchical_attention.py --epochs 8 --sentences 24

After Yang et al. 2016, "Hierarchical attention networks for document classification", whose two levels are the layer
`attn_ops.layers.HierarchicalAttention`. The documents are documentation strings of four Python libraries (see
docstrings.py), and the question is which. On each level a learned context asks all items, and what it attends to is
what counts:

    words -> Embedding(mask_zero=True) -> attention over the words of each sentence -> sentences -> GRU, both ways
          -> attention over the sentences -> document -> Dense

Sentences have other lengths, and documents other numbers of them: both are padded, and both levels have masks. In the
end the weights of both levels tell what a prediction rests on.
"""

# %%
from __future__ import annotations

import attn_ops
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


# %% The model
def build_model(sentences: int, words: int, width: int) -> keras.Model:
    """Documents `[batch, sentences, words]` to the probabilities of the libraries."""
    inputs = keras.Input((sentences, words), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, width, mask_zero=True, name="words")(inputs)
    encoder = keras.layers.Bidirectional(keras.layers.GRU(width // 2, return_sequences=True))
    x = attn_ops.layers.HierarchicalAttention(sentence_encoder=encoder, name="hierarchy")(x)
    x = keras.layers.Dropout(0.2)(x)
    outputs = keras.layers.Dense(len(docstrings.LIBRARIES), activation="softmax")(x)
    model = keras.Model(inputs, outputs, name="attn_ops")
    model.compile(optimizer=keras.optimizers.Adam(2e-3), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


# %% What a prediction rests on
def tell(model: keras.Model, document: np.ndarray, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Prints the sentences that weigh most, and of each the words; returns the weights of words and of sentences."""
    embedding = model.get_layer("words")
    _, of_words, of_sentences = model.get_layer("hierarchy")(embedding(document[None]), return_attention_scores=True)
    of_words, of_sentences = (ops.convert_to_numpy(weights)[0] for weights in (of_words, of_sentences))
    there = docstrings.sentences(text)[: len(document)]
    print("\nWhat weighs most in a document of the test set:")
    for i in of_sentences[: len(there)].argsort()[::-1][:3]:
        words = docstrings.words(there[i])[: document.shape[1]]
        heaviest = of_words[i, : len(words)].argsort()[::-1][:4]
        print(f"  {of_sentences[i]:.2f}  {' '.join(words)[:70]}")
        print(f"        {', '.join(f'{words[j]} {of_words[i, j]:.2f}' for j in heaviest)}")
    return of_words, of_sentences


# %% It learns
def main(argv=None) -> dict[str, dict[str, float]]:
    parser = shared.parser(__doc__, epochs=4, batch_size=32, texts=500, sentences=12, words=24, width=64)
    arguments = shared.parse(parser, argv, epochs=1, texts=100, sentences=5, words=12, width=16)
    sizes = arguments.sentences, arguments.words
    learn, test, texts = load(arguments.texts, *sizes, arguments.seed)
    print(f"{len(learn[0])} documents to learn from, {len(test[0])} to test on, {sizes[0]} x {sizes[1]} words each")
    keras.utils.set_random_seed(arguments.seed)
    model = build_model(*sizes, arguments.width)
    results = shared.compare([model], learn, test, classification, arguments)
    tell(model, test[0][0], texts[0])
    return results


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
# %% [markdown]
"""Tells which library a documentation string is of: texts of many lengths, padded, and masks that hide the padding.

    python examples/text_classification.py                 # about a minute
    python examples/text_classification.py --epochs 8 --length 256

The texts ship with four Python libraries (see docstrings.py). The embedding layer makes Keras's mask of the zeros
that fill a text up; `attn_ops.layers.MultiHeadAttention` takes it as the stock layer does, and its kernels skip what
is hidden:

    words -> Embedding(mask_zero=True) -> + positions -> norm, MultiHeadAttention, norm, Dense, Dense
          -> average -> Dense

What is hidden does not count: more padding changes no prediction, which is looked at in the end.
"""

# %%
from __future__ import annotations

import docstrings
import keras
import numpy as np
import shared
from sequence_classification import classification

VOCABULARY = 4000


# %% The texts as numbers of words, padded with zeros
def load(per_library: int, length: int, seed: int):
    """(x, y) to learn from and to test on, a fifth; x is `[texts, length]`, y is `[texts]`."""
    texts, labels = docstrings.load(per_library, seed)
    test = len(texts) // 5
    known = docstrings.vocabulary(texts[test:], VOCABULARY)
    x = np.stack([docstrings.numbers(text, known, length) for text in texts])
    return (x[test:], labels[test:]), (x[:test], labels[:test])


# %% The model
def build_model(layers, length: int, width: int, heads: int) -> keras.Model:
    """``layers`` is `attn_ops.layers` or `keras.layers`. Takes texts of up to ``length`` words."""
    inputs = keras.Input((None,), dtype="int32")
    x = shared.Positions(length)(keras.layers.Embedding(VOCABULARY, width, mask_zero=True)(inputs))
    x = shared.transformer_block(layers, x, heads)
    x = keras.layers.GlobalAveragePooling1D()(x)  # of what the mask leaves
    x = keras.layers.Dropout(0.2)(x)
    model = keras.Model(inputs, keras.layers.Dense(len(docstrings.LIBRARIES), activation="softmax")(x))
    model.compile(optimizer=keras.optimizers.Adam(2e-3), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


# %% Both models learn, and padding does not count
def main(argv=None) -> dict[str, dict[str, float]]:
    parser = shared.parser(__doc__, epochs=4, batch_size=32, length=128, texts=500, width=64, heads=4)
    arguments = shared.parse(parser, argv, epochs=1, length=32, texts=100, width=16)
    learn, test = load(arguments.texts, arguments.length, arguments.seed)
    padding = (learn[0] == 0).mean()
    print(
        f"{len(learn[0])} texts to learn from and {len(test[0])} to test on; {padding:.0%} of their words are padding"
    )

    models = shared.twins(
        lambda layers: build_model(layers, 2 * arguments.length, arguments.width, arguments.heads), arguments.seed
    )
    results = shared.compare(models, learn, test, classification, arguments)
    some = test[0][:32]
    more = np.pad(some, ((0, 0), (0, arguments.length)))
    change = np.abs(models[0].predict(some, verbose=0) - models[0].predict(more, verbose=0)).max()
    print(f"With twice the length, all of it padding, predictions change by {change:.1e}")
    results["attn_ops"]["change by padding"] = float(change)
    return results


if __name__ == "__main__":
    main()

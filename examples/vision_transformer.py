#!/usr/bin/env python3
# %% [markdown]
"""Classifies handwritten digits with a vision transformer.

    python examples/vision_transformer.py                  # about a minute
    python examples/vision_transformer.py --epochs 60 --layers 4

The data are the 1,797 digits of 8 x 8 pixels that ship with scikit-learn. A digit is cut into 16 patches of 2 x 2
pixels, which are the tokens (Dosovitskiy et al. 2020):

    patches -> Dense -> + positions -> 2 x [norm, MultiHeadAttention, norm, Dense, Dense] -> norm -> average -> Dense

The same model with attention of stock Keras, from the same initial weights, learns next to it.
"""

# %%
from __future__ import annotations

import keras
import numpy as np
import shared
from sequence_classification import classification, load_digits

PATCH = 2


# %% The digits as sequences of patches
def patches(digits: np.ndarray) -> np.ndarray:
    """`[digits, rows, columns]` as `[digits, patches, PATCH * PATCH pixels]`."""
    count, rows, columns = digits.shape
    cut = digits.reshape(count, rows // PATCH, PATCH, columns // PATCH, PATCH)
    return cut.swapaxes(2, 3).reshape(count, -1, PATCH * PATCH)


def load(seed: int):
    """(x, y) to learn from and to test on, x being patches."""
    return [(patches(x), y) for x, y in load_digits(seed)]


# %% The model
def build_model(layers, tokens: int, width: int, heads: int, depth: int) -> keras.Model:
    """``layers`` is `attn_ops.layers` or `keras.layers`."""
    inputs = keras.Input((tokens, PATCH * PATCH))
    x = shared.Positions(tokens)(keras.layers.Dense(width)(inputs))
    for _ in range(depth):
        x = shared.transformer_block(layers, x, heads)
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.LayerNormalization()(x))
    model = keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(x))
    model.compile(optimizer=keras.optimizers.Adam(2e-3), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


# %% Both models learn
def main(argv=None) -> dict[str, dict[str, float]]:
    parser = shared.parser(__doc__, epochs=20, batch_size=64, width=48, heads=4, layers=2)
    arguments = shared.parse(parser, argv, epochs=1, layers=1)
    learn, test = load(arguments.seed)
    tokens = learn[0].shape[1]
    print(f"{len(learn[0])} digits to learn from and {len(test[0])} to test on, {tokens} patches each")
    models = shared.twins(
        lambda layers: build_model(layers, tokens, arguments.width, arguments.heads, arguments.layers), arguments.seed
    )
    return shared.compare(models, learn, test, classification, arguments)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
# %% [markdown]
"""How many heads: the same width in one head or in several, and where each of them looks.

    python examples/multi_head.py                          # about a minute
    python examples/multi_head.py --epochs 40 --width 64

The data are the handwritten digits that ship with scikit-learn, read as eight rows of eight pixels. One layer of
`attn_ops.layers.MultiHeadAttention` lets every row look at all others; with more heads each of them has a smaller
part of the width, and the layer has as many weights as before.

    rows -> Dense -> + positions -> MultiHeadAttention -> + -> norm -> average -> Dense
"""

# %%
from __future__ import annotations

import attn_ops
import keras
import numpy as np
import shared
from sequence_classification import classification, load_digits, step_times

HEADS = (1, 2, 4, 8)


# %% The model
def build_model(layers, heads: int, width: int, rows: int = 8) -> keras.Model:
    """``layers`` is `attn_ops.layers` or `keras.layers`."""
    inputs = keras.Input((rows, 8))
    x = shared.Positions(rows, name="positions")(keras.layers.Dense(width, name="rows")(inputs))
    y = layers.MultiHeadAttention(heads, width // heads, name="heads")(x, x)
    x = keras.layers.LayerNormalization()(keras.layers.Add()([x, y]))
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(x), name=f"heads_{heads}")
    model.compile(optimizer=keras.optimizers.Adam(2e-3), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


# %% Where each head looks
def weights(model: keras.Model, digits: np.ndarray) -> np.ndarray:
    """`[digits, heads, rows, rows]`: how much each row takes from each other one."""
    x = model.get_layer("positions")(model.get_layer("rows")(digits))
    _, scores = model.get_layer("heads")(x, x, return_attention_scores=True)
    return keras.ops.convert_to_numpy(scores)


def tell(scores: np.ndarray) -> None:
    """Of each head: how far from its own row it looks, and at how many rows (the exponential of the entropy)."""
    rows = np.arange(scores.shape[-1])
    distance = (scores * np.abs(rows[:, None] - rows)).sum(-1).mean((0, 2))
    many = np.exp(-(scores * np.log(np.maximum(scores, 1e-30))).sum(-1)).mean((0, 2))
    print("\nhead   rows away   rows looked at")
    for head, (away, at) in enumerate(zip(distance, many, strict=True), 1):
        print(f"{head:>4}{away:>12.1f}{at:>17.1f}")


# %% Models of one head and of several
def main(argv=None) -> dict[str, dict[str, float]]:
    arguments = shared.parse(shared.parser(__doc__, epochs=15, batch_size=64, width=32), argv, epochs=1)
    (x, y), test = load_digits(arguments.seed)
    if arguments.quick:
        x, y = x[:256], y[:256]
    models = []
    for heads in HEADS[:2] if arguments.quick else HEADS:
        keras.utils.set_random_seed(arguments.seed)
        models.append(build_model(attn_ops.layers, heads, arguments.width))
        shared.train(models[-1], x, y, arguments)
    batch = x[: arguments.batch_size], y[: arguments.batch_size]
    results = {model.name: classification(model, *test) for model in models}
    times = step_times(models, *batch, 3 if arguments.quick else 20)
    for model, time in zip(models, times, strict=True):
        stock = build_model(keras.layers, model.get_layer("heads").num_heads, arguments.width)
        stock.set_weights(model.get_weights())
        difference = np.abs(model.predict_on_batch(test[0]) - stock.predict_on_batch(test[0])).max()
        results[model.name] |= {"weights": model.count_params(), "training step, ms": 1e3 * time}
        results[model.name]["stock Keras differs by"] = float(difference)
    shared.show(results)
    tell(weights(models[-1], test[0]))
    return results


if __name__ == "__main__":
    main()

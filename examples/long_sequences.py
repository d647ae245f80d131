#!/usr/bin/env python3
# %% [markdown]
"""Learns from sequences of thousands of tokens: what a training step takes, in time and memory, against stock Keras.

    python examples/long_sequences.py                      # about a minute on two cores
    python examples/long_sequences.py --length 8192

The text is Python's manual, some 470 kB of English that ship with Python, read byte by byte. The model predicts each
next byte from all that stand before it in the sequence:

    bytes -> Embedding -> + positions -> 2 x [norm, MultiHeadAttention, norm, Dense, Dense] -> norm -> Dense(256)

The stock layer holds all scores of a sequence, length x length for each head and layer, and holds them again for the
gradients; the kernels hold none. Both models begin with the same weights, take the same steps and learn the same.
"""

# %%
from __future__ import annotations

import keras
import numpy as np
import shared
from sequence_classification import step_times
from text_generation import BYTES, load_text


# %% Sequences, and the bytes that follow
def load(length: int, count: int, seed: int):
    """x and y, `[count, length]`."""
    text = load_text()
    starts = np.random.default_rng(seed).integers(0, len(text) - length, count)
    pieces = text[starts[:, None] + np.arange(length + 1)]
    return pieces[:, :-1], pieces[:, 1:]


# %% The model
def build_model(layers, length: int, width: int, heads: int, depth: int) -> keras.Model:
    """``layers`` is `attn_ops.layers` or `keras.layers`."""
    inputs = keras.Input((length,), dtype="int32")
    x = shared.Positions(length)(keras.layers.Embedding(BYTES, width)(inputs))
    for _ in range(depth):
        x = shared.transformer_block(layers, x, heads, use_causal_mask=True)
    model = keras.Model(inputs, keras.layers.Dense(BYTES)(keras.layers.LayerNormalization()(x)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(3e-3), loss=loss)
    return model


# %% Memory, time, and what is learnt
def main(argv=None) -> dict[str, dict[str, float]]:
    parser = shared.parser(
        __doc__, length=2048, batch_size=1, steps=12, timed=5, width=128, heads=4, layers=2, epochs=1
    )
    arguments = shared.parse(parser, argv, length=256, steps=3, timed=3, width=32, layers=1)
    x, y = load(arguments.length, arguments.steps * arguments.batch_size, arguments.seed)
    models = shared.twins(
        lambda layers: build_model(layers, arguments.length, arguments.width, arguments.heads, arguments.layers),
        arguments.seed,
    )
    print(f"{arguments.length:,} tokens in a sequence, {arguments.batch_size} in a step")
    results = {}
    for model in models:
        shared.train(model, x, y, arguments, shuffle=False)
        bits = model.history.history["loss"][-1] / np.log(2)
        results[model.name] = {"bits per byte, mean of all steps": bits}
    batch = [shared.first(data, arguments.batch_size) for data in (x, y)]
    for model in models:
        results[model.name]["memory of a training step, MB"] = shared.step_memory(model, *batch)
    for scores, time in zip(results.values(), step_times(models, *batch, arguments.timed), strict=True):
        scores["training step, ms"] = 1e3 * time
    shared.show(results, f"{arguments.length:,} tokens")
    ours, stock = results.values()
    for name in ("training step, ms", "memory of a training step, MB"):
        print(f"{name.partition(',')[0]}: {stock[name] / max(ours[name], 1e-9):.1f} times as much with stock Keras")
    return results


if __name__ == "__main__":
    main()

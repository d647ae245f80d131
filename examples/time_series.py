#!/usr/bin/env python3
# %% [markdown]
"""Predicts the next values of a measured series: regression with self-attention, by mean squared and absolute error.

    python examples/time_series.py                         # about a minute
    python examples/time_series.py --window 128 --ahead 16

The data ship with matplotlib: 12,000 samples of the potential of a cell's membrane. From a window of them the next ones
are predicted, as differences from the last one in the window. Windows to learn from lie before those to test on.

    samples -> Dense -> + positions -> causal self-attention block -> norm -> the last position -> Dense

Beside ours and the same model of stock Keras stands the guess that all stays as it is.
"""

# %%
from __future__ import annotations

import pathlib

import keras
import matplotlib
import numpy as np
import shared


# %% Windows of the series
def load(window: int, ahead: int, step: int = 4):
    """(x, y) to learn from, and (x, y) to test on: the last fifth of the series.

    x is `[windows, window, 1]`, with mean 0 and deviation 1 over what is learnt from; y is `[windows, ahead]`: what
    comes behind, less the window's last value. A window begins ``step`` samples behind the one before.
    """
    path = pathlib.Path(matplotlib.get_data_path()) / "sample_data" / "membrane.dat"
    series = np.fromfile(path, np.float32)
    cut = len(series) * 4 // 5
    series = (series - series[:cut].mean()) / series[:cut].std()

    def windows(part):
        starts = np.arange(0, len(part) - window - ahead + 1, step)[:, None]
        x, y = part[starts + np.arange(window)], part[starts + window + np.arange(ahead)]
        return x[..., None], y - x[:, -1:]

    return windows(series[:cut]), windows(series[cut:])


# %% The model
def build_model(layers, window: int, ahead: int, width: int, heads: int) -> keras.Model:
    """``layers`` is `attn_ops.layers` or `keras.layers`."""
    inputs = keras.Input((window, 1))
    x = shared.Positions(window)(keras.layers.Dense(width)(inputs))
    x = shared.transformer_block(layers, x, heads, use_causal_mask=True)
    x = keras.layers.LayerNormalization()(x)[:, -1]
    model = keras.Model(inputs, keras.layers.Dense(ahead, kernel_initializer="zeros")(x))
    model.compile(optimizer=keras.optimizers.Adam(1e-3), loss="mse", metrics=["mae"])
    return model


def errors(difference: np.ndarray) -> dict[str, float]:
    return {
        "mean squared error": float((difference**2).mean()),
        "mean absolute error": float(np.abs(difference).mean()),
    }


def score(model: keras.Model, x, y) -> dict[str, float]:
    return errors(model.predict(x, verbose=0) - y)


# %% Both models learn
def main(argv=None) -> dict[str, dict[str, float]]:
    parser = shared.parser(__doc__, epochs=8, batch_size=64, window=64, ahead=8, width=32, heads=4)
    arguments = shared.parse(parser, argv, epochs=1)
    learn, test = load(arguments.window, arguments.ahead)
    print(f"{len(learn[0])} windows to learn from, {len(test[0])} later ones to test on")
    models = shared.twins(
        lambda layers: build_model(layers, arguments.window, arguments.ahead, arguments.width, arguments.heads),
        arguments.seed,
    )
    results = shared.compare(models, learn, test, score, arguments)
    results["as it is"] = errors(test[1])
    shared.show({"as it is": results["as it is"]})
    return results


if __name__ == "__main__":
    main()

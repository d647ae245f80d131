#!/usr/bin/env python3
# %% [markdown]
"""Classifies handwritten digits, read as sequences of pixel rows, with an LSTM and self-attention.

    python examples/sequence_classification.py                     # under a minute
    python examples/sequence_classification.py --epochs 60 --plot weights.png

The data are the 1,797 digits of 8 x 8 pixels that ship with scikit-learn: 8 steps of 8 features, 10 classes. The
model is the one of attention tutorials:

    Input -> LSTM(return_sequences=True) -> attn_ops.layers.SelfAttention -> average over time -> Dense(softmax)

The same model made of stock Keras layers, from the same initial weights, is trained next to it, to compare what the
two predict and what a training step costs. At 8 steps attention is a small part of a step: this shows that the swap
is free and right. benchmarks/ shows what it saves where sequences are long.
"""

# %%
from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from sklearn import datasets, metrics, model_selection

import attn_ops
from attn_ops.visualize import plot_attention_weights

UNITS = 64
CLASSES = 10


# %% The digits
def load_digits(seed: int):
    """(x, y) of the training set and of the test set (a fifth); x is [digits, 8 steps, 8 features] in [0, 1]."""
    digits = datasets.load_digits()
    x = (digits.images / 16.0).astype(np.float32)
    x_train, x_test, y_train, y_test = model_selection.train_test_split(
        x, digits.target, test_size=0.2, stratify=digits.target, random_state=seed
    )
    return (x_train, y_train), (x_test, y_test)


# %% The two models
def attn_ops_attention(sequence):
    return attn_ops.layers.SelfAttention(UNITS, name="self_attention")(sequence)


def stock_attention(sequence):
    query, key, value = (
        keras.layers.Dense(UNITS, use_bias=False, name=name)(sequence) for name in ("W_q", "W_k", "W_v")
    )
    return keras.layers.Attention(name="attention")([query, value, key])


def build_model(attention, input_shape, name: str) -> keras.Model:
    inputs = keras.Input(input_shape)
    sequence = keras.layers.LSTM(UNITS, return_sequences=True, name="lstm")(inputs)
    context = attention(sequence)
    pooled = keras.layers.GlobalAveragePooling1D(name="average")(context)
    outputs = keras.layers.Dense(CLASSES, activation="softmax", name="digit")(pooled)
    model = keras.Model(inputs, outputs, name=name)
    model.compile(optimizer=keras.optimizers.Adam(3e-3), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def build_pair(input_shape, seed: int) -> tuple[keras.Model, keras.Model]:
    """The model with attn_ops and the stock one, with the same initial weights."""
    keras.utils.set_random_seed(seed)
    ours = build_model(attn_ops_attention, input_shape, "attn_ops")
    stock = build_model(stock_attention, input_shape, "stock_keras")
    for layer in stock.layers:
        if layer.name in ("W_q", "W_k", "W_v"):
            layer.set_weights([getattr(ours.get_layer("self_attention"), layer.name)])
        elif layer.weights:
            layer.set_weights(ours.get_layer(layer.name).get_weights())
    return ours, stock


# %% What they learn, and what a step costs
def train_and_evaluate(model: keras.Model, train, test, arguments) -> dict[str, float]:
    """Scores on the test set."""
    print(f"\nTraining {model.name}")
    keras.utils.set_random_seed(arguments.seed)  # the same order of the data for both
    model.fit(*train, epochs=arguments.epochs, batch_size=arguments.batch_size, validation_split=0.1, verbose=1)
    return classification(model, *test)


def classification(model: keras.Model, x, y) -> dict[str, float]:
    """How good the probabilities are that a model gives; precision, recall and F1 are means over the classes."""
    probabilities = model.predict(x, verbose=0)
    predicted = probabilities.argmax(-1)
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(y, predicted, average="macro", zero_division=0)
    loss = -np.log(np.maximum(probabilities[np.arange(len(y)), y], 1e-7)).mean()
    scores = {"accuracy": (predicted == y).mean(), "precision": precision, "recall": recall, "F1": f1, "loss": loss}
    return {name: float(score) for name, score in scores.items()}


def step_times(models, x, y, steps: int) -> list[float]:
    """Median seconds of a training step of each model, taken in turns on one batch."""
    times = [[] for _ in models]
    for step in range(steps + 5):
        for model, sample in zip(models, times, strict=True):
            begin = time.perf_counter()
            model.train_on_batch(x, y)
            if step >= 5:  # the first ones trace
                sample.append(time.perf_counter() - begin)
    return [statistics.median(sample) for sample in times]


# %% Which rows a digit's rows attend to
def plot(model: keras.Model, digit, label: int, path: str) -> None:
    """Which rows of one digit the trained model attends to."""
    lstm, attention = model.get_layer("lstm"), model.get_layer("self_attention")
    _, weights = attention(lstm(digit[None]), return_attention_scores=True)
    rows = [f"row {row}" for row in range(digit.shape[0])]
    figure = plot_attention_weights(weights, rows, title=f"A handwritten {label}: attention between its pixel rows")
    figure.savefig(path, dpi=150)
    print(f"\nAttention weights of a test digit: {path}")


# %% All of it
def main(argv=None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE", help="save a picture of attention weights (needs matplotlib)")
    parser.add_argument("--quick", action="store_true", help="2 epochs and few timed steps, to see that it runs")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.epochs = 2

    train, test = load_digits(arguments.seed)
    input_shape = train[0].shape[1:]
    print(f"{len(train[0])} digits to learn from and {len(test[0])} to test on, {input_shape} each")

    ours, stock = build_pair(input_shape, arguments.seed)
    ours.summary()
    sequence = tf.TensorSpec((arguments.batch_size, input_shape[0], UNITS))
    print(f"Self-attention runs as\n{attn_ops.explain(sequence, sequence, sequence, scale=1.0)}")

    x = test[0]
    difference = np.abs(ours.predict(x, verbose=0) - stock.predict(x, verbose=0)).max()
    results = {model.name: train_and_evaluate(model, train, test, arguments) for model in (ours, stock)}
    if arguments.plot:
        plot(ours, test[0][0], test[1][0], arguments.plot)
    batch = [array[: arguments.batch_size] for array in train]
    times = step_times((ours, stock), *batch, steps=10 if arguments.quick else 200)
    for scores, seconds in zip(results.values(), times, strict=True):
        scores["step_ms"] = 1e3 * seconds

    print(f"\n{'on the test set':<28}" + "".join(f"{name:>14}" for name in results))
    for score in ("accuracy", "precision", "recall", "F1", "loss"):
        print(f"{score:<28}" + "".join(f"{scores[score]:>14.4f}" for scores in results.values()))
    print(f"{'training step, median ms':<28}" + "".join(f"{scores['step_ms']:>14.2f}" for scores in results.values()))
    print(f"Largest difference of their predictions before training: {difference:.1e}")
    return results


if __name__ == "__main__":
    main([] if "ipykernel" in sys.modules else None)  # a notebook has no command line

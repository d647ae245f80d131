"""What the examples share: their options, pairs of models, what a step costs, and a table of it.

A pair is one model twice, with attention of `attn_ops.layers` and of `keras.layers`, from the same initial weights:
both learn from the same data in the same order, and what they give and cost is printed side by side.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from sequence_classification import step_times

import attn_ops
from attn_ops.cli import peak_memory


def parser(doc: str, **defaults) -> argparse.ArgumentParser:
    """Of an example: an option for each of the defaults, ``--seed`` and ``--quick``."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        made.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help="default: %(default)s"
        )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--quick", action="store_true", help="little of everything, to see that it runs")
    return made


def parse(made: argparse.ArgumentParser, argv=None, **quick) -> argparse.Namespace:
    """The options of a command line, or their defaults in a notebook; ``quick``: what --quick makes of them."""
    arguments = made.parse_args([] if argv is None and "ipykernel" in sys.modules else argv)
    if arguments.quick:
        vars(arguments).update(quick)
    return arguments


class Positions(keras.layers.Layer):
    """Adds a learned vector for each position to `[batch, length, width]`, of up to ``most`` positions."""

    def __init__(self, most: int, **kwargs):
        super().__init__(**kwargs)
        self.most = most
        self.supports_masking = True

    def build(self, shape):
        self.table = self.add_weight(shape=(self.most, shape[-1]), initializer="glorot_uniform", name="table")

    def call(self, x):
        return x + self.table[: keras.ops.shape(x)[1]]

    def get_config(self):
        return {**super().get_config(), "most": self.most}


def transformer_block(layers, x, heads: int, context=None, **call):
    """Attention of a module of layers, then two Dense ones, each around a residual; `[batch, length, width]`.

    With a ``context`` the keys and values come from that; ``call`` are arguments of the attention layer's call.
    """
    width = x.shape[-1]
    y = keras.layers.LayerNormalization()(x)
    y = layers.MultiHeadAttention(heads, width // heads)(y, y if context is None else context, **call)
    x = keras.layers.Add()([x, y])  # unlike +, it hands masks on
    y = keras.layers.Dense(2 * width, activation="gelu")(keras.layers.LayerNormalization()(x))
    return keras.layers.Add()([x, keras.layers.Dense(width)(y)])


def twins(build, seed: int) -> tuple[keras.Model, keras.Model]:
    """``build(attn_ops.layers)`` and ``build(keras.layers)``, with the same initial weights."""
    keras.utils.set_random_seed(seed)
    ours, stock = build(attn_ops.layers), build(keras.layers)
    stock.set_weights(ours.get_weights())
    ours.name, stock.name = "attn_ops", "stock_keras"
    return ours, stock


def train(model: keras.Model, x, y, arguments, **fit) -> None:
    """With Keras's progress bar, in the same order for every model."""
    print(f"\nTraining {model.name}")
    keras.utils.set_random_seed(arguments.seed)
    model.fit(x, y, epochs=arguments.epochs, batch_size=arguments.batch_size, verbose=1, **fit)


def first(data, count: int):
    """The first items of an array, or of each array of a list."""
    return [array[:count] for array in data] if isinstance(data, list) else data[:count]


def step_memory(model: keras.Model, x, y) -> float:
    """MB that a training step takes beyond what is there before and after it."""
    model.train_on_batch(x, y)  # traces, and makes the optimizer's variables
    peak_memory.give_back()
    return peak_memory.growth(lambda: model.train_on_batch(x, y)) / 1e6


def compare(models, learn, test, score, arguments) -> dict[str, dict[str, float]]:
    """Trains each model, and prints what ``score(model, x, y)`` says of it and what a step costs.

    Args:
        models: A pair, see `twins`, or one alone.
        learn: (x, y) to learn from.
        test: (x, y) to score on.
        score: A function that gives numbers by name.
        arguments: epochs, batch_size, seed, quick.

    Returns:
        The numbers by the name of the model.
    """
    print(attn_ops.explain(models[0]))
    if arguments.quick:
        learn = [first(data, 8 * arguments.batch_size) for data in learn]
    results = {}
    for model in models:
        train(model, *learn, arguments)
        results[model.name] = score(model, *test)
    x, y = (first(data, arguments.batch_size) for data in learn)
    for scores, time in zip(results.values(), step_times(models, x, y, 3 if arguments.quick else 20), strict=True):
        scores["training step, ms"] = 1e3 * time
    show(results)
    return results


def show(results: dict[str, dict[str, float]], title: str = "on what they have not seen") -> None:
    """A column for each of the results, a row for each of the numbers in them."""
    names = list(dict.fromkeys(name for scores in results.values() for name in scores))
    print(f"\n{title:<34}" + "".join(f"{column:>14}" for column in results))
    for name in names:
        cells = [f"{scores[name]:,.4g}" if name in scores else "" for scores in results.values()]
        print(f"{name:<34}" + "".join(f"{cell:>14}" for cell in cells))

"""What a call of given shapes, or a saved model, would run, in each place where it can stand."""

from __future__ import annotations

import dataclasses
import json

import click

from attn_ops.cli import frameworks
from attn_ops.cli.table import table

_BAD = 1


def of_call(query, key, value, bias, mask, dtype, as_json=False, **options) -> int:
    """Prints what a call of these shapes runs by context; returns 1 for arguments that no call can have."""
    tf = frameworks.tensorflow()

    from attn_ops import Explanation, explain

    def spec(shape, dtype=dtype):
        return None if shape is None else tf.TensorSpec(shape, dtype)

    key = key or query

    def ask():
        arrays = {"bias": spec(bias), "mask": spec(mask, "bool")}
        return explain(spec(query), spec(key), spec(value or key), **arrays, **options)

    def ask_there():
        """Where it stands it may be refused what eager calls get: a choice that was asked for."""
        try:
            return ask()
        except ValueError as error:
            return Explanation("none", (str(error),))

    try:
        eager = ask()
    except (TypeError, ValueError) as error:
        click.echo(error, err=True)
        return _BAD
    found = {
        "eager": eager,
        "graph": frameworks.traced(ask_there),
        "XLA": frameworks.traced(ask_there, jit_compile=True),
        "export": frameworks.exported(ask_there),
    }
    devices = {context: explanation.device or _device(tf, context) for context, explanation in found.items()}
    if as_json:
        told = {name: {**dataclasses.asdict(x), "device": devices[name]} for name, x in found.items()}
        click.echo(json.dumps(told, indent=2))
        return 0
    rows = [
        (name, devices[name], x.implementation + (f" ({x.form})" if x.form else ""), "; ".join(x.reasons))
        for name, x in found.items()
    ]
    click.echo(table(("context", "device", "implementation", "reason"), rows))
    for note in dict.fromkeys(note for explanation in found.values() for note in explanation.notes):
        click.echo(f"note: {note}")
    return 0


def _device(tf, context):
    """Whose operations those are, where they are not kernels of ours."""
    if context == "export":
        return "any"  # of whoever loads it
    return "gpu" if tf.config.list_logical_devices("GPU") else "cpu"


def of_model(path, convert, as_json=False) -> int:
    """Prints what each attention layer of a saved Keras model runs; returns 1 where it cannot be loaded."""
    frameworks.tensorflow()
    import keras

    import attn_ops

    try:
        model = keras.saving.load_model(path, compile=False)
    except (OSError, TypeError, ValueError) as error:
        click.echo(f"cannot load {path}: {error}", err=True)
        return _BAD
    explanation = attn_ops.explain(attn_ops.convert(model) if convert else model)
    click.echo(json.dumps(explanation.to_dict(), indent=2) if as_json else explanation)
    return 0

"""What a call of given shapes, or a saved model, would run, in each place where it can stand."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import click

from attn_ops.cli import frameworks
from attn_ops.cli.table import table

_BAD = 1
_DTYPES = ("float32", "float16", "bfloat16", "float64")


class _Shape(click.ParamType):
    """'1,?,8,64' as (1, None, 8, 64)."""

    name = "shape"

    def convert(self, value, param, ctx):
        try:
            shape = tuple(None if part.strip() in ("?", "None") else int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no shape such as 1,2048,12,64 (? for unknown)", param, ctx)
        if any(n is not None and not 0 <= n < 2**63 for n in shape):
            self.fail(f"dimensions must be from 0 to 2^63 - 1, got {value!r}", param, ctx)
        return shape


class _ShapeOrModel(_Shape):
    """A shape, or the path of a Keras model."""

    name = "shape or model"

    def convert(self, value, param, ctx):
        path = pathlib.Path(value)
        return path if path.suffix in (".keras", ".h5") else super().convert(value, param, ctx)

    def shell_complete(self, ctx, param, incomplete):
        return click.Path().shell_complete(ctx, param, incomplete)


@click.command("explain")
@click.argument("query", type=_ShapeOrModel())
@click.argument("key", type=_Shape(), required=False)
@click.argument("value", type=_Shape(), required=False)
@click.option("--dtype", type=click.Choice(_DTYPES), default="float32", show_default=True,
    help="Of query, key, value and bias.")  # fmt: skip
@click.option("--bias", type=_Shape(), help="Of this shape.")
@click.option("--mask", type=_Shape(), help="A boolean one, of this shape.")
@click.option("--is-causal", is_flag=True)
@click.option("--window", type=int, nargs=2, metavar="LEFT RIGHT")
@click.option("--layout", type=click.Choice(["BSHD", "BHSD"]), default="BSHD", show_default=True)
@click.option("--implementation", type=click.Choice(["fused", "composite", "reference"]), help="Ask for this one.")
@click.option("--convert", is_flag=True, help="Of a model: after attn_ops.convert.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(query, as_json, convert, **options):
    """What a call, or a model, would run, and why.

    QUERY, KEY and VALUE are shapes, such as 1,2048,12,64 (? for an unknown dimension; KEY is QUERY's and VALUE is KEY's
    when left out). It tells what runs in eager calls, in graphs (tf.function), in functions that XLA compiles, and in
    exports. Or QUERY is the file of a Keras model, and it tells what each attention layer in it runs.
    """
    context = click.get_current_context()
    of_one_model = isinstance(query, pathlib.Path)
    for option in context.command.params:
        said = context.get_parameter_source(option.name) is click.core.ParameterSource.COMMANDLINE
        if said and option.name not in ("query", "as_json") and of_one_model != (option.name == "convert"):
            what = option.opts[0] if option.opts[0].startswith("-") else option.opts[0].upper()
            raise click.UsageError(f"{what} does not go with {'the file of a model' if of_one_model else 'shapes'}")
    if of_one_model:
        return of_model(query, convert, as_json)
    return of_call(query, as_json=as_json, **options)


def of_call(query, key, value, bias, mask, dtype, as_json=False, **options) -> int:
    """Prints what a call of these shapes runs by context; returns 1 for arguments that no call can have."""
    key = key or query
    shapes = {"query": query, "key": key, "value": value or key, "bias": bias, "mask": mask}
    shapes = {name: (shape, "bool" if name == "mask" else dtype) for name, shape in shapes.items() if shape is not None}
    try:
        found = (_in_tensorflow if frameworks.has_tensorflow() else _in_jax)(shapes, options)
    except (TypeError, ValueError) as error:
        click.echo(error, err=True)
        return _BAD
    if as_json:
        told = {name: {**dataclasses.asdict(x), "device": device} for name, (device, x) in found.items()}
        click.echo(json.dumps(told, indent=2))
        return 0
    rows = [
        (name, device, x.implementation + (f" ({x.form})" if x.form else ""), "; ".join(x.reasons))
        for name, (device, x) in found.items()
    ]
    click.echo(table(("context", "device", "implementation", "reason"), rows))
    for note in dict.fromkeys(note for _, x in found.values() for note in x.notes):
        click.echo(f"note: {note}")
    return 0


def _in_tensorflow(shapes, options) -> dict:
    """By context: the device, and the explanation."""
    tf = frameworks.tensorflow()

    from attn_ops import Explanation, explain

    def ask():
        specs = {name: tf.TensorSpec(*of) for name, of in shapes.items()}
        return explain(**specs, **options)

    def ask_there():
        """Where it stands it may be refused what eager calls get: a choice that was asked for."""
        try:
            return ask()
        except ValueError as error:
            return Explanation("none", (str(error),))

    found = {
        "eager": ask(),
        "graph": frameworks.traced(ask_there),
        "XLA": frameworks.traced(ask_there, jit_compile=True),
        "export": frameworks.exported(ask_there),
    }
    # Whose operations those are, where they are not kernels of ours.
    gpu = "gpu" if tf.config.list_logical_devices("GPU") else "cpu"
    others = {"export": "any"}  # of whoever loads it
    return {context: (x.device or others.get(context, gpu), x) for context, x in found.items()}


def _in_jax(shapes, options) -> dict:
    """The same of what there is without TensorFlow."""
    jax = frameworks.jax()

    from attn_ops.jax import explain

    unknown = [name for name, (shape, _) in shapes.items() if None in shape]
    if unknown:
        raise ValueError(f"explain: JAX has no unknown dimensions: {unknown[0]} has one, and TensorFlow is not installed")
    with frameworks.jax_in_float64():
        found = explain(**{name: jax.ShapeDtypeStruct(*of) for name, of in shapes.items()}, **options)
        return {"JAX": (found.device or jax.default_backend(), found)}


def of_model(path, convert, as_json=False) -> int:
    """Prints what each attention layer of a saved Keras model runs; returns 1 where it cannot be loaded."""
    keras = frameworks.keras()

    import attn_ops

    try:
        model = keras.saving.load_model(path, compile=False)
    except (OSError, TypeError, ValueError) as error:
        click.echo(f"cannot load {path}: {error}", err=True)
        return _BAD
    explanation = attn_ops.explain(attn_ops.convert(model) if convert else model)
    click.echo(json.dumps(explanation.to_dict(), indent=2) if as_json else explanation)
    return 0

"""Five shapes of attention, measured here: ours in a graph against Keras's in a graph and compiled by XLA."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import warnings

import click
import numpy as np

from attn_ops import __version__, kernels
from attn_ops.cli import checkout, frameworks, info, interleave
from attn_ops.cli.table import table

_FAILED = 1
_TOLERANCE = 2e-4  # of the largest value, between two that both sum in float32


@dataclasses.dataclass(frozen=True)
class _Shape:
    """query is [batch, rows, heads, dim], key and value [batch, keys, kv_heads, dim], in float32."""

    what: str
    batch: int
    heads: int
    kv_heads: int
    rows: int
    keys: int
    dim: int
    is_causal: bool = False
    training: bool = False

    def __str__(self):
        heads = f"{self.heads}/{self.kv_heads}" if self.kv_heads != self.heads else self.heads
        keys = f"{self.rows}x{self.keys}" if self.rows != self.keys else self.keys
        return f"({self.batch},{heads},{keys},{self.dim})" + " causal" * self.is_causal

    def quick(self):
        shorter = {name: -(-getattr(self, name) // 8) for name in ("rows", "keys")}
        return dataclasses.replace(self, batch=1, **shorter)


_SHAPES = (
    _Shape("BERT base", 8, 12, 12, 128, 128, 64),
    _Shape("BERT base, training", 2, 12, 12, 512, 512, 64, training=True),
    _Shape("GPT-2", 1, 12, 12, 1024, 1024, 64, is_causal=True),
    _Shape("long, training", 1, 4, 4, 2048, 2048, 64, is_causal=True, training=True),
    _Shape("Llama 8B, one token", 1, 32, 8, 1, 4096, 128),
)
_COLUMNS = ("attn_ops", "Keras graph", "Keras XLA")


@dataclasses.dataclass(frozen=True)
class _Effort:
    """Of each shape."""

    rounds: int
    seconds: float
    turn: float


_FULL = _Effort(rounds=15, seconds=4.0, turn=interleave.TURN)
_QUICK = _Effort(rounds=3, seconds=0.1, turn=0.002)


class _Bench(click.Command):
    """With --report or --device all that follows is for the report in a checkout, which has options of its own."""

    def parse_args(self, ctx, args):
        if checkout.asked_for(args):
            ctx.params = {"report": tuple(args), "threads": None, "quick": False}
            return []
        return super().parse_args(ctx, args)


@click.command("bench", cls=_Bench, epilog=checkout.EPILOG)
@click.option("--threads", type=click.IntRange(min=1), help="Of every implementation (default: all processors).")
@click.option("--quick", is_flag=True, help="Short shapes and few rounds, to see that it runs.")
def command(threads, quick, report=()):
    """Measure five shapes here, against Keras (a minute)."""
    if report:
        return checkout.report(report)
    return run(threads, quick)


def run(threads: int | None, quick: bool) -> int:
    """Prints times of the five shapes; returns 1 where answers differ or something cannot run."""
    threads = threads or len(os.sched_getaffinity(0))
    tf = frameworks.tensorflow()
    reason = kernels.unavailable_reason()
    if reason is not None:
        click.echo(f"bench measures the kernels, and {reason}", err=True)
        return _FAILED
    with contextlib.suppress(RuntimeError):  # where this process has started its pools they stay what they are
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    shapes = [shape.quick() for shape in _SHAPES] if quick else _SHAPES
    rows = []
    with tf.device("CPU"), _progress(shapes) as steps:
        for shape in steps:
            try:
                rows.append(_row(tf, shape, _QUICK if quick else _FULL))
            except AssertionError as error:
                click.echo(f"{shape}: attn_ops and Keras must agree: {error}", err=True)
                return _FAILED
    import keras

    click.echo(f"{info.machine()}, threads: {threads}")
    click.echo(f"attn_ops {__version__}, TensorFlow {tf.__version__}, Keras {keras.__version__}, float32")
    click.echo()
    head = ("", "shape", *(f"{name}, ms" for name in _COLUMNS), "speed-up")
    click.echo(table(head, rows, numbers=head[2:]))
    click.echo()
    click.echo("Shapes are (batch, heads, length, head_dim). Training: forward and backward. Times are medians by the")
    click.echo("clock, taken in turns; the speed-up is over the faster of Keras's two.")
    if quick:
        click.echo("Quick: short shapes and few rounds, to see that it runs. These figures are not to be quoted.")
    return 0


def _progress(shapes):
    """The shapes, with a bar on a terminal."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext(shapes)
    return click.progressbar(
        shapes, label="measuring", file=sys.stderr, show_eta=False, show_pos=True, item_show_func=lambda x: x and str(x)
    )


def _row(tf, shape, effort):
    steps = _steps(tf, shape)
    ours, *others = ([x.numpy() for x in tf.nest.flatten(step())] for step in steps.values())
    for other in others:
        for found, expected in zip(other, ours, strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=_TOLERANCE * np.abs(expected).max())
    samples, _, _ = interleave.run(steps, effort.rounds, effort.seconds, turn=effort.turn)
    times = [samples[name].median("wall") for name in _COLUMNS]
    return (shape.what, str(shape), *(_milliseconds(time) for time in times), f"{min(times[1:]) / times[0]:.1f}x")


def _milliseconds(seconds):
    return f"{1e3 * seconds:,.0f}" if seconds >= 1 else f"{1e3 * seconds:.3g}"


def _steps(tf, shape):
    """What to time, by column: functions without arguments that have been traced."""
    import keras

    from attn_ops import scaled_dot_product_attention

    random = np.random.default_rng(0)
    rows = (shape.batch, shape.rows, shape.heads, shape.dim)
    keys = (shape.batch, shape.keys, shape.kv_heads, shape.dim)
    inputs = [tf.constant(random.standard_normal(x, np.float32)) for x in (rows, keys, keys, rows)]

    def step_of(attend):
        def step(query, key, value, d_out):
            if not shape.training:
                return attend(query, key, value, is_causal=shape.is_causal)
            with tf.GradientTape() as tape:
                tape.watch((query, key, value))
                out = attend(query, key, value, is_causal=shape.is_causal)
            return out, *tape.gradient(out, (query, key, value), output_gradients=d_out)

        return step

    ours, stock = step_of(scaled_dot_product_attention), step_of(keras.ops.dot_product_attention)
    functions = (tf.function(ours), tf.function(stock), tf.function(stock, jit_compile=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Keras, about flash attention
        concrete = [function.get_concrete_function(*inputs) for function in functions]
    return {
        name: (lambda function=function: function(*inputs)) for name, function in zip(_COLUMNS, concrete, strict=True)
    }

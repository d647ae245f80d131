"""The command line `attn-ops`: what it takes. What a command does is in the module of its name."""

from __future__ import annotations

import pathlib
import sys

import click

from attn_ops import __version__
from attn_ops.cli import checkout

_COMPLETE = "_ATTN_OPS_COMPLETE"  # by which click is asked for completions
_INTERRUPTED = 130  # as shells have it

_EXIT_CODES = """\b
Exit status:
  0    all right
  1    the answer is bad: selftest found a wrong result, explain a call that
       cannot be made or a file that cannot be read, bench answers that differ
  2    the command line is wrong, or something that it needs is not installed
  3    a row of the report is slower than --fail-if-slower allows
  130  interrupted"""


class _Shape(click.ParamType):
    """'1,?,8,64' as (1, None, 8, 64)."""

    name = "shape"

    def convert(self, value, param, ctx):
        try:
            return tuple(None if part.strip() in ("?", "None") else int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no shape such as 1,2048,12,64 (? for unknown)", param, ctx)


class _ShapeOrModel(_Shape):
    """A shape, or the path of a Keras model."""

    name = "shape or model"

    def convert(self, value, param, ctx):
        path = pathlib.Path(value)
        return path if path.suffix in (".keras", ".h5") else super().convert(value, param, ctx)

    def shell_complete(self, ctx, param, incomplete):
        return click.Path().shell_complete(ctx, param, incomplete)


class _Bench(click.Command):
    """With --report or --device all that follows is for the report in a checkout, which has options of its own."""

    def parse_args(self, ctx, args):
        if checkout.asked_for(args):
            ctx.params = {"report": tuple(args), "threads": None, "quick": False}
            return []
        return super().parse_args(ctx, args)


@click.group(
    "attn-ops",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EXIT_CODES,
)
@click.version_option(__version__, "-V", "--version", message="attn_ops %(version)s")
@click.pass_context
def cli(context):
    """Fused attention for TensorFlow, Keras and JAX: what is here, whether it is right, what runs, how fast it is."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def info(as_json):
    """Versions, kernels, and what is missing and why."""
    from attn_ops.cli import info

    return info.show(as_json)


@cli.command()
def selftest():
    """Compare all implementations with the reference."""
    from attn_ops.cli import selftest

    return selftest.run()


@cli.command()
def matrix():
    """Which implementation takes which feature."""
    from attn_ops.cli import matrix

    click.echo(matrix.render(), nl=False)
    return 0


@cli.command()
@click.argument("query", type=_ShapeOrModel())
@click.argument("key", type=_Shape(), required=False)
@click.argument("value", type=_Shape(), required=False)
@click.option("--dtype", default="float32", show_default=True, help="Of query, key, value and bias.")
@click.option("--bias", type=_Shape(), help="Of this shape.")
@click.option("--mask", type=_Shape(), help="A boolean one, of this shape.")
@click.option("--is-causal", is_flag=True)
@click.option("--window", type=int, nargs=2, metavar="LEFT RIGHT")
@click.option("--layout", type=click.Choice(["BSHD", "BHSD"]), default="BSHD", show_default=True)
@click.option("--implementation", type=click.Choice(["fused", "composite", "reference"]), help="Ask for this one.")
@click.option("--convert", is_flag=True, help="Of a model: after attn_ops.convert.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def explain(query, as_json, convert, **options):
    """What a call, or a model, would run, and why.

    QUERY, KEY and VALUE are shapes, such as 1,2048,12,64 (? for an unknown dimension; KEY is QUERY's and VALUE is KEY's
    when left out). It tells what runs in eager calls, in graphs (tf.function), in functions that XLA compiles, and in
    exports. Or QUERY is the file of a Keras model, and it tells what each attention layer in it runs.
    """
    from attn_ops.cli import explain

    if isinstance(query, pathlib.Path):
        return explain.of_model(query, convert, as_json)
    return explain.of_call(query, as_json=as_json, **options)


@cli.command(cls=_Bench, epilog=checkout.EPILOG)
@click.option("--threads", type=click.IntRange(min=1), help="Of every implementation (default: all processors).")
@click.option("--quick", is_flag=True, help="Short shapes and few rounds, to see that it runs.")
def bench(threads, quick, report=()):
    """Measure five shapes here, against Keras (a minute)."""
    if report:
        return checkout.report(report)

    from attn_ops.cli import bench

    return bench.run(threads, quick)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell):
    """Print a script for completion by SHELL.

    \b
    bash, in ~/.bashrc:  eval "$(attn-ops completion bash)"
    zsh, in ~/.zshrc:    eval "$(attn-ops completion zsh)"
    fish:  attn-ops completion fish > ~/.config/fish/completions/attn-ops.fish
    """
    from click import shell_completion

    click.echo(shell_completion.get_completion_class(shell)(cli, {}, cli.name, _COMPLETE).source())
    return 0


def main(argv=None) -> int:
    """Runs the command and returns its exit status.

    Raises:
        SystemExit: the command line is wrong, or what the command needs is missing, which is told on standard error.
    """
    try:
        return cli.main(argv, cli.name, complete_var=_COMPLETE, standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except click.Abort:
        click.echo("interrupted", file=sys.stderr)
        return _INTERRUPTED

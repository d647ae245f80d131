"""The command line `attn-ops`. What a command takes and does is in the module of its name, which is loaded when it is asked
for: what is here is enough for help, and for completion of names."""

from __future__ import annotations

import importlib
import sys

import click
from click import shell_completion

from attn_ops import __version__

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

_COMMANDS = {  # the modules, and the first lines of their help
    "bench": "Measure five shapes here, against Keras (a minute).",
    "explain": "What a call, or a model, would run, and why.",
    "info": "Versions, kernels, and what is missing and why.",
    "matrix": "Which implementation takes which feature.",
    "selftest": "Compare all implementations with the reference.",
}


class _Lazy(click.Group):
    """With the commands of those modules beside its own."""

    def list_commands(self, ctx):
        return sorted([*_COMMANDS, *super().list_commands(ctx)])

    def get_command(self, ctx, name):
        if name in _COMMANDS:
            return importlib.import_module(f"attn_ops.cli.{name}").command
        return super().get_command(ctx, name)

    def help_of_commands(self, ctx):
        """(name, line) of each."""
        for name in self.list_commands(ctx):
            yield name, _COMMANDS.get(name) or self.get_command(ctx, name).get_short_help_str()

    def format_commands(self, ctx, formatter):
        with formatter.section("Commands"):
            formatter.write_dl([*self.help_of_commands(ctx)])

    def shell_complete(self, ctx, incomplete):
        named = [(name, line) for name, line in self.help_of_commands(ctx) if name.startswith(incomplete)]
        names = [shell_completion.CompletionItem(name, help=line) for name, line in named]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]


@click.group(
    "attn-ops",
    cls=_Lazy,
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
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell):
    """Print a script for completion by SHELL.

    \b
    bash, in ~/.bashrc:  eval "$(attn-ops completion bash)"
    zsh, in ~/.zshrc:    eval "$(attn-ops completion zsh)"
    fish:  attn-ops completion fish > ~/.config/fish/completions/attn-ops.fish
    """
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

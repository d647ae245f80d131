"""Functions whose options are `Options`: `**given` in the code, spelt out for whoever asks."""

from __future__ import annotations

import functools
import inspect
import re

from attn_ops.call import habits
from attn_ops.call.options import Options

_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_HERE = "    {options}\n"


def function(without=(), documentation="", **more):
    """A decorator for functions that end in ``**given``, options that are handed on.

    What `inspect.signature` and `help` show names every option; `{options}` on a line of the docstring becomes their
    documentation. Other arguments are a TypeError that says what to pass instead (habits.py).

    Args:
        without: `Options` that the function does not take.
        documentation: lines that go before those of the options, as they look in an unindented docstring.
        **more: options of its own, and their defaults.
    """
    names = [name for name in Options._fields if name not in without]
    defaults = {**{name: Options._field_defaults[name] for name in names}, **more}
    options = [inspect.Parameter(name, _KEYWORD, default=default) for name, default in defaults.items()]

    def decorate(function):
        *positional, _ = inspect.signature(function).parameters.values()
        known = frozenset([*(p.name for p in positional), *defaults])

        @functools.wraps(function)
        def wrapper(*args, **given):
            if len(args) > len(positional) or not known.issuperset(given):
                raise TypeError(habits.message(function.__name__, [p.name for p in positional], list(defaults), args, given))
            return function(*args, **given)

        wrapper.__signature__ = inspect.Signature([*positional, *options])
        if wrapper.__doc__ is not None:  # there are none under python -OO
            wrapper.__doc__ = inspect.cleandoc(wrapper.__doc__).replace(_HERE, documentation + _documentation(names))
        return wrapper

    return decorate


def completed(function, given) -> dict:
    """The options of one of those functions: those that are ``given``, and the defaults of the others."""
    options = inspect.signature(function).parameters.values()
    return {p.name: given.get(p.name, p.default) for p in options if p.kind is _KEYWORD}


def _documentation(names) -> str:
    """The lines on these options in the documentation of `Options`."""
    lines = inspect.cleandoc(Options.__doc__) + "\n"  # as Python 3.13 has them itself
    pieces = re.finditer(r"^    (\w+): .*\n(?: {8}.*\n)*", lines, re.MULTILINE)
    by_name = {piece.group(1): piece.group() for piece in pieces}
    return "".join(by_name[name] for name in names)

#!/usr/bin/env python3
"""Writes attn_ops/__init__.pyi, what type checkers and editors know of names that load on first use:

    python tests/package/stub.py > attn_ops/__init__.pyi

Functions whose options stand in `call.options.Options` are spelt out; the others are where they are defined.
"""

import inspect
import sys

import attn_ops
from attn_ops.call.options import Options

_TYPES = {**Options.__annotations__, "implementation": "str | None", "rotary": "bool | dict | None"}
_RETURNS = {"can_use_fused": "Support"}
_HEAD = '''\
# Written by tests/package/stub.py, which tests compare it with.

from typing import Any

{imports}

__version__: str
__all__: list[str]
'''


def stub() -> str:
    spelt, imports = [], []
    for name, module in sorted(attn_ops._ATTRIBUTES.items(), key=lambda pair: (pair[1], pair[0])):
        if hasattr(getattr(attn_ops, name), "__signature__"):
            spelt.append(_definition(name))
        else:
            imports.append(f"from attn_ops.{module} import {name} as {name}")
    modules = [f"from attn_ops import {name} as {name}" for name in attn_ops._MODULES]
    return "\n".join([_HEAD.format(imports="\n".join([*modules, *imports])), *spelt, ""])


def _definition(name):
    lines, keywords = [], False
    for parameter in inspect.signature(getattr(attn_ops, name)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            keywords = True
            lines.append("    *,")
        default = parameter.default
        default = str(default) if isinstance(default, str) else default  # "top_left" is of a class of its own
        value = "" if default is parameter.empty else f" = {default!r}"
        lines.append(f"    {parameter.name}: {_type(parameter)}{value},")
    return "\n".join([f"def {name}(", *lines, f") -> {_RETURNS.get(name, 'Any')}: ..."])


def _type(parameter):
    named = _TYPES.get(parameter.name, "Any")
    named = getattr(named, "__forward_arg__", named).replace("typing.", "")
    if parameter.default is None and named != "Any" and "None" not in named:
        return f"{named} | None"
    return named


if __name__ == "__main__":
    sys.stdout.write(stub())

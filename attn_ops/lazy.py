"""Packages that only name things: a name loads the module that has it when it is first used."""

from __future__ import annotations

import importlib
import sys

from attn_ops import requirements


def attach(package, homes):
    """`__getattr__` and `__dir__` of a ``package`` whose names are in the modules that ``homes`` has for them, relative to it,
    or are such modules themselves. Type checkers know them by the stub beside the package."""

    def load(name):
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(homes[name], package)
        except ModuleNotFoundError as error:
            reason = requirements.reason(f"{package}.{name}", error)
            if reason is None:
                raise
            raise ImportError(reason) from error
        value = module if homes[name] == f".{name}" else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    return load, lambda: sorted(homes)

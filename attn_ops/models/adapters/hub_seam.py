"""Seams in classes of KerasHub, whose code is known."""

from __future__ import annotations

import dataclasses
import functools
import sys

from attn_ops.models.adapters.known_code import KNOWN_CODE
from attn_ops.models.seams import Seam, fingerprint

_HUB = "keras_hub.src."


@dataclasses.dataclass(frozen=True)
class HubSeam(Seam):
    """A seam, with more code whose work the adapter does.

    Attributes:
        beside: functions, and methods of other classes, of the same module.
    """

    beside: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        own = super().fingerprint()
        if not self.beside:
            return own
        module = sys.modules[self.module]
        functions = (functools.reduce(getattr, name.split("."), module) for name in self.beside)
        return f"{own}+{fingerprint(*functions)}"


def hub_seam(module, name, method, parameters, adapter, steps=(), **more):
    """The seam of the method of `keras_hub.src.module.name`, with the codes that known_code.py has for it."""
    codes = KNOWN_CODE.get(f"{name}.{method}", ("unknown",))
    return HubSeam(_HUB + module, name, method, tuple(parameters), adapter, steps, codes, **more)

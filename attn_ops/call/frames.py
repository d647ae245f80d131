"""Who called, where nothing else tells: an export says to nobody that it is one."""

from __future__ import annotations

import inspect


def any_of(modules) -> bool:
    """Whether code of one of these modules, or of a package among them, is on the stack."""
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name in modules or name.rpartition(".")[0] in modules:
            return True
        frame = frame.f_back
    return False

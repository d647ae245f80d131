"""Who called, where nothing else tells: an export says to nobody that it is one."""

from __future__ import annotations

import inspect


def any_of(modules, function=None) -> bool:
    """Whether code of one of these modules, or of a package among them, is on the stack; if given, of this ``function``."""
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name in modules or name.rpartition(".")[0] in modules:
            if function in (None, frame.f_code.co_name):
                return True
        frame = frame.f_back
    return False

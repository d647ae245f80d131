"""How much memory a call takes."""

from __future__ import annotations

import ctypes
import pathlib
from collections.abc import Callable


def growth(call: Callable[[], object]) -> int:
    """Bytes by which the resident set of this process grows at most while ``call`` runs; what it returns is counted."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _status("VmRSS")
    result = call()
    grown = _status("VmHWM") - before
    del result
    return grown


def give_back() -> None:
    """Gives memory that is free, but kept for the next call, back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")

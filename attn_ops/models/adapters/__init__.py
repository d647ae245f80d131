"""What stands in for the attention of other people's classes. The table of all, and with it all adapters, is made when it is
first asked for."""

from __future__ import annotations

from attn_ops import lazy

_HOMES = {
    "BY_CLASS": ".table",
    "SEAMS": ".table",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = lazy.attach(__name__, _HOMES)

"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()) -> str:
    """The rows under their head, in columns; those of the names ``numbers`` end at one place, others begin at one."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        [cell.rjust(width) if name in numbers else cell.ljust(width) for name, cell, width in zip(head, row, widths)]
        for row in (head, *rows)
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)

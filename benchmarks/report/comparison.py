"""Two reports of the same machine: what became faster or slower.

Times are compared as they are, medians by the clock: not divided by anything, so that what is compared is what a user
waits for. Another machine, or a busy one, shows in all rows alike; so does the ratio of the limits, which is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rows import Row

from .sections import OURS


@dataclasses.dataclass(frozen=True)
class Change:
    """A row that both reports have; ratio above 1: it takes so many times as long now."""

    row: Row
    old_seconds: float

    @property
    def ratio(self) -> float:
        return self.row.wall_median / self.old_seconds

    @property
    def is_ours(self) -> bool:
        return self.row.peer.startswith(OURS)

    def __str__(self) -> str:
        row = self.row
        threads = f"{row.threads} thread{'s' if row.threads > 1 else ''}"
        what = f"{row.workload} {row.shape} {row.options}".rstrip()
        return (
            f"{row.peer}, {what}, {row.mode}, {threads}: {1e3 * self.old_seconds:.3g} -> "
            f"{1e3 * row.wall_median:.3g} ms ({self.ratio:.2f}x)"
        )


def changes(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """The rows with a time in both, most slowed down first."""
    before = {row.key: row.wall_median for row in old if row.wall_median}
    both = [Change(row, before[row.key]) for row in new if row.wall_median and row.key in before]
    return sorted(both, key=lambda change: -change.ratio)


def slower(found: Sequence[Change], factor: float) -> list[Change]:
    """Rows of attn_ops that take more than `factor` times as long as before."""
    return [change for change in found if change.is_ours and change.ratio > factor]


def limit_ratio(old: Sequence[Row], new: Sequence[Row]) -> float | None:
    """How much faster the machine itself measured, the median over the rows that both have; 1 is an equal machine."""
    before = {row.key: row.limit_per_second for row in old if row.limit_per_second}
    ratios = sorted(row.limit_per_second / before[row.key] for row in new if row.limit_per_second and row.key in before)
    return ratios[len(ratios) // 2] if ratios else None

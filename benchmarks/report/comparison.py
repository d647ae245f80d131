"""Two reports of the same machine: what became faster or slower.

Times are compared as they are, medians by the clock: not divided by anything, so that what is compared is what a user
waits for. Another machine, or a busy one, shows in all rows alike; so does the ratio of the limits, which is given.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence

from rows import Row

from .sections import OURS

NOTHING_TO_COMPARE, SLOWER = 2, 3  # exit statuses


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


def check_options(arguments) -> None:
    """Raises ValueError for a --fail-if-slower that cannot be meant."""
    if arguments.fail_if_slower is not None:
        if not arguments.fail_if_slower > 0:
            raise ValueError(f"--fail-if-slower ({arguments.fail_if_slower}) must be above 0")
        if not arguments.compare:
            raise ValueError("--fail-if-slower needs --compare OLD.csv")


def tell(
    arguments, old: Sequence[Row], new: Sequence[Row], table: Callable[[Sequence[Change]], str], same: str
) -> tuple[int, list[str]]:
    """The exit status (0, NOTHING_TO_COMPARE or SLOWER), and what is to be said about the comparison.

    `same` is which options must have been those of then.
    """
    found, ratio, status = changes(old, new), limit_ratio(old, new), 0
    machine = f"the limits measured were {ratio:.2f}x those of then, which is the machine" if ratio else "no limit"
    told = [f"## Compared with {arguments.compare.name}", f"{len(found)} rows are in both; {machine}."]
    if arguments.fail_if_slower is not None:
        worse = slower(found, arguments.fail_if_slower)
        status = SLOWER if worse else 0
        ours = sum(change.is_ours for change in found)
        if not ours:
            status = NOTHING_TO_COMPARE
            print(
                f"bench --report: no row of attn_ops is in both this report and {arguments.compare}: measured "
                f"with the same {same}?",
                file=sys.stderr,
            )
        told += [f"{len(worse)} of {ours} rows of attn_ops take more than {arguments.fail_if_slower:g}x their time."]
        for change in worse:
            print(f"slower: {change}", file=sys.stderr)
    return status, [*told, table(found)]

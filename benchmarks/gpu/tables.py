"""Markdown of what was measured on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from report.tables import table
from rows import Row


def details(rows: Sequence[Row]) -> str:
    """A table for each workload and mode; ratios are to the first peer of it."""
    blocks = []
    for (mode, workload, shape, options), group in itertools.groupby(
        rows, lambda row: (row.mode, row.workload, row.shape, row.options)
    ):
        group = list(group)
        blocks.append(f"**{workload} {shape} {options}**, {mode} ({group[0].rounds} rounds)")
        is_read = group[0].limit == "copy"
        head = ("peer", "us: median", "min", "GB/s" if is_read else "TFLOP/s", f"% of {group[0].limit}", "x", "error")
        blocks.append(table(head, [_line(row, group[0]) for row in group], "l" + "r" * 6))
    return "\n\n".join(blocks) or "Nothing was measured."


def _line(row, first):
    ratio = row.wall_median / first.wall_median
    times = [f"{1e6 * seconds:.4g}" for seconds in (row.wall_median, row.wall_min)]
    return (row.peer, *times, f"{rate(row):.4g}", f"{row.percent_of_limit:.0f}", f"{ratio:.2f}", f"{row.error:.0e}")


def rate(row: Row) -> float:
    """TFLOP/s; of decode steps, which are bound by reading keys and values, GB/s."""
    if row.limit == "copy":
        return row.percent_of_limit / 100 * row.limit_per_second / 1e9
    return row.gflops_per_second / 1e3


def limits(rows: Sequence[Row]) -> str:
    """The best of what was measured in the rounds."""
    titles = {"matmul": ("product of 8192 x 8192 bfloat16 matrices, TFLOP/s", 1e12), "copy": ("copy, GB/s", 1e9)}
    lines = []
    for name, (title, unit) in titles.items():
        found = [row.limit_per_second / unit for row in rows if row.limit == name]
        if found:
            lines.append((title, f"{max(found):.0f}", f"{min(found):.0f}"))
    return table(("limit of the device", "best", "worst"), lines, "lrr")

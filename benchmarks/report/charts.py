"""PNG charts of a report."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence

from rows import Row
from workloads import FORWARD, FORWARD_BACKWARD, WORKLOADS

from . import sections
from .sections import OURS


def draw(directory: pathlib.Path, rows: Sequence[Row]) -> list[str]:
    """Draws what the rows suffice for, and returns the names of the files."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    drawn = []
    for threads in sorted({row.threads for row in rows}):
        here = [row for row in rows if row.threads == threads]
        drawn += [
            _lengths(directory / f"time_{threads}_threads.png", here, threads),
            _parts(directory / f"limit_{threads}_threads.png", here, threads),
        ]
    drawn.append(_memory(directory / "memory.png", rows))
    return [path.name for path in drawn if path]


def _lengths(path, rows, threads):
    """Time against length, (1,12,N,64) forward; both axes logarithmic."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        name = row.workload.removesuffix("-quick")
        if name in sections.LENGTHS and row.mode == FORWARD and row.wall_median:
            points.setdefault(row.peer, []).append((_length(row), 1e3 * row.wall_median))
    return _lines(path, points, f"forward (1,12,N,64), {_threads(threads)}", "milliseconds")


def _memory(path, rows):
    """Memory growth against length, forward + backward; both axes logarithmic."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        name = row.workload.removesuffix("-quick")
        if name in sections.MEMORY_LENGTHS and row.mode == FORWARD_BACKWARD and row.memory_growth_bytes:
            points.setdefault(row.peer, []).append((_length(row), row.memory_growth_bytes / 1e6))
    return _lines(path, points, "memory growth, forward + backward (1,12,N,64)", "MB")


def _lines(path, points, title, unit):
    if not points:
        return None
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for peer, values in points.items():
        axes.plot(*zip(*sorted(values), strict=True), marker="o", label=peer, linewidth=3 if peer == OURS else 1.5)
    lengths = sorted({length for values in points.values() for length, _ in values})
    axes.set(xscale="log", yscale="log", xlabel="sequence length N", ylabel=unit, title=title)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _parts(path, rows, threads):
    """Every workload of ours as a part of the machine's limit."""
    ours = [
        row
        for row in rows
        if row.peer == OURS and row.percent_of_limit and row.workload.removesuffix("-quick") in WORKLOADS
    ]
    if not ours:
        return None
    import matplotlib.pyplot as plt

    labels = [f"{row.workload}{', backward too' if row.mode == FORWARD_BACKWARD else ''}" for row in ours]
    colours = {"read": "tab:orange"}
    figure, axes = plt.subplots(figsize=(8, 1 + 0.25 * len(ours)), layout="constrained")
    bars = axes.barh(labels, [row.percent_of_limit for row in ours])
    for bar, row in zip(bars, ours, strict=True):
        bar.set_color(colours.get(row.limit, "tab:blue"))
    axes.bar_label(bars, fmt="%.0f", padding=2)
    axes.invert_yaxis()
    axes.set(xlabel="% of the FMA peak (blue) or the read bandwidth (orange)", title=f"attn_ops, {_threads(threads)}")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _length(row) -> int:
    return int(re.split("[,x]", row.shape)[2])


def _threads(count):
    return f"{count} thread{'s' if count > 1 else ''}"

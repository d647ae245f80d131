"""Markdown tables of what was measured."""

from __future__ import annotations

import datetime
import itertools
import platform
from collections.abc import Sequence

from attn_ops.cli import info
from limits import TITLES
from rows import Row

from .comparison import Change
from .targets import Verdict

_MODES = {
    "forward": "forward",
    "forward_backward": "forward + backward",
    "backward": "backward",
    "layer": "Keras layer, inference",
    "layer_training": "Keras layer, training step",
}


def verdicts(found: Sequence[Verdict]) -> str:
    """The target table."""
    words = {True: "met", False: "**not met**", None: "–"}
    lines = [(v.section, v.work, str(v.threads), v.target, v.value, words[v.met]) for v in found]
    return table(("section", "measured", "threads", "target", "value (worst case)", ""), lines, "llrrll")


def times(rows: Sequence[Row]) -> str:
    """A line for each workload, mode and number of threads: our time, and that of the fastest other peer."""
    lines = []
    timed = [row for row in rows if row.wall_median]
    for (workload, shape, options, mode, threads), group in itertools.groupby(
        timed, lambda row: (row.workload, row.shape, row.options, row.mode, row.threads)
    ):
        ours, others = [], []
        for row in group:
            (ours if row.peer.startswith("attn_ops") else others).append(row)
        fastest = [min(peers, key=lambda row: row.wall_median, default=None) for peers in (ours, others)]
        cells = [f"{1e3 * row.wall_median:.3g} ({row.peer})" if row else "–" for row in fastest]
        lines.append((f"{workload} {shape} {options}".rstrip(), _MODES[mode], str(threads), *cells))
    return table(("workload", "mode", "threads", "attn_ops, ms", "fastest other, ms"), lines, "llrrr")


def details(rows: Sequence[Row]) -> str:
    """A table for each workload, mode and number of threads; ratios are to the first peer of it that was timed."""
    blocks = []
    timed = [row for row in rows if row.wall_median]
    for (mode, threads, workload, shape, options), group in itertools.groupby(
        timed, lambda row: (row.mode, row.threads, row.workload, row.shape, row.options)
    ):
        group = list(group)
        title = " ".join(filter(None, (workload, shape, options)))
        plural = "s" if threads > 1 else ""
        blocks.append(f"**{title}, {_MODES[mode]}, {threads} thread{plural}** ({group[0].rounds} rounds)")
        lines = []
        for row in group:
            times = [f"{1e3 * t:.3g}" for t in (row.wall_median, row.wall_min, row.cpu_median, row.cpu_min)]
            ratios = [f"{row.wall_median / group[0].wall_median:.2f}", f"{row.cpu_median / group[0].cpu_median:.2f}"]
            rates = [f"{row.gflops_per_second:.1f}", f"{row.percent_of_limit:.0f}"]
            lines.append((row.peer, *times, *rates, *ratios, f"{row.error:.0e}"))
        head = ("peer", "wall ms: median", "min", "cpu ms: median", "min", "GFLOP/s")
        head += (f"% of {group[0].limit}", "x wall", "x cpu", "error")
        blocks.append(table(head, lines, "l" + "r" * 9))
    return "\n\n".join(blocks)


def memory(rows: Sequence[Row]) -> str:
    """Growth of the first step of forward + backward, in a fresh process."""
    lines = [
        (f"{row.workload} {row.shape}", row.peer, f"{row.memory_growth_bytes / 1e6:.0f}")
        for row in rows
        if row.memory_growth_bytes is not None
    ]
    return table(("forward + backward", "peer", "MB, outputs included"), lines, "llr")


def limits(found: dict[str, dict[tuple[str, int], float]]) -> str:
    """The machine's limits, for each instruction set and number of threads."""
    columns = list(next(iter(found.values())))
    head = ("limit", *(f"{isa}, {threads} thread{'s' if threads > 1 else ''}" for isa, threads in columns))
    lines = [(TITLES[name], *(f"{rates[column] / 1e9:.1f}" for column in columns)) for name, rates in found.items()]
    return table(head, lines, "l" + "r" * len(columns))


def changes(found: Sequence[Change]) -> str:
    lines = [
        (
            change.row.peer,
            " ".join(filter(None, (change.row.workload, change.row.shape, change.row.options))),
            _MODES[change.row.mode],
            str(change.row.threads),
            f"{1e3 * change.old_seconds:.3g}",
            f"{1e3 * change.row.wall_median:.3g}",
            f"{change.ratio:.2f}",
        )
        for change in found
    ]
    return table(("peer", "workload", "mode", "threads", "before, ms", "now, ms", "now / before"), lines, "lllrrrr")


def heading(rows: Sequence[Row]) -> str:
    """What was measured with, and when."""
    return f"{info.machine()}, {datetime.date.today()}. {versions(rows)}, Python {platform.python_version()}."


def versions(rows: Sequence[Row]) -> str:
    """Of every library that was measured."""
    return ", ".join(dict.fromkeys(library for row in rows if row.version for library in row.version.split(", ")))


def table(head: Sequence[str], lines: Sequence[Sequence[str]], alignment: str) -> str:
    if not lines:
        return "Nothing was measured."
    rule = ["---:" if side == "r" else "---" for side in alignment]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))

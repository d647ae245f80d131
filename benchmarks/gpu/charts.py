"""PNG charts: speed against length for each head dimension and mode, and decode steps."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from rows import Row

from .measure import OURS
from .tables import rate


def draw(directory: pathlib.Path, rows: Sequence[Row]) -> list[str]:
    """Draws what the rows suffice for, and returns the names of the files."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    drawn = []
    prefill = [row for row in rows if row.limit == "matmul"]
    for mode, options in sorted({(row.mode, row.options) for row in prefill}):
        chosen = [row for row in prefill if (row.mode, row.options) == (mode, options)]
        name = f"gpu_{mode}_{options.replace(' ', '_') or 'plain'}.png"
        drawn.append(_lengths(directory / name, chosen, f"{mode}, {options}"))
    decode = [row for row in rows if row.limit == "copy"]
    if decode:
        drawn.append(_decode(directory / "gpu_decode.png", decode))
    return drawn


def _lengths(path, rows, title):
    import matplotlib.pyplot as plt

    dims = sorted({_extents(row)[1] for row in rows})
    figure, panels = plt.subplots(1, len(dims), figsize=(5 * len(dims), 4), layout="constrained", squeeze=False)
    for axes, dim in zip(panels[0], dims, strict=True):
        here = [row for row in rows if _extents(row)[1] == dim]
        for peer in dict.fromkeys(row.peer for row in here):
            points = sorted((_extents(row)[0], rate(row)) for row in here if row.peer == peer)
            width = 3 if peer.startswith(OURS) else 1.5
            axes.plot(*zip(*points, strict=True), marker="o", label=peer, linewidth=width)
        lengths = sorted({_extents(row)[0] for row in here})
        axes.axhline(max(row.limit_per_second for row in here) / 1e12, color="grey", linestyle=":", label="matmul")
        axes.set(xscale="log", xlabel="sequence length", ylabel="TFLOP/s", title=f"{title}, head dim {dim}")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path.name


def _decode(path, rows):
    import matplotlib.pyplot as plt

    workloads = list(dict.fromkeys(row.workload for row in rows))
    peers = list(dict.fromkeys(row.peer for row in rows))
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    height = 0.8 / len(peers)
    for index, peer in enumerate(peers):
        found = {row.workload: row.percent_of_limit for row in rows if row.peer == peer}
        places = [n + index * height for n, workload in enumerate(workloads) if workload in found]
        axes.barh(places, list(found.values()), height, label=peer)
    axes.set_yticks([n + 0.4 - height / 2 for n in range(len(workloads))], workloads)
    axes.invert_yaxis()
    axes.set(xlabel="keys and values read, % of the copy bandwidth")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path.name


def _extents(row) -> tuple[int, int]:
    """(seqlen, head_dim)"""
    length, dim = row.shape.strip("()").split(",")[2:]
    return int(length), int(dim)

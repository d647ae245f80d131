"""Masks in text: what is seen, what is hidden, and what kernels skip."""

from __future__ import annotations

import textwrap

import numpy as np

from attn_ops import requirements
from attn_ops.call import options

BLOCK = (64, 128)  # rows and keys; of those that hold nothing visible the kernels compute nothing
SEEN, HIDDEN, SKIPPED = "█", "·", " "
PARTLY = "░▒▓"  # up to a third, two thirds, all but some
_COLOURS = ("#ffffff", "#d9dde3", "#2166ac")  # skipped, hidden, seen
_MOST_PAIRS = 2**30  # a byte each
_GRID = 64  # rows and keys between which lines are drawn


class Picture(str):
    """A text that a Python prompt shows as it is."""

    __repr__ = str.__str__


def text(mask, seqlen_q, seqlen_k=None, *, entry=0, head=0, query_offset=None, width=64, block=BLOCK):
    """The mask as text, one character per pair, or per block of pairs where there are too many; `print` shows it.

    Args:
      seqlen_q, seqlen_k: extents, integers; seqlen_k None: the same.
      entry, head: which of the batch and of the heads, where the mask differs between them.
      query_offset: the position of row 0: an integer or integers `[batch]`.
      width: the most characters of a line.
      block: rows and keys of the blocks that are left blank where nothing in them is visible.
    Returns:
      A str: a line on what it shows, a line per row from the first key on the left, and a legend.
    """
    pairs, skipped = seen_and_skipped("show", mask, seqlen_q, seqlen_k, entry, head, query_offset, block)
    if not options.is_integer(width):
        raise TypeError(f"show: width must be an integer, got {width!r}")
    if width < 1:
        raise ValueError(f"show: width must be at least 1, got {width}")
    side = 1
    while -(-pairs.shape[1] // side) > width:
        side *= 2
    cell = (1, 1) if side == 1 else (2 * side, side)  # characters are twice as high as wide
    count = _sums(np.ones_like(pairs), *cell)
    share = _sums(pairs, *cell) / np.maximum(count, 1)
    every = _sums(skipped, *cell) == count
    shades = np.array([*PARTLY])
    cells = np.where(every, SKIPPED, HIDDEN)
    cells = np.where(share > 0, shades[np.minimum((share * 3).astype(int), 2)], cells)
    cells = np.where(share == 1, SEEN, cells)
    rows, keys = pairs.shape
    head_line = f"{rows} x {keys}: {mask.described()}, {pairs.mean() if pairs.size else 0.0:.3g} of all pairs"
    legend = [f"{SEEN} seen"]
    legend += [f"{PARTLY} partly"] if side > 1 else []
    legend += [f"{HIDDEN} hidden"]
    legend += [f"blank: skipped, in blocks of {block[0]} x {block[1]}"] if every.any() else []
    legend += [f"each is {cell[0]} x {cell[1]} pairs"] if side > 1 else []
    return Picture("\n".join([head_line, *("".join(row) for row in cells), ", ".join(legend)]))


def plot(mask, seqlen_q, seqlen_k=None, *, entry=0, head=0, query_offset=None, block=BLOCK, title=None, ax=None):
    """A picture of a `Mask` by matplotlib: `attn_ops.visualize.plot_mask`, which has the documentation."""
    try:
        from matplotlib import colors, patches, pyplot
    except ImportError as error:
        raise ImportError(requirements.missing("attn_ops.visualize.plot_mask", "matplotlib")) from error
    seen, skipped = seen_and_skipped("plot_mask", mask, seqlen_q, seqlen_k, entry, head, query_offset, block)
    kind = np.where(seen, 2, np.where(skipped, 0, 1))
    if ax is None:
        width, height = panel_inches(max(seen.shape[0], 1), max(seen.shape[1], 1), alone=True)
        _, ax = pyplot.subplots(figsize=(width + 1.4, height + 0.8), layout="compressed")
    ax.imshow(kind, cmap=colors.ListedColormap(_COLOURS), vmin=0, vmax=2, interpolation="nearest", aspect="equal")
    if max(seen.shape) <= _GRID:  # cells that can be told apart
        ax.set_xticks(np.arange(seen.shape[1] + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(seen.shape[0] + 1) - 0.5, minor=True)
        ax.grid(which="minor", color="white", linewidth=0.8)
        ax.tick_params(which="minor", length=0)
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    ax.set_title(textwrap.shorten(mask.described() if title is None else title, 70), fontsize=10)
    names = ("skipped", "hidden", "seen")
    shown = [n for n in (2, 1, 0) if (kind == n).any()]
    ax.legend(
        handles=[patches.Patch(facecolor=_COLOURS[n], edgecolor="0.6", label=names[n]) for n in shown],
        loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=9,
    )  # fmt: skip
    return ax


def panel_inches(seqlen_q: int, seqlen_k: int, alone: bool) -> tuple[float, float]:
    """Width and height of one panel: the aspect of the matrix, within reason."""
    side = 5.5 if alone else 3.0
    ratio = min(max(seqlen_q / seqlen_k, 0.25), 4.0)
    return (side, side * ratio) if ratio <= 1 else (side / ratio, side)


def seen_and_skipped(name, mask, seqlen_q, seqlen_k, entry, head, query_offset, block):
    """Two bool arrays `[seqlen_q, seqlen_k]`: the visible pairs, and those in a block without any."""
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    for what, extent in (("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k)):
        options.size(f"{name}: {what}", extent, least=0)
    for what, at in (("entry", entry), ("head", head)):
        if not options.is_integer(at):
            raise TypeError(f"{name}: {what} must be an integer, got {at!r}")
    if not isinstance(block, (tuple, list)) or len(block) != 2 or not all(map(options.is_integer, block)):
        raise TypeError(f"{name}: block must hold two integers from 1, got {block!r}")
    if seqlen_q * seqlen_k > _MOST_PAIRS:
        raise ValueError(
            f"{name}: {seqlen_q} x {seqlen_k} pairs are too many to draw (2**30 at most); draw fewer rows, from query_offset= on"
        )
    mask.resolved(seqlen_q, seqlen_k, query_offset)  # so that functions can tell what they are
    pairs = np.asarray(mask.materialize(seqlen_q, seqlen_k, query_offset=query_offset))
    index = []
    for what, at, extent in zip(("entry", "head"), (entry, head), pairs.shape):
        if extent != 1 and not -extent <= at < extent:
            raise ValueError(f"{name}: {what} must be one of {extent}, got {at}")
        index.append(at if extent != 1 else 0)
    pairs = pairs[tuple(index)]
    block_q, block_k = block
    if min(block) < 1:
        raise ValueError(f"{name}: block must hold two integers from 1, got {block}")
    rows, keys = np.arange(pairs.shape[0]), np.arange(pairs.shape[1])
    empty = _sums(pairs, block_q, block_k) == 0
    skipped = empty[rows[:, None] // block_q, keys // block_k]
    return pairs, skipped


def _sums(x, rows, keys):
    """How many are true in blocks of rows and keys; the last ones may be smaller."""
    x = np.pad(x, [(0, -x.shape[0] % rows), (0, -x.shape[1] % keys)])
    return x.reshape(x.shape[0] // rows, rows, x.shape[1] // keys, keys).sum((1, 3), dtype=np.int64)

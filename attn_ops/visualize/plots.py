"""Heat maps of attention weights, and pictures of masks, by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from attn_ops.masks import pictures
from attn_ops.masks.mask import combined
from attn_ops.visualize import drawable, figures

_NAME = "plot_attention_weights"
_MAX_COLUMNS = 4
_CELL = {False: 0.2, True: 0.34}  # inches, where there is room: labels of 8 points fit, and with annotate numbers of 7
_SIDES = {True: (3.0, 9.0), False: (2.0, 4.5)}  # the least and most inches of a panel: alone, and among others
_FLAT = 4  # cells of flatter matrices are no squares


def plot_attention_weights(
    weights,
    query_tokens: Sequence | None = None,
    key_tokens: Sequence | None = None,
    *,
    example: int = 0,
    heads: Sequence[int] | None = None,
    title: str | None = None,
    annotate: bool = False,
    cmap: str = "Blues",
    figure=None,
    ax=None,
    vmax: float | None = None,
    power: float = 1.0,
    crop: bool = False,
):
    """Draws attention weights as heat maps: one row per query, one column per key, one panel per head.

    All panels share one colour scale, from 0 to the largest weight drawn, so heads can be compared by eye.
    What is hidden, and NaN, is hatched.

    Args:
        weights: [seqlen_q, seqlen_k], [batch, seqlen_q, seqlen_k] or [batch, num_heads, seqlen_q, seqlen_k];
            any real dtype, NumPy or TensorFlow, e.g. what a layer returns with `return_attention_scores=True`. Or a
            :class:`LayerAttention`, whose tokens and masks are drawn too.
        query_tokens: seqlen_q labels for the rows (any objects; `str` is applied), or None for positions.
        key_tokens: seqlen_k labels for the columns; None takes query_tokens if seqlen_q == seqlen_k.
        example: which entry of the batch to draw (rank 3 and 4); negative counts from the end.
        heads: which heads to draw and in which order (rank 4); None draws all.
        title: text above the figure.
        annotate: whether to write each weight, to two digits, in its cell.
        cmap: name of a matplotlib colour map.
        figure: an empty `matplotlib.figure.Figure` to draw into; None makes one with `pyplot`, which the caller
            shows, saves or closes. Notebooks show it once.
        ax: a matplotlib axes to draw into, for one matrix.
        vmax: the weight of the last colour; None for the largest drawn. Larger ones have that colour too.
        power: colours go by weight ** power; 0.5 shows small weights, which are most of those of long sequences.
        crop: whether to draw real tokens only: from the first to the last with a label that is not empty, and without
            labels of what weighs or is weighed.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `weights` is symbolic (a KerasTensor, or a tensor inside `tf.function`).
        ValueError: wrong rank, an empty extent, a label count that is not the number of rows or columns, an `example` or
            head that does not exist, several matrices for one axes, or `vmax` or `power` that is not positive.
    """
    panels, own_query, own_key, block = drawable.matrices(_NAME, weights, example, heads)
    vmax, power = figures.checked_scale(_NAME, vmax, power)
    seqlen_q, seqlen_k = panels[0][1].shape
    query_tokens = own_query if query_tokens is None else query_tokens
    key_tokens = own_key if key_tokens is None else key_tokens
    if key_tokens is None and seqlen_q == seqlen_k:
        key_tokens = query_tokens
    query_labels = drawable.labels(_NAME, "query_tokens", query_tokens, seqlen_q, block)
    key_labels = drawable.labels(_NAME, "key_tokens", key_tokens, seqlen_k, block)
    if crop:
        values = [panel for _, panel in panels]
        rows = drawable.real_range(values, None if query_tokens is None else query_labels, 0)
        keys = drawable.real_range(values, None if key_tokens is None else key_labels, 1)
        panels = [(name, panel[rows, keys]) for name, panel in panels]
        query_labels, key_labels = query_labels[rows], key_labels[keys]
        seqlen_q, seqlen_k = panels[0][1].shape
    if ax is not None and len(panels) > 1:
        raise ValueError(f"{_NAME}: ax takes one matrix, and there are {len(panels)} heads: pass heads=[one of them]")
    figures.pyplot(_NAME)

    width, height = _inches(seqlen_q * _CELL[annotate], seqlen_k * _CELL[annotate], alone=len(panels) == 1)
    if ax is None:
        rows = math.ceil(len(panels) / _MAX_COLUMNS)
        columns = math.ceil(len(panels) / rows)  # as even as can be: 6 is 2 x 3
        left, below = figures.label_inches(query_labels), figures.label_inches(key_labels)
        figure = figures.new_figure(_NAME, columns * width + left + 1.4, rows * height + below + 1.0, figure)
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    else:
        figure, columns, axes = ax.figure, 1, np.array([[ax]], object)
        box = ax.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
        width, height = box.width, box.height
    drawn = max(np.nanmax(panel, initial=0.0) for _, panel in panels)
    largest = vmax or drawn or 1.0
    square = max(seqlen_q, seqlen_k) <= _FLAT * min(seqlen_q, seqlen_k)
    for index, panel_ax in enumerate(axes.flat):
        if index >= len(panels):
            panel_ax.set_axis_off()
            continue
        name, panel = panels[index]
        image = panel_ax.imshow(
            np.ma.masked_invalid(panel),
            cmap=cmap,
            norm=figures.norm(largest, power),
            aspect="equal" if square else "auto",
            interpolation="nearest",
        )
        panel_ax.patch.set(**figures.HATCH)  # what shows through a NaN
        if name:
            panel_ax.set_title(name, fontsize=10)
        figures.label_axis(panel_ax.yaxis, query_labels, height)
        figures.label_axis(panel_ax.xaxis, key_labels, width)
        if max(map(len, key_labels)) > 2:
            panel_ax.tick_params(axis="x", labelrotation=90)
        panel_ax.tick_params(length=0, labelsize=8)
        for spine in panel_ax.spines.values():
            spine.set_color("0.8")
        if ax is None:
            panel_ax.label_outer()
        if index + columns >= len(panels):  # last of its column, also above an empty place
            panel_ax.tick_params(labelbottom=True)
            panel_ax.set_xlabel("key" if block == 1 else f"key, in blocks of {block}")
        if index % columns == 0:
            panel_ax.set_ylabel("query" if block == 1 else f"query, in blocks of {block}")
        if annotate:
            _annotate(panel_ax, image, panel)
    label = "attention weight" if block == 1 else "attention weight, mean of a block"
    figures.colour_bar(figure, image, axes if ax is None else ax, largest, drawn > largest, label)
    if title is not None:
        ax.set_title(title) if ax is not None else figure.suptitle(title)
    return figure


def plot_mask(
    mask,
    seqlen_q: int,
    seqlen_k: int | None = None,
    *,
    entry: int = 0,
    head: int = 0,
    query_offset=None,
    block: tuple[int, int] = pictures.BLOCK,
    title: str | None = None,
    ax=None,
):
    """Draws who sees whom: a row per query, a column per key; seen, hidden and skipped pairs in three colours.

    Skipped are the hidden pairs of blocks in which nothing is visible, for which the kernels compute nothing.

    Args:
        mask: an `attn_ops.masks.Mask`, or a boolean array as `attn_ops.masks.boolean` takes it.
        seqlen_q, seqlen_k: extents, integers; seqlen_k None: the same.
        entry, head: which of the batch and of the heads, where the mask differs between them.
        query_offset: the position of row 0: an integer or integers `[batch]`.
        block: rows and keys of a block.
        title: text above the picture; None for what the mask is made of.
        ax: a matplotlib axes to draw into; None makes a figure with `pyplot`, which the caller shows, saves or closes.

    Returns:
        The matplotlib axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: an entry or head that does not exist, or what `Mask.materialize` raises.
    """
    return pictures.plot(
        combined(mask),
        seqlen_q,
        seqlen_k,
        entry=entry,
        head=head,
        query_offset=query_offset,
        block=block,
        title=title,
        ax=ax,
    )


def _inches(rows: float, keys: float, alone: bool) -> tuple[float, float]:
    """Width and height of a panel whose cells would take so many inches. Flat matrices may be wider than the others are."""
    least, most = _SIDES[alone]
    if max(rows, keys) > _FLAT * min(rows, keys):
        wide = min(max(rows, keys, least), 14.0 if alone else most)
        flat = min(max(min(rows, keys), 1.2), wide)
        return (wide, flat) if keys > rows else (flat, wide)
    scale = max(least / max(rows, keys), min(1.0, most / max(rows, keys)))
    return keys * scale, rows * scale


def _annotate(ax, image, panel: np.ndarray) -> None:
    colours = image.cmap(image.norm(panel))
    for (row, column), weight in np.ndenumerate(panel):
        if not np.isnan(weight):
            ax.text(
                column,
                row,
                f"{weight:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color=figures.ink(colours[row, column]),
            )

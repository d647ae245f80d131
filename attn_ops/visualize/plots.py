"""Pictures of attention weights and masks. Needs matplotlib: `pip install matplotlib`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from attn_ops import requirements
from attn_ops.masks import pictures
from attn_ops.masks.mask import combined

_MAX_COLUMNS = 4
_LABELS_PER_INCH = 7  # more cannot be read


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
):
    """Draws attention weights as heat maps: one row per query, one column per key, one panel per head.

    All panels share one colour scale, from 0 to the largest weight drawn, so heads can be compared by eye.
    NaN weights are drawn grey.

    Args:
        weights: [seqlen_q, seqlen_k], [batch, seqlen_q, seqlen_k] or [batch, num_heads, seqlen_q, seqlen_k];
            any real dtype, NumPy or TensorFlow, e.g. what a layer returns with `return_attention_scores=True`.
        query_tokens: seqlen_q labels for the rows (any objects; `str` is applied), or None for positions.
        key_tokens: seqlen_k labels for the columns; None takes query_tokens if seqlen_q == seqlen_k.
        example: which entry of the batch to draw (rank 3 and 4); negative counts from the end.
        heads: which heads to draw and in which order (rank 4); None draws all.
        title: text above the figure.
        annotate: whether to write each weight, to two digits, in its cell.
        cmap: name of a matplotlib colour map.
        figure: an empty `matplotlib.figure.Figure` to draw into; None makes one with `pyplot`, which the caller
            shows, saves or closes.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `weights` is symbolic (a KerasTensor, or a tensor inside `tf.function`).
        ValueError: wrong rank, an empty extent, a label count that is not the number of rows or columns, or an
            `example` or head that does not exist.
    """
    panels = _panels(_to_numpy(weights), example, heads)
    seqlen_q, seqlen_k = panels[0][1].shape
    if key_tokens is None and seqlen_q == seqlen_k:
        key_tokens = query_tokens
    query_labels = _labels("query_tokens", query_tokens, seqlen_q)
    key_labels = _labels("key_tokens", key_tokens, seqlen_k)

    rows = math.ceil(len(panels) / _MAX_COLUMNS)
    columns = math.ceil(len(panels) / rows)  # as even as can be: 6 is 2 x 3
    width, height = pictures.panel_inches(seqlen_q, seqlen_k, alone=len(panels) == 1)
    figure = _figure(figure, columns * width + 1.4, rows * height + 1.0)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    largest = max(np.nanmax(panel, initial=0.0) for _, panel in panels) or 1.0
    for index, ax in enumerate(axes.flat):
        if index >= len(panels):
            ax.set_axis_off()
            continue
        name, panel = panels[index]
        image = ax.imshow(np.ma.masked_invalid(panel), cmap=cmap, vmin=0.0, vmax=largest, aspect="equal")
        ax.set_facecolor("0.8")  # what shows through a NaN
        ax.set_title(name, fontsize=10)
        _label(ax.yaxis, query_labels, height)
        _label(ax.xaxis, key_labels, width)
        if max(map(len, key_labels)) > 2:
            ax.tick_params(axis="x", labelrotation=90)
        ax.tick_params(length=0, labelsize=8)
        for spine in ax.spines.values():
            spine.set_color("0.8")
        ax.label_outer()
        if index + columns >= len(panels):  # last of its column, also above an empty place
            ax.tick_params(labelbottom=True)
            ax.set_xlabel("key")
        if index % columns == 0:
            ax.set_ylabel("query")
        if annotate:
            _annotate(ax, panel, largest)
    bar = figure.colorbar(image, ax=axes, shrink=0.85, aspect=30, pad=0.02)
    bar.set_label("attention weight")
    bar.outline.set_visible(False)
    if title is not None:
        figure.suptitle(title)
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


def _to_numpy(weights) -> np.ndarray:
    try:
        array = np.asarray(weights)
    except (TypeError, ValueError, NotImplementedError, AttributeError) as error:
        raise TypeError(_symbolic(weights)) from error
    if array.dtype == object:
        raise TypeError(_symbolic(weights))
    try:  # one dtype for float16, bfloat16, masks, ...; complex numbers and strings have no colour
        return array.astype(np.float64, casting="unsafe" if array.dtype.kind != "c" else "same_kind")
    except (TypeError, ValueError) as error:
        raise TypeError(f"plot_attention_weights: weights must be real numbers, got dtype {array.dtype}") from error


def _symbolic(weights) -> str:
    return (
        f"plot_attention_weights: weights must hold values, got {type(weights).__name__}; call the model on data "
        "first (a symbolic tensor of a functional model or a tf.function has none)"
    )


def _panels(weights: np.ndarray, example: int, heads) -> list[tuple[str, np.ndarray]]:
    """(title, [seqlen_q, seqlen_k]) of every panel."""
    if weights.ndim not in (2, 3, 4):
        raise ValueError(
            "plot_attention_weights: weights must be [seqlen_q, seqlen_k], [batch, seqlen_q, seqlen_k] or "
            f"[batch, num_heads, seqlen_q, seqlen_k], got shape {weights.shape}"
        )
    if weights.size == 0:
        raise ValueError(f"plot_attention_weights: weights must not be empty, got shape {weights.shape}")
    if heads is not None and weights.ndim != 4:
        raise ValueError(f"plot_attention_weights: heads needs weights of rank 4, got shape {weights.shape}")
    if weights.ndim == 2:
        return [("", weights)]
    batch = weights.shape[0]
    if not -batch <= example < batch:
        raise ValueError(f"plot_attention_weights: example {example} is not in a batch of {batch}")
    if weights.ndim == 3:
        return [("", weights[example])]
    num_heads = weights.shape[1]
    chosen = range(num_heads) if heads is None else list(heads)
    wrong = [head for head in chosen if not 0 <= head < num_heads]
    if wrong or len(chosen) == 0:
        raise ValueError(f"plot_attention_weights: heads must be in 0..{num_heads - 1} and at least one, got {heads}")
    return [(f"head {head}", weights[example, head]) for head in chosen]


def _labels(argument: str, tokens, extent: int) -> list[str]:
    if tokens is None:
        return [str(position) for position in range(extent)]
    labels = [str(token) for token in tokens]
    if len(labels) != extent:
        raise ValueError(f"plot_attention_weights: {argument} has {len(labels)} labels for {extent} positions")
    return labels


def _figure(figure, width: float, height: float):
    if figure is None:
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError(
                requirements.missing("attn_ops.visualize.plot_attention_weights", "matplotlib")
            ) from error
        figure = pyplot.figure(figsize=(width, height))
    figure.set_layout_engine("compressed")  # constrained layout for panels of fixed aspect
    return figure


def _label(axis, labels: list[str], inches: float) -> None:
    """Every n-th label, n = 1, 2, 5, 10, 20, ..., so that they can be read."""
    most = max(1, int(inches * _LABELS_PER_INCH))
    step = next(
        factor * 10**power for power in range(18) for factor in (1, 2, 5) if factor * 10**power * most >= len(labels)
    )
    positions = range(0, len(labels), step)
    axis.set_ticks(positions, [labels[position] for position in positions])


def _annotate(ax, panel: np.ndarray, largest: float) -> None:
    for (row, column), weight in np.ndenumerate(panel):
        light = not weight > 0.5 * largest
        ax.text(column, row, f"{weight:.2f}", ha="center", va="center", fontsize=7, color="black" if light else "white")

"""Tokens as running text, coloured by the weight that they receive."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from attn_ops.visualize import drawable, figures
from attn_ops.visualize.recorded import LayerAttention

_NAME = "plot_attention_over_text"
_POINTS = 11
_ADVANCE = 0.602  # of a letter of DejaVu Sans Mono, in its size
_LINE = 1.9  # of lines, likewise
_BAR = 1.2  # inches beside the text


def plot_attention_over_text(
    weights,
    tokens: Sequence | None = None,
    *,
    query: int | None = None,
    example: int = 0,
    heads: Sequence[int] | None = None,
    title: str | None = None,
    cmap: str = "Blues",
    vmax: float | None = None,
    power: float = 1.0,
    ax=None,
    width: float = 8.0,
):
    """Writes the tokens as text, each on the colour of the weight that it receives.

    Args:
        weights: As for :func:`plot_attention_weights`. Tokens that nobody sees (all weights NaN, or hidden) are hatched.
        tokens: seqlen_k labels; None for those of a :class:`LayerAttention`.
        query: The row whose weights are shown, negative counts from the end; None for the mean over all rows.
        example, heads: Of which example, and of which heads the mean.
        title: Text above it.
        cmap, vmax, power: As for :func:`plot_attention_weights`.
        ax: A matplotlib axes to draw into; None makes a figure with `pyplot`.
        width: Inches of a new figure.

    Returns:
        The matplotlib axes.

    Raises:
        ImportError, TypeError, ValueError: As :func:`plot_attention_weights`; a `query` that is no row.
    """
    if isinstance(weights, LayerAttention) and query is None:
        received, hidden, own = _received(weights, example, heads)
    else:
        panels, _, own, block = drawable.matrices(_NAME, weights, example, heads)
        if block > 1:
            raise ValueError(f"{_NAME}: of long sequences the weights of one row are not kept: query must be None")
        mean = np.stack([panel for _, panel in panels])
        rows = mean.shape[1]
        if query is not None and not -rows <= query < rows:
            raise ValueError(f"{_NAME}: query must be one of {rows} rows, got {query}")
        mean = mean if query is None else mean[:, query : query + 1 or None]
        hidden = np.isnan(mean).all((0, 1))
        received = np.nan_to_num(mean).mean((0, 1))
    vmax, power = figures.checked_scale(_NAME, vmax, power)
    if tokens is None and own is None:
        raise ValueError(f"{_NAME}: tokens must be given, a label for each of {len(received)} keys")
    texts = drawable.labels(_NAME, "tokens", own if tokens is None else tokens, len(received))
    pyplot = figures.pyplot(_NAME)

    if ax is not None:
        box = ax.get_window_extent().transformed(ax.figure.dpi_scale_trans.inverted())
        width = box.width
    letter = _POINTS * _ADVANCE / 72
    places, lines = _lines(texts, max(8, int(width / letter)))
    if ax is None:
        height, above = max(1.0, lines * _LINE * _POINTS / 72), 0.45 if title else 0.15
        inches = width + _BAR, height + above + 0.1
        figure = pyplot.figure(figsize=inches)
        figures.show_once(figure)
        ax = figure.add_axes((0.1 / inches[0], 0.1 / inches[1], width / inches[0], height / inches[1]))
    bar = ax.inset_axes((1.01, 0.08, 0.12 / width, 0.84))
    largest = vmax or float(received.max()) or 1.0
    scale = figures.norm(largest, power)
    colours = pyplot.get_cmap(cmap)
    ax.set_axis_off()
    ax.set_xlim(0, width / letter)
    ax.set_ylim(lines - 0.4, -0.6)
    for text, weight, dark, (line, column) in zip(texts, received, hidden, places):
        colour = colours(scale(min(weight, largest)))
        box = {"boxstyle": "square,pad=0.25", "facecolor": colour, "edgecolor": "none"}
        if dark:
            box = {"boxstyle": "square,pad=0.25", **figures.HATCH}
        ax.text(
            column,
            line,
            text.replace("$", r"\$"),
            family="monospace",
            fontsize=_POINTS,
            va="center",
            color="0.5" if dark else figures.ink(colour),
            bbox=box,
        )
    from matplotlib import cm

    figures.colour_bar(
        ax.figure, cm.ScalarMappable(scale, colours), ax, largest, received.max() > largest, "weight received", cax=bar
    )
    if title is not None:
        ax.set_title(title, loc="left")
    return ax


def _received(layer, example, heads):
    """What the keys of a layer receive, in the mean of some heads; which are hidden; and their labels."""
    batch, num_heads = layer.shape[:2]
    if not -batch <= example < batch:
        raise ValueError(f"{_NAME}: example {example} is not in a batch of {batch}")
    chosen = list(range(num_heads) if heads is None else heads)
    if not chosen or not all(0 <= head < num_heads for head in chosen):
        raise ValueError(f"{_NAME}: heads must be in 0..{num_heads - 1} and at least one, got {heads}")
    own = None if layer.key_tokens is None else layer.key_tokens[example]
    return layer.received[example, chosen].mean(0), ~layer.real_keys[example], own


def _lines(texts, width):
    """(line, column) of each text in lines of so many letters, and how many lines there are."""
    places, line, column = [], 0, 0.5
    for text in texts:
        size = sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
        if column > 1 and column + size > width - 1:
            line, column = line + 1, 0.5
        places.append((line, column))
        column += size + 1.2
    return places, line + 1

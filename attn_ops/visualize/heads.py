"""All heads of all layers at a glance."""

from __future__ import annotations

import numpy as np

from attn_ops.visualize import drawable, figures
from attn_ops.visualize.recorded import ModelAttention

_NAME = "plot_heads"


def plot_heads(
    attention,
    *,
    example: int = 0,
    cmap: str = "Blues",
    power: float = 0.5,
    crop: bool = True,
    title: str | None = None,
    figure=None,
):
    """Draws every head of every layer, small: a row per layer, a column per head.

    Each head has colours from 0 to its own largest weight; what is hidden is hatched. Below each is its entropy in nats.

    Args:
        attention: What :func:`attention` returns, or weights as `ModelAttention.from_weights` takes them.
        example: Which entry of the batch.
        cmap, power: As for :func:`plot_attention_weights`.
        crop: Whether padding is left out.
        title: Text above it.
        figure: An empty `matplotlib.figure.Figure` to draw into; None makes one with `pyplot`.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: An example that does not exist, weights that are no probabilities, or no layers.
    """
    if not isinstance(attention, ModelAttention):
        attention = ModelAttention.from_weights(attention)
    _, power = figures.checked_scale(_NAME, None, power)
    if not len(attention):
        raise ValueError(f"{_NAME}: there are no layers")
    columns = max(layer.heads for layer in attention)
    size = max(0.5, min(1.2, 14.0 / columns))
    figure = figures.new_figure(_NAME, columns * size + 1.6, len(attention) * (size + 0.18) + 0.6, figure)
    axes = figure.subplots(len(attention), columns, squeeze=False)
    for row, layer in zip(axes, attention):
        panels, _, _, block = drawable.matrices(_NAME, layer, example, None)
        where = np.s_[:, :]
        if crop:
            where = tuple(_real(x[example], block) for x in (layer.real_rows, layer.real_keys))
        for head, ax in enumerate(row):
            if head >= layer.heads:
                ax.set_axis_off()
                continue
            panel = panels[head][1][where]
            largest = np.nanmax(panel, initial=0.0) or 1.0
            ax.imshow(np.ma.masked_invalid(panel), cmap=cmap, norm=figures.norm(largest, power), aspect="auto")
            ax.patch.set(**figures.HATCH)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_xlabel(f"{layer.entropy[example, head]:.2f}", fontsize=7, labelpad=1, color="0.4")
            for spine in ax.spines.values():
                spine.set_color("0.8")
            if layer is attention[0]:
                ax.set_title(str(head), fontsize=8)
        row[0].set_ylabel(_short(layer.name), fontsize=8, rotation=0, ha="right", va="center")
    if title is not None:
        figure.suptitle(title)
    return figure


def _real(real, block):
    """From the first real position to the last, in blocks."""
    there = np.flatnonzero(real)
    return slice(there[0] // block, there[-1] // block + 1) if len(there) else slice(None)


def _short(name, most=28):
    return name if len(name) <= most else f"…{name[1 - most :]}"

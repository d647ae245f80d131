"""What the plots share: figures that are shown once, colours of weights, letters that can be read on them."""

from __future__ import annotations

import functools
import math

import numpy as np

from attn_ops import requirements

LABELS_PER_INCH = 7  # more cannot be read
_LONGEST_LABEL = 24  # characters; of longer ones the first
_CHARACTER = 0.067  # inches that one takes at 8 points
HATCH = {"facecolor": "0.94", "edgecolor": "0.72", "hatch": "////", "linewidth": 0.0}  # of what is hidden


def pyplot(name: str):
    """matplotlib's, or ImportError in the name of the function."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(requirements.missing(f"attn_ops.visualize.{name}", "matplotlib")) from error
    return pyplot


def new_figure(name: str, width: float, height: float, figure=None):
    """A figure of these inches, or the one that is given, laid out for panels of fixed aspect."""
    if figure is None:
        figure = pyplot(name).figure(figsize=(width, height))
        show_once(figure)
    figure.set_layout_engine("compressed")
    return figure


def show_once(figure):
    """Notebooks show the figures of a cell at its end, and once more the one that its last line gives: not those."""
    import matplotlib

    if "inline" in matplotlib.get_backend():
        figure._ipython_display_ = functools.partial(_display, figure)


def _display(figure):
    from matplotlib import pyplot

    if pyplot.fignum_exists(figure.number):
        return  # shown at the end of the cell
    import io

    from IPython import display

    picture = io.BytesIO()
    figure.savefig(picture, format="png", bbox_inches="tight")
    display.display(display.Image(picture.getvalue()))


def norm(largest: float, power: float):
    """From a weight to a place in a colour map."""
    from matplotlib import colors

    return colors.Normalize(0.0, largest) if power == 1 else colors.PowerNorm(power, 0.0, largest)


def checked_scale(name: str, vmax, power):
    """``vmax``, None or a positive float, and ``power``, a positive float."""
    for what, x in (("vmax", vmax), ("power", power)):
        number = isinstance(x, (int, float, np.integer, np.floating)) and not isinstance(x, bool)
        if not (what == "vmax" and x is None) and not (number and math.isfinite(x) and x > 0):
            raise ValueError(f"{name}: {what} must be a positive number, got {x!r}")
    return None if vmax is None else float(vmax), float(power)


def colour_bar(figure, image, axes, largest: float, clipped: bool, label="attention weight", cax=None):
    """With its ends and its middle labelled, beside the axes or in ``cax``."""
    place = {"ax": axes, "shrink": 0.85, "aspect": 30, "pad": 0.02} if cax is None else {"cax": cax}
    bar = figure.colorbar(image, extend="max" if clipped else "neither", **place)
    ticks = [0.0, largest / 2, largest]
    bar.set_ticks(ticks, labels=[f"{'≥ ' if clipped and x == largest else ''}{x:.3g}" for x in ticks])
    bar.minorticks_off()
    bar.set_label(label)
    bar.outline.set_visible(False)
    return bar


def ink(colour) -> str:
    """Black or white, whichever can be read on an RGB colour: by the contrast of WCAG 2.2 (relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "white"


def short(label: str) -> str:
    """What is written of a label."""
    return label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 1]}…"


def label_inches(labels) -> float:
    """How far the longest label reaches from its axis, beyond the five characters that all figures have room for."""
    return _CHARACTER * max(0, max(len(short(label)) for label in labels) - 5)


def label_axis(axis, labels, inches: float) -> None:
    """Every n-th label, n = 1, 2, 5, 10, 20, ..., so that they can be read."""
    most = max(1, int(inches * LABELS_PER_INCH))
    step = next(
        factor * 10**power for power in range(18) for factor in (1, 2, 5) if factor * 10**power * most >= len(labels)
    )
    positions = range(0, len(labels), step)
    axis.set_ticks(positions, [short(labels[position]) for position in positions])

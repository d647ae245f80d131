"""Makes the charts and tables of measurements from the figures that are kept as CSV: `python docs/charts.py`.

What it writes beside them is the same, byte for byte, wherever it runs; a test compares.
"""

import csv
from pathlib import Path

FIGURES = Path(__file__).resolve().parent / "figures"
OURS = "attn_ops"
COLOURS = {OURS: "#1f5fa8", "Keras, graph": "#8d99a6", "Keras, XLA": "#c4ccd4"}
_BAR, _GAP, _LEFT, _WIDE = 15, 16, 190, 400


def rows(name: str) -> list[dict]:
    """A CSV of figures: a dict per row, numbers as they are written."""
    with (FIGURES / name).open(newline="") as file:
        return list(csv.DictReader(file))


def bars(title: str, note: str, groups: dict[str, dict[str, float]], unit: str) -> str:
    """An SVG of horizontal bars: by group, and in it by series, how long each is, as a multiple of ours."""
    largest = max(value / series[OURS] for series in groups.values() for value in series.values())
    y, parts = 64, []
    for name, series in groups.items():
        middle = y + _BAR * len(series) / 2 + 4
        parts.append(_text(_LEFT - 10, middle, name, "end"))
        for of, value in series.items():
            width = _WIDE * value / series[OURS] / largest
            ratio = "" if of == OURS else f", {value / series[OURS]:.1f}×"
            parts.append(f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR - 2}" fill="{COLOURS[of]}"/>')
            parts.append(_text(_LEFT + width + 6, y + _BAR - 4, f"{value:g} {unit}{ratio}", size=11))
            y += _BAR
        y += _GAP
    legend, x = [], _LEFT
    for of in dict.fromkeys(of for series in groups.values() for of in series):
        legend.append(f'<rect x="{x}" y="36" width="11" height="11" fill="{COLOURS[of]}"/>')
        legend.append(_text(x + 16, 46, of))
        x += 36 + 7 * len(of)
    width, height = _LEFT + _WIDE + 130, y + 18
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" role="img" aria-label="{title}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(16, 22, title, size=15, weight="600"),
        *legend, *parts,
        _text(16, height - 10, note, size=11),
        "</svg>\n",
    ])  # fmt: skip


def _text(x, y, text, anchor="start", size=12, weight="400"):
    font = f'font-size="{size}" font-weight="{weight}"'
    return f'<text x="{x:.0f}" y="{y:.0f}" {font} text-anchor="{anchor}" fill="#24292f">{text}</text>'


def table(found: list[dict], ratios: bool = True, words: int = 1, digits: int = 1) -> str:
    """Markdown; behind each number, in brackets, how many times ours it is. The first ``words`` columns are names."""
    head = list(found[0])
    ours = next(name for name in head if name.startswith(OURS))
    lines = [head, ["---"] * words + ["---:"] * (len(head) - words)]
    for row in found:
        cells = [row[name] for name in head[:words]]
        for name in head[words:]:
            in_brackets = ratios and row[name] and name != ours
            ratio = f" ({float(row[name]) / float(row[ours]):.{digits}f})" if in_brackets else ""
            cells.append((row[name] or "–") + ratio)
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def made() -> dict[str, str]:
    """The files, by name, and what is in them."""
    speed, memory = rows("speed.csv"), rows("memory.csv")
    shape = list(speed[0])[1]
    both = [row for row in speed if row["pass"] == "forward + backward"]
    training = {row[shape]: {name: float(row[name]) for name in COLOURS} for row in both}
    needed = {row["pass"]: {name: float(row[name]) for name in COLOURS} for row in memory}
    machine = "(batch, heads, length, head_dim), float32, one thread of a Zen 5 with AVX-512, 2026-11-23"
    return {
        "speed.svg": bars("Attention on a CPU, forward + backward: time, as a multiple of ours", machine, training, "ms"),
        "memory.svg": bars("Memory that a first step of (1,16,4096,64) adds", "the same machine, 2 threads; outputs and "
                           "gradients included", needed, "MB"),
        "speed.md": table(speed, words=2),
        "memory.md": table(memory, ratios=False),
        "transformer_step.md": table(rows("transformer_step.csv"), digits=2),
    }  # fmt: skip


if __name__ == "__main__":
    for name, content in made().items():
        (FIGURES / name).write_text(content)

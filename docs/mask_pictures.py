"""The pictures of the guide to masks, drawn by `Mask.plot` when Sphinx starts, from the masks of code/masks.py."""

import contextlib
import io
import runpy
from pathlib import Path

HERE = Path(__file__).resolve().parent


def draw(app):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder = Path(app.srcdir, "_pictures")
    folder.mkdir(exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        pictures = runpy.run_path(str(HERE / "code" / "masks.py"))["PICTURES"]
    for name, (mask, length, block) in pictures.items():
        figure, axes = pyplot.subplots(figsize=(4.2, 3.0), layout="constrained")
        mask.plot(length, block=block, ax=axes)
        figure.savefig(folder / f"{name}.svg")
        pyplot.close(figure)


def setup(app):
    app.connect("builder-inited", draw)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

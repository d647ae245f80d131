"""The viewer: one HTML file that needs nothing else, and the same as a widget in notebooks."""

from __future__ import annotations

import base64
import functools
import html
import importlib.util
import pathlib

from attn_ops.visualize.payload import payload
from attn_ops.visualize.recorded import LayerAttention, ModelAttention

_NAME = "attn_ops.visualize.viewer"
_HERE = pathlib.Path(__file__).parent
MAX_BYTES = 2**24
# The page may run what stands in it, and fetch nothing.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
body {{ margin: 0; }}
{css}</style>
</head>
<body>
<main id="attn-ops"></main>
<noscript>This page needs JavaScript, which it has in itself.</noscript>
<script type="application/json" id="attn-ops-header">{header}</script>
<script type="text/plain" id="attn-ops-data">{data}</script>
<script type="module">
{module}
renderPage();
</script>
</body>
</html>
"""


def viewer(attention, path=None, *, example=0, image=None, grid=None, title=None, max_bytes=MAX_BYTES):
    """A viewer of attention weights for browsers and notebooks: one HTML file that needs no network.

    It shows all heads of all layers, one of them large, lines between tokens, the tokens as text, and patches over an
    image; what masks hide is hatched. Everything works by keyboard ("?" tells the keys), and pictures and weights can
    be saved from it.

    Args:
        attention: What :func:`attention` returns, a :class:`LayerAttention`, or weights as
            `ModelAttention.from_weights` takes them.
        path: Where to write the HTML file; None for nowhere yet.
        example: Which entry of the batch.
        image: For vision models: the image `[height, width]` or `[height, width, channels]`, whose patches are the last
            tokens.
        grid: (rows, columns) of patches; None for squares over the image.
        title: None for the name of the model.
        max_bytes: Beyond it, before compression, layers are shown by means of blocks and the largest weights of each row.

    Returns:
        A :class:`Viewer`, which notebooks show: as a widget where the package anywidget is installed.

    Raises:
        ValueError: Weights that are no probabilities or NaN, an example that does not exist, an image or a grid that does
            not fit, or more layers than ``max_bytes`` allows.
    """
    if isinstance(attention, LayerAttention):
        attention = ModelAttention(attention.name, [attention])
    elif not isinstance(attention, ModelAttention):
        attention = ModelAttention.from_weights(attention)
    header, data = payload(_NAME, attention, example, image, grid, title, max_bytes)
    made = Viewer(title or attention.model, header, data)
    if path is not None:
        made.save(path)
    return made


class Viewer:
    """What :func:`viewer` makes.

    Attributes:
        title: the title.
        html: the page, a str.
    """

    def __init__(self, title: str, header: str, data: bytes):
        self.title = title
        self._header, self._data = header, data

    @functools.cached_property
    def html(self) -> str:
        return _PAGE.format(
            policy=_POLICY,
            title=html.escape(self.title),
            css=_source("viewer.css"),
            module=_source("viewer.js"),
            header=self._header.replace("<", "\\u003c"),  # so that no token ends the element
            data=base64.b64encode(self._data).decode(),
        )

    def save(self, path) -> pathlib.Path:
        """Writes the page to a file, and returns its path."""
        path = pathlib.Path(path)
        path.write_text(self.html, encoding="utf-8", newline="\n")
        return path

    def widget(self):
        """The same as a widget of the package anywidget; ImportError where that is not installed."""
        if importlib.util.find_spec("anywidget") is None:
            raise ImportError(
                "attn_ops.visualize.Viewer.widget needs anywidget, which is not installed: pip install anywidget"
            )
        return _widget_class()(header=self._header, data=self._data)

    def _repr_html_(self):
        page = html.escape(self.html, quote=True)
        return (
            f'<iframe srcdoc="{page}" title="{html.escape(self.title, quote=True)}" sandbox="allow-scripts allow-downloads '
            'allow-popups" style="width:100%;height:820px;border:0"></iframe>'
        )

    def _repr_mimebundle_(self, **options):
        if importlib.util.find_spec("anywidget") is not None:
            shown = self.widget()._repr_mimebundle_(**options)
            if shown:
                return shown
        return {"text/plain": repr(self), "text/html": self._repr_html_()}

    def __repr__(self):
        return (
            f"<attn_ops.visualize.Viewer of {self.title}: .save(path) writes it, {len(self._data):,} bytes of weights>"
        )


def _source(name):
    return (_HERE / name).read_text(encoding="utf-8")


@functools.cache
def _widget_class():
    import anywidget
    import traitlets

    class AttentionWidget(anywidget.AnyWidget):
        _esm = _HERE / "viewer.js"
        _css = _HERE / "viewer.css"
        header = traitlets.Unicode().tag(sync=True)
        data = traitlets.Bytes().tag(sync=True)

    return AttentionWidget

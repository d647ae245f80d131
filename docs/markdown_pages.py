"""Each page as Markdown beside its HTML, and `llms.txt` with the list of them: for programs that read documentation.

A page is its source with what it includes put in its place. Pages that are made of docstrings are what Sphinx renders
as text.
"""

import re
import textwrap
from pathlib import Path

from docutils import nodes
from sphinx.builders.text import TextBuilder
from sphinx.writers.text import TextTranslator

_INCLUDES = re.compile(r"^```\{(literalinclude|include)\} (\S+)\n((?::.*\n)*)```\n", re.MULTILINE)
_WHAT = """# attn_ops

> Fused attention for TensorFlow, Keras and JAX: forward and backward on CPUs, with dropout, masks and scores, inside
> XLA, and without a score matrix in memory. (CUDA kernels are there, measured on an H100.)

Each page is also there as HTML, under the same name.
"""


def expanded(text: str, folder: Path) -> str:
    """The source of a page in ``folder``, with the files, or the marked regions of files, that it includes."""

    def included(match):
        kind, path, options = match.groups()
        content = (folder / path).read_text()
        after, before = (
            re.search(rf'^:{name}: "(.*)"$', options, re.MULTILINE) for name in ("start-after", "end-before")
        )
        content = content.split(after.group(1), 1)[1] if after else content
        content = content.split(before.group(1), 1)[0] if before else content
        if kind == "include":
            return content
        language = re.search(r"^:language: (\w+)$", options, re.MULTILINE)
        content = textwrap.dedent(content.strip("\n").rstrip(" ")).strip("\n")
        return f"```{language.group(1) if language else 'python'}\n{content}\n```\n"

    text = _INCLUDES.sub(included, text)
    text = re.sub(r"^```\{image\} (\S+)\n:alt: (.*)\n(?::.*\n)*```$", r"![\2](\1)", text, flags=re.MULTILINE)
    return re.sub(r"(!\[[^\]]*\]\()((?:\.\./)*)[\w/]*/(\w+\.svg\))", r"\1\2_images/\3", text)  # where Sphinx puts them


def write(app, exception):
    if exception is not None or app.builder.name not in ("html", "dirhtml"):
        return
    lines = [_WHAT]
    for name in sorted(app.env.found_docs, key=lambda name: _place(app, name)):
        source = Path(app.env.doc2path(name))
        text = source.read_text()
        page = _as_text(app, name) if "```{eval-rst}" in text else expanded(text, source.parent)
        target = Path(app.outdir, f"{name}.md")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page)
        lines.append(f"- [{app.env.titles[name].astext()}]({name}.md){_summary(app, name)}")
    Path(app.outdir, "llms.txt").write_text("\n".join(lines) + "\n")


def _place(app, name):
    """Where a page is in the table of contents."""
    depth_first, pending = [], [app.config.root_doc]
    while pending:
        page = pending.pop(0)
        depth_first.append(page)
        pending = [*app.env.toctree_includes.get(page, ()), *pending]
    return depth_first.index(name) if name in depth_first else len(depth_first)


def _summary(app, name):
    """The first sentence of a page that stands in no table or list."""
    for paragraph in app.env.get_doctree(name).findall(nodes.paragraph):
        if not isinstance(paragraph.parent, nodes.section):
            continue
        sentence = re.split(r"(?<=\.)\s", paragraph.astext().replace("\n", " "), maxsplit=1)[0]
        return f": {sentence.rstrip('.:')}"
    return ""


def _as_text(app, name):
    builder = TextBuilder(app, app.env)
    builder.secnumbers, builder.current_docname = {}, name
    document = app.env.get_and_resolve_doctree(name, app.builder)
    visitor = TextTranslator(document, builder)
    document.walkabout(visitor)
    return visitor.body


def setup(app):
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

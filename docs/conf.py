"""How Sphinx builds these pages: `./dev docs`, or `python -m sphinx -W --keep-going docs docs/_build`."""

import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path[:0] = [str(HERE.parent), str(HERE)]  # the package of this checkout, and the modules beside this one

import attn_ops  # noqa: E402

project = "attn_ops"
author = "The attn_ops authors"
project_copyright = "The attn_ops authors. Apache License 2.0"
version = release = attn_ops.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "markdown_pages", "mask_pictures"]
exclude_patterns = ["_build", "code", "figures"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
default_role = "literal"  # `x` in docstrings

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_use_ivar = False
napoleon_custom_sections = ["Weights", ("Call arguments", "params_style")]

smartquotes = False

html_theme = "furo"
html_title = f"attn_ops {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False  # each page is there as Markdown, with what it includes (markdown_pages.py)
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "monokai"

# A name in a docstring that leads nowhere is an error, but for those of others: nothing is asked of a network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(tf|jax|keras|keras_hub|numpy|matplotlib)\..*")]


def for_sphinx(app, what, name, obj, options, lines):
    """Makes docstrings what Sphinx reads: "`KerasTensor`s" is no reStructuredText, and Keras has an "Output:" and lists
    that are indented in their own way."""
    text = re.sub(
        r"(``[^`]+``|`[^`]+`)(\w?)", lambda span: span[1] + ("\\ " + span[2] if span[2] else ""), "\n".join(lines)
    )
    before, found, output = text.partition("\nOutput:\n")
    text = before + (found and "\nReturns:\n" + re.sub(r"^ +", "    ", output, flags=re.MULTILINE))
    lines[:] = _lists(text.split("\n"))


def _lists(lines):
    """With a blank line before each list, and two spaces before what goes on in an item."""
    item = None
    for line in lines:
        stripped = line.lstrip()
        indent = len(line) - len(stripped)
        if stripped.startswith("- "):
            if item is None:
                yield ""
            item = indent
        elif item is not None and stripped and indent > item:
            line = " " * (item + 2) + stripped
        elif stripped:
            item = None
        yield line


def setup(app):
    app.connect("autodoc-process-docstring", for_sphinx, priority=400)  # before napoleon

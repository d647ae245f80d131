"""The pages themselves: links, regions of code, figures, and that they leave nothing public out. Needs no Sphinx."""

import ast
import builtins
import csv
import importlib.util
import inspect
import re
import runpy
import sys
from pathlib import Path

import attn_ops
import pytest
from attn_ops.call import habits
from attn_ops.cli import info

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if not {"_build", "figures"} & set(path.relative_to(DOCS).parts))
MARKDOWN = [*PAGES, *ROOT.glob("*.md"), *(ROOT / "csrc").rglob("*.md"), *(ROOT / ".github").rglob("*.md")]
REGION = r'^```\{literalinclude\} (\S+)\n:start-after: "# \[(\w+)\]"\n:end-before: "# \[/(\w+)\]"\n(?::dedent:\n)?```$'
MADE_BY_SPHINX = "_pictures"


def without_code(text):
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path):
    """The anchors of the headings of a page, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Those within the repository: nothing is asked of a network."""
    links = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", without_code(page.read_text()))
    links += re.findall(r"^```\{(?:image|include)\} (\S+)$", page.read_text(), re.MULTILINE)
    for link in links:
        if link.startswith(("http:", "https:", "mailto:")) or MADE_BY_SPHINX in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_code_of_pages_comes_from_files():
    used = {}
    for page in PAGES:
        assert "```python" not in page.read_text(), page
        found = re.findall(REGION, page.read_text(), re.MULTILINE)
        assert len(found) == page.read_text().count("{literalinclude}"), page
        for path, start, end in found:
            assert start == end
            used.setdefault((page.parent / path).resolve(), set()).add(start)
    for path in sorted((DOCS / "code").glob("*.py")):
        text = path.read_text()
        opened, closed = (re.findall(rf"^ *# \[{slash}(\w+)\]$", text, re.MULTILINE) for slash in ("", "/"))
        assert opened == closed and len(set(opened)) == len(opened), path
        assert used[path.resolve()] == set(opened), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_pages_can_be_followed_by_themselves(page):
    """All names of their code come from it."""
    if page.stem in ("fallback", "troubleshooting"):
        pytest.skip("its calls are those of other pages, or said in words")
    code = ""
    for path, start, _ in re.findall(REGION, page.read_text(), re.MULTILINE):
        text = (page.parent / path).read_text()
        code += re.search(rf"^# \[{start}\]\n(.*?)^# \[/{start}\]$", text, re.MULTILINE | re.DOTALL).group(1)
    bound, used = set(dir(builtins)), set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            (bound if isinstance(node.ctx, ast.Store) else used).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).split(".")[0])
    assert used - bound == set()


def test_pages_are_in_the_table_of_contents():
    listed = set(re.findall(r"^([\w/]+)$", (DOCS / "index.md").read_text(), re.MULTILINE))
    assert listed == {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES} - {"index"}


def test_the_readme_is_short_and_shows_code_that_runs():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 700
    [shown] = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    start = (DOCS / "code" / "start.py").read_text()
    regions = re.findall(r"^# \[(?:swap|explain)\]\n(.*?)^# \[/", start, re.MULTILINE | re.DOTALL)

    def statements(code):
        """With imports one by one."""
        for node in ast.parse(code).body:
            several = isinstance(node, ast.Import)
            yield from [f"import {alias.name}" for alias in node.names] if several else [ast.unparse(node)]

    assert [*statements(shown)] == [*statements("\n".join(regions))]


def test_the_guide_to_the_op_has_all_options_and_their_defaults():
    text = (DOCS / "code" / "op.py").read_text()
    [shown] = re.findall(r"^# \[signature\]\n(.*?)^# \[/", text, re.MULTILINE | re.DOTALL)
    call = ast.parse(shown).body[0].value
    given = [*(argument.id for argument in call.args), *(keyword.arg for keyword in call.keywords)]
    parameters = inspect.signature(attn_ops.scaled_dot_product_attention).parameters
    assert given == [*parameters]
    for keyword in call.keywords:
        assert ast.literal_eval(keyword.value) == parameters[keyword.arg].default, keyword.arg


def figures(name):
    with (DOCS / "figures" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_readme_has_the_figures_that_were_measured():
    shape = "(batch, heads, length, head_dim)"
    measured = {f"{row['pass']} {row[shape]}": (row, "ms") for row in figures("speed.csv")}
    measured["a token, 8,192 before it (1,32/8,1x8192,128)"] = measured["decode (1,32/8,1x8192,128)"]
    measured["memory of forward + backward, (1,16,4096,64)"] = (figures("memory.csv")[1], "MB")
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (.*?) \| ([\d.]+ \w+) \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    assert len(rows) == 4
    for name, *cells in rows:
        row, unit = measured[name]
        found = [row["attn_ops"], row["Keras, graph"], row["Keras, XLA"]]
        assert cells == [f"{value} {unit}" if value else "–" for value in found], name


def test_charts_are_what_the_figures_say():
    spec = importlib.util.spec_from_file_location("docs_charts", DOCS / "charts.py")
    charts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(charts)
    for name, content in charts.made().items():
        assert (DOCS / "figures" / name).read_text() == content, "python docs/charts.py"


def test_the_reference_leaves_nothing_public_out():
    text = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    documented = set(re.findall(r"^\.\. auto\w+:: (?:[\w.]+\.)?(\w+)$", text, re.MULTILINE))
    modules = {"integration", "jax", "layers", "masks", "models", "reference", "visualize", "__version__"}
    wanted = set(attn_ops.__all__) - modules
    wanted |= set(attn_ops.layers.__all__) - {"GroupQueryAttention"} | set(attn_ops.models.__all__)
    functions = {name for name in attn_ops.masks.__all__ if inspect.isfunction(getattr(attn_ops.masks, name))}
    wanted |= functions - {"combined", "interval", "not_boolean", "tells_visible"}  # of the implementations
    assert wanted - documented == set()


def test_environment_variables_are_on_their_page():
    text = (DOCS / "reference" / "environment.md").read_text()
    named = set(re.findall(r"^\| `(ATTN_OPS_\w+)` \|", text, re.MULTILINE))
    assert named >= set(info.ENVIRONMENT)
    sources = [*(ROOT / "attn_ops").rglob("*.py"), *(ROOT / "csrc").rglob("*.cc"), *(ROOT / "csrc").rglob("*.h")]
    read = r'(?:getenv\(|environ\.get\(|environ\[|environ, )"(ATTN_OPS_\w+)"'
    assert {name for path in sources for name in re.findall(read, path.read_text())} - named == set()


def test_commands_that_are_named_exist(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["attn_ops", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module("attn_ops", run_name="__main__")
    known = capsys.readouterr().out
    named = {name for page in MARKDOWN for name in re.findall(r"(?:python -m attn_ops|attn-ops) (\w+)", page.read_text())}
    assert named and {name for name in named if name not in known} == set()
    script = (ROOT / "dev").read_text()
    named = {name for page in MARKDOWN for name in re.findall(r"\./dev (\w+)", page.read_text())}
    assert {name for name in named if f"./dev {name} " not in script} == set()


def test_other_names_are_those_that_errors_know():
    lines = (DOCS / "guides" / "porting.md").read_text().split("\n\n")[2].splitlines()[2:]
    names = {name for line in lines for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert len(names) > 20 and names - set(habits._HERE) == {"scaled_dot_product_attention"}


def test_the_version_is_one():
    assert f"\nversion: {attn_ops.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"VERSION {attn_ops.__version__} " in (ROOT / "CMakeLists.txt").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version", ' in project and 'version = { attr = "attn_ops.__version__" }' in project

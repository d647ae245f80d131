"""The notebooks that `./dev notebooks` makes of the examples: their cells, run one after the other, are the script."""

import re
import sys
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path for path in (ROOT / "examples").glob("*.py") if "\n# %%" in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_cells_are_the_script(script, monkeypatch):
    notebook = jupytext.read(script)
    nbformat.validate(notebook)
    first, *rest = notebook.cells
    assert first.cell_type == "markdown" and f"python examples/{script.name}" in first.source
    assert all(cell.cell_type == "code" for cell in rest) and rest[-1].source.count("main(") == 2
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    called = []
    names = {"__name__": "__main__", "called": called}
    for cell in rest:
        source = re.sub(r"^    main\(", "    called.append(main); (", cell.source, flags=re.MULTILINE)
        exec(compile(source, str(script), "exec"), names)
    assert called == [names["main"]]


def test_the_command_takes_all_of_them_and_git_none():
    assert "jupytext --quiet --to ipynb $(grep -l '^# %%' examples/*.py)" in (ROOT / "dev").read_text()
    assert "/examples/*.ipynb" in (ROOT / ".gitignore").read_text().splitlines()
    assert {"long_sequences", "sequence_classification", "text_generation"} <= {script.stem for script in SCRIPTS}

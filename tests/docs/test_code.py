"""The code in the documentation, docs/code/*.py: it runs, prints what the pages show, and fails as they say."""

import re
import runpy
import warnings
from pathlib import Path

import keras
import pytest
from attn_ops import requirements

DOCS = Path(__file__).resolve().parents[2] / "docs"
SLOW = ("models_of_keras_hub", "on_jax", "saving", "tutorial")
ERRORS = (DOCS / "troubleshooting.md").read_text()
TITLE_AND_REGION = r'^## `(.*)`\n(?:(?!^## ).*\n)*?^:start-after: "# \[(\w+)\]"$'
TITLES = {region: title for title, region in re.findall(TITLE_AND_REGION, ERRORS, re.MULTILINE)}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a file of docs/code as a script, in an empty folder, with the names that Keras gives in a new process."""

    def of(name):
        pytest.importorskip("matplotlib").use("Agg")
        from matplotlib import pyplot

        monkeypatch.chdir(tmp_path)
        keras.backend.clear_session()
        try:
            return runpy.run_path(str(DOCS / "code" / f"{name}.py"))
        finally:
            pyplot.close("all")

    return of


@pytest.mark.parametrize("name", sorted(path.stem for path in (DOCS / "code").glob("*.py") if path.stem not in SLOW))
def test_it_runs_and_prints_what_pages_show(name, run, capsys):
    run(name)
    printed = capsys.readouterr().out
    for page in pages_with(name):
        files = set(re.findall(r"code/(\w+)\.py", page.read_text()))
        for shown in re.findall(r"^```text\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            assert len(files) == 1, f"{page}: which of {files} prints it?"
            assert shown in printed, f"{page}: {name}.py prints\n{printed}"


@pytest.mark.wide(4)
@pytest.mark.parametrize("name", SLOW)
def test_what_takes_longer_runs(name, run):
    if name == "models_of_keras_hub":
        pytest.importorskip("keras_hub")
    run(name)


def pages_with(name):
    return [page for page in DOCS.rglob("*.md") if f"code/{name}.py" in page.read_text() and "_build" not in page.parts]


@pytest.fixture(scope="module")
def calls():
    return runpy.run_path(str(DOCS / "code" / "errors.py"))


def test_titles_without_a_call_are_said_too():
    without = re.findall(r"^## `(.*)`$", ERRORS, re.MULTILINE)[len(TITLES) :]
    operator = (DOCS.parent / "csrc" / "bindings" / "tf_hint.h").read_text()
    assert len(without) == 2 and without[0].split("'")[1] in operator
    assert without[1] in requirements.missing("attn_ops.explain", "tensorflow")


def test_each_error_has_a_title():
    regions = set(re.findall(r"^ *# \[(\w+)\]$", (DOCS / "code" / "errors.py").read_text(), re.MULTILINE))
    assert set(TITLES) == regions


@pytest.mark.parametrize("region", TITLES)
def test_errors_are_what_their_titles_say(region, calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            calls[region]()
            said = " ".join(str(warning.message) for warning in warned)
        except (TypeError, ValueError) as error:
            said = str(error)
    assert TITLES[region] in said

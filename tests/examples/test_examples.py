"""The examples that shared.py serves: each runs, little of it; their data are what they say; what is shared is right."""

import importlib
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if "def main" in path.read_text())
# What must be nearly the same of both models after --quick, of which the dropout may differ.
NEAR = {
    "long_sequences": "bits per byte, mean of all steps",
    "seq2seq": "letters right",
    "text_classification": "loss",
    "time_series": "mean squared error",
    "vision_transformer": "loss",
}
ALONE = {"sequence_classification", "text_generation"}  # with tests of their own


def example(name):
    return importlib.import_module(name)


@pytest.mark.wide(8)
@pytest.mark.parametrize("name", sorted({*SCRIPTS} - ALONE))
def test_it_runs_and_learns_what_stock_keras_learns(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what they write
    results = example(name).main(["--quick"])
    printed = capsys.readouterr().out
    assert "━" in printed and ("training step" in printed or name == "reading_attention")  # Keras's bar
    if name == "convert_model":
        assert "0 of 1 attention layers run fused" in printed and "1 of 1 attention layers run fused" in printed
        assert results["converted"]["loss"] == pytest.approx(results["stock_keras"]["loss"], abs=1e-4)
        assert results["trained on"]["loss"] < results["converted"]["loss"]
        assert results["reverted"]["difference"] < 1e-5
    elif name == "hierarchical_attention":
        assert results["attn_ops"]["loss"] < np.log(4) and "What weighs most" in printed
    elif name == "reading_attention":
        assert "Most attended words of it" in printed and "MultiHeadAttention  4" in printed
        folder = Path("reading_attention")
        assert {path.name for path in folder.iterdir()} == {"attention.html", "heads.png", "words.png"}
        assert "attn-ops-data" in (folder / "attention.html").read_text() and results["text_classifier"]["loss"] < 2
    elif name == "multi_head":
        assert {scores["weights"] for scores in results.values()} == {results["heads_1"]["weights"]}
        assert all(scores["stock Keras differs by"] < 1e-5 for scores in results.values())
    else:
        ours, stock = (results[model][NEAR[name]] for model in ("attn_ops", "stock_keras"))
        assert np.isfinite(ours) and ours == pytest.approx(stock, rel=0.15)
        assert results["attn_ops"].get("change by padding", 0) < 1e-5


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_tells_how_it_is_run(name):
    text = (ROOT / "examples" / f"{name}.py").read_text()
    assert text.startswith("#!/usr/bin/env python3\n# %% [markdown]\n\"\"\"")
    assert f"python examples/{name}.py" in text and text.count("\n# %% ") >= 3
    assert f"`{name}`" in (ROOT / "docs" / "start" / "examples.md").read_text()


# --------------------------------------------------------------------------------------------------------------- data


def test_docstrings():
    docstrings = example("docstrings")
    source = 'class A:\n    """One."""\n    b = """c"""\n\n    def d(self):\n        r"""Two\n\n        more."""\n'
    assert docstrings.strings(source) == ["One.", "Two\n\n        more."]
    texts, labels = docstrings.load(50, seed=0)
    assert np.bincount(labels).tolist() == [50] * 4 and len(set(texts)) == 200
    assert not any(re.search(r"\b(numpy|np|sklearn|keras)\b", text, re.IGNORECASE) for text in texts)
    known = docstrings.vocabulary(["b a a", "a b c"], 4)
    assert known == {"a": 2, "b": 3}
    assert docstrings.numbers("A, b? c.", known, 8).tolist() == [2, 1, 3, 1, 1, 1, 0, 0]
    assert docstrings.sentences("One. Two:\n  three\n\nfour") == ["One.", "Two:", "three", "four"]


def test_patches():
    digits = np.arange(64).reshape(1, 8, 8)
    cut = example("vision_transformer").patches(digits)
    assert cut.shape == (1, 16, 4) and cut[0, 0].tolist() == [0, 1, 8, 9] and cut[0, 5].tolist() == [18, 19, 26, 27]


def test_windows():
    (x, y), (later, _) = example("time_series").load(16, 3)
    assert x.shape == (len(y), 16, 1) and y.shape[1] == 3 and len(x) > 3 * len(later) > 1000
    # A window begins four samples behind the one before: what follows this one is in the next.
    np.testing.assert_allclose(y[0], x[1, 12:15, 0] - x[0, 15, 0], atol=1e-6)


def test_phrases():
    seq2seq = example("seq2seq")
    source, target = seq2seq.pair(["각", "나"])
    assert "".join(chr(n + seq2seq.FIRST_JAMO - 1) for n in source) == unicodedata.normalize("NFD", "각나")
    assert seq2seq.until_end(target) == "GAGNA" and target[-1] == seq2seq.END
    ([korean, so_far], latin), ([unseen, _], _) = seq2seq.load(200, seed=0)
    assert so_far[:, 0].tolist() == [seq2seq.START] * 200 and (so_far[:, 1:] == latin[:, :-1]).all()

    def syllables(rows):
        texts = ("".join(chr(n + seq2seq.FIRST_JAMO - 1) for n in row if n) for row in rows)
        return {syllable for text in texts for syllable in unicodedata.normalize("NFC", text)}

    assert not syllables(korean) & syllables(unseen)


# ------------------------------------------------------------------------------------------------------------- shared


def test_twins_predict_the_same():
    shared = example("shared")
    build = lambda layers: example("vision_transformer").build_model(layers, tokens=4, width=8, heads=2, depth=1)
    ours, stock = shared.twins(build, seed=1)
    assert [type(model.layers[4]).__module__.partition(".")[0] for model in (ours, stock)] == ["attn_ops", "keras"]
    x = np.random.default_rng(0).standard_normal((3, 4, 4), np.float32)
    np.testing.assert_allclose(ours(x), stock(x), atol=1e-6)


def test_quick_and_notebooks(monkeypatch):
    shared = example("shared")
    parser = shared.parser("", epochs=7, width=3)
    assert vars(shared.parse(parser, ["--quick", "--width", "4"], epochs=1)) | {"seed": 0} == {
        "epochs": 1, "width": 4, "seed": 0, "quick": True
    }  # fmt: skip
    monkeypatch.setattr("sys.argv", ["a notebook", "-f", "kernel.json"])
    with pytest.raises(SystemExit):
        shared.parse(parser)
    monkeypatch.setitem(__import__("sys").modules, "ipykernel", shared)
    assert shared.parse(parser).epochs == 7

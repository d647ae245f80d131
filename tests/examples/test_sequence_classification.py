"""examples/sequence_classification.py runs, on small settings, with and without the compiled library."""

import importlib.util
import pathlib

import pytest

from children import run

pytest.importorskip("tensorflow")
pytest.importorskip("sklearn")

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "examples" / "sequence_classification.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("sequence_classification", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fused_model_learns_what_the_stock_model_learns(example, capsys, tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    picture = tmp_path / "weights.png"
    results = example.main(["--quick", "--batch-size", "16", "--plot", str(picture)])
    printed = capsys.readouterr().out
    for name in ("accuracy", "precision", "recall", "F1", "training step"):
        assert name in printed
    assert "implementation: fused" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    ours, stock = results["attn_ops"], results["stock_keras"]
    assert ours["accuracy"] > 0.5  # chance is 0.1
    assert abs(ours["accuracy"] - stock["accuracy"]) < 0.05
    assert abs(ours["loss"] - stock["loss"]) < 0.05


def test_both_models_start_with_the_same_predictions(example):
    (x, _), _ = example.load_digits(seed=0)
    ours, stock = example.build_pair(x.shape[1:], seed=3)
    assert abs(ours.predict(x[:50], verbose=0) - stock.predict(x[:50], verbose=0)).max() < 1e-5


def test_runs_as_a_script_without_the_library():
    script = "import runpy; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [str(SCRIPT), "--quick", "--batch-size", "128"]
    done = run(script, *arguments, without=("jax", "matplotlib"), ATTN_OPS_DISABLE="1")
    assert done.returncode == 0, done.stderr
    assert "implementation: composite" in done.stdout and "ATTN_OPS_DISABLE" in done.stdout
    assert "Epoch 2/2" in done.stdout

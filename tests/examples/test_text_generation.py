"""examples/text_generation.py: what it generates with caches and without is the same, and training lowers the loss."""

import importlib.util
import pathlib
import types

import keras
import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "examples" / "text_generation.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("text_generation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_caches_write_the_same_bytes(example):
    keras.utils.set_random_seed(1)
    model = example.Writer(32, 2)
    prompt = tf.constant(example.load_text()[None, :7])
    model(prompt)
    ours, whole = (make(model, 6, jit_compile=False)(prompt).numpy() for make in (example.with_cache, example.without_cache))
    assert ours.shape == (1, 6) and (ours == whole).all()


@pytest.mark.wide(2)
@pytest.mark.parametrize("steps", [20, 60])
def test_training(example, steps):
    text = example.load_text()
    assert len(text) > 300_000 and text.max() < 256
    model = example.Writer(16, 1)
    arguments = types.SimpleNamespace(seed=0, steps=steps, batch_size=8, length=32)
    assert example.train(model, text, arguments) < np.log2(256) - 0.5

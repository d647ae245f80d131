"""Files of Keras that hold our classes load after `import attn_ops` alone, whatever was imported when and on any backend.

What loads is asked in processes of their own; what the files hold is made here.
"""

import os
import sys

import keras
import numpy as np
import pytest

import attn_ops
from attn_ops.models import registration
from children import run

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 5, 4, 8)).astype("float32")
Y = RNG.standard_normal((2, 5, 8)).astype("float32")
LOADS = """
import sys
import numpy as np
files = np.load(sys.argv[1])
{imports}
assert not [name for name in sys.modules if name in ("attn_ops.layers", "attn_ops.tensorflow.attention", "attn_ops.models.operation")]
import keras
for path, x in ("op", "x"), ("layers", "y"):
    model = keras.saving.load_model(sys.argv[2] + path + ".keras")
    for i, result in enumerate(model.predict(files[x], verbose=0)):
        np.testing.assert_allclose(result, files[f"{{path}}{{i}}"], rtol=1e-5, atol=1e-5)
"""
ORDERS = {
    "before keras": "import attn_ops, keras",
    "after keras": "import keras, attn_ops",
    "a module of it, before tensorflow": "from attn_ops import masks\nimport tensorflow",
}


def model_of_the_op():
    x = keras.Input((5, 4, 8))
    out, lse = attn_ops.scaled_dot_product_attention(x, x, x, is_causal=True, return_lse=True)
    weights = attn_ops.attention_weights(x, x, is_causal=True, lse=lse)
    packed = attn_ops.scaled_dot_product_attention(x, out, x, mask=attn_ops.masks.window(1, 1))
    return keras.Model(x, [out, lse, weights, packed])


def model_of_layers():
    x = y = keras.Input((5, 8))
    y = attn_ops.layers.MultiHeadAttention(2, 4)(y, y, use_causal_mask=True)
    y = attn_ops.layers.GroupedQueryAttention(4, 2, 1)(y, y)
    y = attn_ops.layers.Attention()([y, y])
    y = attn_ops.layers.AttentionLayer()([y, y, y])
    y = attn_ops.layers.SelfAttention(8)(y)
    return keras.Model(x, attn_ops.layers.AttentionLayerWithWeights()([y, y, y]))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    arrays = {"x": X, "y": Y}
    for name, model, inputs in ("op", model_of_the_op(), X), ("layers", model_of_layers(), Y):
        model.save(folder / f"{name}.keras")
        arrays.update({f"{name}{i}": np.array(result) for i, result in enumerate(model(inputs))})
    np.savez(folder / "arrays.npz", **arrays)
    return [str(folder / "arrays.npz"), f"{folder}{os.sep}"]


def test_the_saved_values_are_right(files):
    arrays = np.load(files[0])
    out, lse = attn_ops.reference.attention(X, X, X, is_causal=True)
    np.testing.assert_allclose(arrays["op0"], out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(arrays["op1"], lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        arrays["op2"], attn_ops.reference.attention_weights(X, X, is_causal=True), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        arrays["op3"], attn_ops.reference.attention(X, out, X, window=(1, 1))[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.wide(3)
@pytest.mark.parametrize("order", ORDERS)
def test_files_load_after_import_attn_ops_alone(files, order):
    result = run(LOADS.format(imports=ORDERS[order]), *files)
    assert result.returncode == 0, result.stderr


@pytest.mark.wide(2)
@pytest.mark.parametrize("order", ["before keras", "after keras"])
def test_files_load_on_the_jax_backend_without_tensorflow(files, order):
    hidden = "sys.modules['tensorflow'] = None\n"
    result = run(LOADS.format(imports=hidden + ORDERS[order]), *files, without=(), KERAS_BACKEND="jax")
    assert result.returncode == 0, result.stderr


def test_every_registered_class_has_a_stand_in():
    """Also one that somebody adds later."""
    for name in dir(attn_ops.layers):  # each is loaded when it is first used
        getattr(attn_ops.layers, name)
    attn_ops.scaled_dot_product_attention(keras.Input((2, 8)), Y[:, :2], Y[:, :2])
    mine = {
        name.removeprefix("attn_ops>"): cls
        for name, cls in keras.saving.get_custom_objects().items()
        if name.startswith("attn_ops>")
    }
    assert mine.keys() == registration.CLASSES.keys()
    for name, (module, kind) in registration.CLASSES.items():
        assert mine[name] is getattr(sys.modules[f"attn_ops.{module}"], name)
        assert kind is None or issubclass(mine[name], getattr(keras, kind))


def test_a_stand_in_makes_the_class():
    code = """
import attn_ops, keras
stand_in = keras.saving.get_registered_object("attn_ops>SelfAttention")
layer = stand_in(8)
assert type(layer) is attn_ops.layers.SelfAttention
assert keras.saving.get_registered_object("attn_ops>SelfAttention") is attn_ops.layers.SelfAttention
assert type(stand_in.from_config(layer.get_config())) is attn_ops.layers.SelfAttention
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_import_brings_no_framework():
    result = run("import sys, attn_ops; assert not {'keras', 'tensorflow', 'jax', 'numpy'} & sys.modules.keys()", without=())
    assert result.returncode == 0, result.stderr


def test_other_finders_of_modules_and_questions_for_keras_are_left_alone():
    """A second finder that asks all the others too, as those of wrapt do, and find_spec without an import."""
    code = """
import importlib.machinery, importlib.util, sys
import attn_ops

class Asks:
    busy = False
    def find_spec(self, name, path=None, target=None):
        if self.busy or name != "keras":
            return None
        self.busy = True
        try:
            return importlib.util.find_spec(name)
        finally:
            self.busy = False

sys.meta_path.insert(0, Asks())
assert importlib.util.find_spec("keras").name == "keras" and "keras" not in sys.modules
import keras
assert type(keras.__loader__) is importlib.machinery.SourceFileLoader
assert "attn_ops>Attention" in keras.saving.get_custom_objects()
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("version", ["3.3.3", "2.15.0"])
def test_an_older_keras_is_named(version):
    code = f"""
import sys, types
import attn_ops
sys.modules["keras"] = types.ModuleType("keras")
sys.modules["keras"].__version__ = {version!r}
for load in (lambda: attn_ops.layers, lambda: __import__("attn_ops.layers"), lambda: attn_ops.convert):
    try:
        load()
    except ImportError as error:
        assert str(error) == "attn_ops.layers needs Keras 3.7 or newer, and {version} is installed: pip install -U keras"
    else:
        raise SystemExit("it loads")
import attn_ops.reference
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("order", ["stub before", "stub after"])
def test_a_strange_keras_does_not_keep_the_package_from_loading(tmp_path, order):
    (tmp_path / "keras.py").write_text("__version__ = '1.0'")
    code = "import keras, attn_ops" if order == "stub before" else "import attn_ops, keras"
    result = run(code + "; attn_ops.masks.causal()", PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert result.returncode == 0, result.stderr

"""A fused SavedModel in a server without Python: TensorFlow's C API from a C++ program (client.cc)."""

import shutil
import subprocess
from pathlib import Path

import attn_ops
import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

SOURCE = Path(__file__).with_name("client.cc")


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++")
    program = tmp_path_factory.mktemp("serving") / "client"
    libraries = Path(tf.sysconfig.get_lib())
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-isystem{tf.sysconfig.get_include()}", SOURCE]
    command += [f"-L{libraries}", "-l:libtensorflow_cc.so.2", "-l:libtensorflow_framework.so.2"]
    subprocess.run([*command, f"-Wl,-rpath,{libraries}", "-o", program], check=True)
    return program


@pytest.fixture
def serve(tmp_path, client):
    """Runs a saved model on inputs, one after the other; see client.cc. The outputs, and the finished process."""

    def run(library, source, target, inputs, *state):
        np.asarray(inputs, "float32").tofile(tmp_path / "data")
        command = [client, tmp_path / "model", library, source, target, tmp_path / "data", *map(str, inputs[0].shape)]
        done = subprocess.run([*command, "--", *state], capture_output=True, text=True, timeout=120)
        return np.fromfile(tmp_path / "data", "float32"), done

    return run


def tensors(path, signature):
    """The names of a signature's inputs and outputs, by name."""
    saved = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    found = saved.meta_graphs[0].signature_def[signature]
    return [{key: tensor.name for key, tensor in half.items()} for half in (found.inputs, found.outputs)]


def test_a_c_api_client_serves_the_fused_model(tmp_path, serve):
    inputs = keras.Input((12, 16))
    x = attn_ops.layers.MultiHeadAttention(num_heads=2, key_dim=8)(inputs, inputs, use_causal_mask=True)
    model = keras.Model(inputs, x)
    attn_ops.export(model, tmp_path / "model", ops="fused", verbose=False)
    names = [name for half in tensors(tmp_path / "model", "serving_default") for name in half.values()]
    x = np.random.default_rng(0).normal(size=(3, 12, 16)).astype("float32")

    _, without = serve("-", *names, [x])
    assert without.returncode == 1
    assert "TF_LoadSessionFromSavedModel: Op type not registered 'AttnOps>LibraryIsMissing" in without.stderr
    assert "tf_load_library" in without.stderr

    result, served = serve(attn_ops.load_library(), *names, [x])
    assert served.returncode == 0, served.stderr
    np.testing.assert_allclose(result.reshape(x.shape), model.predict(x, verbose=0), atol=1e-5)


BATCH, FEATURES, ROOM = 2, 12, 16
TOKENS = np.random.default_rng(1).normal(size=(9, BATCH, 1, FEATURES)).astype("float32")


class Decoder(tf.Module):
    """Decode steps of one layer, whose cache is what a caller hands around, or lies in variables."""

    def __init__(self):
        self.layer = attn_ops.layers.GroupedQueryAttention(8, 4, 2, rotary=True)
        self.layer.build((BATCH, 1, FEATURES), (BATCH, 1, FEATURES))
        # What a session restores: of Keras's own variables it knows copies.
        self.weights = [weight.value for weight in self.layer.weights]
        self.kept = [tf.Variable(x) for x in self.new()]
        x = tf.TensorSpec(TOKENS.shape[1:], tf.float32, "x")
        given = [tf.TensorSpec(field.shape, field.dtype, name) for name, field in self.new()._asdict().items()]
        self.start = tf.function(lambda: self.new()._asdict(), input_signature=[])
        self.step = tf.function(self._step, input_signature=[x, *given], autograph=False)
        self.kept_step = tf.function(self._kept_step, input_signature=[x], autograph=False)

    def new(self):
        return attn_ops.KVCache.create(BATCH, ROOM, 2, 8)

    def _step(self, x, key, value, lengths, written):
        out, cache = self.layer(x, x, cache=attn_ops.KVCache(key, value, lengths, written))
        return {"out": out, **cache._asdict()}

    def _kept_step(self, x):
        out, cache = self.layer(x, x, cache=attn_ops.KVCache(*(tf.convert_to_tensor(x) for x in self.kept)))
        for variable, field in zip(self.kept, cache):
            variable.assign(field)
        return {"out": out}


@pytest.mark.wide(2)
@pytest.mark.parametrize("way", ["handed around", "in variables"])
def test_decode_steps_with_a_cache(tmp_path, serve, way):
    """A token at a time gives what the causal layer gives for the whole sequence."""
    decoder = Decoder()
    whole = np.moveaxis(TOKENS[:, :, 0], 0, 1)
    expected = np.moveaxis(decoder.layer(whole, whole, use_causal_mask=True).numpy(), 1, 0)
    signatures = {"start": decoder.start, "step": decoder.step}
    if way == "in variables":
        signatures = {"step": decoder.kept_step}
    attn_ops.export(decoder, tmp_path / "model", ops="fused", signatures=signatures)
    saved = (tmp_path / "model" / "saved_model.pb").read_bytes()
    assert b"AttnOps>Forward" in saved and b"AttnOps>AppendToCache" in saved

    inputs, outputs = tensors(tmp_path / "model", "step")
    state = []
    if way == "handed around":
        first = tensors(tmp_path / "model", "start")[1]
        state = [name for part in attn_ops.KVCache._fields for name in (first[part], outputs[part], inputs[part])]
    result, served = serve(attn_ops.load_library(), inputs["x"], outputs["out"], TOKENS, *state)
    assert served.returncode == 0, served.stderr
    np.testing.assert_allclose(result.reshape(TOKENS.shape)[:, :, 0], expected, atol=1e-5)

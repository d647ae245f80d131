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


def test_a_c_api_client_serves_the_fused_model(tmp_path, client):
    inputs = keras.Input((12, 16))
    x = attn_ops.layers.MultiHeadAttention(num_heads=2, key_dim=8)(inputs, inputs, use_causal_mask=True)
    model = keras.Model(inputs, x)
    attn_ops.export(model, tmp_path / "model", ops="fused", verbose=False)
    saved = saved_model_pb2.SavedModel.FromString((tmp_path / "model" / "saved_model.pb").read_bytes())
    signature = saved.meta_graphs[0].signature_def["serving_default"]
    names = [tensor.name for tensors in (signature.inputs, signature.outputs) for tensor in tensors.values()]
    x = np.random.default_rng(0).normal(size=(3, 12, 16)).astype("float32")

    def run(library):
        x.tofile(tmp_path / "data")
        command = [client, tmp_path / "model", library, *names, tmp_path / "data", *map(str, x.shape)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    without = run("-")
    assert without.returncode == 1
    assert "TF_LoadSessionFromSavedModel: Op type not registered 'AttnOps>LibraryIsMissing" in without.stderr
    assert "tf_load_library" in without.stderr

    served = run(attn_ops.load_library())
    assert served.returncode == 0, served.stderr
    result = np.fromfile(tmp_path / "data", "float32").reshape(x.shape)
    np.testing.assert_allclose(result, model.predict(x, verbose=0), atol=1e-5)

"""The layers on other backends of Keras than TensorFlow, which is that of this process."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run(code, backend):
    environment = {**os.environ, "KERAS_BACKEND": backend}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=HERE)


def test_jax():
    # Without the conftest.py here, which is for a process with TensorFlow.
    code = (
        "import sys; sys.modules['tensorflow'] = None; import pytest;"
        "sys.exit(pytest.main(['on_jax.py', '-q', '--noconftest', '-p', 'no:cacheprovider']))"
    )
    process = run(code, "jax")
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-2000:]
    assert " passed" in process.stdout


def test_other_backends_are_refused():
    process = run("import attn_ops; attn_ops.layers", "numpy")
    assert process.returncode
    assert "attn_ops.layers needs Keras on the tensorflow or the jax backend, not on 'numpy'" in process.stderr

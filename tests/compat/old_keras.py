"""What must happen beside a Keras that is too old for the layers: they say so, and the operator works.

The last line is JSON, for run.py."""

import json
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import attn_ops
import keras
import numpy as np
import tensorflow as tf
from attn_ops import reference

print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}, NumPy {np.__version__}, {attn_ops.__file__}")
try:
    attn_ops.layers  # noqa: B018 - loaded by this
except ImportError as error:
    wanted = f"attn_ops.layers needs Keras 3.7 or newer, and {keras.__version__} is installed: pip install -U keras"
    assert wanted in str(error), error
else:
    raise AssertionError("the layers were loaded")
x = np.random.default_rng(0).normal(size=(2, 7, 2, 8)).astype("float32")
out = attn_ops.scaled_dot_product_attention(x, x, x, is_causal=True, implementation="fused")
np.testing.assert_allclose(out, reference.attention(x, x, x, is_causal=True)[0], atol=1e-5)
print("  passed: the layers refuse, the operator works")
print(json.dumps({"result": "layers refuse", "tensorflow": tf.__version__, "keras": keras.__version__}))

"""What the layers cannot ask `keras.ops` for: the functions of `on_tensorflow` or `on_jax`, by the backend of Keras."""

from __future__ import annotations

import importlib

import keras

_MODULES = {"tensorflow": "attn_ops.layers.on_tensorflow", "jax": "attn_ops.layers.on_jax"}

if keras.config.backend() not in _MODULES:
    raise ImportError(
        f"attn_ops.layers needs Keras on the {' or the '.join(_MODULES)} backend, not on "
        f"{keras.config.backend()!r}: set KERAS_BACKEND={' or KERAS_BACKEND='.join(_MODULES)} before importing keras"
    )

backend = importlib.import_module(_MODULES[keras.config.backend()])

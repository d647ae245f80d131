"""What the layers cannot ask `keras.ops` for: the functions of `on_tensorflow` or `on_jax`, by the backend of Keras,
and how Keras keeps the mask of a tensor."""

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

try:
    from keras.src.backend import set_keras_mask
except ImportError:

    def set_keras_mask(x, mask):
        """Gives `x` a Keras mask; arrays that take no attributes get the one that Keras gives them after the call."""
        try:
            x._keras_mask = mask
        except AttributeError:
            pass

"""Whether a layer runs in training, for methods that are not told."""

from __future__ import annotations

import functools

import keras
from keras import ops


def in_training():
    """What Keras hands down as `training` inside the call of a layer: True, False or None."""
    told = []
    _asked()(ops.zeros((), "int32"), tell=told.append)
    return told[0]


@functools.cache
def _asked():
    return _Asked(name="attn_ops_in_training")


class _Asked(keras.layers.Layer):
    """Tells what it is called with. Layers without the argument hand `training` down to the layers that they call."""

    def call(self, anchor, tell, training=None):
        tell(training)
        return anchor

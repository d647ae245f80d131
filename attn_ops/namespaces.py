"""The few functions of arrays that masks need of whichever framework their arrays belong to."""

from __future__ import annotations

import sys

import numpy as np


class NumPy:
    """The few array functions that NumPy, TensorFlow and JAX name or do differently."""

    arange = staticmethod(np.arange)
    minimum = staticmethod(np.minimum)
    equal = staticmethod(np.equal)

    def int64(self, x):
        return np.asarray(x).astype(np.int64)

    def bool(self, x):
        return np.asarray(x)

    def repeat_batch(self, visible, batch):
        return np.broadcast_to(visible, (batch,) + visible.shape[1:])

    def check_lengths(self, name, lengths, seqlen):
        lengths = np.asarray(lengths)
        if lengths.size and (lengths.min() < 0 or lengths.max() > seqlen):
            raise ValueError(f"Mask.materialize: {name} must be in [0, {seqlen}], got {lengths}")


class TensorFlow:
    def __init__(self, tf):
        self.tf = tf
        self.arange = tf.range
        self.minimum = tf.minimum
        self.equal = tf.equal

    def int64(self, x):
        return self.tf.cast(x, self.tf.int64)

    def bool(self, x):
        return self.tf.convert_to_tensor(x)

    def repeat_batch(self, visible, batch):
        return self.tf.broadcast_to(visible, self.tf.concat([[batch], self.tf.shape(visible)[1:]], 0))

    def check_lengths(self, name, lengths, seqlen):
        """Values of a graph tensor are not known here; the attention op checks them when it runs."""


class Jax:
    def __init__(self, jax):
        self.jnp = jax.numpy
        self.arange = jax.numpy.arange
        self.minimum = jax.numpy.minimum
        self.equal = jax.numpy.equal

    def int64(self, x):
        """In JAX's default integers: int32, unless 64 bits are enabled. An integer stays one, since extents must."""
        return x if isinstance(x, int) else self.jnp.asarray(x).astype(int)

    def bool(self, x):
        return self.jnp.asarray(x)

    def repeat_batch(self, visible, batch):
        return self.jnp.broadcast_to(visible, (batch, *visible.shape[1:]))

    def check_lengths(self, name, lengths, seqlen):
        """Values of a traced array are not known here; the attention checks them where it can."""


class Keras:
    """KerasTensors: what a mask of them needs to be combined with others and handed to the attention."""

    def __init__(self, keras):
        self.keras = keras
        self.minimum = keras.ops.minimum
        self.equal = keras.ops.equal

    def int64(self, x):
        return self.keras.ops.cast(x, "int64")


def of(values):
    """That of the framework which one of the values belongs to."""
    keras = sys.modules.get("keras")
    kind = getattr(keras, "KerasTensor", ())
    if any(isinstance(value, kind) for value in values):
        return Keras(keras)
    tf = sys.modules.get("tensorflow")
    if tf is not None and any(tf.is_tensor(value) for value in values):
        return TensorFlow(tf)
    jax = sys.modules.get("jax")
    if jax is not None and any(isinstance(value, jax.Array) for value in values):
        return Jax(jax)
    return NumPy()

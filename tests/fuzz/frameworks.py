"""The frameworks whose functions ways call: where these are, their arrays, and the forms that a call has there."""

import contextlib

import numpy as np


class TensorFlow:
    """Eager calls."""

    name, prefix = "tensorflow", ""

    @property
    def functions(self):
        import attn_ops

        return attn_ops

    def array(self, x):
        import tensorflow as tf

        return tf.constant(x)

    def of(self, case):
        """The context in which arrays of a case keep their dtype."""
        return contextlib.nullcontext()

    def form(self, function, compiles):
        return function


class Jax(TensorFlow):
    """Eager calls, and those in `jax.jit`."""

    name, prefix = "jax", "jax-"

    @property
    def functions(self):
        import attn_ops.jax

        return attn_ops.jax

    def array(self, x):
        import jax

        return jax.numpy.asarray(x)

    def of(self, case):
        import jax

        return jax.enable_x64(case.query.dtype == np.float64)

    def form(self, function, compiles):
        import jax

        return jax.jit(function) if compiles else function


ALL = (TensorFlow(), Jax())

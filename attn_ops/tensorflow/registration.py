"""Gradients of the operators in TensorFlow's registry, which the process has one of."""

import tensorflow as tf


def gradient_of(operator):
    """`tf.RegisterGradient`, unless another copy of this package came first: the operators of the process are its then
    (`attn_ops.kernels.unavailable_reason`), and so are their gradients; this copy's calls go to the composite."""

    def register(function):
        try:
            return tf.RegisterGradient(operator)(function)
        except KeyError:
            return function

    return register

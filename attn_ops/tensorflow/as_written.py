"""Functions that TensorFlow's AutoGraph leaves as they are."""

from __future__ import annotations

import functools

import tensorflow as tf


def as_written(function):
    """``function``, kept from AutoGraph, which in `tf.function` would convert it for seconds and for nothing: its
    conditions are of Python. Unlike `tf.autograph.experimental.do_not_convert` it costs eager calls next to nothing."""
    traced = tf.autograph.experimental.do_not_convert(function)

    @functools.wraps(traced)  # with the mark by which AutoGraph knows it
    def call(*args, **kwargs):
        return function(*args, **kwargs) if tf.executing_eagerly() else traced(*args, **kwargs)

    return call

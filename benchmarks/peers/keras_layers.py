"""The whole multi-head attention layer, ours and stock, with the same weights: inference and a training step."""

from __future__ import annotations

import numpy as np

from workloads import LAYER, LAYER_TRAINING

from .base import Peer

_LEARNING_RATE = 1e-6  # the update is timed; the weights should stay what they are


def layer_weights(workload) -> list[np.ndarray]:
    """Kernels of the query, key, value [width, heads, head_dim] and output projection [heads, head_dim, width]."""
    generator = np.random.default_rng(2)
    width = workload.num_heads * workload.head_dim
    shapes = [(width, heads, workload.head_dim) for heads in (workload.num_heads,) + 2 * (workload.num_kv_heads,)]
    shapes.append((workload.num_heads, workload.head_dim, width))
    return [generator.standard_normal(shape, np.float32) / np.float32(np.sqrt(width)) for shape in shapes]


class KerasLayer(Peer):
    def __init__(self, name, layers, jit_compile, modules):
        self.name = name
        self.modules = modules
        self._layers = layers
        self._jit_compile = jit_compile

    def supports(self, workload, mode):
        return mode in (LAYER, LAYER_TRAINING)

    def prepare(self, workload, mode, inputs):
        import tensorflow as tf

        x = tf.constant(inputs["query"].reshape(workload.batch, workload.seqlen_q, -1))
        d_out = tf.constant(inputs["d_out"].reshape(x.shape))
        layer = self._layer(workload)
        layer.build(x.shape, x.shape)
        layer.set_weights(layer_weights(workload))
        kernels = layer.trainable_variables
        kernels = [variable.value for variable in kernels]  # the tf.Variable

        def infer():
            return layer(x, x, use_causal_mask=workload.is_causal)

        def train():
            with tf.GradientTape() as tape:
                out = layer(x, x, use_causal_mask=workload.is_causal, training=True)
                loss = tf.reduce_sum(out * d_out)
            gradients = tape.gradient(loss, kernels)
            for kernel, gradient in zip(kernels, gradients, strict=True):
                kernel.assign_sub(_LEARNING_RATE * gradient)
            return out, *gradients[:3]

        step = infer if mode == LAYER else train
        return tf.function(step, jit_compile=self._jit_compile, autograph=False).get_concrete_function()

    def _layer(self, workload):
        layers = self._layers()
        if workload.num_heads == workload.num_kv_heads:
            return layers.MultiHeadAttention(workload.num_heads, workload.head_dim, use_bias=False)
        return layers.GroupQueryAttention(workload.head_dim, workload.num_heads, workload.num_kv_heads, use_bias=False)

    def outputs(self, workload, mode, result):
        return [result.numpy()] if mode == LAYER else [tensor.numpy() for tensor in result]


def _ours():
    from attn_ops import layers

    return layers


def _stock():
    import keras

    return keras.layers


def peers():
    yield KerasLayer("attn_ops_layer", _ours, False, ("attn_ops", "tensorflow"))
    yield KerasLayer("attn_ops_layer_xla", _ours, True, ("attn_ops", "tensorflow"))
    yield KerasLayer("keras_layer", _stock, False, ("keras", "tensorflow"))
    yield KerasLayer("keras_layer_xla", _stock, True, ("keras", "tensorflow"))

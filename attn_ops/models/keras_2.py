"""The attention functions on KerasTensors of Keras 2 (`tf_keras`): layers of its functional models.

TensorFlow would record the operations inside instead, one by one: the kernel's operator, which XLA does not have, and the seed
of one dropout for all calls.
"""

from __future__ import annotations

import tensorflow as tf
import tf_keras

import attn_ops
from attn_ops.generation.cache import with_fields
from attn_ops.models import keras_tensors, operation


def attention(query, key, value, given):
    """The symbolic result of `scaled_dot_product_attention` with these options; there are KerasTensors among them all."""
    own, tensors = operation.options_and_tensors(attn_ops.scaled_dot_product_attention, query, key, given)
    return ScaledDotProductAttention(own)(query, _given(key=key, value=value, **tensors))


def attention_weights(query, key, given):
    """The symbolic result of `attention_weights` with these options; there are KerasTensors among them all."""
    own, tensors = operation.options_and_tensors(attn_ops.attention_weights, query, key, given)
    return AttentionWeights(own)(query, _given(key=key, **tensors))


def decode_attention(q, cache, k_new, v_new, given):
    """The symbolic result of `decode_attention`; there are KerasTensors among its arguments."""
    tensors = {what: x for what, x in given.items() if tf.is_tensor(x) or keras_tensors.is_of_keras_2(x)}
    options = {what: x for what, x in given.items() if what not in tensors}
    return DecodeAttention(cache.layout, cache.window, options)(q, _given(cache=[*cache], k_new=k_new, v_new=v_new, **tensors))


def updated(cache, k, v, lengths):
    """The symbolic result of `KVCache.update`; there are KerasTensors among its arguments."""
    return UpdatedCache(cache.layout, cache.window, {})(k, _given(cache=[*cache], v=v, lengths=lengths))


def _given(**tensors):
    return {what: x for what, x in tensors.items() if x is not None}


class _Calls(tf_keras.layers.Layer):
    """A layer that calls a Keras operation of ours with the same options and tensors."""

    _operation_class = None

    def __init__(self, options, **kwargs):
        super().__init__(**{"autocast": False, **kwargs})
        self._operation = self._operation_class(**options)

    def call(self, query, others):
        return self._operation.call(query, **others)

    def get_config(self):
        return {**super().get_config(), "options": self._operation.get_config()}


@tf_keras.utils.register_keras_serializable(package="attn_ops")
class ScaledDotProductAttention(_Calls):
    """`scaled_dot_product_attention` in a functional model of Keras 2; made by calling that on its KerasTensors."""

    _operation_class = operation.ScaledDotProductAttention


@tf_keras.utils.register_keras_serializable(package="attn_ops")
class AttentionWeights(_Calls):
    """`attention_weights` in a functional model of Keras 2; made by calling that on its KerasTensors."""

    _operation_class = operation.AttentionWeights


class _CallsOfCaches(tf_keras.layers.Layer):
    """A layer whose first argument are new rows, the other ones a cache's fields and more tensors."""

    def __init__(self, layout, window, options, **kwargs):
        super().__init__(**{"autocast": False, **kwargs})
        self._layout, self._window, self._options = layout, window, options

    def _cache(self, fields):
        return with_fields(self._layout, self._window, fields)

    def get_config(self):
        return {**super().get_config(), "layout": self._layout, "window": self._window, "options": self._options}


@tf_keras.utils.register_keras_serializable(package="attn_ops")
class DecodeAttention(_CallsOfCaches):
    """`decode_attention` in a functional model of Keras 2; made by calling that on its KerasTensors."""

    def call(self, q, others):
        others = dict(others)
        return attn_ops.decode_attention(q, self._cache(others.pop("cache")), **others, **self._options)


@tf_keras.utils.register_keras_serializable(package="attn_ops")
class UpdatedCache(_CallsOfCaches):
    """`KVCache.update` in a functional model of Keras 2; made by calling that with its KerasTensors."""

    def call(self, k, others):
        others = dict(others)
        return self._cache(others.pop("cache")).update(k, **others)

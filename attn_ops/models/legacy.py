"""Layers of Keras 2 and TensorFlow Addons as ours, with their weights."""

from __future__ import annotations

import numpy as np

from attn_ops.layers.multi_head_attention import MultiHeadAttention

_OPTIONS = ("num_heads", "key_dim", "value_dim", "use_bias", "output_shape", "attention_axes")
# What both kinds of layers have, and ours by the same names. Initializers have done their work.
_SHARED = ("name", "trainable", "dropout", "activity_regularizer") + tuple(
    f"{of}_{what}" for of in ("kernel", "bias") for what in ("regularizer", "constraint")
)


def from_tf_keras(layer):
    """A `MultiHeadAttention` of Keras 2 (`tf_keras`, `tf.keras` up to TensorFlow 2.15) as one of :mod:`attn_ops.layers`.

    Args:
        layer: The layer, built. It takes its inputs in the same order: `layer(query, value, key)`.

    Returns:
        A built :class:`attn_ops.layers.MultiHeadAttention` with the same sizes, dropout, name, dtype policy,
        regularizers, constraints and weights.

    Raises:
        TypeError: `layer` is no `MultiHeadAttention` of Keras 2.
        ValueError: It is not built, and so has no weights.
    """
    config = _config("from_tf_keras", layer, "MultiHeadAttention", ("num_heads", "key_dim"))
    if not layer.built or config.get("query_shape") is None:
        raise ValueError("attn_ops.models.from_tf_keras: layer is not built, and has no weights yet: call it once")
    ours = MultiHeadAttention(**{name: config[name] for name in _OPTIONS if name in config}, **_shared(layer, config))
    ours.build(*(tuple(config[f"{what}_shape"]) for what in ("query", "value", "key")))
    ours.set_weights(layer.get_weights())
    return ours


def from_tensorflow_addons(layer):
    """A `tfa.layers.MultiHeadAttention` as one of :mod:`attn_ops.layers`.

    That layer is called with a list, `layer([query, key, value], mask=mask)`, ours by `layer(query, value, key=key,
    attention_mask=mask)`; scores are asked for by `return_attention_scores=True` in each call.

    Args:
        layer: The layer, built.

    Returns:
        A built :class:`attn_ops.layers.MultiHeadAttention` with the same sizes, dropout, name, dtype policy,
        regularizers, constraints and weights. Where the layer has a bias behind its projection, ours has zeros for those that
        it lacks.

    Raises:
        TypeError: `layer` is no `MultiHeadAttention` of TensorFlow Addons.
        ValueError: It is not built, and so has no weights.
    """
    sizes = ("head_size", "num_heads", "use_projection_bias")
    config = _config("from_tensorflow_addons", layer, "MultiHeadAttention", sizes)
    if not layer.built:
        raise ValueError("attn_ops.models.from_tensorflow_addons: layer is not built, and has no weights yet: call it once")
    weights = [np.asarray(weight) for weight in layer.get_weights()]
    query, key, value, projection = weights[:4]  # [num_heads, features, head_size], and the last to the output
    num_heads, _, head_size = query.shape
    use_bias = config["use_projection_bias"]
    ours = MultiHeadAttention(
        num_heads,
        head_size,
        value_dim=value.shape[-1],
        output_shape=projection.shape[-1],
        use_bias=use_bias,
        **_shared(layer, config),
    )
    ours.build(*((None, None, kernel.shape[1]) for kernel in (query, value, key)))
    kernels = [np.swapaxes(kernel, 0, 1) for kernel in (query, key, value)] + [projection]
    biases = [np.zeros(kernel.shape[1:], kernel.dtype) for kernel in kernels[:3]] + weights[4:]
    ours.set_weights([x for pair in zip(kernels, biases) for x in pair] if use_bias else kernels)
    return ours


def _shared(layer, config):
    policy = getattr(getattr(layer, "dtype_policy", None), "name", None)
    return {"dtype": policy, **{name: config[name] for name in _SHARED if name in config}}


def _config(function, layer, name, needed):
    """The config of a layer of this class, or TypeError."""
    config = layer.get_config() if hasattr(layer, "get_config") and hasattr(layer, "get_weights") else {}
    if type(layer).__name__ != name or not set(needed) <= set(config):
        raise TypeError(
            f"attn_ops.models.{function}: layer must be a {name} with {', '.join(needed)} in its config, got "
            f"{type(layer).__name__}"
        )
    return config

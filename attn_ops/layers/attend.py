"""The attention of the layers, its scores and its dropout seeds."""

from __future__ import annotations

import keras
from keras import ops

from attn_ops.layers.axes import AttentionAxes, broadcasts, dims
from attn_ops.layers.backend import backend

_ONE_AXIS = AttentionAxes((1,), 2)


def dropout_seed(owner, rate, training):
    """The next seed of `owner.seed_generator` where dropout is to run, else None. Only a run with dropout advances the
    generator, as in Keras, and a recomputation of it does not: it gets the same seed."""
    if not rate or not training:  # without dropout `training` may be a tensor of a graph
        return None
    return backend.draw_seed(owner.seed_generator)


def hide_rows(out, query_mask):
    """`out` `[*batch, seqlen, features]` with zeros where `query_mask` `[*batch, seqlen]`, which broadcasts, is False."""
    pairs = zip(reversed(tuple(query_mask.shape)), reversed(tuple(out.shape[:-1])))
    if len(query_mask.shape) >= len(out.shape) or not all(broadcasts(*pair) for pair in pairs):
        raise ValueError(
            f"attn_ops.layers: a query mask of shape {tuple(query_mask.shape)} does not broadcast to the axes before the "
            f"features of the output, of shape {tuple(out.shape)}"
        )
    return ops.where(ops.expand_dims(query_mask, -1), out, ops.zeros((), out.dtype))


def attend(
    query, key, value, *, mask, scale, implementation, dropout_rate, dropout_seed, scores=None, attention=None, **more
):
    """Attention of `[batch, seqlen, heads, dim]` tensors, and the attention weights if asked for.

    Args:
        query, key, value: As for :func:`attn_ops.scaled_dot_product_attention`.
        mask: An :class:`attn_ops.masks.Mask` or None.
        scale: Float or scalar tensor.
        implementation: None, "fused" or "composite".
        dropout_rate: The rate where `dropout_seed` is given, by `dropout_seed()`; no dropout where that is None.
        scores: None, "undropped" (the softmax) or "dropped" (what multiplied the values).
        attention: What attends in place of :func:`attn_ops.scaled_dot_product_attention`, without scores.
        more: Other options of :func:`attn_ops.attention_weights`, such as `sinks`.

    Returns:
        The output and the scores `[batch, num_heads, seqlen_q, seqlen_k]` in the dtype of `query`, or None.
    """
    options = {"mask": mask, "scale": scale, **more}
    dropout = {} if dropout_seed is None else {"dropout_rate": dropout_rate, "dropout_seed": dropout_seed}
    attention = backend.attention.scaled_dot_product_attention if attention is None else attention
    out = attention(query, key, value, **options, **dropout, implementation=implementation)
    if scores is None:
        return out, None
    # Not from the log-sum-exp: -inf for a row that sees no key is what `tf.debugging.enable_check_numerics` looks for.
    weights = backend.attention.attention_weights(query, key, **options)
    if scores == "dropped" and dropout:
        keep = backend.kept(dropout_seed, dims(weights), dropout_rate)
        weights = ops.where(keep, weights / (1.0 - dropout_rate), ops.zeros((), weights.dtype))
    return out, weights


def attend_one_head(layer, query, key, value, *, attention_bias=None, **options):
    """:func:`attend` for `[batch, seqlen, features]` tensors, ragged ones too; the scores are `[batch, seqlen_q, seqlen_k]`.

    The rate of the dropout and the implementation are the `layer`'s. `attention_bias` is None or added to the scores:
    `[seqlen_q, seqlen_k]` or `[batch, seqlen_q, seqlen_k]`, every extent may be 1.
    """
    options |= {"dropout_rate": layer.dropout, "implementation": layer.implementation}
    if attention_bias is not None:
        bias = ops.convert_to_tensor(attention_bias)
        options["bias"] = _ONE_AXIS.flatten_mask(bias, query, key, "attention_bias")
    if backend.is_ragged(query):
        tokens = backend.tokens(type(layer).__name__, query, key, value)
        heads = (ops.expand_dims(x, 2) for x in (tokens.query, tokens.key, tokens.value))
        out, _ = attend(*heads, attention=tokens.attend, **options)
        return tokens.ragged(ops.squeeze(out, 2)), None
    out, scores = attend(*(ops.expand_dims(x, 2) for x in (query, key, value)), **options)
    return ops.squeeze(out, 2), scores if scores is None else ops.squeeze(scores, 1)


def ragged_like(spec, query):
    """A KerasTensor of an output, ragged where the `query` is."""
    if not getattr(query, "ragged", False):
        return spec
    return keras.KerasTensor(spec.shape, dtype=spec.dtype, ragged=True)

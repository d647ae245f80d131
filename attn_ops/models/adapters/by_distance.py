"""Attention with biases by distance: BLOOM and Falcon (Press et al. 2021, arXiv:2108.12409), T5 (Raffel et al. 2020,
arXiv:1910.10683), whose `call` projects, biases and attends in one."""

from __future__ import annotations

import typing
from typing import Any

import numpy as np
from keras import ops

from attn_ops.call.position_bias import T5RelativeBias, alibi_slopes
from attn_ops.layers.axes import dims
from attn_ops.models.adapters import cache as caches
from attn_ops.models.adapters import heads, structure
from attn_ops.models.adapters.training import in_training


def bloom(layer, stock, hidden_states, attention_mask=None, cache=None, cache_update_index=None):
    """`BloomAttention.call`: scores scale q k^T + slope j, where j is the key; as a distance but for a constant per row."""
    options = structure.options(attention_mask)
    if not options or layer._alibi_layer.alibi_bias_max != 8 or (cache is None and cache_update_index is not None):
        return stock(hidden_states, attention_mask, cache, cache_update_index)
    rows = (dense(hidden_states) for dense in (layer._query_dense, layer._key_dense, layer._value_dense))
    options["alibi_slopes"] = alibi_slopes(layer.num_heads)
    out, cache = _attended(layer, *rows, cache, cache_update_index, layer._dropout_layer, options)
    out = layer._dropout_layer(layer._output_dense(out))
    return out if cache is None else (out, cache)


def falcon(layer, stock, inputs, alibi, attention_mask=None, cache=None, cache_update_index=None):
    """`FalconAttention.call`: scores scale (q k^T + alibi), with `[batch, num_heads, 1, seqlen_k]` biases that count the
    real keys: those of slopes where all are real, and else, since padding may have holes, biases."""
    options = structure.options(attention_mask)
    if not options or (cache is None and cache_update_index is not None):
        return stock(inputs, alibi, attention_mask, cache, cache_update_index)
    rows = [dense(inputs) for dense in (layer.query_dense, layer.key_dense, layer.value_dense)]
    if _counts_all_keys(alibi, attention_mask, cache):
        options["alibi_slopes"] = structure.of(alibi) * layer.inv_norm_factor
    else:
        scaled = ops.cast(alibi, rows[0].dtype) * ops.cast(layer.inv_norm_factor, rows[0].dtype)
        options["bias"] = ops.stop_gradient(scaled)
    out, cache = _attended(layer, *rows, cache, cache_update_index, layer.attention_dropout, options)
    out = layer.output_dense(out)
    return out if cache is None else (out, cache)


def falcon_alibi(layer, stock, num_heads, mask):
    """`FalconTransformerDecoder._build_alibi_tensor`, which keeps the slopes that its biases are made of."""
    return structure.keep(stock(num_heads, mask), np.asarray(layer._get_slopes(num_heads), np.float32))


def _counts_all_keys(alibi, attention_mask, cache):
    """Whether Falcon's biases are slopes times the keys: none is padding, and of a cache there are biases for all."""
    known = structure.of(attention_mask)
    if structure.of(alibi) is None or known is None or known.padding is not None:
        return False
    return cache is None or alibi.shape[-1] == cache.shape[2] is not None


def _attended(layer, query, key, value, cache, index, dropout, options):
    """The heads of the output joined, `[batch, seqlen_q, num_heads * head_dim]`, and the cache."""
    training = in_training() if dropout.rate else False
    options["scale"] = layer.inv_norm_factor
    if cache is not None and index is not None and not training and "query_offset" in options:
        out, cache = caches.attended(query, cache, index, key, value, **options)
        return heads.join(out), cache
    key, value, cache = caches.update(cache, index, key, value)
    return heads.join(heads.attention(query, key, value, dropout=dropout, training=training, **options)[0]), cache


class PositionBias(typing.NamedTuple):
    """What the first layer of T5's stacks hands to the others beside its dense tensor: the table and the mask."""

    table: Any
    options: dict

    def given(self, layer):
        bidirectional, distance = not layer.is_decoder, layer.relative_attention_max_distance
        table = {} if self.table is None else {"relative_bias": T5RelativeBias(self.table, bidirectional, distance)}
        return {**table, **self.options}


def t5(
    layer,
    stock,
    hidden_states,
    mask=None,
    key_value_states=None,
    position_bias=None,
    cache=None,
    cache_update_index=None,
    training=False,
):
    """`T5MultiHeadAttention.call`: unscaled scores plus a table by buckets of distances, shared by all layers of a stack.

    The dense `position_bias` that the first layer returns is made by the stock code, and computed only where somebody reads
    it.
    """
    known = structure.of(position_bias)
    if position_bias is None:
        options = structure.options(mask)
        if options is not None:
            options.update(structure.query_offset(cache_update_index))
            own = layer.relative_attention_bias if layer.use_relative_attention_bias else None
            known = PositionBias(None if own is None else ops.convert_to_tensor(own), options)
    if known is None and position_bias is None or (cache is None and cache_update_index is not None):
        return stock(hidden_states, mask, key_value_states, position_bias, cache, cache_update_index, training)
    batch, seqlen_q = dims(hidden_states)[:2]

    def split(x):
        return ops.reshape(x, [batch, -1, layer.num_heads, layer.key_value_dim])

    states = hidden_states if key_value_states is None else key_value_states
    query = split(layer.query_projector(hidden_states))
    options = {"scale": 1.0, **({"bias": position_bias} if known is None else known.given(layer))}
    if cache is not None and cache_update_index is None:
        key, value = cache[:, 0], cache[:, 1]
    else:
        key, value = split(layer.key_projector(states)), split(layer.value_projector(states))
    grows = cache is not None and key_value_states is None and "query_offset" in options
    if grows and not (training and layer.dropout_layer.rate):
        out, cache = caches.attended(query, cache, cache_update_index, key, value, **options)
        seqlen_k = dims(cache)[2]
    else:
        key, value, cache = caches.update(cache, cache_update_index, key, value)
        options.update(dropout=layer.dropout_layer, training=training)
        out, seqlen_k = heads.attention(query, key, value, **options)[0], dims(key)[1]
    if position_bias is None:
        index = 0 if cache_update_index is None else cache_update_index
        position_bias = _dense_position_bias(layer, mask, seqlen_q, seqlen_k, index)
        structure.keep(position_bias, known)
    return layer.output_projector(heads.join(out)), position_bias, cache


def _dense_position_bias(layer, mask, seqlen_q, seqlen_k, index):
    """What the stock layer returns for the layers after it, `[batch or 1, num_heads, seqlen_q, seqlen_k]`."""
    if layer.use_relative_attention_bias:
        bias = layer.compute_bias(seqlen_q, seqlen_k, query_start_index=index)
    else:
        bias = ops.zeros([1, layer.num_heads, seqlen_q, seqlen_k], layer.compute_dtype)
    return bias if mask is None else bias + (1.0 - ops.cast(ops.expand_dims(mask, 1), bias.dtype)) * -1e9

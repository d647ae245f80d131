"""The NumPy reference as a TensorFlow function: implementation="reference"."""

from __future__ import annotations

import tensorflow as tf

from attn_ops import reference
from attn_ops.call import pages
from attn_ops.call.attention_call import OPTIONAL_DIFFERENTIABLE, AttentionCall
from attn_ops.generation import int8
from attn_ops.masks import constructors
from attn_ops.tensorflow import xp


def attention(call: AttentionCall):
    """(out, lse) computed by `reference.attention` in float64 and cast to the dtypes of the other implementations.

    Runs eagerly and in graphs, in the Python process that built them; differentiable once.
    """
    call = pages.gathered(xp, int8.dequantized(xp, call))
    key_begin, key_end = call.intervals or (None, None)
    q_ids, kv_ids = call.segments or (None, None)
    named = {
        "query": call.query,
        "key": call.key,
        "value": call.value,
        "bias": call.bias,
        "relative_bias": call.relative_bias,
        "sinks": call.sinks,
        "query_seq_lengths": call.query_lengths,
        "key_value_seq_lengths": call.key_lengths,
        "dropout_seed": call.seed,
        "query_offset": call.query_offset,
        "alibi_slopes": call.alibi_slopes,
        "key_begin": key_begin,
        "key_end": key_end,
        "q_ids": q_ids,
        "kv_ids": kv_ids,
        "blocks": call.blocks,
    }
    named = {name: x for name, x in named.items() if x is not None}
    options = {
        "scale": call.scale,
        "window": (call.window_left, call.window_right),
        "causal_alignment": "bottom_right" if call.bottom_right else "top_left",
        "dropout_rate": call.dropout_rate,
        "layout": call.layout,
        "logits_soft_cap": call.logits_soft_cap,
    }
    differentiable = call.differentiable()

    def with_arrays(function, arrays):
        """``function`` of the reference on the arrays of `named` and then the masks."""
        given = dict(zip(named, arrays))
        seen_by = list(arrays[len(named) :])
        if "key_begin" in given:
            seen_by.append(constructors.intervals(given.pop("key_begin"), given.pop("key_end")))
        if "q_ids" in given:
            seen_by.append(constructors.segments(given.pop("q_ids"), given.pop("kv_ids")))
        if "blocks" in given:
            seen_by.append(constructors.block_sparse(given.pop("blocks"), call.block_q, call.block_k))
        if "relative_bias" in given:  # that of a call has the heads first
            given["relative_bias"] = given["relative_bias"].T
        if "query_offset" in given and len(given["query_offset"]) == 1:
            given["query_offset"] = int(given["query_offset"][0])
        if "alibi_slopes" in given and len(given["alibi_slopes"]) == 1:
            given["alibi_slopes"] = given["alibi_slopes"][0]
        return function(**given, mask=seen_by or None, **options)

    def forward(*arrays):
        out, lse = with_arrays(reference.attention, arrays)
        return out.astype(call.query.dtype.as_numpy_dtype), lse.astype(call.lse_dtype.as_numpy_dtype)

    def backward(d_out, d_lse, *arrays):
        gradients = with_arrays(
            lambda **kwargs: reference.attention_gradients(d_out=d_out, d_lse=d_lse, **kwargs), arrays
        )
        gradients = dict(zip(_differentiable(named), [g for g in gradients if g is not None]))
        if "relative_bias" in gradients:
            gradients["relative_bias"] = gradients["relative_bias"].T
        return [g.astype(x.dtype.as_numpy_dtype) for g, x in zip(gradients.values(), differentiable)]

    @tf.custom_gradient
    def run(*tensors):
        out, lse = tf.numpy_function(forward, tensors, (call.query.dtype, call.lse_dtype))
        out_shape, lse_shape = call.result_shapes()
        out.set_shape(out_shape)
        lse.set_shape(lse_shape)

        def gradient(d_out, d_lse):
            d = tf.numpy_function(backward, (d_out, d_lse, *tensors), [x.dtype for x in differentiable])
            of = dict(zip(_differentiable(named), d))
            for name, d_x in of.items():
                d_x.set_shape(named[name].shape)
            return [of.get(name) for name in named] + [None] * len(call.masks)

        return (out, lse), gradient

    return run(*named.values(), *call.masks)


def _differentiable(names):
    return [name for name in ("query", "key", "value", *OPTIONAL_DIFFERENTIABLE) if name in names]

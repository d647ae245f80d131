"""The NumPy reference as a TensorFlow function: implementation="reference"."""

from __future__ import annotations

import tensorflow as tf

from attn_ops import reference
from attn_ops.call.attention_call import AttentionCall


def attention(call: AttentionCall):
    """(out, lse) computed by `reference.attention` in float64 and cast to the dtypes of the other implementations.

    Runs eagerly and in graphs, in the Python process that built them; differentiable once.
    """
    named = {
        "query": call.query,
        "key": call.key,
        "value": call.value,
        "bias": call.bias,
        "query_seq_lengths": call.query_lengths,
        "key_value_seq_lengths": call.key_lengths,
        "dropout_seed": call.seed,
    }
    named = {name: x for name, x in named.items() if x is not None}
    options = {
        "scale": call.scale,
        "window": (call.window_left, call.window_right),
        "causal_alignment": "bottom_right" if call.bottom_right else "top_left",
        "dropout_rate": call.dropout_rate,
        "layout": call.layout,
    }
    differentiable = [x for x in (call.query, call.key, call.value, call.bias) if x is not None]

    def with_arrays(function, arrays):
        """``function`` of the reference on the arrays of `named` and then the masks."""
        masks = list(arrays[len(named) :])
        return function(**dict(zip(named, arrays)), mask=masks or None, **options)

    def forward(*arrays):
        out, lse = with_arrays(reference.attention, arrays)
        return out.astype(call.query.dtype.as_numpy_dtype), lse.astype(call.lse_dtype.as_numpy_dtype)

    def backward(d_out, d_lse, *arrays):
        gradients = with_arrays(
            lambda **kwargs: reference.attention_gradients(d_out=d_out, d_lse=d_lse, **kwargs), arrays
        )
        return [g.astype(x.dtype.as_numpy_dtype) for g, x in zip(gradients, differentiable)]

    @tf.custom_gradient
    def run(*tensors):
        out, lse = tf.numpy_function(forward, tensors, (call.query.dtype, call.lse_dtype))
        out_shape, lse_shape = call.result_shapes()
        out.set_shape(out_shape)
        lse.set_shape(lse_shape)

        def gradient(d_out, d_lse):
            d = tf.numpy_function(backward, (d_out, d_lse, *tensors), [x.dtype for x in differentiable])
            of = dict(zip([name for name in ("query", "key", "value", "bias") if name in named], d))
            for name, d_x in of.items():
                d_x.set_shape(named[name].shape)
            return [of.get(name) for name in named] + [None] * len(call.masks)

        return (out, lse), gradient

    return run(*named.values(), *call.masks)

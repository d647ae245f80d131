"""The operators `AttnOps>Forward`, `AttnOps>Decode` and `AttnOps>Backward` of the compiled library, as TensorFlow functions.

They are registered by csrc/bindings/tensorflow.cc, and their gradients by derivatives.py.
"""

from __future__ import annotations

import tensorflow as tf

from attn_ops import kernels
from attn_ops.call.attention_call import AttentionCall, attributes, cache_inputs, optional_inputs, reads_cache
from attn_ops.tensorflow import gpu


def forward(call: AttentionCall, **more):
    """(out, lse, statistics), differentiable; lse is None unless ``call.return_lse``. ``more`` are attributes."""
    library, caches = kernels.library(), ()
    operator = library.attn_ops_forward
    if reads_cache(call):
        operator, caches = library.attn_ops_decode, cache_inputs(gpu.with_table(call)).values()
    out, statistics, lse = operator(
        call.query,
        call.key,
        call.value,
        *optional_inputs(call).values(),
        *caches,
        num_lse=int(call.return_lse),
        Tlse=call.lse_dtype,
        **attributes(call),
        **more,
    )
    lse = lse[0] if call.return_lse else None
    if not tf.executing_eagerly():
        # The op's shape function cannot read attributes, and so not tell the heads from the rows.
        call.set_result_shapes(out, lse, statistics)
    return out, lse, statistics


def backward(call: AttentionCall, out, statistics, d_out, d_lse):
    """The gradients of those inputs of ``call`` that are `asked` for; ``d_lse`` may be None."""
    d_query, d_key, d_value, *others = kernels.library().attn_ops_backward(
        call.query,
        call.key,
        call.value,
        out,
        statistics,
        d_out,
        () if d_lse is None else (d_lse,),
        *optional_inputs(call).values(),
        d_bias=call.bias is not None and not call.constant_bias,
        **attributes(call),
    )
    inputs = call.differentiable()
    gradients = [d_query, d_key, d_value, *(gradient for gradients in others for gradient in gradients)]
    for at in call.asked()[3:]:  # whether they are wanted the op's shape function cannot tell
        gradients[at].set_shape(inputs[at].shape)
    return [gradients[at] for at in call.asked()]


# Registers the ops, so that a saved model which holds them can be loaded from here on.
kernels.library()

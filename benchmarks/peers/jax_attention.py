"""jax.nn.dot_product_attention, jitted, on [batch, seqlen, heads, head_dim]."""

from __future__ import annotations

import numpy as np

from workloads import BIAS, BOOLEAN, FORWARD, FORWARD_BACKWARD, PADDING, SEGMENTS, dense_mask

from .base import Peer


class JaxAttention(Peer):
    name = "jax"
    modules = ("jax",)
    dtypes = ("float32", "bfloat16")
    masks = (PADDING, SEGMENTS, BOOLEAN, BIAS)
    windows = True

    def supports(self, workload, mode):
        return mode in (FORWARD, FORWARD_BACKWARD)

    def prepare(self, workload, mode, inputs):
        import jax

        q, k, v, d_out = (jax.numpy.asarray(inputs[name]) for name in ("query", "key", "value", "d_out"))
        arrays = {"bias": inputs.get("bias"), "key_value_seq_lengths": inputs.get("key_lengths")}
        if workload.mask in (SEGMENTS, BOOLEAN):
            arrays["mask"] = dense_mask(workload, inputs)
        arrays = {name: jax.numpy.asarray(array) for name, array in arrays.items() if array is not None}
        options = {"is_causal": workload.is_causal, "local_window_size": workload.window}

        def attend(q, k, v, arrays):
            return jax.nn.dot_product_attention(q, k, v, **arrays, **options)

        def differentiate(q, k, v, d_out, arrays):
            out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, arrays), q, k, v)
            return out, *backward(d_out)

        if mode == FORWARD:
            compiled = jax.jit(attend)
            return lambda: jax.block_until_ready((compiled(q, k, v, arrays),))
        compiled = jax.jit(differentiate)
        return lambda: jax.block_until_ready(compiled(q, k, v, d_out, arrays))

    def outputs(self, workload, mode, result):
        return [np.asarray(array) for array in result]


def peers():
    yield JaxAttention()

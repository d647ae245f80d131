"""attn_ops and Keras's attention op, each eager, in a graph, and (Keras) compiled with XLA."""

from __future__ import annotations

from workloads import FORWARD, FORWARD_BACKWARD

from .base import Peer


class TensorFlowOp(Peer):
    """`attend(q, k, v, is_causal)` on [batch, seqlen, heads, head_dim] tensors.

    Graph and XLA steps are concrete functions, so that the price of Python argument matching (0.2 ms) is nobody's.
    """

    def __init__(self, name, attend, how, modules):
        self.name = name
        self.modules = modules
        self._attend = attend
        self._how = how

    def supports(self, workload, mode):
        return mode in (FORWARD, FORWARD_BACKWARD)

    def prepare(self, workload, mode, inputs):
        import tensorflow as tf

        arguments = [tf.constant(inputs[name]) for name in ("query", "key", "value")]
        if mode == FORWARD:

            def step(q, k, v):
                return self._attend(q, k, v, workload.is_causal)
        else:
            arguments.append(tf.constant(inputs["d_out"]))

            def step(q, k, v, d_out):
                with tf.GradientTape() as tape:
                    tape.watch((q, k, v))
                    out = self._attend(q, k, v, workload.is_causal)
                return out, *tape.gradient(out, (q, k, v), output_gradients=d_out)

        if self._how != "eager":
            function = tf.function(step, jit_compile=self._how == "xla", autograph=False)
            step = function.get_concrete_function(*arguments)
        return lambda: step(*arguments)

    def outputs(self, workload, mode, result):
        return [result.numpy()] if mode == FORWARD else [tensor.numpy() for tensor in result]


def _attn_ops(implementation):
    def attend(q, k, v, is_causal):
        import attn_ops

        return attn_ops.scaled_dot_product_attention(q, k, v, is_causal=is_causal, implementation=implementation)

    return attend


def _keras(q, k, v, is_causal):
    import keras

    return keras.ops.dot_product_attention(q, k, v, is_causal=is_causal)


def peers():
    ours = ("attn_ops", "tensorflow")
    yield TensorFlowOp("attn_ops", _attn_ops("fused"), "graph", ours)
    yield TensorFlowOp("attn_ops_eager", _attn_ops("fused"), "eager", ours)
    yield TensorFlowOp("attn_ops_composite", _attn_ops("composite"), "graph", ours)
    for how in ("graph", "xla", "eager"):
        yield TensorFlowOp(f"keras_{how}", _keras, how, ("keras", "tensorflow"))

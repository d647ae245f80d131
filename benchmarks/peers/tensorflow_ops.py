"""attn_ops and Keras's attention op, each eager, in a graph and with XLA, and plain TensorFlow with XLA."""

from __future__ import annotations

from workloads import FORWARD, FORWARD_BACKWARD, MASKS, dense_mask

from .base import Peer


class TensorFlowOp(Peer):
    """`attend(workload, q, k, v, extras)` on [batch, seqlen, heads, head_dim] tensors; extras: what masks are made of.

    Graph and XLA steps are concrete functions, so that the price of Python argument matching (0.2 ms) is nobody's.
    """

    dtypes = ("float32", "float64", "float16", "bfloat16")

    def __init__(self, name, attend, how, modules, extras=None, masks=(), windows=False):
        self.name = name
        self.modules = modules
        self.masks = masks
        self.windows = windows
        self._attend = attend
        self._how = how
        self._extras = extras or (lambda workload, inputs: {})

    def supports(self, workload, mode):
        return mode in (FORWARD, FORWARD_BACKWARD)

    def prepare(self, workload, mode, inputs):
        import tensorflow as tf

        names = ("query", "key", "value") if mode == FORWARD else ("query", "key", "value", "d_out")
        extras = {name: array for name, array in self._extras(workload, inputs).items() if array is not None}
        arguments = [tf.constant(inputs[name]) for name in names] + [tf.constant(x) for x in extras.values()]

        if workload.is_decode:
            arguments[1:3] = _kept(*arguments[1:3])

        def attend(q, k, v, arrays):
            return self._attend(workload, q, k, v, dict(zip(extras, arrays, strict=True)))

        if mode == FORWARD:

            def step(q, k, v, *arrays):
                return attend(q, k, v, arrays)
        else:

            def step(q, k, v, d_out, *arrays):
                with tf.GradientTape() as tape:
                    tape.watch((q, k, v))
                    out = attend(q, k, v, arrays)
                return out, *tape.gradient(out, (q, k, v), output_gradients=d_out)

        if self._how != "eager":
            function = tf.function(step, jit_compile=self._how == "xla", autograph=False)
            step = function.get_concrete_function(*arguments)
        return lambda: step(*arguments)

    def outputs(self, workload, mode, result):
        return [result.numpy()] if mode == FORWARD else [tensor.numpy() for tensor in result]


def _kept(key, value):
    """The same where a cache keeps them: in large pages, as NumPy's arrays lie that others read."""
    import attn_ops

    cache = attn_ops.KVCache.create(*key.shape, key.dtype, value_dim=value.shape[-1]).update(key, value)
    return cache.key, cache.value


def _attn_ops(implementation):
    def attend(workload, q, k, v, extras):
        import attn_ops

        mask = extras.get("boolean_mask")
        if "segment_ids" in extras:
            mask = attn_ops.masks.segments(extras["segment_ids"], extras["segment_ids"])
        return attn_ops.scaled_dot_product_attention(
            q,
            k,
            v,
            bias=extras.get("bias"),
            mask=mask,
            is_causal=workload.is_causal,
            window=workload.window,
            key_value_seq_lengths=extras.get("key_lengths"),
            implementation=implementation,
        )

    return attend


def _keras(workload, q, k, v, extras):
    import keras

    return keras.ops.dot_product_attention(q, k, v, is_causal=workload.is_causal, **extras)


def _plain(workload, q, k, v, extras):
    """What one writes by hand: matmul, softmax, matmul."""
    import tensorflow as tf

    q, k, v = (tf.transpose(x, (0, 2, 1, 3)) for x in (q, k, v))
    scores = tf.matmul(q, k, transpose_b=True) * tf.cast(workload.head_dim**-0.5, q.dtype)
    if workload.is_causal:
        visible = tf.linalg.band_part(tf.ones((workload.seqlen_q, workload.seqlen_k), tf.bool), -1, 0)
        scores = tf.where(visible, scores, tf.cast(-1e30, q.dtype))
    return tf.transpose(tf.matmul(tf.nn.softmax(scores), v), (0, 2, 1, 3))


class PlainXla(TensorFlowOp):
    def supports(self, workload, mode):
        return super().supports(workload, mode) and workload.num_heads == workload.num_kv_heads

    dtypes = ("float32", "float64")  # the scores would overflow in less


def _structured(workload, inputs):
    return {name: inputs.get(name) for name in ("bias", "boolean_mask", "segment_ids", "key_lengths")}


def _dense(workload, inputs):
    return {"bias": inputs.get("bias"), "mask": dense_mask(workload, inputs)}


def peers():
    ours = {"modules": ("attn_ops", "tensorflow"), "extras": _structured, "masks": MASKS, "windows": True}
    yield TensorFlowOp("attn_ops", _attn_ops("fused"), "graph", **ours)
    yield TensorFlowOp("attn_ops_eager", _attn_ops("fused"), "eager", **ours)
    yield TensorFlowOp("attn_ops_xla", _attn_ops("fused"), "xla", **ours)
    yield TensorFlowOp("attn_ops_composite", _attn_ops("composite"), "graph", **ours)
    stock = {"modules": ("keras", "tensorflow"), "extras": _dense, "masks": MASKS, "windows": True}
    for how in ("graph", "xla", "eager"):
        yield TensorFlowOp(f"keras_{how}", _keras, how, **stock)
    yield PlainXla("tf_xla", _plain, "xla", ("tensorflow",))

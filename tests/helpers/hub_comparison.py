"""Layers and models of KerasHub before and after `attn_ops.convert`: their outputs and gradients, and how many of their
attentions ran fused."""

import numpy as np
import tensorflow as tf

import attn_ops


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def randomize(layer, seed=1):
    """Weights so large that attention is far from uniform."""
    rng = np.random.default_rng(seed)
    for weight in layer.weights:
        if "float" in str(weight.dtype):
            fan_in = max(1, int(np.prod(weight.shape[:-1])))
            size = 0.4 if len(weight.shape) < 2 else 1.5 / np.sqrt(fan_in)
            value = rng.normal(size=weight.shape) * size
            weight.assign(abs(value) if "variance" in weight.name else value)


class Fused:
    """Counts the calls of the op, all of which have to run fused."""

    def __init__(self, monkeypatch):
        run, self.calls, self.rates = attn_ops.scaled_dot_product_attention, 0, []

        def spy(*args, **kwargs):
            self.calls += 1
            self.rates.append(kwargs.get("dropout_rate", 0.0))
            return run(*args, **{**kwargs, "implementation": "fused"})

        monkeypatch.setattr(attn_ops, "scaled_dot_product_attention", spy)


def results(call, weights, inputs=(), at=None, **options):
    """The outputs of ``call(*inputs)`` as one vector, and the gradients of a weighted sum of them by weights and inputs.

    Args:
        inputs: arrays by position; only those of floats have gradients.
        at: a function of an output that tells where it counts.
    """

    def run(*inputs):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([weight.value for weight in weights])
            tape.watch([x for x in inputs if x.dtype.is_floating])
            outs = [tf.cast(x, tf.float32) for x in tf.nest.flatten(call(*inputs)) if x is not None]
            outs = [x if at is None else x * at(x) for x in outs]
            rng = np.random.default_rng(5)
            loss = sum(tf.reduce_sum(x * rng.normal(size=x.shape).astype("float32")) for x in outs)
        by = [*(weight.value for weight in weights), *(x for x in inputs if x.dtype.is_floating)]
        return outs, [
            tf.zeros_like(x) if g is None else tf.convert_to_tensor(g) for x, g in zip(by, tape.gradient(loss, by))
        ]

    run = tf.function(run, **options) if options else run
    outs, gradients = run(*(tf.convert_to_tensor(x) for x in inputs))
    return [np.asarray(x) for x in outs], [np.asarray(x, "float32") for x in gradients]


def assert_close(ours, stock, out, gradient):
    """Outputs to within ``out`` of their own scale, gradients to within ``gradient`` of the largest one's, if any."""
    assert [x.shape for x in ours[0]] == [x.shape for x in stock[0]]
    for x, y in zip(ours[0], stock[0]):
        np.testing.assert_allclose(x, y, rtol=0, atol=out * max(1e-3, abs(y).max()))
    if gradient is None:
        return
    scale = max(abs(y).max() for y in stock[1])
    assert scale > 0
    for x, y in zip(ours[1], stock[1], strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=gradient * scale)

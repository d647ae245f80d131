"""What a call costs beside the attention: eagerly, through a layer, and to trace.

    python benchmarks/overhead.py

Microseconds of the calling thread's processor time for an attention of one row and one key of 64 numbers, and for a
`MultiHeadAttention` of 2 heads, 4 rows; seconds to trace twelve such layers, forward and with the gradient. Least of
many rounds, ours and stock's in turn: what others do on the machine only adds to it.
"""

from __future__ import annotations

import os
import time


def least(functions, rounds, repeats):
    """The least processor time of a call of each of the named functions, in seconds."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            begin = time.thread_time()
            for _ in range(repeats):
                function()
            best[name] = min(best[name], (time.thread_time() - begin) / repeats)
    return best


def of_calls():
    import tensorflow as tf

    import attn_ops
    from attn_ops.call.normalize import normalize
    from attn_ops.tensorflow import xp
    from attn_ops.tensorflow.forms import eager

    q = tf.random.normal((1, 1, 1, 64))
    call = normalize(xp, "overhead", q, q, q)
    return {
        "TensorFlow, q + q": lambda: tf.raw_ops.AddV2(x=q, y=q),
        "the operator": lambda: eager.forward(call),
        "scaled_dot_product_attention": lambda: attn_ops.scaled_dot_product_attention(q, q, q),
    }


def of_layers():
    import keras
    import tensorflow as tf

    import attn_ops

    x = tf.random.normal((1, 4, 64))
    layers = {"keras": keras.layers.MultiHeadAttention(2, 32), "attn_ops": attn_ops.layers.MultiHeadAttention(2, 32)}
    return {f"MultiHeadAttention of {name}": lambda layer=layer: layer(x, x) for name, layer in layers.items()}


def of_traces(training):
    import keras
    import tensorflow as tf

    import attn_ops

    def model(kind):
        x = inputs = keras.Input((32, 64))
        for _ in range(12):
            x = x + kind(2, 32)(x, x)
        return keras.Model(inputs, x)

    def tracing(model):
        weights = [weight.value for weight in model.trainable_weights]

        def step(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(model(x, training=training))
            return tape.gradient(loss, weights) if training else loss

        return lambda: tf.function(step, autograph=False).get_concrete_function(tf.TensorSpec((4, 32, 64)))

    kinds = {"keras": keras.layers.MultiHeadAttention, "attn_ops": attn_ops.layers.MultiHeadAttention}
    return {f"tracing 12 of {name}": tracing(model(kind)) for name, kind in kinds.items()}


def main() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name, seconds in {**least(of_calls(), 100, 50), **least(of_layers(), 50, 10)}.items():
        print(f"{seconds * 1e6:10.1f} us   {name}", flush=True)
    for training in (False, True):
        for name, seconds in least(of_traces(training), 4, 1).items():
            print(f"{seconds:10.2f} s    {name}{', with the gradient' if training else ''}", flush=True)


if __name__ == "__main__":
    main()

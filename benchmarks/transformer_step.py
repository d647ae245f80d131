"""A training step of a small transformer, with our attention layer and the stock one, compiled by XLA and not.

    python benchmarks/transformer_step.py                     # 4 layers, batch 8, 512 tokens, width 512, 8 heads
    python benchmarks/transformer_step.py --causal --threads 1
    python benchmarks/transformer_step.py --seqlen 2048 --batch 2 --policy mixed_bfloat16

All four models have the same weights and inputs, take turns in the rounds of one process, and must agree on the loss.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
from attn_ops.cli import interleave
from peers.base import set_threads

_LEARNING_RATE = 1e-6  # the update is timed; the weights should stay what they are


def block(layers, attention, x, num_heads, is_causal):
    width = x.shape[-1]
    normed = layers.LayerNormalization()(x)
    attend = attention.MultiHeadAttention(num_heads, width // num_heads)
    x = layers.Add()([x, attend(normed, normed, use_causal_mask=is_causal)])
    hidden = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x))
    return layers.Add()([x, layers.Dense(width)(hidden)])


def training_step(attention, arguments, jit_compile, weights=None):
    """One step as a function without arguments that returns the loss, and the weights it began with."""
    import keras
    import tensorflow as tf

    inputs = x = keras.Input((arguments.seqlen, arguments.width))
    for _ in range(arguments.layers):
        x = block(keras.layers, attention, x, arguments.heads, arguments.causal)
    model = keras.Model(inputs, x)
    if weights is not None:
        model.set_weights(weights)
    weights = model.get_weights()
    generator = np.random.default_rng(0)
    data, target = (
        tf.constant(generator.standard_normal((arguments.batch, arguments.seqlen, arguments.width), np.float32))
        for _ in range(2)
    )
    variables = [variable.value for variable in model.trainable_variables]  # the tf.Variable

    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(tf.cast(model(data, training=True), tf.float32) - target))
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(_LEARNING_RATE * gradient)
        return loss

    return tf.function(step, jit_compile=jit_compile, autograph=False).get_concrete_function(), weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 4), ("batch", 8), ("seqlen", 512), ("width", 512), ("heads", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--policy", default="float32", help="Keras's dtype policy, such as mixed_bfloat16")
    arguments = parser.parse_args()
    set_threads(arguments.threads)

    import attn_ops.layers
    import keras

    keras.config.set_dtype_policy(arguments.policy)
    keras.utils.set_random_seed(0)
    steps, weights = {}, None
    for name, attention in (("attn_ops", attn_ops.layers), ("keras", keras.layers)):
        for how, jit_compile in (("graph", False), ("xla", True)):
            steps[f"{name}, {how}"], weights = training_step(attention, arguments, jit_compile, weights)
    losses = [float(step()) for step in steps.values()]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4 if arguments.policy == "float32" else 1e-2)

    samples, _, rounds = interleave.run(steps, arguments.rounds, seconds=float("inf"))
    print(f"{vars(arguments)}, median of {rounds} rounds")
    print("\n| | wall, ms | CPU, ms | × attn_ops, xla |\n|---|---:|---:|---:|")
    ours = samples["attn_ops, xla"].median("wall")
    for name, sample in samples.items():
        wall, cpu = sample.median("wall"), sample.median("cpu")
        print(f"| {name} | {1e3 * wall:.0f} | {1e3 * cpu:.0f} | {wall / ours:.2f} |")


if __name__ == "__main__":
    main()

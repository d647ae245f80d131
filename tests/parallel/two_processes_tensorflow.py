"""One of two workers of TensorFlow, told by TF_CONFIG (test_tensorflow.py): a loop of training, and a divided
sequence."""

import json
import os
import sys

sys.modules |= dict.fromkeys(("jax", "matplotlib", "scipy"))  # what Keras imports and does without

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

import attn_ops  # noqa: E402

strategy = tf.distribute.MultiWorkerMirroredStrategy()
RNG = np.random.default_rng(0)
X, Y = (RNG.standard_normal((8, 6, 8)).astype("float32") for _ in range(2))
worker = json.loads(os.environ["TF_CONFIG"])["task"]["index"]


def model():
    keras.utils.set_random_seed(0)
    layer = attn_ops.layers.MultiHeadAttention(2, 4)
    layer.build(X.shape, X.shape)
    return layer


def gradients(layer, x, y, count):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(layer(x, x, use_causal_mask=True) - y)) / count
    return tape.gradient(loss, [w.value for w in layer.trainable_weights])


with strategy.scope():
    layer = model()


@tf.function
def step(x, y):
    def replica(x, y):
        context = tf.distribute.get_replica_context()
        summed = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients(layer, x, y, X.size))
        for weight, gradient in zip(layer.trainable_weights, summed):
            weight.value.assign_sub(0.1 * gradient)

    strategy.run(replica, (x, y))


alone = model()
for _ in range(2):
    step(X[4 * worker : 4 * worker + 4], Y[4 * worker : 4 * worker + 4])
    for weight, gradient in zip(alone.trainable_weights, gradients(alone, X, Y, X.size)):
        weight.value.assign_sub(0.1 * gradient)
for found, right in zip(layer.weights, alone.weights):
    np.testing.assert_allclose(found.numpy(), right.numpy(), rtol=1e-5, atol=1e-6)

QUERY = tf.constant(RNG.standard_normal((2, 12, 2, 8)), tf.float32)
mine = slice(6 * worker, 6 * worker + 6)


def with_gradient(attend, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        out = attend(x, x, x, is_causal=True)
        loss = tf.reduce_sum(tf.sin(out))
    return out, tape.gradient(loss, x)


@tf.function
def divided(x):
    return strategy.run(lambda x: with_gradient(attn_ops.all_gather_kv, x), (x,))


for found, right in zip(divided(QUERY[:, mine]), with_gradient(attn_ops.scaled_dot_product_attention, QUERY)):
    np.testing.assert_allclose(found, right[:, mine], rtol=1e-5, atol=1e-5)
print("worker", worker, "of", strategy.num_replicas_in_sync)

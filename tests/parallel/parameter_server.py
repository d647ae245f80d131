"""`ParameterServerStrategy` with one worker and one parameter server in this process, which they keep until it ends."""

import socket

import numpy as np
import tensorflow as tf

import attn_ops


def address():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


cluster = tf.train.ClusterSpec({"worker": [address()], "ps": [address()]})
servers = [tf.distribute.Server(cluster, job_name=job, protocol="grpc") for job in cluster.jobs]
strategy = tf.distribute.ParameterServerStrategy(
    tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc")
)
coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
x = np.random.default_rng(0).standard_normal((4, 6, 8)).astype("float32")


def made():
    layer = attn_ops.layers.MultiHeadAttention(2, 4)
    layer.build(x.shape, x.shape)
    return layer


def trained(layer):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x, x, use_causal_mask=True) ** 2)
    weights = [weight.value for weight in layer.trainable_variables]
    for weight, gradient in zip(weights, tape.gradient(loss, weights)):
        weight.assign_sub(0.001 * gradient)
    return loss


local = made()
with strategy.scope():
    layer = made()
assert "/job:ps/" in layer.weights[0].value.device
layer.set_weights(local.get_weights())
step = tf.function(lambda: strategy.run(trained, [layer]))
losses = []
for _ in range(2):
    result = coordinator.schedule(step)
    coordinator.join()
    losses.append(result.fetch())
np.testing.assert_allclose(losses, [trained(local) for _ in range(2)], rtol=1e-5)
for found, wanted in zip(layer.get_weights(), local.get_weights(), strict=True):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
assert losses[1] < losses[0]
print("trained")

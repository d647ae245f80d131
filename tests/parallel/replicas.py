"""What test_tensorflow.py runs in a process of its own: two replicas on logical devices of the CPU."""

import keras
import numpy as np
import tensorflow as tf

import attn_ops

devices = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (tf.constant(RNG.standard_normal((2, 12, heads, 8)), tf.float32) for heads in (4, 2, 2))
BIAS = tf.constant(RNG.standard_normal((1, 4, 12, 12)), tf.float32)
OPTIONS = {
    "is_causal": True,
    "alibi_slopes": attn_ops.alibi_slopes(4),
    "query_seq_lengths": [9, 12],
    "key_value_seq_lengths": [12, 5],
    "return_lse": True,
}


def parts(x, axis):
    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.split(x, 2, axis)[context.replica_id_in_sync_group]
    )


def joined(x, axis=1):
    return tf.concat(strategy.experimental_local_results(x), axis)


def with_gradients(attend, query, key, value, bias):
    with tf.GradientTape() as tape:
        tape.watch([query, key, value, bias])
        out, lse = attend(query, key, value, bias=bias, **OPTIONS)
        loss = tf.reduce_sum(tf.sin(out)) + tf.reduce_sum(tf.where(tf.math.is_finite(lse), lse, 0))
    return out, lse, *tape.gradient(loss, [query, key, value, bias])


@tf.function
def gathered(*arguments):
    return strategy.run(lambda *x: with_gradients(attn_ops.all_gather_kv, *x), arguments)


found = gathered(*(parts(x, 1) for x in (QUERY, KEY, VALUE)), parts(BIAS, 2))
expected = with_gradients(attn_ops.scaled_dot_product_attention, QUERY, KEY, VALUE, BIAS)
for x, right, axis in zip(found, expected, (1, 2, 1, 1, 1, 2)):
    np.testing.assert_allclose(joined(x, axis), right, rtol=1e-4, atol=1e-5)
print("gathered")

x, y = (RNG.standard_normal((8, 6, 8)).astype("float32") for _ in range(2))


def trained():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 8))
    model = keras.Model(inputs, attn_ops.layers.MultiHeadAttention(2, 4)(inputs, inputs, use_causal_mask=True))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    return model.get_weights()


with strategy.scope():
    mirrored = trained()
for weight, right in zip(mirrored, trained()):
    np.testing.assert_allclose(weight, right, rtol=1e-5, atol=1e-6)
print("trained")


def kept():
    """Which weights each replica keeps, of the same attention."""
    keras.utils.set_random_seed(3)
    ones = tf.ones((1, 6, 1, 6))

    @tf.function
    def step():
        def replica():
            out = attn_ops.scaled_dot_product_attention(ones * 0, ones * 0, tf.eye(6)[None, :, None], dropout_rate=0.5)
            return out > 0

        return strategy.run(replica)

    return [x.numpy() for x in strategy.experimental_local_results(step())]


first, again = kept(), kept()
assert (first[0] != first[1]).any(), "replicas drop alike"
assert all((a == b).all() for a, b in zip(first, again)), "a seed does not repeat"
print("dropped")

try:
    attn_ops.all_gather_kv(QUERY, KEY, VALUE, dropout_rate=0.1)
except TypeError as error:
    assert "dropout_rate" in str(error)
with strategy.scope():
    try:
        attn_ops.all_gather_kv(QUERY, KEY, VALUE)
    except ValueError as error:
        assert "replica context" in str(error)
        print("refused")


def refused(given):
    """What is said of lengths that are out of range, when a function is traced or when it runs."""

    @tf.function(input_signature=None if isinstance(given, list) else [tf.TensorSpec([None], tf.int32)])
    def step(lengths=given):
        shares = [x[:, :6] for x in (QUERY, KEY, VALUE)]
        return strategy.run(lambda: attn_ops.all_gather_kv(*shares, query_seq_lengths=lengths))

    try:
        step() if isinstance(given, list) else step(given)
    except (ValueError, tf.errors.InvalidArgumentError) as error:
        return "lengths" in str(error)
    return False


assert all(refused(x) for x in ([13, 5], [-1, 5], tf.constant([13, 5]), tf.constant([-1, 5])))
assert not refused(tf.constant([12, 0]))
print("told")

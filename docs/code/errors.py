"""docs/troubleshooting.md: calls that bring about what its titles say.

The test of that page calls the function that has the name of a region, and looks for its title in what is raised or
warned of.
"""

import keras
import numpy as np
import tensorflow as tf

import attn_ops

q = tf.random.normal([2, 8, 4, 16])
x = np.ones((1, 4, 2, 8), np.float32)


def unexpected_argument():
    # [unexpected_argument]
    attn_ops.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
    # [/unexpected_argument]


def additive_mask():
    # [additive_mask]
    attn_ops.scaled_dot_product_attention(q, q, q, mask=tf.constant(np.triu(np.full([8, 8], -1e9, "float32"), 1)))
    # [/additive_mask]


def mask_of_the_keys():
    # [mask_of_the_keys]
    attn_ops.scaled_dot_product_attention(q[:, :5], q, q, mask=tf.ones([2, 8], tf.bool))
    # [/mask_of_the_keys]


def heads():
    # [heads]
    attn_ops.scaled_dot_product_attention(q, q[:, :, :3], q[:, :, :3])
    # [/heads]


def rank():
    # [rank]
    attn_ops.scaled_dot_product_attention(q, q[0], q[0])
    # [/rank]


def forced():
    # [forced]
    model = keras.Sequential([keras.Input((8, 16)), attn_ops.layers.SelfAttention(flash_attention=True)])
    attn_ops.export(model, "unused", ops="composite", verbose=False)
    # [/forced]


def one_query():
    # [one_query]
    attn_ops.scaled_dot_product_attention(q[:, :1], q, q, is_causal=True)
    # [/one_query]


def nothing_fused():
    # [nothing_fused]
    with attn_ops.patched():
        pass  # what was traced before goes on as it was
    # [/nothing_fused]


def full_cache():
    # [full_cache]
    cache = attn_ops.KVCache.create(batch=2, max_length=4, num_kv_heads=4, head_dim=16)
    attn_ops.decode_attention(q, cache, q, q)
    # [/full_cache]


def beyond_keras():
    # [beyond_keras]
    inputs = keras.Input((8, 16))
    layer = attn_ops.layers.MultiHeadAttention(2, 8, sinks=True, name="attention")
    attn_ops.revert(keras.Model(inputs, layer(inputs, inputs)))
    # [/beyond_keras]


def symbolic_weights():
    # [symbolic_weights]
    attn_ops.visualize.plot_attention_weights(keras.Input((8, 8)))
    # [/symbolic_weights]


def seed_on_jax():
    # [seed_on_jax]
    attn_ops.jax.scaled_dot_product_attention(x, x, x, dropout_rate=0.1)
    # [/seed_on_jax]


def ragged():
    # [ragged]
    attn_ops.layers.RotaryEmbedding()(tf.ragged.constant([[[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]]], ragged_rank=1))
    # [/ragged]


def window():
    # [window]
    attn_ops.scaled_dot_product_attention(q, q, q, window=4)
    # [/window]


def two_places():
    # [two_places]
    attn_ops.scaled_dot_product_attention(q, q, q, is_causal=True, query_offset=3, causal_alignment="bottom_right")
    # [/two_places]

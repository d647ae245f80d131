"""docs/troubleshooting.md: what is said, and what brings it about. Each function of CALLS raises or warns as its page says."""

import keras
import numpy as np
import tensorflow as tf

import attn_ops

q = tf.random.normal([2, 8, 4, 16])


# [unexpected]
def torch_names():
    attn_ops.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
# [/unexpected]


# [additive]
def an_additive_mask():
    attn_ops.scaled_dot_product_attention(q, q, q, mask=tf.constant(np.triu(np.full([8, 8], -1e9, "float32"), 1)))
# [/additive]


# [padding]
def a_mask_of_the_keys():
    attn_ops.scaled_dot_product_attention(q[:, :5], q, q, mask=tf.ones([2, 8], tf.bool))
# [/padding]


# [heads]
def heads_that_do_not_divide():
    attn_ops.scaled_dot_product_attention(q, q[:, :, :3], q[:, :, :3])
# [/heads]


# [rank]
def one_rank_too_few():
    attn_ops.scaled_dot_product_attention(q, q[0], q[0])
# [/rank]


# [forced]
def forced_where_it_cannot():
    model = keras.Sequential([keras.Input((8, 16)), attn_ops.layers.SelfAttention(flash_attention=True)])
    attn_ops.export(model, "unused", ops="composite", verbose=False)
# [/forced]


# [decoding]
def one_query_top_left():
    attn_ops.scaled_dot_product_attention(q[:, :1], q, q, is_causal=True)
# [/decoding]


# [nothing_fused]
def traced_before():
    with attn_ops.patched():
        pass
# [/nothing_fused]


# [room]
def a_cache_that_is_full():
    cache = attn_ops.KVCache.create(2, 4, 4, 16)
    attn_ops.decode_attention(q, cache, q, q)
# [/room]


# [revert]
def options_that_keras_lacks():
    inputs = keras.Input((8, 16))
    layer = attn_ops.layers.MultiHeadAttention(2, 8, sinks=True, name="attention")
    attn_ops.revert(keras.Model(inputs, layer(inputs, inputs)))
# [/revert]


# [symbolic]
def a_picture_of_a_symbol():
    attn_ops.visualize.plot_attention_weights(keras.Input((8, 8)))
# [/symbolic]


# [seed]
def jax_without_a_seed():
    x = np.ones((1, 4, 2, 8), np.float32)
    attn_ops.jax.scaled_dot_product_attention(x, x, x, dropout_rate=0.1)
# [/seed]


# [ragged]
def a_ragged_input():
    attn_ops.layers.SelfAttention(16)(tf.ragged.constant([[[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]]], ragged_rank=1))
# [/ragged]


# [sequence_window]
def the_window_of_keras():
    attn_ops.scaled_dot_product_attention(q, q, q, window=4)
# [/sequence_window]


# [query_offset]
def two_places_for_a_row():
    attn_ops.scaled_dot_product_attention(q, q, q, is_causal=True, query_offset=3, causal_alignment="bottom_right")
# [/query_offset]

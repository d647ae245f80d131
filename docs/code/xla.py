"""docs/guides/xla.md"""

# [function]
import keras
import numpy as np
import tensorflow as tf

import attn_ops


@tf.function(jit_compile=True)
def attend(q):
    return attn_ops.scaled_dot_product_attention(q, q, q, is_causal=True)


q = tf.random.normal([1, 32, 2, 16])
answer = attend(q)
# [/function]

eager = attn_ops.scaled_dot_product_attention(q, q, q, is_causal=True)
np.testing.assert_allclose(answer, eager, rtol=1e-4, atol=1e-5)

# [explain]
@tf.function(jit_compile=True)
def told(q):
    print(attn_ops.explain(q, q, q, is_causal=True))
    return q


told(q)
# [/explain]

# [mixed]
policy = keras.mixed_precision.DTypePolicy("mixed_bfloat16")
layer = attn_ops.layers.MultiHeadAttention(num_heads=2, key_dim=16, dtype=policy)
half = layer(tf.random.normal([1, 32, 32]), tf.random.normal([1, 32, 32]))  # bfloat16 in and out, float32 inside
# [/mixed]

# [recompute]
@tf.recompute_grad
def block(q):
    return attn_ops.scaled_dot_product_attention(q, q, q, dropout_rate=0.1, dropout_seed=3)


with tf.GradientTape() as tape:
    tape.watch(q)
    y = block(q)
gradient = tape.gradient(y, q)  # what the first run dropped, the second one drops
# [/recompute]

with tf.GradientTape() as tape:
    tape.watch(q)
    y = attn_ops.scaled_dot_product_attention(q, q, q, dropout_rate=0.1, dropout_seed=3)
np.testing.assert_allclose(gradient, tape.gradient(y, q), rtol=1e-4, atol=1e-5)
assert half.dtype == tf.bfloat16

"""docs/index.md, docs/start/doors.md and README.md"""

# [swap]
import keras

import attn_ops

x = inputs = keras.Input((1024, 512))
# was keras.layers.MultiHeadAttention
x = attn_ops.layers.MultiHeadAttention(num_heads=8, key_dim=64)(x, x, use_causal_mask=True)
model = keras.Model(inputs, keras.layers.Dense(10)(x))  # compile, fit, save: as ever
# [/swap]

# [explain]
print(attn_ops.explain(model))
# [/explain]

# [op]
import tensorflow as tf

query = tf.random.normal([2, 128, 8, 64])  # [batch, seqlen, num_heads, head_dim]
out = attn_ops.scaled_dot_product_attention(query, query, query, is_causal=True, dropout_rate=0.1)
# [/op]

# [convert]
inputs = keras.Input((32, 48))
stock = keras.Model(inputs, keras.layers.MultiHeadAttention(2, 24, dropout=0.1)(inputs, inputs))

attn_ops.convert(stock)  # in place: same layers, same weights
attn_ops.revert(stock)  # and back
# [/convert]

# [patched]
import numpy as np

with attn_ops.patched(stock):
    answer = stock.predict(np.zeros((2, 32, 48), "float32"), verbose=0)
# [/patched]

assert out.shape == query.shape and answer.shape == (2, 32, 48)
assert type(stock.layers[1]) is keras.layers.MultiHeadAttention
assert "1 of 1 attention layers run fused" in str(attn_ops.explain(model))

"""docs/guides/weights.md"""

# [model]
import keras
import numpy as np
import tensorflow as tf

import attn_ops

tokens = keras.Input((6,), dtype="int32")
x = keras.layers.Embedding(20, 16, mask_zero=True)(tokens)
x = attn_ops.layers.MultiHeadAttention(num_heads=2, key_dim=8, name="attention")(x, x)
model = keras.Model(tokens, keras.layers.Dense(3)(x))
sentence = np.array([[5, 3, 9, 1, 0, 0]])  # two positions of padding
words = ["the", "cat", "sat", "down", "", ""]
# [/model]

# [scores]
layer = model.get_layer("attention")
before = keras.Model(model.input, model.layers[1].output)  # the model up to what the attention reads
features = before(sentence)  # with its Keras mask
_, weights = layer(features, features, return_attention_scores=True)  # [1, 2 heads, 6, 6]
# [/scores]

# [op]
q = k = tf.random.normal([1, 6, 2, 8])
_, lse = attn_ops.scaled_dot_product_attention(q, k, k, is_causal=True, return_lse=True)
probabilities = attn_ops.attention_weights(q, k, is_causal=True, lse=lse)  # [1, 2 heads, 6, 6]
# [/op]

# [plot]
from attn_ops.visualize import plot_attention_weights

figure = plot_attention_weights(weights, words, title="Who reads whom")
figure.savefig("heads.png")
# [/plot]

# [summary]
entropy = -np.sum(weights * np.log(np.maximum(weights, 1e-9)), axis=-1)  # 0: one key only; log(6): all the same
distance = np.sum(weights * np.abs(np.arange(6)[:, None] - np.arange(6)), axis=-1)  # how far away a head looks
# [/summary]

weights = np.asarray(weights)
assert weights.shape == (1, 2, 6, 6) and (weights[..., 4:] == 0).all()
np.testing.assert_allclose(weights[0, :, :4].sum(-1), 1.0, rtol=1e-5)
np.testing.assert_allclose(np.sum(probabilities, -1), 1.0, rtol=1e-5)
assert entropy.shape == distance.shape == (1, 2, 6)

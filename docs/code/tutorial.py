"""docs/start/tutorial.md: what tutorials on attention in Keras build by hand, with layers that work."""

import numpy as np

# [import]
import keras

from attn_ops.layers import AttentionLayer, AttentionLayerWithWeights, MultiHeadAttention, SelfAttention

# [/import]

keras.utils.set_random_seed(0)

# [attention]
query = keras.Input((10, 64))
key = keras.Input((20, 64))
value = keras.Input((20, 32))
context = AttentionLayer()([query, key, value])  # [batch, 10, 32]
attention_model = keras.Model([query, key, value], context)
# [/attention]

# [self_attention]
inputs = keras.Input((8, 8))
sequence = keras.layers.LSTM(64, return_sequences=True)(inputs)
context = SelfAttention(64)(sequence)
pooled = keras.layers.GlobalAveragePooling1D()(context)
outputs = keras.layers.Dense(10, activation="softmax")(pooled)
model = keras.Model(inputs, outputs)
# [/self_attention]

# [data]
from sklearn.datasets import load_digits

digits = load_digits()  # 1,797 pictures of 8 x 8 pixels: 8 steps of 8 features
x, y = (digits.images / 16.0).astype("float32"), digits.target
# [/data]

# [fit]
model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
history = model.fit(x, y, batch_size=32, validation_split=0.2, epochs=2)
# [/fit]

# [weights]
attention = model.layers[2]
sequence = model.layers[1](x[:1])  # what the trained LSTM gives for one digit
_, weights = attention(sequence, return_attention_scores=True)  # [1, 8, 8]; each row sums to 1
# [/weights]

# [weights_layer]
context, weights_of_layer = AttentionLayerWithWeights()([sequence, sequence, sequence])
# [/weights_layer]

# [plot]
from attn_ops.visualize import plot_attention_weights

figure = plot_attention_weights(weights, [f"row {i}" for i in range(8)], title="A digit: attention between its rows")
figure.savefig("weights.png")
# [/plot]

# [multi_head]
inputs = keras.Input((8, 8))
x_ = keras.layers.Dense(64)(inputs)
attended = MultiHeadAttention(num_heads=4, key_dim=16, dropout=0.1)(x_, x_)
x_ = keras.layers.LayerNormalization()(x_ + attended)
outputs = keras.layers.Dense(10, activation="softmax")(keras.layers.GlobalAveragePooling1D()(x_))
multi_head = keras.Model(inputs, outputs)
# [/multi_head]

random = np.random.default_rng(0)
q, k, v = (random.normal(size=shape).astype("float32") for shape in ((2, 10, 64), (2, 20, 64), (2, 20, 32)))
scores = q @ k.swapaxes(1, 2)
by_hand = np.exp(scores - scores.max(-1, keepdims=True))
by_hand = by_hand / by_hand.sum(-1, keepdims=True) @ v
np.testing.assert_allclose(attention_model([q, k, v]), by_hand, rtol=1e-4, atol=1e-4)
np.testing.assert_allclose(np.sum(weights, -1), 1.0, rtol=1e-5)
np.testing.assert_allclose(np.sum(weights_of_layer, -1), 1.0, rtol=1e-5)
assert np.isfinite(history.history["val_loss"]).all() and multi_head(x[:2]).shape == (2, 10)

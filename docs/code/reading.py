"""docs/guides/reading.md"""

# [train]
import keras
import numpy as np

import attn_ops
from attn_ops import visualize

keras.utils.set_random_seed(0)
random = np.random.default_rng(0)
words = ["", "the", "film", "music", "was", "and", "very", "not", "good", "great", "dull", "bad"]  # 0 is padding
good, bad = {"good", "great"}, {"dull", "bad"}


def review():
    """A sentence of up to 10 words, and whether it praises: "not" turns what follows it around."""
    text = ["the", random.choice(["film", "music"]), "was"]
    if turned := random.random() < 0.5:
        text.append("not")
    text += ["very"] * random.integers(3) + [random.choice([*good, *bad])]
    praises = (text[-1] in good) != turned
    return [words.index(word) for word in text + [""] * (10 - len(text))], int(praises)


sentences, labels = (np.array(x) for x in zip(*(review() for _ in range(600))))

ids = keras.Input((10,), dtype="int32")
x = keras.layers.Embedding(len(words), 16, mask_zero=True)(ids)
y = keras.layers.MultiHeadAttention(2, 8, name="attention")(x, x)
x = keras.layers.GlobalAveragePooling1D()(keras.layers.Add()([x, y]), mask=ids != 0)
model = keras.Model(ids, keras.layers.Dense(1, activation="sigmoid")(x), name="reviews")
model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
model.optimizer.learning_rate = 0.01
model.fit(sentences, labels, epochs=12, verbose=0)
# [/train]

# [attention]
sentence = ["the", "film", "was", "not", "very", "good", "", "", "", ""]
numbers = np.array([[words.index(word) for word in sentence]])
attention = visualize.attention(model, numbers, tokens=sentence)
print(attention)  # a table: every attention layer, with its heads, entropy and mean distance
layer = attention["attention"]
layer.weights  # [1, 2 heads, 10 queries, 10 keys]
layer.hidden  # True where the mask hides a key
# [/attention]

# [viewer]
viewer = visualize.viewer(attention, "reviews.html")  # one file; in a notebook the last line of a cell shows it
# [/viewer]

# [pictures]
visualize.plot_attention_weights(layer, crop=True, annotate=True).savefig("heads.png")
visualize.plot_attention_over_text(layer, query=sentence.index("good"), title='What "good" reads').figure.savefig(
    "words.png"
)
visualize.plot_heads(attention).savefig("all_heads.png")
# [/pictures]

# [numbers]
received = layer.received[0].mean(0)  # what each word receives, in the mean of all heads and of all real words
most = np.argsort(-received)[:3]
print([(sentence[key], round(float(received[key]), 2)) for key in most])
print(layer.entropy[0], layer.distance[0])  # of each head
# [/numbers]

# [elsewhere]
found = visualize.ModelAttention.from_weights({"a layer": np.full((2, 4, 4), 0.25)}, tokens=list("abcd"))
# [/elsewhere]

# [long]
long = attn_ops.layers.MultiHeadAttention(2, 8, name="long")
x = random.normal(size=(1, 1500, 16)).astype("float32")
long(x, x)
(kept,) = visualize.attention(long, (x, x), top_keys=4)
kept.weights is None and kept.blocks.size  # 8: the weights are not kept, but the means of 8 x 8 of them
kept.blocks.means, kept.blocks.top_keys  # [1, 2 heads, 188, 188] and [1, 2 heads, 1500, 4]
# [/long]

assert model.evaluate(sentences, labels, verbose=0)[1] > 0.9
weights = np.asarray(layer.weights)
np.testing.assert_allclose(weights[0, :, :6].sum(-1), 1.0, rtol=1e-5)
assert layer.hidden[0, 0, :, 6:].all() and (weights[..., 6:] == 0).all()
assert (
    kept.blocks.means.shape == (1, 2, 188, 188)
    and kept.blocks.top_keys.shape == (1, 2, 1500, 4)
    and kept.blocks.size == 8
)
assert found[0].entropy[0, 0] == np.float32(np.log(4)) and len(viewer.html) < 10**6

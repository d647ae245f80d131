"""docs/guides/models.md"""

# [attention]
import keras

import attn_ops


class MyAttention(keras.layers.Layer):
    """An attention that nobody knows: one head, its method `_attend`."""

    scale = 0.25

    def call(self, x):
        return self._attend(x[:, :, None], x[:, :, None], x[:, :, None])[:, :, 0]

    def _attend(self, query, key, value, mask=None):
        scores = keras.ops.einsum("bthd,bshd->bhts", query, key) * self.scale
        return keras.ops.einsum("bhts,bshd->bthd", keras.ops.softmax(scores), value)


inputs = keras.Input((16, 8))
model = keras.Model(inputs, MyAttention()(inputs))
# [/attention]

import numpy as np

x = np.random.default_rng(0).normal(size=(2, 16, 8)).astype("float32")
stock_answer = model(x)


# [register]
def attend(layer, stock, query, key, value, mask=None):
    if mask is not None and mask.dtype != "bool":
        return stock(query, key, value, mask)  # what the layer would have done
    return attn_ops.scaled_dot_product_attention(query, key, value, mask=mask, scale=layer.scale)


attn_ops.models.register(MyAttention, attend, method="_attend")
attn_ops.convert(model)
print(attn_ops.explain(model))
# [/register]

np.testing.assert_allclose(model(x), stock_answer, rtol=1e-4, atol=1e-5)
assert "1 of 1 attention layers run fused" in str(attn_ops.explain(model))

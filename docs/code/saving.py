"""docs/guides/saving.md"""

# [model]
import keras
import numpy as np
import tensorflow as tf

import attn_ops

inputs = keras.Input((16, 8))
model = keras.Model(inputs, attn_ops.layers.MultiHeadAttention(2, 4)(inputs, inputs))
x = np.random.default_rng(0).normal(size=(2, 16, 8)).astype("float32")
# [/model]

# [keras]
model.save("model.keras")
same = keras.saving.load_model("model.keras")  # after import attn_ops
# [/keras]

# [weights]
stock = attn_ops.revert(keras.models.clone_model(model))  # layers of Keras, for those who have no attn_ops
model.save_weights("model.weights.h5")
stock.load_weights("model.weights.h5")
# [/weights]

# [export]
attn_ops.export(model, "exported", verbose=False)  # TensorFlow's own operations: loads anywhere
loaded = tf.saved_model.load("exported")
anywhere = loaded.serve(x)
# [/export]

# [fused]
attn_ops.export(model, "exported_fused", ops="fused", verbose=False)
path = attn_ops.load_library()  # before loading; tf.load_library(path) and TF_LoadLibrary take the path
loaded_fused = tf.saved_model.load("exported_fused")
fused = loaded_fused.serve(x)
# [/fused]

expected = model(x)
for answer in (same(x), stock(x), anywhere, fused):
    np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)

"""docs/guides/models.md; needs KerasHub"""

import numpy as np

# [convert]
import keras_hub

import attn_ops

model = keras_hub.models.LlamaBackbone(
    vocabulary_size=64, num_layers=1, num_query_heads=4, num_key_value_heads=2, hidden_dim=32, intermediate_dim=64
)
attn_ops.convert(model)  # every attention that is known runs fused; fit, predict, generate as ever
print(attn_ops.explain(model))  # what each layer runs now, why, and what to do about the rest
# [/convert]

tokens = {"token_ids": np.arange(16)[None], "padding_mask": np.ones((1, 16), bool)}
converted = model(tokens)

# [revert]
attn_ops.revert(model)  # and back
# [/revert]

np.testing.assert_allclose(converted, model(tokens), rtol=1e-3, atol=1e-5)

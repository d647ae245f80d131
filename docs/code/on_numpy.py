"""docs/guides/numpy.md"""

# [reference]
import numpy as np

from attn_ops import reference

q = np.random.default_rng(0).normal(size=(2, 16, 4, 8))
out, lse = reference.attention(q, q, q, is_causal=True)  # float64: the specification
dq, dk, dv, _ = reference.attention_gradients(q, q, q, d_out=np.ones_like(out), is_causal=True)
# [/reference]

# [kernels]
import attn_ops

x = q.astype(np.float32)
fused, lse, statistics = attn_ops._core.forward(x, x, x, window_right=0, num_threads=1)  # causal
print(attn_ops._core.isas())  # "avx512", "avx2", "neon", "generic": what this processor can run
# [/kernels]

np.testing.assert_allclose(fused, out, rtol=1e-4, atol=1e-5)
assert dq.shape == dk.shape == dv.shape == q.shape and "generic" in attn_ops._core.isas()

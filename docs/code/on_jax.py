"""docs/guides/jax.md and docs/guides/porting.md"""

# [jax]
import jax

import attn_ops.jax

q = jax.random.normal(jax.random.key(0), (2, 64, 4, 16))
attend = jax.jit(lambda q: attn_ops.jax.scaled_dot_product_attention(q, q, q, is_causal=True))
gradient = jax.grad(lambda q: attend(q).sum())(q)
# [/jax]

# [dropout]
key = jax.random.key(1)  # JAX has no hidden random state
out = attn_ops.jax.scaled_dot_product_attention(q, q, q, dropout_rate=0.1, dropout_seed=key)
# [/dropout]

# [forward_mode]
def composite(q):
    return attn_ops.jax.scaled_dot_product_attention(q, q, q, implementation="composite")


_, tangent = jax.jvp(composite, (q,), (q,))
# [/forward_mode]

# [sharded]
import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

import attn_ops.jax


def causal(q):
    return attn_ops.jax.scaled_dot_product_attention(q, q, q, is_causal=True)


mesh, batch = Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")
sharded = jax.jit(jax.shard_map(causal, mesh=mesh, in_specs=batch, out_specs=batch, check_vma=False))
# [/sharded]

np.testing.assert_allclose(attend(q), jax.nn.dot_product_attention(q, q, q, is_causal=True), rtol=1e-4, atol=1e-5)
np.testing.assert_allclose(sharded(q), attend(q), rtol=1e-5, atol=1e-6)
assert gradient.shape == tangent.shape == out.shape == q.shape

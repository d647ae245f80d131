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
_, tangent = jax.jvp(lambda q: attn_ops.jax.scaled_dot_product_attention(q, q, q), (q,), (q,))
# [/forward_mode]

# [sharded]
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import attn_ops.jax


@jax.jit
def causal(q):
    return attn_ops.jax.scaled_dot_product_attention(q, q, q, is_causal=True)


mesh = Mesh(np.array(jax.devices()).reshape(-1, 1), ("data", "model"))
sharding = NamedSharding(mesh, PartitionSpec("data", None, "model"))  # batch and heads
shares = causal(jax.device_put(q, sharding))
# [/sharded]

# [sequence]
from attn_ops.jax import parallel


def share(query, key, value):
    """What each device does with its part of the sequence."""
    return parallel.context_parallel(query, key, value, axis="sequence", is_causal=True)


devices = Mesh(np.array(jax.devices()), ("sequence",))
parts = PartitionSpec(None, "sequence")
whole = jax.jit(jax.shard_map(share, mesh=devices, in_specs=(parts,) * 3, out_specs=parts))
# [/sequence]

# [merge]
keys = q[:, :40], q[:, 40:]
attended = [attn_ops.jax.scaled_dot_product_attention(q, k, k, return_lse=True) for k in keys]
out, lse = attn_ops.jax.merge_attention(*zip(*attended))
# [/merge]

np.testing.assert_allclose(out, attn_ops.jax.scaled_dot_product_attention(q, q, q), rtol=1e-5, atol=1e-6)
np.testing.assert_allclose(whole(q, q, q), attend(q), rtol=1e-5, atol=1e-6)
np.testing.assert_allclose(attend(q), jax.nn.dot_product_attention(q, q, q, is_causal=True), rtol=1e-4, atol=1e-5)
np.testing.assert_allclose(shares, attend(q), rtol=1e-5, atol=1e-6)
assert gradient.shape == tangent.shape == out.shape == q.shape

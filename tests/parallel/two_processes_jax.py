"""One of two processes that JAX makes one: `python two_processes_jax.py <address> <number of this one>`
(test_jax.py)."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import attn_ops.jax  # noqa: E402
from attn_ops.jax import parallel  # noqa: E402

RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (RNG.standard_normal((2, 16, heads, 8)).astype("float32") for heads in (4, 2, 2))
MESH = Mesh(np.array(jax.devices()), ("s",))
SEQUENCE = NamedSharding(MESH, P(None, "s"))


def loss(attend):
    return lambda *x: jnp.sum(jnp.sin(attend(*x)))


def plain(*x):
    return attn_ops.jax.scaled_dot_product_attention(*x, is_causal=True)


expected = jax.jit(jax.value_and_grad(loss(plain), (0, 1, 2)))(QUERY, KEY, VALUE)
divided = [jax.make_array_from_callback(x.shape, SEQUENCE, lambda at, x=x: x[at]) for x in (QUERY, KEY, VALUE)]
for method in sys.argv[3:]:

    def local(*x, method=method):
        return parallel.context_parallel(*x, axis="s", method=method, is_causal=True)

    whole = jax.shard_map(local, mesh=MESH, in_specs=(P(None, "s"),) * 3, out_specs=P(None, "s"))
    value, gradients = jax.jit(jax.value_and_grad(loss(whole), (0, 1, 2)))(*divided)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    for found, right in zip(gradients, expected[1]):
        for shard in found.addressable_shards:
            np.testing.assert_allclose(shard.data, right[shard.index], rtol=1e-4, atol=1e-5)
    print(method, "of", jax.process_count(), "processes")

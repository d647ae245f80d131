"""Arrays of no elements and of any extents, in a process of its own (test_memory_safety.py): calls return at once, and
what they return is zeros. A loop over the batch or the heads of nothing would take hours.

    python empty.py core <number of calls> <seed>   of attn_ops._core, on guarded memory
    python empty.py tensorflow                      eager, in a graph, by XLA
    python empty.py jax
"""

import sys

import numpy as np

HUGE = 2**31
# query and key, whose value_dim is the head_dim.
SHAPES = [
    ((HUGE, 0, 4, 8), (HUGE, 0, 4, 8)),
    ((HUGE, 5, 0, 8), (HUGE, 0, 4, 8)),
    ((HUGE, 0, 4, 8), (HUGE, 0, 2, 8)),
    ((2, HUGE, 0, 8), (2, 7, 2, 8)),
    ((0, HUGE, 4, 8), (0, 7, 2, 8)),
    ((0, 5, 4, HUGE), (0, 7, 2, HUGE)),
    ((1, 0, HUGE, 8), (1, 7, 2, 8)),
    ((1, 0, 2, 2**25), (1, 0, 2, 2**25)),
]


def claim(*shape):
    """Zeros that take no memory, whatever their number."""
    return np.broadcast_to(np.float32(0), shape)


def core(number, seed):
    import guarded
    from attn_ops import _core

    rng = np.random.default_rng(seed)
    counts = dict.fromkeys(("returned", "refused", "forward", "backward"), 0)
    for _ in range(number):
        batch, queries, keys, kv_heads, group, dim, value_dim = map(int, rng.choice((0, 0, 1, 1, 3, HUGE, 2**40), 7))
        heads = kv_heads * group
        if batch * queries * heads > 0 and (batch > 3 or heads > 3) and max(queries, keys, heads, dim, value_dim) <= 3:
            continue  # a lot to compute
        print(batch, queries, keys, kv_heads, group, dim, value_dim, flush=True)
        q, k, v = (batch, queries, heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, value_dim)
        options = {"masks": [np.ones((1, 1, 1, 1), bool)], "bias": np.zeros((1, 1, 1, 1), "float32"), "num_threads": 2}
        try:
            with guarded.guarded(poison=0xFF):
                out, *statistics = _core.forward(claim(*q), claim(*k), claim(*v), **options)
                counts["forward"] += 1
                assert out.shape == (*q[:3], value_dim)
                assert not out.any() if out.size and keys == 0 else True
                if 2**20 < np.prod(k, dtype=float) < 2**50 or 2**20 < np.prod(v, dtype=float) < 2**50:
                    continue  # gradients that would take gigabytes of zeros
                *gradients, _, _ = _core.backward(claim(*q), claim(*k), claim(*v), out, statistics[-1], out, **options)
            counts["backward"] += 1
            assert [x.shape for x in gradients] == [q, k, v, (1, 1, 1, 1)]
            assert not any(x.any() for x in gradients if x.size)
            counts["returned"] += 1
        except (ValueError, MemoryError) as error:
            counts["refused"] += 1
            print(" ", error)
    print(counts)
    assert min(counts.values()) > number // 20


def tensorflow():
    import attn_ops
    import tensorflow as tf
    from attn_ops import kernels

    library = kernels.library()

    def attend(q, k):
        return attn_ops.scaled_dot_product_attention(q, k, k, implementation="fused")

    def gradients(q, k):  # not by a tape, whose zeros for what nobody used are counted in int32
        results = library.attn_ops_forward(q, k, k, *[[]] * 12, num_lse=0)
        return library.attn_ops_backward(q, k, k, results.out, results.statistics, results.out, *[[]] * 13)

    compiled = tf.function(attend, jit_compile=True)
    for q, k in SHAPES:
        for mode, run in (("eager", attend), ("graph", tf.function(attend)), ("XLA", compiled)):
            print(q, k, mode, flush=True)
            try:
                assert tuple(run(tf.zeros(q), tf.zeros(k)).shape) == q
            except tf.errors.InvalidArgumentError:
                assert mode == "XLA" and max(q) >= HUGE  # TensorFlow reads such extents as dynamic ones
        print(q, k, "composite", flush=True)
        query, key = tf.zeros(q), tf.zeros(k)
        out = attn_ops.scaled_dot_product_attention(query, key, key, implementation="composite")
        assert tuple(out.shape) == q
        dq, *others, d_bias, d_relative_bias, d_sinks = gradients(query, key)
        assert [tuple(x.shape) for x in (dq, *others)] == [q, k, k]
        assert [d_bias, d_relative_bias, d_sinks] == [[], [], []]
        assert not any(x.numpy().any() for x in others)


def jax():
    import attn_ops.jax
    import jax
    import jax.numpy as jnp

    def run(q, k):
        def attend(q, k):
            return attn_ops.jax.scaled_dot_product_attention(q, k, k, implementation="fused")

        out, pull = jax.vjp(attend, q, k)
        return out, *pull(out)

    for q, k in SHAPES:
        print(q, k, flush=True)
        out, *gradients = jax.jit(run)(jnp.zeros(q), jnp.zeros(k))
        assert [x.shape for x in (out, *gradients)] == [q, q, k]
        assert not np.asarray(gradients[1]).any()


if __name__ == "__main__":
    {"core": core, "tensorflow": tensorflow, "jax": jax}[sys.argv[1]](*map(int, sys.argv[2:]))
    print("done", flush=True)

"""Calls of every kind as functions without arguments that return NumPy arrays: what threads.py, soak.py and determinism.py repeat.

The arrays are few and small, or large enough for several threads (`large`), and always the same.
"""

import numpy as np


# What of the options has a gradient, which is asked for: a kernel that need not make one sums in another order.
LEARNED = ("bias", "relative_bias", "sinks")


def arrays(large, dtype="float32", heads=4, kv_heads=2, dim=16):
    rng = np.random.default_rng(7)
    rows = 300 if large else 24
    return [rng.standard_normal((2, rows, n, dim)).astype(dtype) for n in (heads, kv_heads, kv_heads, heads)]


def options(rows):
    """Options by name, beside the plain call."""
    rng = np.random.default_rng(8)
    return {
        "causal": {"is_causal": True},
        "dropout": {"dropout_rate": 0.3, "dropout_seed": (3, 4), "window": (40, 8)},
        "bias": {"bias": rng.standard_normal((1, 4, 1, rows)).astype("float32"), "logits_soft_cap": 20.0},
        "lengths": {"key_value_seq_lengths": np.array([rows, rows // 3], np.int32)},
        "table": {
            "relative_bias": rng.standard_normal((9, 4)).astype("float32"),
            "sinks": rng.standard_normal(4).astype("float32"),
            "alibi_slopes": np.array([0.5, 0.25, 0.1, 0.0], "float32"),
        },
    }


def core(large=False, num_threads=0, isa=None):
    from attn_ops import _core

    def call(q, k, v, d_out, **named):
        def run():
            out, lse, statistics = _core.forward(q, k, v, num_threads=num_threads, isa=isa, **named)
            gradients = _core.backward(q, k, v, out, statistics, d_out, num_threads=num_threads, isa=isa, **named)
            return [out, lse, *(x for x in gradients if x is not None)]

        return run

    given = {"plain": {}, "causal": {"window_right": 0}, "dropout": {"dropout_rate": 0.3, "dropout_seed": 5}}
    calls = {name: call(*arrays(large), **named) for name, named in given.items()}
    calls["float16"] = call(*arrays(large, "float16"))
    calls["float64"] = call(*arrays(large, "float64"))
    return calls


def op(large=False, wraps=("eager", "graph"), implementation="fused"):
    """TensorFlow: each call with its gradients, run directly and as a function."""
    import attn_ops
    import tensorflow as tf

    forms = {
        "eager": lambda f: f,
        "graph": lambda f: tf.function(f, autograph=False),
        "xla": lambda f: tf.function(f, autograph=False, jit_compile=True),
    }

    def call(wrap, tensors, named):
        learned = {name: tf.constant(named[name]) for name in LEARNED if name in named}
        rest = {name: x for name, x in named.items() if name not in learned}

        def attend(q, k, v, d_out, learned):
            inputs = (q, k, v, *learned.values())
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                out = attn_ops.scaled_dot_product_attention(q, k, v, implementation=implementation, **learned, **rest)
            return out, *tape.gradient(out, inputs, d_out)

        function = forms[wrap](attend)
        return lambda: [x.numpy() for x in function(*tensors, learned)]

    tensors = [tf.constant(x) for x in arrays(large)]
    given = {"plain": {}, **options(tensors[0].shape[1])}
    return {f"{wrap} {name}": call(wrap, tensors, named) for wrap in wraps for name, named in given.items()}


def decoding():
    """TensorFlow: eager calls with a cache that grows."""
    import attn_ops
    import tensorflow as tf

    q, k, v, _ = (tf.constant(x) for x in arrays(False))

    def run():
        cache = attn_ops.KVCache.create(2, 24, 2, 16, "float32")
        for first, last in ((0, 20), (20, 21), (21, 24)):
            out, cache = attn_ops.decode_attention(q[:, first:last], cache, k[:, first:last], v[:, first:last])
        return [out.numpy()]

    return {"decoding": run}


def models(count=3):
    """Keras models, each with its own function."""
    import attn_ops
    import keras
    import tensorflow as tf

    calls = {}
    for number in range(count):
        keras.utils.set_random_seed(number)
        x = inputs = keras.Input((24, 16))
        for _ in range(2):
            x = x + attn_ops.layers.MultiHeadAttention(4, 8)(x, x, use_causal_mask=True)
        model = keras.Model(inputs, x)
        given = tf.constant(np.random.default_rng(number).standard_normal((2, 24, 16)).astype("float32"))
        function = tf.function(model, autograph=False)
        calls[f"model {number}"] = lambda function=function, given=given: [function(given).numpy()]
    return calls


def jax(large=False):
    import attn_ops.jax
    import jax

    def call(named):
        learned = {name: named[name] for name in LEARNED if name in named}
        rest = {name: x for name, x in named.items() if name not in learned}

        def attend(q, k, v, d_out, learned):
            def forward(q, k, v, learned):
                return attn_ops.jax.scaled_dot_product_attention(q, k, v, implementation="fused", **learned, **rest)

            out, pull = jax.vjp(forward, q, k, v, learned)
            *gradients, of_learned = pull(d_out)
            return out, *gradients, *(of_learned[name] for name in learned)

        function = jax.jit(attend)
        return lambda: [np.asarray(x) for x in function(*given, learned)]

    given = arrays(large)
    return {f"jax {name}": call(named) for name, named in {"plain": {}, **options(given[0].shape[1])}.items()}


def same(found, wanted):
    """Whether all results have the same bits."""
    return len(found) == len(wanted) and all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(found, wanted))

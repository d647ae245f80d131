"""A quick comparison of every implementation on this machine with the NumPy reference."""

from __future__ import annotations

import numpy as np

from attn_ops import kernels, reference

_TOLERANCE = {"float32": 1e-5, "float64": 1e-12}  # relative to the largest value; errors of the kernels are below 1/5
_CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right window": {"window": (9, 2), "causal_alignment": "bottom_right"},
    "lengths": {"query_seq_lengths": np.array([31, 0]), "key_value_seq_lengths": np.array([5, 50])},
    "mask": {"mask": np.arange(50) % 3 > 0},
    "bias": {"bias": np.linspace(-1, 1, 4 * 50).reshape(1, 4, 1, 50)},
    "dropout": {"dropout_rate": 0.3, "dropout_seed": 7},
}


def _inputs(dtype):
    random = np.random.default_rng(0)
    shapes = [(2, 31, 4, 24), (2, 50, 2, 24), (2, 50, 2, 17), (2, 31, 4, 17)]
    return [random.standard_normal(shape).astype(dtype) for shape in shapes]


def _core(isa):
    core = kernels.core()

    def run(query, key, value, d_out, options):
        options = dict(options)
        window = options.pop("window", (-1, -1))
        named = {
            "isa": isa,
            "window_left": window[0],
            "window_right": 0 if options.pop("is_causal", False) else window[1],
            "bottom_right": options.pop("causal_alignment", "top_left") == "bottom_right",
            "query_lengths": options.pop("query_seq_lengths", None),
            "key_lengths": options.pop("key_value_seq_lengths", None),
            "masks": [options.pop("mask")] if "mask" in options else [],
            **options,
        }
        out, _, statistics = core.forward(query, key, value, **named)
        return out, *core.backward(query, key, value, out, statistics, d_out, **named)[:3]

    return run


def _tensorflow(implementation, jit_compile=False):
    import tensorflow as tf

    from attn_ops import scaled_dot_product_attention

    def run(query, key, value, d_out, options):
        def step(*inputs):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                out = scaled_dot_product_attention(*inputs, implementation=implementation, **options)
            return out, *tape.gradient(out, inputs, output_gradients=tf.constant(d_out))

        inputs = [tf.constant(x) for x in (query, key, value)]
        return [x.numpy() for x in (tf.function(step, jit_compile=True) if jit_compile else step)(*inputs)]

    return run


def _implementations():
    """Name and function of each implementation present, or None and why it is not."""
    if kernels.core() is None:
        yield "kernels", None, kernels.core_unavailable_reason()
    else:
        for isa in kernels.core().isas():
            yield f"kernels {isa}", _core(isa), None
    try:
        yield "composite", _tensorflow("composite"), None
    except ImportError as error:
        yield "composite", None, str(error)
        return
    reason = kernels.unavailable_reason()
    yield "fused op", None if reason else _tensorflow("fused"), reason
    reason = reason or kernels.xla_unavailable_reason()
    yield "fused in XLA", None if reason else _tensorflow("fused", jit_compile=True), reason


def run() -> int:
    """Prints one line per implementation and case; returns 1 when one was wrong."""
    wrong = 0
    for name, function, missing in _implementations():
        if function is None:
            print(f"{name:16} missing: {missing}")
            continue
        for dtype, tolerance in _TOLERANCE.items():
            for case, options in _CASES.items():
                options = {k: v.astype(dtype) if k == "bias" else v for k, v in options.items()}
                if "mask" in options:
                    options["mask"] = options["mask"].reshape(1, 1, 1, -1)
                *inputs, d_out = _inputs(dtype)
                expected = [
                    reference.attention(*inputs, **options)[0],
                    *reference.attention_gradients(*inputs, d_out=d_out, **options)[:3],
                ]
                found = function(*inputs, d_out, options)
                error = max(np.abs(f - e).max() / np.abs(e).max() for f, e in zip(found, expected))
                good = bool(error <= tolerance)  # NaN is wrong
                wrong += not good
                print(f"{name:16} {dtype} {case:20} error {error:.1e} {'ok' if good else 'WRONG'}")
    print(f"{wrong} wrong" if wrong else "all right")
    return 1 if wrong else 0

"""A quick comparison of every implementation on this machine with the NumPy reference."""

from __future__ import annotations

import time

import click
import numpy as np

from attn_ops import kernels, reference, requirements
from attn_ops.cli import frameworks
from attn_ops.cli.table import table

_TOLERANCE = {"float32": 1e-5, "float64": 1e-12}  # relative to the largest value; errors of the kernels are below 1/5
_CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right window": {"window": (9, 2), "causal_alignment": "bottom_right"},
    "lengths": {"query_seq_lengths": np.array([31, 0]), "key_value_seq_lengths": np.array([5, 50])},
    "mask": {"mask": (np.arange(50) % 3 > 0).reshape(1, 1, 1, -1)},
    "bias": {"bias": np.linspace(-1, 1, 4 * 50).reshape(1, 4, 1, 50)},
    "dropout": {"dropout_rate": 0.3, "dropout_seed": 7},
}


@click.command("selftest")
def command():
    """Compare all implementations with the reference."""
    return run()


def _cases():
    """(dtype, name) to (query, key, value, the gradient of the output) and options."""
    shapes = [(2, 31, 4, 24), (2, 50, 2, 24), (2, 50, 2, 17), (2, 31, 4, 17)]
    for dtype in _TOLERANCE:
        random = np.random.default_rng(0)
        inputs = [random.standard_normal(shape).astype(dtype) for shape in shapes]
        for name, options in _CASES.items():
            options = {k: v.astype(dtype) if k == "bias" else v for k, v in options.items()}
            yield (dtype, name), (inputs, options)


def _expected(inputs, options):
    *inputs, d_out = inputs
    return [
        reference.attention(*inputs, **options)[0],
        *reference.attention_gradients(*inputs, d_out=d_out, **options)[:3],
    ]


def _core(isa):
    """By the kernels on NumPy arrays. This and what follows: a function of all cases, that gives the output and the
    gradients of query, key and value for each."""
    core = kernels.core()

    def attend(inputs, options):
        query, key, value, d_out = inputs
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

    return lambda cases: [attend(*case) for case in cases]


def _tensorflow(implementation, **traced):
    """By TensorFlow: eager, or all cases in one function with these options of `tf.function`."""

    def run(cases):
        tf = frameworks.tensorflow()

        from attn_ops import scaled_dot_product_attention

        def step(inputs, options):
            *inputs, d_out = inputs
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                out = scaled_dot_product_attention(*inputs, implementation=implementation, **options)
            return out, *tape.gradient(out, inputs, output_gradients=d_out)

        def steps(all_inputs):
            return [step(inputs, options) for inputs, (_, options) in zip(all_inputs, cases, strict=True)]

        function = tf.function(steps, autograph=False, **traced) if traced else steps
        return function([[tf.constant(x) for x in inputs] for inputs, _ in cases])

    return run


def _jax(cases):
    """By JAX, all cases in one program."""
    import jax

    from attn_ops.jax import forms, scaled_dot_product_attention

    # Asked for by name it is not traced as composite beside, for other platforms.
    implementation = None if forms.unavailable_reason() else "fused"

    def step(inputs, options):
        *inputs, d_out = inputs
        out, pull = jax.vjp(
            lambda *x: scaled_dot_product_attention(*x, implementation=implementation, **options), *inputs
        )
        return out, *pull(d_out)

    def steps(all_inputs):
        return [step(inputs, options) for inputs, (_, options) in zip(all_inputs, cases, strict=True)]

    with frameworks.jax_on_cpu_in_float64():
        return jax.jit(steps)([inputs for inputs, _ in cases])


def _implementations():
    """Name and function of each implementation present, or None and why it is not.

    Those that only hand the same kernels over in another way compile for a while, and do it in one dtype.
    """
    without_tensorflow = _missing(frameworks.tensorflow)  # first: others import it, and its notes are to stay out
    if kernels.core() is None:
        yield "kernels", None, kernels.core_unavailable_reason()
    else:
        for isa in kernels.core().isas():
            yield f"kernels {isa}", _core(isa), None
    if requirements.installed("jax"):
        yield "JAX", _in_one_dtype(_jax), None
    if without_tensorflow:
        yield "TensorFlow", None, without_tensorflow
        return
    reason = kernels.unavailable_reason()
    yield "fused op", None if reason else _tensorflow("fused"), reason
    yield "fused in graphs", None if reason else _in_one_dtype(_tensorflow("fused", jit_compile=False)), reason
    reason = reason or kernels.xla_unavailable_reason()
    yield "fused in XLA", None if reason else _in_one_dtype(_tensorflow("fused", jit_compile=True)), reason
    yield "composite", _tensorflow("composite"), None


def _missing(framework):
    """Why it cannot be used, or None."""
    try:
        framework()
    except frameworks.Missing as missing:
        return missing.message


def _in_one_dtype(implementation):
    return lambda cases: implementation(cases[: len(_CASES)])


def run() -> int:
    """Prints a line for each implementation, with its largest errors; returns 1 when one was wrong."""
    begin = time.monotonic()
    cases = dict(_cases())
    expected = {name: _expected(*case) for name, case in cases.items()}
    rows, wrong, absent = [], [], []
    for implementation, function, missing in _implementations():
        if function is None:
            absent.append(f"{implementation}: missing: {missing}")
            continue
        found = function(list(cases.values()))
        errors = {name: _error(results, expected[name]) for name, results in zip(cases, found)}
        bad = [
            (implementation, *name, f"{error:.1e}")
            for name, error in errors.items()
            if not error <= _TOLERANCE[name[0]]
        ]
        wrong += bad
        worst = [max((error for (of, _), error in errors.items() if of == dtype), default=None) for dtype in _TOLERANCE]
        cells = ["–" if error is None else f"{error:.1e}" for error in worst]
        rows.append((implementation, str(len(errors)), *cells, "WRONG" if bad else "ok"))
    head = ("implementation", "cases", *_TOLERANCE, "")
    click.echo(table(head, rows, numbers=head[1:-1]))
    for line in (*absent, *(f"WRONG: {', '.join(case)}" for case in wrong)):
        click.echo(line)
    click.echo(f"largest error of outputs and gradients against the reference; {time.monotonic() - begin:.1f} s")
    click.echo(f"{len(wrong)} wrong" if wrong else "all right")
    return 1 if wrong else 0


def _error(found, expected) -> float:
    """The largest, as a part of the largest value; infinite for NaN."""
    errors = [np.abs(np.asarray(f) - e).max() / np.abs(e).max() for f, e in zip(found, expected, strict=True)]
    return float(np.nan_to_num(max(errors, key=lambda error: (np.isnan(error), error)), nan=np.inf))

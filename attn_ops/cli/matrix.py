"""Which implementation takes which feature, as a table of what the package's own decisions say: `explain` in every place
that a call can stand in, the rules of the CUDA kernels, and derivatives that are asked for."""

from __future__ import annotations

import functools
import importlib.util

import click
import ml_dtypes
import numpy as np

import attn_ops
from attn_ops import kernels, reference
from attn_ops.call.normalize import normalize
from attn_ops.call.position_bias import T5RelativeBias, alibi_slopes
from attn_ops.cli import frameworks, matrix_of_caches, matrix_of_shares
from attn_ops.masks import constructors as masks
from attn_ops.masks.functions import from_function

_BATCH, _ROWS, _KEYS, _HEADS, _KV_HEADS, _DIM = 2, 4, 5, 4, 2, 8


def _ones(*shape, dtype="float32"):
    return np.ones(shape, dtype)


def _inputs(heads=_HEADS, kv_heads=_KV_HEADS, dim=_DIM, value_dim=None, dtype="float32", bhsd=False):
    shapes = (_BATCH, _ROWS, heads, dim), (_BATCH, _KEYS, kv_heads, dim), (_BATCH, _KEYS, kv_heads, value_dim or dim)
    arrays = (_ones(*shape, dtype=dtype) for shape in shapes)
    return dict(zip(("query", "key", "value"), (x.swapaxes(1, 2) if bhsd else x for x in arrays)))


def _of_rank(*batch):
    return {"query": _ones(*batch, _ROWS, _DIM), "key": _ones(*batch, _KEYS, _DIM), "value": _ones(*batch, _KEYS, _DIM)}


_BOTTOM_RIGHT = {"causal_alignment": "bottom_right"}
_BLOCKS = np.array([[True, False, True], [False, True, True]])

# The arguments of a call with each feature; what is not said of the inputs is `_inputs()`.
FEATURES = {
    "one head for each": _inputs(kv_heads=_HEADS),
    "grouped heads": {},
    "one key head": _inputs(kv_heads=1),
    "value_dim of its own": _inputs(value_dim=3),
    "head_dim 512": _inputs(dim=512),
    "rank 3": _of_rank(_BATCH),
    "rank 2": _of_rank(),
    "layout BHSD": {**_inputs(bhsd=True), "layout": "BHSD"},
    "float16": _inputs(dtype="float16"),
    "bfloat16": _inputs(dtype=ml_dtypes.bfloat16),
    "float64": _inputs(dtype="float64"),
    "scale, a number": {"scale": 0.3},
    "scale, a tensor": {"scale": _ones()},
    "causal": {"is_causal": True},
    "causal, bottom right": {"is_causal": True, **_BOTTOM_RIGHT},
    "window": {"window": (1, 2)},
    "query_offset": {"query_offset": np.array([1, 0]), "is_causal": True},
    "lengths": {"query_seq_lengths": np.array([4, 2]), "key_value_seq_lengths": np.array([3, 5])},
    "boolean mask": {"mask": _ones(_BATCH, 1, _ROWS, _KEYS, dtype=bool)},
    "masks.key_padding": {"mask": masks.key_padding(_ones(_BATCH, _KEYS, dtype=bool))},
    "masks.query_padding": {"mask": masks.query_padding(_ones(_BATCH, _ROWS, dtype=bool))},
    "masks.padding": {"mask": masks.padding(key_lengths=np.array([3, 5]))},
    "masks.causal, masks.window": {"mask": masks.causal() & masks.window(left=2)},
    "masks.intervals": {"mask": masks.intervals([[0, 0, 2, 4]], [[1, 3, 3, 5]])},
    "masks.prefix": {"mask": masks.prefix(np.array([2, 0]))},
    "masks.chunked": {"mask": masks.chunked(2) & masks.causal()},
    "masks.packed": {"mask": masks.packed([0, 3, 4], [0, 2, 5])},
    "masks.segments, contiguous": {"mask": masks.segments([[0, 0, 1, 2]], [[0, 1, 1, 2, 2]], contiguous=True)},
    "masks.segments, scattered": {"mask": masks.segments([[1, 0, 1, 2]], [[0, 1, 2, 1, 0]])},
    "masks.block_sparse": {"mask": masks.block_sparse(_BLOCKS, 2, 2)},
    "masks.from_function, recognised": {"mask": from_function(lambda b, h, q, k: q >= k)},
    "masks.from_function, others": {"mask": from_function(lambda b, h, q, k: (q - k) % 3 != 1)},
    "logits_soft_cap": {"logits_soft_cap": 5.0},
    "alibi_slopes": {"alibi_slopes": alibi_slopes(_HEADS)},
    "relative_bias by distance": {"relative_bias": _ones(7, _HEADS)},
    "relative_bias of T5": {"relative_bias": T5RelativeBias(_ones(8, _HEADS), max_distance=16)},
    "bias": {"bias": _ones(1, _HEADS, _ROWS, _KEYS)},
    "bias, float32 beside 16 bits": {**_inputs(dtype="float16"), "bias": _ones(1, 1, 1, _KEYS)},
    "sinks": {"sinks": _ones(_HEADS)},
    "dropout": {"dropout_rate": 0.3, "dropout_seed": 7},
    "return_lse": {"return_lse": True},
}


@click.command("matrix")
def command():
    """Which implementation takes which feature."""
    click.echo(render(), nl=False)
    return 0


def arguments(feature) -> dict:
    """The arguments of `scaled_dot_product_attention` that show a feature, as NumPy arrays."""
    return {**_inputs(), **FEATURES[feature]}


def implementations() -> tuple[dict, dict]:
    """By column, and in it by feature: the implementation that runs it, forward and backward, as `explain` tells. And by
    column the reasons against the fused one, with the features that have them."""
    found, reasons = {}, {}
    for column, explained in _explained():
        found[column] = {feature: name for feature, (name, _) in explained.items()}
        for feature, (_, against) in explained.items():
            for reason in against:
                reasons.setdefault(column, {}).setdefault(reason, []).append(feature)
    return found, reasons


def _explained():
    tf = frameworks.tensorflow()

    from attn_ops.tensorflow import gpu, xp

    def everywhere(answer):
        def answers():
            with tf.device("CPU"):
                return {feature: answer(arguments(feature)) for feature in FEATURES}

        return answers

    def told(given):
        return _answer(attn_ops.explain(**given))

    yield "TensorFlow", everywhere(told)()
    yield "tf.function", frameworks.traced(everywhere(told))
    yield "XLA", frameworks.traced(everywhere(told), jit_compile=True)
    if importlib.util.find_spec("jax") is not None:
        yield "JAX", _explained_by_jax()
    if kernels.cuda_library_exists():

        def on_gpu(given):
            reason = gpu.call_reason(normalize(xp, "explain", **given), forced=False)
            return ("composite", (reason,)) if reason else ("fused", ())

        yield "GPU", everywhere(on_gpu)()
    yield "NumPy", {feature: _by_the_reference(**arguments(feature)) for feature in FEATURES}


def _answer(explanation):
    return explanation.implementation, explanation.reasons


def _by_the_reference(return_lse=False, **given):
    out, _ = reference.attention(**given)
    reference.attention_gradients(**given, d_out=out)
    return "reference", ()


def _explained_by_jax():
    with frameworks.jax_on_cpu_in_float64():
        return {feature: _answer(attn_ops.jax.explain(**arguments(feature))) for feature in FEATURES}


def gradients() -> dict:
    """By feature: the arguments that a gradient reaches. Each is asked for, of TensorFlow's eager calls."""
    tf = frameworks.tensorflow()

    found = {}
    for feature in FEATURES:
        given = arguments(feature)
        table = given.get("relative_bias")
        floating = {name: x for name, x in given.items() if _is_floating(x)}
        if isinstance(table, T5RelativeBias):
            floating["relative_bias"] = table.table
        floating = {name: tf.constant(x) for name, x in floating.items()}
        with tf.device("CPU"), tf.GradientTape() as tape:
            tape.watch(floating)
            watched = dict(floating)
            if isinstance(table, T5RelativeBias):
                rule = table.bidirectional, table.max_distance
                watched["relative_bias"] = T5RelativeBias(floating["relative_bias"], *rule)
            results = attn_ops.scaled_dot_product_attention(**{**given, **watched})
        reached = tape.gradient(results, floating)
        found[feature] = [name for name, d in reached.items() if d is not None]
    return found


def _is_floating(x):
    return isinstance(x, np.ndarray) and (x.dtype.kind == "f" or x.dtype == ml_dtypes.bfloat16)


def derivatives() -> dict:
    """By column, and in it by kind of derivative: "yes" where it is found, or "no"."""
    tf = frameworks.tensorflow()

    found = {}
    with tf.device("CPU"):
        inputs = [tf.constant(x) for x in _inputs().values()]
        kinds = _tensorflow_derivatives()
        for column, run in (
            ("TensorFlow", lambda asked: asked()),
            ("tf.function", frameworks.traced),
            ("XLA", functools.partial(frameworks.traced, jit_compile=True)),
        ):
            given = {kind: run(functools.partial(function, *inputs)) for kind, function in kinds.items()}
            found[column] = {kind: "no" if derivative is None else "yes" for kind, derivative in given.items()}
    if importlib.util.find_spec("jax") is not None:
        found["JAX"] = _jax_derivatives()
    return found


def _tensorflow_derivatives():
    tf = frameworks.tensorflow()

    def gradient(function):
        def of(*inputs):
            with tf.GradientTape() as tape:
                tape.watch(inputs[0])
                result = function(*inputs)
            return tape.gradient(result, inputs[0])

        return of

    def forward_mode(function):
        def of(*inputs):
            with tf.autodiff.ForwardAccumulator(inputs[0], tf.ones_like(inputs[0])) as accumulator:
                result = function(*inputs)
            return accumulator.jvp(result)

        return of

    return _kinds(attn_ops, gradient, forward_mode)


def _jax_derivatives():
    import jax
    import jax.numpy as jnp

    def gradient(function):
        return jax.grad(lambda *inputs: jnp.sum(function(*inputs)))

    def forward_mode(function):
        return lambda *inputs: jax.jvp(function, inputs, inputs)[1]

    found = {}
    for kind, function in _kinds(attn_ops.jax, gradient, forward_mode).items():
        try:
            jax.jit(function).lower(*_inputs().values())
            found[kind] = "yes"
        except TypeError:
            found[kind] = "no"
    return found


def _kinds(module, gradient, forward_mode):
    """The derivatives that are asked of a module's functions, by name, as functions of query, key and value."""
    attention = module.scaled_dot_product_attention

    def forced(*inputs):
        return attention(*inputs, implementation="composite")

    def of_weights(query, key, value):
        return module.attention_weights(query, key)

    return {
        "first": gradient(attention),
        "second": gradient(gradient(attention)),
        "forward mode": forward_mode(attention),
        'forward mode, implementation="composite"': forward_mode(forced),
        "first, of attention_weights": gradient(of_weights),
        "second, of attention_weights": gradient(gradient(of_weights)),
    }


def render() -> str:
    """All of it, in Markdown."""
    found, reasons = implementations()
    reached = gradients()
    lines = [
        "# What runs where",
        "",
        "Written by `python -m attn_ops matrix`: what `attn_ops.explain` answers for a call with each feature, on the CPU and by the",
        "rules of the CUDA kernels. The same implementation runs forward and backward. The gradients are those that a tape gave.",
        "",
        *_table(
            ["feature", *found, "gradients"],
            ([feature, *(column[feature] for column in found.values()), ", ".join(reached[feature])] for feature in FEATURES),
        ),
    ]
    for column, by_reason in reasons.items():
        lines += ["", f"Not fused, {column}:", ""]
        lines += [f"- {reason}: {'; '.join(features)}" for reason, features in by_reason.items()]
    asked = derivatives()
    kinds = next(iter(asked.values()))
    lines += ["", "Derivatives of a plain call:", ""]
    lines += _table(["derivative", *asked], ([kind, *(column[kind] for column in asked.values())] for kind in kinds))
    caches = matrix_of_caches.implementations()
    lines += ["", "A step of `decode_attention` or `paged_attention`, which appends a row and attends; without gradients:", ""]
    rows = ([cache, *(column[cache] for column in caches.values())] for cache in matrix_of_caches.CACHES)
    lines += _table(["cache", *caches], rows)
    if importlib.util.find_spec("jax") is not None:
        ways = matrix_of_shares.implementations({feature: arguments(feature) for feature in FEATURES})
        lines += ["", "`attn_ops.jax.parallel.context_parallel`, by method:", ""]
        rows = ([feature, *(column[feature] for column in ways.values())] for feature in FEATURES)
        lines += _table(["of a divided sequence", *ways], rows)
    return "\n".join(lines) + "\n"


def _table(head, rows):
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]

"""Every implementation of attention behind one call: NumPy arrays and public arguments in, results out.

`all_implementations()` feeds the fixture `implementation` (conftest.py). What is not there (library not built, no
TensorFlow) stays in the list and fails its tests, saying why, so that nothing goes untested unnoticed. Only tests of
the CUDA kernels are skipped where those were not built, for which few machines have the compiler.
"""

import dataclasses
import functools
import importlib.util

import cuda_run
import numpy as np
import pytest
from attn_ops import T5RelativeBias, kernels, reference
from attn_ops.kernels import cuda
from kernel_options import core_options, table_gradient

# The inputs that have a gradient, and what that is called here.
GRADIENTS = {
    "query": "dq",
    "key": "dk",
    "value": "dv",
    "bias": "d_bias",
    "relative_bias": "d_relative_bias",
    "sinks": "d_sinks",
}


@dataclasses.dataclass
class Result:
    """What one run gives, as arrays of the dtypes the implementation returned; the gradient of what is not given is None."""

    out: np.ndarray
    lse: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    d_bias: np.ndarray | None = None
    d_relative_bias: np.ndarray | None = None
    d_sinks: np.ndarray | None = None

    def items(self):
        return [(name, array) for name, array in vars(self).items() if array is not None]


def differentiable(arguments):
    """The names of those that have a gradient, in the order of the gradients."""
    return [name for name in GRADIENTS if arguments.get(name) is not None]


def of_gradients(out, lse, gradients, options):
    """The result with these gradients, as many as the ``options`` ask for."""
    names = differentiable({"query": 0, "key": 0, "value": 0, **options})
    return Result(out, lse, **{GRADIENTS[name]: x for name, x in zip(names, gradients, strict=True)})


class Implementation:
    """One way to compute attention. Those with ``thinning`` above 1 are slow to run or to trace, and run less often."""

    largest_head_dim = float("inf")

    def __init__(self, name, run, missing=None, thinning=1, dtypes=None):
        self.name = name
        self.dtypes = dtypes or (("float32", "float64") if thinning == 1 else ("float32",))
        self._run = run
        self._missing = missing
        self._thinning = thinning

    def __repr__(self):
        return self.name

    def __call__(self, query, key, value, d_out, d_lse=None, **options) -> Result:
        assert self._missing is None, f"{self.name}: {self._missing}"
        return self._run(query, key, value, d_out, d_lse, options)

    @property
    def is_slow(self):
        return self._thinning > 1

    def thin(self, cases):
        """All the cases, or a few spread over them."""
        return list(cases)[:: self._thinning]


def specification(query, key, value, d_out, d_lse=None, **options) -> Result:
    """The NumPy reference, in float64."""
    out, lse = reference.attention(query, key, value, **options)
    gradients = reference.attention_gradients(query, key, value, d_out=d_out, d_lse=d_lse, **options)
    return of_gradients(out, lse, [x for x in gradients if x is not None], options)


def isas():
    """Those that can run here, for parameters of tests; where the kernels were not built, one that fails."""
    return kernels.core().isas() if kernels.core() else ["missing"]


def run_core(isa, query, key, value, d_out, d_lse, options, num_threads=0):
    core = kernels.core()
    named = {**core_options(query, key, options), "isa": isa, "num_threads": num_threads}
    out, lse, statistics = core.forward(query, key, value, **named)
    if d_lse is not None:
        d_lse = d_lse.astype(lse.dtype)
    gradients = core.backward(query, key, value, out, statistics, d_out, d_lse=d_lse, **named)
    result = Result(out, lse, *gradients)
    if result.d_relative_bias is not None:
        result.d_relative_bias = table_gradient(options["relative_bias"], result.d_relative_bias)
    return result


# Arguments that are arrays: they become inputs of the traced functions, so that one trace serves many values.
_ARRAYS = (
    "bias",
    "mask",
    "query_seq_lengths",
    "key_value_seq_lengths",
    "dropout_seed",
    "query_offset",
    "alibi_slopes",
    "relative_bias",
    "sinks",
    "scale",
)


def _attend(implementation, static, tensors, d_out, d_lse):
    import tensorflow as tf
    from attn_ops import scaled_dot_product_attention

    tensors, static = dict(tensors), dict(static)
    buckets = static.pop("buckets", None)
    watched = [tensors[name] for name in differentiable(tensors)]
    if buckets is not None:
        tensors["relative_bias"] = T5RelativeBias(tensors["relative_bias"], *buckets)
    with tf.GradientTape() as tape:
        tape.watch(watched)
        results = scaled_dot_product_attention(**tensors, **static, return_lse=True, implementation=implementation)
    cotangents = [d_out, d_lse] if d_lse is not None else [d_out]
    return *results, *tape.gradient(results[: len(cotangents)], watched, output_gradients=cotangents)


@functools.lru_cache(maxsize=64)
def _traced(implementation, static, jit_compile):
    """A `tf.function` for these static options, traced anew only for new dtypes, ranks or optional inputs."""
    import tensorflow as tf

    @tf.function(jit_compile=jit_compile)
    def function(tensors, d_out, d_lse):
        return _attend(implementation, dict(static), tensors, d_out, d_lse)

    return function


def _run_tensorflow(mode, implementation, query, key, value, d_out, d_lse, options):
    import tensorflow as tf

    tensors = {"query": query, "key": key, "value": value}
    static = {}
    given = options
    if isinstance(options.get("relative_bias"), T5RelativeBias):
        table = options["relative_bias"]
        static["buckets"] = table.bidirectional, table.max_distance
        options = {**options, "relative_bias": table.table}
    for name, option in options.items():
        is_array = name in _ARRAYS and all(isinstance(x, np.ndarray) for x in tf.nest.flatten(option))
        (tensors if is_array else static)[name] = option
    tensors = tf.nest.map_structure(tf.constant, tensors)
    d_out = tf.constant(d_out)
    if d_lse is not None:
        d_lse = tf.constant(d_lse, tf.float64 if d_out.dtype == tf.float64 else tf.float32)
    if mode == "eager":
        results = _attend(implementation, static, tensors, d_out, d_lse)
    else:
        key = tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in static.items()))
        function = _traced(implementation, key, mode == "xla")
        if mode == "graph":
            # One trace for all sizes: every dimension is unknown, also those that broadcast.
            unknown = tf.nest.map_structure(
                lambda x: None if x is None else tf.TensorSpec([None] * x.shape.rank, x.dtype), (tensors, d_out, d_lse)
            )
            if "buckets" in static:  # of which the number must be known
                unknown[0]["relative_bias"] = tf.TensorSpec(tensors["relative_bias"].shape, tensors["relative_bias"].dtype)
            function = function.get_concrete_function(*unknown)
            results = function(*[x for x in tf.nest.flatten((tensors, d_out, d_lse)) if x is not None])
        else:
            results = function(tensors, d_out, d_lse)
    out, lse, *gradients = [r.numpy() for r in results]
    return of_gradients(out, lse, gradients, given)


def _run_jax(implementation, query, key, value, d_out, d_lse, options):
    import jax
    from attn_ops.jax import scaled_dot_product_attention

    options = dict(options)
    named = {"query": query, "key": key, "value": value, **options}
    named = {name: options.pop(name, named[name]) for name in differentiable(named)}
    with jax.enable_x64(query.dtype == np.float64):

        def attend(named):
            return scaled_dot_product_attention(**named, return_lse=True, implementation=implementation, **options)

        (out, lse), pull = jax.vjp(attend, jax.tree.map(jax.numpy.asarray, named))
        d_lse = np.zeros(lse.shape, lse.dtype) if d_lse is None else d_lse.astype(lse.dtype)
        [gradients] = pull((jax.numpy.asarray(d_out), jax.numpy.asarray(d_lse)))
        gradients = [gradients[name] for name in named]  # JAX has sorted the names
        tables = (x.table if isinstance(x, T5RelativeBias) else x for x in gradients)
        return of_gradients(*map(np.asarray, (out, lse)), list(map(np.asarray, tables)), named)


def _jax_missing(implementation):
    """Why JAX cannot run ``implementation``, or None."""
    if importlib.util.find_spec("jax") is None:
        return "JAX is not installed"
    if implementation == "composite":
        return None
    from attn_ops.jax import forms

    return forms.unavailable_reason()


class Cuda(Implementation):
    """The CUDA kernels, on a device or on the stand-in. Few rows are decoded, unless that is forbidden."""

    largest_head_dim = 256

    def __init__(self, on_device, decodes=True):
        name = "cuda" if decodes else "cuda-without-decode"
        super().__init__(name, self._attend, dtypes=("float32", "float16", "bfloat16"))
        self.on_device = on_device
        self.most_decode_rows = 64 if decodes else 0

    def _attend(self, query, key, value, d_out, d_lse, options):
        if query.dtype == np.float64 or max(query.shape[-1], value.shape[-1]) > self.largest_head_dim:
            pytest.skip("the CUDA kernels leave float64 and head dimensions above 256 to the composite")
        cuda_run.start(self.on_device)
        cuda.set_most_decode_rows(self.most_decode_rows)
        result = Result(**cuda_run.run(query, key, value, d_out, d_lse, options))
        if result.d_relative_bias is not None:
            result.d_relative_bias = table_gradient(options["relative_bias"], result.d_relative_bias)
        return result


def all_implementations(on_device=False):
    core = kernels.core()
    if core is None:
        yield Implementation("core", None, kernels.core_unavailable_reason())
    else:
        for isa in core.isas():
            dtypes = ("bfloat16",) if isa.endswith("bf16") else None  # all that these compute in a way of their own
            yield Implementation(f"core-{isa}", functools.partial(run_core, isa), dtypes=dtypes)
    for implementation, missing in (("composite", None), ("fused", kernels.unavailable_reason())):
        for mode, thinning in (("eager", 1), ("graph", 4), ("xla", 6)):
            run = functools.partial(_run_tensorflow, mode, implementation)
            yield Implementation(f"{implementation}-{mode}", run, missing, thinning)
    yield Implementation("reference-eager", functools.partial(_run_tensorflow, "eager", "reference"), thinning=4)
    for implementation, thinning in (("composite", 6), ("fused", 4)):
        run = functools.partial(_run_jax, implementation)
        yield Implementation(f"jax-{implementation}", run, _jax_missing(implementation), thinning)
    yield Cuda(on_device)
    yield Cuda(on_device, decodes=False)


def of_own_choice():
    """The public functions where they choose, in each place, what runs; graphs know all sizes."""
    for mode in ("eager", "function", "xla"):
        yield Implementation(mode, functools.partial(_run_tensorflow, mode, None))
    yield Implementation("jax", functools.partial(_run_jax, None))

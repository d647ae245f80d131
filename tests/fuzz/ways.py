"""The ways to compute a case: `attn_ops._core` with its views of memory and threads, and what the other tests run."""

import functools

import numpy as np
from attn_ops import kernels, masks

from cases import DTYPES
from fuzz import cases
from kernel_options import expanded_table, table_gradient


def kernel_precision(case, isa):
    """The dtype in which the kernels of an instruction set compute a case: some round weights to bfloat16."""
    return case.query.dtype if isa.endswith("bf16") and case.dtype == "bfloat16" else case.accumulator


class Way:
    """Computes cases: called with one it gives the results by name."""

    share = 1.0  # of the cases
    lacks = frozenset()  # options that it does not take
    dtypes = tuple(DTYPES)
    rounds = True  # results have the dtypes of the case
    differentiates = True

    def suited(self, case):
        """What it computes of a case that was drawn: that, another that is like it, or None."""
        return case if case.dtype in self.dtypes and not self.lacks & set(case.options) else None


class Kernels(Way):
    """Kernels alone, of arrays that may lie in memory in any way. What is hidden changes no bit, nor who computes what."""

    def __call__(self, case, turn=0, threads=None):
        """Results by name. `turn`: which garbage of the case, and on how many threads if `threads` does not say."""
        raise NotImplementedError

    def named(self, case, options, turn, threads):
        """The keywords of `_core.forward` and `_core.backward` for the options of `case.arguments`, the kernels' own apart."""
        left, right = options.get("window") or (-1, -1)
        seed, offset = options.get("dropout_seed", (0, 0))
        return dict(
            masks=[self._seen_as(case, "mask", mask) for mask in options.get("mask", ())],
            bias=self._seen_as(case, "bias", options.get("bias")),
            scale=options.get("scale"),
            window_left=left,
            window_right=0 if options.get("is_causal") else right,
            bottom_right=options.get("causal_alignment") == "bottom_right",
            query_lengths=options.get("query_seq_lengths"),
            key_lengths=options.get("key_value_seq_lengths"),
            dropout_rate=options.get("dropout_rate", 0.0),
            dropout_seed=seed,
            dropout_offset=offset,
            layout=options["layout"],
            query_offset=options.get("query_offset"),
            **self._structure(case),
            **self._scores(options),
        )

    @staticmethod
    def _structure(case):
        named = {name: x for name, x in case.structure.items() if name != "blocks"}
        if "blocks" in case.structure:
            named |= dict(zip(("blocks", "block_q", "block_k"), case.structure["blocks"]))
        return named

    @staticmethod
    def _scores(options):
        slopes, table = options.get("alibi_slopes"), options.get("relative_bias")
        return dict(
            soft_cap=options.get("logits_soft_cap"),
            slopes=None if slopes is None else np.atleast_2d(slopes),
            relative_bias=None if table is None else expanded_table(table).T,
            sinks=options.get("sinks"),
        )

    @staticmethod
    def _seen_as(case, name, x):
        """The same array, lying in memory as the case wants it."""
        return x if x is None or name not in case.views else view(case.views[name], x)

    @staticmethod
    def _in_the_tables_form(options, results):
        """Without what there is no gradient of; that of a table is of the table that was given."""
        if results["d_relative_bias"] is not None:
            results["d_relative_bias"] = table_gradient(options["relative_bias"], results["d_relative_bias"])
        return {name: x for name, x in results.items() if x is not None}


class Core(Kernels):
    """The kernels of one instruction set on NumPy arrays."""

    def __init__(self, isa):
        self.name, self.isa = f"core-{isa}", isa

    def precision(self, case):
        """The dtype in which it computes."""
        return kernel_precision(case, self.isa)

    def __call__(self, case, turn=0, threads=None):
        core = kernels.core()
        query, key, value, d_out, d_lse, options = case.arguments(turn)
        named = self.named(case, options, turn, threads)
        inputs = [self._seen_as(case, name, x) for name, x in (("query", query), ("key", key), ("value", value))]
        out, lse, statistics = core.forward(*inputs, **named)
        out_again, d_out = self._seen_as(case, "out", out), self._seen_as(case, "d_out", d_out)
        gradients = core.backward(*inputs, out_again, statistics, d_out, d_lse=d_lse, **named)
        results = {"out": out, "lse": lse, "maximum": statistics[..., 0], "sum": statistics[..., 1]}
        results |= dict(zip(("dq", "dk", "dv", "d_bias", "d_relative_bias", "d_sinks"), gradients, strict=True))
        return self._in_the_tables_form(options, results)

    def named(self, case, options, turn, threads):
        return dict(super().named(case, options, turn, threads), isa=self.isa, num_threads=threads or case.threads[turn])


def with_structure(case, options):
    """The options with the structure of the case's mask in it."""
    if not case.structure:
        return options
    parts = {"intervals": masks.intervals, "segments": masks.segments, "blocks": masks.block_sparse}
    structured = [parts[name](*given) for name, given in case.structure.items()]
    return {**options, "mask": masks.combined([*(options.get("mask") or ()), *structured])}


class Other(Way):
    """An implementation of the other tests (implementations.py)."""

    def __init__(self, name, share):
        self.name, self.share = name, share

    def precision(self, case):
        return kernel_precision(case, kernels.core().default_isa()) if "fused" in self.name else case.accumulator

    def __call__(self, case):
        query, key, value, d_out, d_lse, options = case.arguments()
        if self.name not in KERNELS_ALONE and "mask" in options:
            options["mask"] = [mask != 0 for mask in options["mask"]]
        options = with_structure(case, options)
        if "dropout_seed" in options and not self.name.startswith("jax"):  # as a tensor: one trace serves many seeds
            options["dropout_seed"] = np.array(options["dropout_seed"], np.int64)
        result = _implementations()[self.name](query, key, value, d_out, d_lse, **options)
        return dict(result.items())


class Reference(Other):
    """The specification, which computes in float64 whatever it is given."""

    rounds = False

    def precision(self, case):
        return np.dtype(np.float64)

    def __call__(self, case):
        from implementations import specification

        query, key, value, d_out, d_lse, options = case.arguments()
        return dict(specification(query, key, value, d_out, d_lse, **with_structure(case, options)).items())


@functools.cache
def _implementations():
    from implementations import all_implementations

    return {repr(implementation): implementation for implementation in all_implementations()}


# Those in which only our kernels read masks. For the operators of XLA and TensorFlow True is the byte 1.
KERNELS_ALONE = ("fused-eager", "fused-graph")

# By the names of run.py, which has more; the share is of the cases that run when nothing is asked for.
OTHERS = {
    "reference": Reference("reference", 0.1),
    "op": Other("fused-eager", 0.1),
    "graph": Other("fused-graph", 0.03),
    "xla": Other("fused-xla", 0.01),
    "composite": Other("composite-eager", 0.05),
    "jax-fused": Other("jax-fused", 0.02),
    "jax-composite": Other("jax-composite", 0.01),
}


def view(kind, x):
    """An array equal to `x` that lies otherwise in memory."""
    if kind == "fortran":
        return np.asfortranarray(x)
    if kind == "reversed":
        back = (slice(None, None, -1),) * x.ndim
        return np.ascontiguousarray(x[back])[back]
    if kind == "gaps":
        spread = np.zeros([2 * n for n in x.shape], x.dtype)
        spread[(slice(None, None, 2),) * x.ndim] = x
        return spread[(slice(None, None, 2),) * x.ndim]
    if kind == "permuted":
        axes = (2, 0, 3, 1)
        return np.ascontiguousarray(x.transpose(axes)).transpose(np.argsort(axes))
    if kind == "swapped bytes":
        return x.astype(x.dtype.newbyteorder()) if x.dtype.kind == "f" else x
    assert kind == "misaligned" and kind in cases.VIEWS
    beside = np.ndarray(x.shape, x.dtype, buffer=np.empty(x.nbytes + 1, np.uint8), offset=1)
    beside[...] = x
    return beside

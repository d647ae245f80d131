"""The CUDA kernels: on the CPU (`cuda…`), by the layer of tests/cuda_host or as nvcc's PTX, or on a card (`card…`)."""

import contextlib
import os

import cuda_run
import implementations
from attn_ops.kernels import cuda
from cuda_arrays import Array, Strided, driver

from fuzz import stored, ways


class Cuda(ways.Kernels):
    """Forward and backward. The matrix units want weights of 16 bits where the inputs are.

    A number of threads stands for the order in which blocks, warps and lanes run, where that can be chosen.
    """

    dtypes = ("float32", "float16", "bfloat16")

    def __init__(self, name, share, on_device=False, decodes=True):
        self.name, self.share, self.on_device = name, share, on_device
        self.most_decode_rows = 64 if decodes else 0

    def precision(self, case):
        return case.query.dtype

    def suited(self, case):
        fits = max(case.query.shape[-1], case.value.shape[-1]) <= implementations.Cuda.largest_head_dim
        return super().suited(case) if fits else None

    def __call__(self, case, turn=0, threads=None):
        query, key, value, d_out, d_lse, options = case.arguments(turn)
        named = self.named(case, options, turn, threads)
        with self._running(case, threads or case.threads[turn]):
            found = cuda_run.forward_and_backward(query, key, value, d_out, d_lse, named, _laid_for(case))
        return self._in_the_tables_form(options, _with_statistics_apart(found))

    @contextlib.contextmanager
    def _running(self, case, order):
        """Where the calls of a case are launched."""
        cuda_run.start(self.on_device)
        cuda.set_most_decode_rows(self.most_decode_rows)
        os.environ["ATTN_OPS_HOST_LAYER_SEED"] = str(order)
        yield

    @staticmethod
    def _seen_as(case, name, x):
        """It lies in device memory that way, and not here."""
        return x


class CudaStored(stored.Stored, Cuda):
    """Forward, on pages and on keys of 16 bits beside queries of float32."""

    kinds = ("float", "16 bits")

    def __call__(self, case, turn=0, threads=None):
        query, key, value, named = self._given(case, turn, threads)
        out_shape = (*query.shape[:3], value.shape[3])
        with self._running(case, threads or case.threads[turn]):
            options, arrays = cuda_run.launch_options(named)
            found = cuda_run.call_forward(query, key, value, out_shape, options)
        found = {name: array.numpy() for name, array in found.items()}
        for array in arrays:
            array.numpy()  # nothing was written beside it
        return _with_statistics_apart({name: found[name] for name in ("out", "lse", "statistics")})


class CudaPtx(Cuda):
    """As nvcc's PTX, interpreted: cases of few tiles, as one takes a second or more."""

    most_tiles = 8  # of 64 rows and 64 keys, or parts of them

    def suited(self, case):
        batch, num_heads, rows, keys = case.scores_shape
        tiles = batch * num_heads * -(-rows // 64) * -(-keys // 64)
        return super().suited(case) if tiles <= self.most_tiles else None

    @contextlib.contextmanager
    def _running(self, case, order):
        from cuda_host.ptx.device import Interpreter

        with super()._running(case, order):
            cuda.set_most_decode_rows(64 if stored.drawn(case, 50).random() < 0.3 else 0)
            with Interpreter(driver()):
                yield


def _laid_for(case):
    """Puts an array into device memory as the case wants it to lie there."""

    def laid(name, x):
        kind = case.views.get("mask" if name == "masks" else name)
        if kind is None or kind == "swapped bytes":
            return Array(x)
        return Strided(x, 1) if kind == "misaligned" else Strided(ways.view(kind, x))

    return laid


def _with_statistics_apart(found):
    statistics = found.pop("statistics")
    return {**found, "maximum": statistics[..., 0], "sum": statistics[..., 1]}


WAYS = {
    way.name: way
    for on_device, name in ((False, "cuda"), (True, "card"))
    for way in (
        Cuda(name, 0.5, on_device),
        Cuda(f"{name}-without-decode", 0.5, on_device, decodes=False),
        CudaStored(f"{name}-stored", 0.5, on_device),
    )
}
WAYS["cuda-ptx"] = CudaPtx("cuda-ptx", 0.02)

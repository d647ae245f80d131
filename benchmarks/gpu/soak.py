"""The same bits from thousands of launches: on poisoned memory, on two streams at once, and replayed from a CUDA graph.

Blocks meet in memory where decode's parts are put together and where the gradient of a table is added up; workspace is
lent.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from attn_ops.kernels import cuda

_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT / "tests"), str(_ROOT / "tests/helpers")]

import cuda_run
from cuda_arrays import Array, driver, synchronize

from .checks import on_stand_in

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class _Job:
    """Calls on arrays of their own, launched one after the other."""

    def __init__(self, calls, written, kept):
        self.calls, self.written, self.kept = calls, written, kept
        self.spaces = [Array.unwritten((call.workspace_bytes(),), np.uint8) for call in calls]

    def launch(self, stream):
        for call, space in zip(self.calls, self.spaces):
            call(space.view, stream.value or 0)

    def poison(self, byte):
        for view in (array.view for array in (*self.written, *self.spaces)):
            if view.bytes == 0:
                continue
            driver().cuMemsetD8_v2(ctypes.c_uint64(view.pointer), byte & 0xFF, ctypes.c_size_t(view.bytes))

    def results(self):
        return [array.numpy().tobytes() for array in self.written]


def _normal(rng, *shape, dtype=_BFLOAT16):
    return Array(rng.standard_normal(shape, np.float32).astype(dtype))


def _forward(q, k, v, options, kept):
    batch, rows, heads, dim = q.view.shape
    out = Array.unwritten((batch, rows, heads, dim), q.view.dtype if q.view.dtype != "bfloat16" else _BFLOAT16)
    statistics = Array.unwritten((batch, heads, rows, 2), "float32")
    call = cuda.Forward(*(x.view for x in (q, k, v, out, statistics)), **options)
    return call, [out, statistics], [q, k, v, *kept]


def _decode(keys):
    """A step of two sequences, whose parts blocks put together."""
    rng = np.random.default_rng(0)
    k, v = (_normal(rng, 2, keys, 8, 128) for _ in range(2))
    call, written, kept = _forward(_normal(rng, 2, 1, 32, 128), k, v, {}, [])
    return _Job([call], written, kept)


def _pages(keys):
    """The same from pages, of 16 bits beside float32."""
    rng = np.random.default_rng(1)
    pages = [_normal(rng, keys // 16, 64, 8, 128) for _ in range(2)]
    table = rng.permutation(keys // 16).astype(np.int32)[: 2 * (keys // 64)].reshape(2, -1)
    options, kept = cuda_run.launch_options({"block_table": table, "key_lengths": np.array([keys - 5, keys // 2 + 1])})
    call, written, kept = _forward(_normal(rng, 2, 1, 32, 128, dtype="float32"), *pages, options, kept)
    return _Job([call], written, kept)


def _training(keys):
    """Forward and backward with a table by distance and sinks, whose gradients are sums of many blocks'."""
    rng = np.random.default_rng(2)
    rows = keys // 8
    q, k, v, d_out = (_normal(rng, 1, rows, heads, 64) for heads in (4, 2, 2, 4))
    table, sinks = rng.standard_normal((4, 257), np.float32), rng.standard_normal(4, np.float32)
    options, kept = cuda_run.launch_options({"relative_bias": table, "sinks": sinks, "window_right": 0})
    forward, written, kept = _forward(q, k, v, options, kept)
    gradients = [Array.unwritten(x.view.shape, _BFLOAT16) for x in (q, k, v)]
    terms = (("d_relative_bias", table), ("d_sinks", sinks))
    terms = {name: Array.unwritten(x.shape, "float32") for name, x in terms}
    arrays = (q, k, v, *written, d_out, *gradients)
    backward = cuda.Backward(*(x.view for x in arrays), **{name: x.view for name, x in terms.items()}, **options)
    return _Job([forward, backward], [*written, *gradients, *terms.values()], [*kept, d_out])


_JOBS = {"decode": _decode, "pages": _pages, "training": _training}


def soak(keys: int = 8192, turns: int = 100, launches: int = 50, replays: int = 1000) -> int:
    """Returns how often bits were others."""
    cuda_run.start(not on_stand_in())
    wrong = 0
    for name, make in _JOBS.items():
        wrong += _on_streams(name, make, keys, turns, launches) + _in_a_graph(name, make, keys, replays)
    return wrong


def _on_streams(name, make, keys, turns, launches):
    expected = _once(make(keys))
    jobs = [(make(keys), _stream()) for _ in range(2)]
    wrong = 0
    for turn in range(turns):
        for job, stream in jobs:
            job.poison(turn)
            for _ in range(launches):
                job.launch(stream)
        synchronize()
        wrong += sum(job.results() != expected for job, _ in jobs)
    print(f"{name}: {2 * turns * launches} launches on two streams, {wrong} times other bits")
    return wrong


def _in_a_graph(name, make, keys, replays):
    job, stream, graph = make(keys), _stream(), ctypes.c_void_p()
    driver().cuStreamBeginCapture_v2(stream, 0)
    job.launch(stream)
    driver().cuStreamEndCapture(stream, ctypes.byref(graph))
    driver().cuGraphInstantiateWithFlags(ctypes.byref(graph), graph, ctypes.c_uint64(0))
    job.poison(0xFF)
    for _ in range(replays):
        driver().cuGraphLaunch(graph, stream)
    synchronize()
    same = job.results() == _once(make(keys))
    print(f"{name}: {replays} replays of a graph, {'the same bits' if same else 'OTHER BITS'}")
    return int(not same)


def _once(job):
    job.launch(ctypes.c_void_p())
    return job.results()


def _stream():
    stream = ctypes.c_void_p()
    driver().cuStreamCreate(ctypes.byref(stream), 0)
    return stream

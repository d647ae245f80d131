"""Our kernels on NumPy arrays, without TensorFlow: on all threads, on one of them, and on more than there are CPUs, so that
they can be compared in one process. The report alone asks for these."""

from __future__ import annotations

from workloads import FORWARD, FORWARD_BACKWARD

from .base import Peer, threads


class Core(Peer):
    modules = ("attn_ops",)
    dtypes = ("float32", "float64", "float16", "bfloat16")
    by_default = False

    def __init__(self, name, count=None):
        self.name = name
        self._count = count

    def supports(self, workload, mode):
        return mode in (FORWARD, FORWARD_BACKWARD)

    def prepare(self, workload, mode, inputs):
        from attn_ops import _core

        q, k, v, d_out = (inputs[name] for name in ("query", "key", "value", "d_out"))
        options = {"num_threads": self._count or threads()}
        if workload.is_causal:
            options["window_right"] = 0

        def step():
            out, _, statistics = _core.forward(q, k, v, **options)
            if mode == FORWARD:
                return (out,)
            return out, *_core.backward(q, k, v, out, statistics, d_out, **options)[:3]

        return step

    def outputs(self, workload, mode, result):
        return list(result)


def peers():
    yield Core("attn_ops_core")
    yield Core("attn_ops_core_1_thread", 1)
    yield Core("attn_ops_core_16_threads", 16)

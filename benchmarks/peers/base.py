"""What a peer is, how its answers are checked, and how its threads are set."""

from __future__ import annotations

import abc
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Sequence

import numpy as np

from workloads import FORWARD, FORWARD_BACKWARD, LAYER, dense_mask, make_inputs

_threads = os.cpu_count()
# The largest error against the float64 reference on the same, rounded inputs.
_TOLERANCE = {"float32": 2e-5, "float64": 1e-11, "float16": 5e-3, "bfloat16": 4e-2}


class Peer(abc.ABC):
    """One implementation of attention, and what it declares to support beside float32 and no mask."""

    name: str
    modules: tuple[str, ...]  # what must be importable
    dtypes: tuple[str, ...] = ("float32",)
    masks: tuple[str, ...] = ()  # of workloads.MASKS
    windows = False
    by_default = True  # whether it is measured when no peers are named

    def installed(self) -> bool:
        return all(importlib.util.find_spec(module) is not None for module in self.modules)

    def can(self, workload, mode: str) -> bool:
        """Whether it can do this work."""
        return (
            workload.dtype in self.dtypes
            and workload.mask in ("", *self.masks)
            and (self.windows or not workload.window)
            and self.supports(workload, mode)
        )

    @abc.abstractmethod
    def supports(self, workload, mode: str) -> bool:
        """Whether it has this mode for these shapes; dtype, mask and window are looked at by `can`."""

    @abc.abstractmethod
    def prepare(self, workload, mode: str, inputs: dict[str, np.ndarray]) -> Callable[[], object]:
        """The step to time. Inputs are converted to the peer's native layout here, outside the step."""

    @abc.abstractmethod
    def outputs(self, workload, mode: str, result) -> list[np.ndarray]:
        """What a step returned, as NumPy: [out] or [out, dq, dk, dv], all [batch, seqlen, heads, head_dim].

        For the layer modes: [layer output] or [layer output, gradients of the query, key and value kernels].
        """

    def __str__(self) -> str:
        return self.name


def threads() -> int:
    return _threads


def set_threads(count: int) -> None:
    """Call once, before any peer is used: the frameworks size their pools when first used."""
    global _threads
    _threads = count
    os.environ["OMP_NUM_THREADS"] = os.environ["NPROC"] = str(count)  # NPROC: jax
    if count == 1:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    if importlib.util.find_spec("tensorflow"):
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(count)
        tf.config.threading.set_inter_op_parallelism_threads(count)
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(count)


def versions() -> dict[str, str]:
    """Of what is installed; TensorFlow comes under several names of distributions."""
    import attn_ops

    distributions = importlib.metadata.packages_distributions()
    modules = ("tensorflow", "keras", "torch", "onnxruntime", "openvino", "jax")
    found = {name: importlib.metadata.version(distributions[name][0]) for name in modules if name in distributions}
    return {"attn_ops": attn_ops.__version__, **found}


@functools.cache
def check(peer: Peer, workload, mode: str) -> float:
    """The largest error of a peer at a miniature (`Workload.miniature`), against the float64 reference.

    Raises:
        AssertionError: it is more than the dtype explains: what is fast but wrong is not measured.
    """
    inputs = make_inputs(workload, seed=1)
    actual = peer.outputs(workload, mode, peer.prepare(workload, mode, inputs)())
    expected = _reference(workload, mode, inputs)
    assert len(actual) == len(expected), f"{peer}: {len(actual)} outputs, expected {len(expected)}"
    error, tolerance = 0.0, _TOLERANCE[workload.dtype]
    for got, want in zip(actual, expected, strict=True):
        assert got.shape == want.shape, f"{peer} on {workload}, {mode}: shape {got.shape}, expected {want.shape}"
        error = max(error, float(np.abs(got.astype(np.float64) - want).max() / max(1.0, np.abs(want).max())))
    assert error <= tolerance, f"{peer} on {workload}, {mode}: error {error:.2g} exceeds {tolerance:.2g}"
    return error


def _reference(workload, mode: str, inputs: dict[str, np.ndarray]) -> Sequence[np.ndarray]:
    from attn_ops import reference

    q, k, v, d_out = (inputs[name].astype(np.float64) for name in ("query", "key", "value", "d_out"))
    options = {"is_causal": workload.is_causal, "mask": dense_mask(workload, inputs), "bias": inputs.get("bias")}

    def attend(q, k, v):
        return reference.attention(q, k, v, **options)[0]

    def differentiate(q, k, v, d_out):
        return reference.attention_gradients(q, k, v, d_out=d_out, **options)[:3]

    if mode == FORWARD:
        return [attend(q, k, v)]
    if mode == FORWARD_BACKWARD:
        return [attend(q, k, v), *differentiate(q, k, v, d_out)]

    from .keras_layers import layer_weights

    x = q.reshape(*q.shape[:2], -1)
    gradient = d_out.reshape(x.shape)
    query, key, value, output = (weight.astype(np.float64) for weight in layer_weights(workload))
    projected = [np.einsum("btf,fnd->btnd", x, kernel) for kernel in (query, key, value)]
    out = np.einsum("btnd,ndf->btf", attend(*projected), output)
    if mode == LAYER:
        return [out]
    d_projected = differentiate(*projected, np.einsum("btf,ndf->btnd", gradient, output))
    return [out, *(np.einsum("btf,btnd->fnd", x, d) for d in d_projected)]

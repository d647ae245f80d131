"""The CUDA kernels behind the call that every implementation of the tests has, and where they run.

Under plain `pytest` they run on the CPU, on the stand-in driver of tests/cuda_host: by the layer there, or, with
ATTN_OPS_STANDIN_PTX=1 in the environment, as nvcc's PTX (tests/cuda_host/ptx). With `pytest -m gpu`, on the device.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
from attn_ops.kernels import cuda
from cuda_arrays import Array, driver, missing_reason, unwritten
from kernel_options import core_options

ROOT = Path(__file__).resolve().parents[2]


def library() -> Path | None:
    """The installed library; where there was no compiler for its kernels, the one that was built without them: the
    stand-in has kernels of its own."""
    return cuda.LIBRARY if cuda.LIBRARY.exists() else library_without_kernels()


def library_without_kernels() -> Path | None:
    """With an image of every architecture, which is no more than its name."""
    built = ROOT.glob("build/**/libattn_ops_cuda_without_kernels.so")
    return max(built, key=lambda path: path.stat().st_mtime, default=None)


def on_device(config) -> bool:
    """Whether this run of pytest is for the device."""
    chosen = config.getoption("markexpr")
    return "gpu" in chosen.split() and "not gpu" not in chosen


def skip_reason(device: bool) -> str | None:
    """Why there is nothing to run the kernels on; None when there is. Builds nothing."""
    if library() is None or (device and library() != cuda.LIBRARY):
        return cuda.unavailable_reason()
    return (missing_reason() or cuda.unavailable_reason()) if device else None


@functools.cache
def start(device: bool) -> None:
    """Makes the stand-in the driver of this process, unless it is for the device or the user named another."""
    cuda.LIBRARY = library()
    if not device and "ATTN_OPS_CUDA_DRIVER" not in os.environ:
        from cuda_host import build

        os.environ["ATTN_OPS_CUDA_DRIVER"] = str(build.library())
    driver()
    reason = cuda.unavailable_reason()
    assert reason is None, reason
    if not device and os.environ.get("ATTN_OPS_STANDIN_PTX") == "1":
        from cuda_host.ptx.device import Interpreter

        Interpreter(driver()).__enter__()


def run(query, key, value, d_out, d_lse, options, **more) -> dict[str, np.ndarray | None]:
    """Forward and backward: out, lse, dq, dk, dv, d_bias, d_relative_bias, d_sinks by name. `more` are options of the
    launches alone."""
    results = run_all(query, key, value, d_out, d_lse, options, **more)
    del results["statistics"]
    return results


def run_all(query, key, value, d_out, d_lse, options, **more) -> dict[str, np.ndarray | None]:
    """The same, with statistics."""
    named = {**core_options(query, key, options), **more}
    if named.get("bias") is not None and np.asarray(named["bias"]).dtype != np.float32:
        named["bias"] = np.asarray(named["bias"]).astype(query.dtype)
    d_lse = None if d_lse is None else d_lse.astype(np.float32)
    return forward_and_backward(query, key, value, d_out, d_lse, named)


def laid_as_usual(name: str, values: np.ndarray) -> Array:
    return Array(values)


def forward_and_backward(query, key, value, d_out, d_lse, named, lay=laid_as_usual) -> dict[str, np.ndarray | None]:
    """What `run_all` gives, by the keywords of `_core.forward`.

    `lay` puts an array into device memory, by its name: that of an argument, or of what has the shape of one ("out").
    """
    options, arrays = launch_options(named, lay)
    kept = call_forward(query, key, value, d_out.shape, options, lay)
    shared = [kept[name].view for name in ("query", "key", "value", "out", "statistics")]
    gradients = {name: lay(name, unwritten(x)) for name, x in (("query", query), ("key", key), ("value", value))}
    terms = {name: named.get(name) for name in ("bias", "relative_bias", "sinks")}
    terms = {name: None if x is None else Array(unwritten(x)) for name, x in terms.items()}
    d_out, d_lse = lay("d_out", d_out), None if d_lse is None else Array(d_lse)
    workspace = launch(
        cuda.Backward(
            *shared,
            d_out.view,
            *(x.view for x in gradients.values()),
            d_lse=d_lse and d_lse.view,
            **{f"d_{name}": x and x.view for name, x in terms.items()},
            **options,
        )
    )
    for array in (*kept.values(), *arrays, d_out, d_lse, workspace):
        if array is not None:
            array.numpy()  # nothing was written beside it
    results = {name: kept[name] for name in ("out", "lse", "statistics")}
    results |= dict(zip(("dq", "dk", "dv"), gradients.values())) | {f"d_{name}": x for name, x in terms.items()}
    return {name: array and array.numpy() for name, array in results.items()}


def call_forward(query, key, value, out_shape, options, lay=laid_as_usual) -> dict[str, Array]:
    """Launches forward with the options of `launch_options`. Returns its arrays, by name."""
    kept = {name: lay(name, x) for name, x in (("query", query), ("key", key), ("value", value))}
    batch, seqlen_q, num_heads, _ = query.shape if options["layout"] == "BSHD" else query.swapaxes(1, 2).shape
    kept["out"] = lay("out", unwritten(np.empty(out_shape, query.dtype)))
    kept["statistics"] = Array(unwritten(np.empty((batch, num_heads, seqlen_q, 2), np.float32)))
    kept["lse"] = Array(unwritten(np.empty((batch, num_heads, seqlen_q), np.float32)))
    shared = (kept[name].view for name in ("query", "key", "value", "out", "statistics"))
    workspace = launch(cuda.Forward(*shared, lse=kept["lse"].view, **options))
    return kept if workspace is None else {**kept, "workspace": workspace}


def launch_options(named, lay=laid_as_usual) -> tuple[dict, list[Array]]:
    """Keywords of `_core.forward` as those of `cuda.Forward`, and the device arrays that they describe."""
    kept = []

    def laid(name, x):
        if isinstance(x, (list, tuple)):
            return [laid(name, part) for part in x]
        if not isinstance(x, np.ndarray):
            return x
        kept.append(lay(name, x.astype(np.int32) if x.dtype.kind == "i" else x))
        return kept[-1].view

    named = {"layout": "BSHD", **named}
    words = [int(named.pop(name, 0)) & (1 << 64) - 1 for name in ("dropout_seed", "dropout_offset")]
    if named.get("dropout_rate"):
        named["dropout_words"] = np.array(words, np.uint64)
    return {name: laid(name, x) for name, x in named.items()}, kept


def launch(call, stream: int = 0) -> Array | None:
    """Launches with a workspace of just what is asked for; returns it, to be kept until the kernels are done."""
    reason = call.unsupported_reason()
    assert reason is None, reason
    size = call.workspace_bytes()
    workspace = Array.unwritten((size,), np.uint8) if size else None
    call(workspace and workspace.view, stream)
    return workspace

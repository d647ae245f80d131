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
from cuda_arrays import Array, driver, missing_reason
from reference_cases import take_mask


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
    """Forward and backward: out, lse, dq, dk, dv, d_bias, d_relative_bias, d_sinks by name. `more` are options of the launches alone."""
    results = run_all(query, key, value, d_out, d_lse, options, **more)
    del results["statistics"]
    return results


def run_all(query, key, value, d_out, d_lse, options, **more) -> dict[str, np.ndarray | None]:
    """The same, with statistics."""
    options, arrays = launch_options(query, key, dict(options))
    options |= more
    inputs = {name: Array(x) for name, x in zip("qkv", (query, key, value), strict=True)}
    batch, seqlen_q, num_heads, _ = query.shape if options["layout"] == "BSHD" else query.swapaxes(1, 2).shape
    out = Array.unwritten(d_out.shape, query.dtype)
    lse = Array.unwritten((batch, num_heads, seqlen_q), "float32")
    statistics = Array.unwritten((batch, num_heads, seqlen_q, 2), "float32")
    shared = (*(x.view for x in inputs.values()), out.view, statistics.view)
    forward = launch(cuda.Forward(*shared, lse=lse.view, **options))

    gradients = {f"d{name}": Array.unwritten(x.shape, query.dtype) for name, x in zip("qkv", (query, key, value))}
    bias = arrays["bias"].numpy() if "bias" in arrays else None
    d_bias = None if bias is None else Array.unwritten(bias.shape, bias.dtype)
    d_sinks = Array.unwritten((num_heads,), "float32") if "sinks" in arrays else None
    d_table = Array.unwritten(arrays["relative_bias"].numpy().shape, "float32") if "relative_bias" in arrays else None
    d_out = Array(d_out)
    d_lse = None if d_lse is None else Array(d_lse.astype("float32"))
    backward = launch(
        cuda.Backward(
            *shared,
            d_out.view,
            *(x.view for x in gradients.values()),
            d_lse=d_lse and d_lse.view,
            d_bias=d_bias and d_bias.view,
            d_relative_bias=d_table and d_table.view,
            d_sinks=d_sinks and d_sinks.view,
            **options,
        )
    )
    for array in (*inputs.values(), *arrays.values(), d_out, forward, backward):
        if array is not None:
            array.numpy()  # nothing was written beside it
    results = {"out": out, "lse": lse, "statistics": statistics, **gradients, "d_bias": d_bias}
    results |= {"d_relative_bias": d_table, "d_sinks": d_sinks}
    return {name: array and array.numpy() for name, array in results.items()}


def launch_options(query, key, options):
    """Public arguments of the attention as those of `cuda.Forward`, and the device arrays that they describe."""
    structure = take_mask(options)
    rows, offset = 1 if options.get("layout", "BSHD") == "BSHD" else 2, options.pop("query_offset", None)
    parts = structure.parts(query.shape[rows], key.shape[rows], offset)
    arrays = {f"mask {i}": Array(np.asarray(mask, bool)) for i, mask in enumerate(parts.dense)}
    named = {"layout": "BSHD", "masks": [array.view for array in arrays.values()]}
    named |= {name: getattr(structure, name) for name in ("window_left", "window_right", "bottom_right")}
    if parts.intervals is not None:
        ends = [Array(np.ascontiguousarray(x, np.int32)) for x in parts.intervals]
        arrays |= dict(zip(("key_begin", "key_end"), ends))
        named["intervals"] = [array.view for array in ends]
    if parts.segments is not None:
        ids = [Array(np.ascontiguousarray(x, np.int32)) for x in parts.segments]
        arrays |= dict(zip(("query_ids", "key_ids"), ids))
        named["segments"] = [array.view for array in ids]
    if parts.blocks is not None:
        arrays["blocks"] = Array(np.asarray(parts.blocks, bool))
        named |= {"blocks": arrays["blocks"].view, "block_q": parts.block_q, "block_k": parts.block_k}
    if offset is not None:
        arrays["query_offset"] = Array(np.atleast_1d(np.asarray(offset, np.int32)))
        named["query_offset"] = arrays["query_offset"].view
    for name in ("query_lengths", "key_lengths"):
        if getattr(structure, name) is not None:
            arrays[name] = Array(np.asarray(getattr(structure, name), np.int32))
            named[name] = arrays[name].view
    named["soft_cap"] = options.pop("logits_soft_cap", None)
    slopes, table, sinks = (options.pop(name, None) for name in ("alibi_slopes", "relative_bias", "sinks"))
    slopes = slopes if slopes is None else np.atleast_2d(slopes)
    for name, x in (("slopes", slopes), ("relative_bias", table), ("sinks", sinks)):
        if x is not None:
            arrays[name] = Array(np.asarray(x, np.float32))
            named[name] = arrays[name].view
    if options.get("bias") is not None:
        bias = np.asarray(options.pop("bias"))
        arrays["bias"] = Array(bias if bias.dtype == np.float32 else bias.astype(query.dtype))
        named["bias"] = arrays["bias"].view
    seed = options.pop("dropout_seed", None)
    if seed is not None:
        words = (seed, 0) if np.ndim(seed) == 0 else seed
        arrays["words"] = Array(np.array([int(word) & (1 << 64) - 1 for word in words], np.uint64))
        named["dropout_words"] = arrays["words"].view
    return {**named, **options}, arrays


def launch(call, stream: int = 0) -> Array | None:
    """Launches with a workspace of just what is asked for; returns it, to be kept until the kernels are done."""
    reason = call.unsupported_reason()
    assert reason is None, reason
    size = call.workspace_bytes()
    workspace = Array.unwritten((size,), np.uint8) if size else None
    call(workspace and workspace.view, stream)
    return workspace

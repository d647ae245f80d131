"""The fused kernels as XLA custom calls, and why they cannot run.

The handlers are compiled into `attn_ops._core` (csrc/bindings/xla.cc).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from attn_ops import kernels
from attn_ops.call import attention_call
from attn_ops.call.attention_call import canonical
from attn_ops.jax import place
from attn_ops.jax.call import Arrays, Options, accumulator

_PLATFORMS_OF_SHARES = ("cpu",)  # with dropout: the kernels for CUDA know of no larger call
_PLATFORMS = {"Host": "cpu", "CUDA": "CUDA"}  # of XLA, and what JAX calls them where it takes custom calls


@functools.cache
def unavailable_reason() -> str | None:
    """Why there are no kernels in this process, for any platform; None when there are. Registers them."""
    reason = kernels.disabled_reason() or kernels.core_unavailable_reason() or kernels.unknown_isa_reason()
    if reason is not None:
        return reason
    for platform, handlers in kernels.core().xla_handlers().items():
        for target, handler in handlers.items():
            jax.ffi.register_ffi_target(target, handler, platform=_PLATFORMS[platform])
    return None


def platforms(options: Options, arrays: Arrays) -> tuple[str, ...]:
    """Where the kernels take this call, by the names of `jax.lax.platform_dependent`."""
    return _PLATFORMS_OF_SHARES if arrays.origin is not None or cuda_reason(options, arrays) else ("cpu", "cuda")


def cuda_reason(options: Options, arrays: Arrays) -> str | None:
    """Why the kernels do not run this call on the CUDA devices here; None when they do."""
    reason = _cuda_device_reason()
    if reason is None:
        reason = attention_call.beyond_cuda(arrays)
    if reason is not None:
        return reason
    # jax.export may leave extents open.
    known = (n if isinstance(n, int) else 1 for n in attention_call.cuda_sizes(options, arrays))
    return kernels.cuda_unsupported_reason(arrays.query.dtype.name, *known)


@functools.cache
def _cuda_device_reason() -> str | None:
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return "JAX has no CUDA device here"
    reasons = (kernels.cuda_unavailable_reason(device.local_hardware_id) for device in devices)
    return next((reason for reason in reasons if reason is not None), None)


def forward(options: Options, arrays: Arrays):
    """(out, lse, statistics); lse is None unless ``options.return_lse``."""
    query, key, value = arrays[:3]
    rows = canonical(query.shape, options.layout)[:3]
    results = (
        place.result((*query.shape[:3], value.shape[3]), query.dtype, query),
        place.result((*rows, 2), accumulator(query.dtype), query),
        *([place.result(rows, accumulator(query.dtype), query)] if options.return_lse else []),
    )
    optional, attributes = _optional(options, _with_table(options, arrays))
    attributes["num_lse"] = np.int64(options.return_lse)
    operands = query, key, value, *optional
    out, statistics, *lse = _call("attn_ops.forward", results, operands, attributes, _workspace(options, arrays))
    return out, lse[0] if lse else None, statistics


def backward(options: Options, arrays: Arrays, out, statistics, d_out, d_lse, wanted: tuple[str, ...]):
    """The gradients of the ``wanted`` of ``arrays.differentiable()``, in that order."""
    d_bias = "bias" in wanted  # the others that the call has are computed in any case
    computed = [name for name in arrays.differentiable() if name != "bias" or d_bias]
    results = tuple(place.result(x.shape, x.dtype, x) for x in (getattr(arrays, name) for name in computed))
    optional, attributes = _optional(options, arrays)
    attributes |= {"num_d_lse": np.int64(d_lse is not None), "d_bias": d_bias}
    operands = (*arrays[:3], out, statistics, d_out, *(() if d_lse is None else (d_lse,)), *optional)
    workspace = _workspace(options, arrays, backward=True)
    gradients = _call("attn_ops.backward", results, operands, attributes, workspace)
    return tuple(d for name, d in zip(computed, gradients) if name in wanted)


def _call(target, results, operands, attributes, workspace: int | None):
    """The results of the custom call. On CUDA with one more, ``workspace`` bytes for the kernels: what asks XLA for memory
    while it runs cannot be put into a CUDA graph."""

    def asking(*operands):
        return jax.ffi.ffi_call(target, results, vmap_method="sequential")(*operands, **attributes)

    def lent(*operands):
        scratch = place.result((workspace,), jnp.uint8, operands[0])
        call = jax.ffi.ffi_call(f"{target}.lent", (*results, scratch), vmap_method="sequential")
        return call(*operands, **attributes)[:-1]

    if workspace is None:
        return asking(*operands)
    return jax.lax.platform_dependent(*operands, default=asking, cuda=lent)


def _with_table(options: Options, arrays: Arrays) -> Arrays:
    """On CUDA, where no entry of a table of pages can be looked at, those that are none name another one, as for the
    composite."""
    if arrays.block_table is None or "cuda" not in platforms(options, arrays):
        return arrays
    last = arrays.key.shape[0] - 1
    table = jax.lax.platform_dependent(arrays.block_table, default=lambda x: x, cuda=lambda x: jnp.clip(x, 0, last))
    return arrays._replace(block_table=table)


def _workspace(options: Options, arrays: Arrays, backward: bool = False) -> int | None:
    """How many bytes the kernels need on CUDA; None where they do not run there, or that is not known before they do."""
    sizes = attention_call.cuda_sizes(options, arrays)
    if "cuda" not in platforms(options, arrays) or not all(isinstance(n, int) for n in sizes):
        return None
    table = arrays.relative_bias
    return kernels.cuda_workspace_bytes(
        backward,
        arrays.query.dtype.name,
        *sizes,
        pages=arrays.block_table is not None,
        reach=-1 if table is None else table.shape[1] // 2,
    )


def _optional(options, arrays):
    """The operands after the obligatory ones, and the attributes that both kernels take."""
    if arrays.origin is not None:
        arrays = arrays._replace(seed=jnp.concatenate([arrays.seed, arrays.origin]))
    lists = attention_call.given_inputs(arrays)
    attributes = {**attention_call.attributes(options), **{name: len(operands) for name, operands in lists.items()}}
    attributes = {name: np.int64(x) if type(x) is int else x for name, x in attributes.items()}
    return [operand for operands in lists.values() for operand in operands], attributes

"""Whether a call in TensorFlow would run on a GPU, and why the CUDA kernels cannot take it there."""

from __future__ import annotations

import functools

import tensorflow as tf

from attn_ops import kernels
from attn_ops.call.attention_call import AttentionCall, beyond_cuda, cuda_sizes
from attn_ops.tensorflow import place


def in_use(call: AttentionCall) -> bool:
    """Whether TensorFlow would put the fused op of ``call``, or the operations in its place, on a GPU."""
    if not _ordinals():
        return False
    if "CPU" in place.device():
        return False
    if not tf.executing_eagerly():
        return True
    # An eager op goes to the GPU, wherever its inputs are, as soon as it has a kernel there.
    has_kernel = kernels.cuda_library_exists() and call.query.dtype != tf.float64
    return has_kernel or "CPU" not in call.query.device


def any_visible() -> bool:
    """Whether TensorFlow has a GPU."""
    return bool(_ordinals())


def takes_eager_ops() -> bool:
    """Whether an eager operation that has kernels everywhere runs on a GPU here."""
    return any_visible() and "CPU" not in place.device()


def unsupported_reasons(call: AttentionCall, forced: bool) -> list[str]:
    """Why the fused op cannot run ``call`` on the GPU that it would run on; empty when it can, or when that is a CPU.

    What the kernels think of unknown extents shows when they run: ``forced`` calls take that risk.
    """
    if not in_use(call):
        return []
    reason = _device_reason() or call_reason(call, forced)
    return [f"a GPU is in use, and {reason}; under tf.device('CPU') the fused op runs on the CPU"] if reason else []


def _device_reason():
    """Why one of the visible GPUs has no kernels: which of them a graph will run on is not known when it is made."""
    reasons = map(kernels.cuda_unavailable_reason, _ordinals())
    return next((reason for reason in reasons if reason is not None), None)


@functools.cache
def _ordinals() -> tuple[int, ...]:
    """The GPUs that TensorFlow uses, by their numbers in the driver: fixed as soon as it has been asked for them."""
    if not tf.config.list_logical_devices("GPU"):
        return ()
    return tuple(int(device.name.rpartition(":")[2]) for device in tf.config.get_visible_devices("GPU"))


def call_reason(call: AttentionCall, forced: bool) -> str | None:
    """Why the CUDA kernels, where they are available, do not take ``call``; None when they do."""
    lacking = beyond_cuda(call)
    if lacking is not None:
        return lacking
    sizes = cuda_sizes(call, call)
    if None in sizes[-2:] and not forced:
        return "head_dim and value_dim are not known, of which its kernels take some"
    return kernels.cuda_unsupported_reason(call.query.dtype.name, *(1 if n is None else n for n in sizes))


def with_table(call: AttentionCall) -> AttentionCall:
    """``call`` as a GPU takes it, where no entry of a table of pages can be looked at: those that are none name another
    one, as for the composite."""
    if call.block_table is None or not in_use(call):
        return call
    return call._replace(block_table=tf.clip_by_value(call.block_table, 0, tf.shape(call.key)[0] - 1))


def workspace_bytes(call: AttentionCall, backward: bool) -> int | None:
    """How many bytes the CUDA kernels need for ``call``; None where it does not run on a GPU, or they are not known yet."""
    sizes = cuda_sizes(call, call)
    if not in_use(call) or None in sizes or unsupported_reasons(call, forced=False):
        return None
    pages, table = call.block_table is not None, call.relative_bias
    reach = -1 if table is None else None if table.shape[1] is None else table.shape[1] // 2
    if reach is None:
        return None
    size = kernels.cuda_workspace_bytes(backward, call.query.dtype.name, *sizes, pages=pages, reach=reach)
    return size if size < 2**31 else None  # extents in XLA's programs have 32 bits

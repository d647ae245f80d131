"""Finds and loads the compiled libraries, and says why where one is not to be had.

``libattn_ops.so`` holds the TensorFlow operators and needs TensorFlow loaded first; ``_core`` has the same kernels for
NumPy arrays and needs nothing. Either is loaded at its first use, once per process, and opens ``libattn_ops_cuda.so``
with the kernels for GPUs itself, when there is a GPU to use.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from pathlib import Path
from types import ModuleType

from attn_ops import requirements

_LIBRARY = Path(__file__).parents[1] / "libattn_ops.so"
_OLDEST_TENSORFLOW = (2, 16)


def library() -> ModuleType | None:
    """The module with ``attn_ops_forward`` and ``attn_ops_backward``, or None: see `unavailable_reason`."""
    return _library()[0]


def library_path() -> str:
    """Of what `library` loads: the real one, since a library loaded under two names would register its operators twice."""
    return os.path.realpath(_LIBRARY)


def unavailable_reason() -> str | None:
    """Why `library` is None, and what to do about it; None when it is there."""
    return _library()[1]


def xla_unavailable_reason() -> str | None:
    """Why functions compiled by XLA cannot call the kernels, where `library` is there; None when they can."""
    return _xla_unavailable_reason()


def core() -> ModuleType | None:
    """The module ``attn_ops._core``, or None: see `core_unavailable_reason`."""
    return _core()[0]


def core_unavailable_reason() -> str | None:
    """Why `core` is None; None when it is there."""
    return _core()[1]


def cuda_library_exists() -> bool:
    """Whether the library of the CUDA kernels is there: only then the operators have kernels for GPUs."""
    return core() is not None and core().cuda_library_exists()


@functools.cache
def cuda_unavailable_reason(device: int = 0) -> str | None:
    """Why the CUDA kernels cannot run on the device of this number, as the driver counts; None when they can."""
    return core_unavailable_reason() or core().cuda_unavailable_reason(device) or None


def cuda_unsupported_reason(dtype: str, *sizes: int) -> str | None:
    """Why the CUDA kernels do not take such calls; None when they do. For where they are available.

    The ``sizes`` are batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim and value_dim.
    """
    return core().cuda_unsupported_reason(dtype, *sizes) or None


def cuda_workspace_bytes(backward: bool, dtype: str, *sizes: int, pages: bool = False, reach: int = -1) -> int:
    """The most bytes of workspace that the CUDA kernels need for such calls, of these ``sizes`` (see `cuda_unsupported_reason`),
    with keys in ``pages`` or not; a ``reach`` of 0 or more is that of a relative_bias which has a gradient."""
    return core().cuda_workspace_bytes(backward, dtype, *sizes, pages, reach)


def disabled_reason() -> str | None:
    """That the user switched the kernels off, or None."""
    if os.environ.get("ATTN_OPS_DISABLE", "0") not in ("", "0"):
        return "the environment variable ATTN_OPS_DISABLE switches the fused op off"
    return None


@functools.cache
def unknown_isa_reason() -> str | None:
    """That the user asked the CPU kernels for an instruction set that they do not have here, or None."""
    wanted = os.environ.get("ATTN_OPS_ISA")
    if not wanted or core() is None or wanted in core().isas():
        return None
    usable = ", ".join(core().isas())
    return f"the environment variable ATTN_OPS_ISA ({wanted!r}) must name an instruction set that is usable here: {usable}"


@functools.cache
def _library() -> tuple[ModuleType | None, str | None]:
    disabled = disabled_reason()
    if disabled is not None:
        return None, disabled
    try:
        import tensorflow as tf
    except ImportError as error:
        return None, f"TensorFlow cannot be imported ({error}): pip install tensorflow (or tensorflow-cpu)"
    if tuple(int(part) for part in tf.__version__.split(".")[:2]) < _OLDEST_TENSORFLOW:
        return None, f"TensorFlow {tf.__version__} is older than 2.16, the oldest that the fused op supports"
    path = library_path()
    if not os.path.exists(path):
        return None, f"{_LIBRARY} does not exist: the package was not built; {requirements.REINSTALL}"
    others = _mapped_copies() - {path}
    if others:
        return None, (
            f"another copy of the library is already loaded in this process, from {', '.join(sorted(others))}: "
            f"{path} cannot be loaded beside it; import attn_ops from one place only"
        )
    try:
        return tf.load_op_library(path), None
    except (tf.errors.OpError, OSError) as error:
        return None, f"{path} cannot be loaded with TensorFlow {tf.__version__}: {error}"


@functools.cache
def _xla_unavailable_reason() -> str | None:
    reason = ctypes.CDLL(library_path()).attn_ops_xla_unavailable_reason
    reason.restype = ctypes.c_char_p
    return reason().decode() or None


def _mapped_copies() -> set[str]:
    """The real paths of all files of the library's name that are mapped into this process."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        paths = {line.split(maxsplit=5)[-1].strip() for line in maps if _LIBRARY.name in line}
    return {os.path.realpath(path) for path in paths if os.path.basename(path) == _LIBRARY.name}


@functools.cache
def _core() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("attn_ops._core"), None
    except ImportError as error:
        return None, f"attn_ops._core cannot be imported ({error}); {requirements.REINSTALL}"

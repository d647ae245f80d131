"""Device memory for tests through the driver alone: NumPy arrays there and back.

The driver is libcuda.so.1, or the library that the environment variable ATTN_OPS_CUDA_DRIVER names, which is how the
stand-in that runs kernels on the CPU takes its place (for libattn_ops_cuda.so as well).
"""

from __future__ import annotations

import ctypes
import functools
import os

import numpy as np
from attn_ops.kernels.cuda_types import DeviceArray
from cuda_host.driver import Driver

_MARGIN = 256  # bytes before and after an array on a device; as many as allocations are aligned to
_POISON = 0xFF  # what memory holds before it is written: NaN in every dtype


@functools.cache
def driver() -> Driver:
    """The driver, with the primary context of device 0 current on this thread.

    Raises:
        RuntimeError: there is no driver or no device.
    """
    try:
        return Driver(os.environ.get("ATTN_OPS_CUDA_DRIVER", "libcuda.so.1"))
    except OSError as error:
        raise RuntimeError(f"no CUDA driver: {error}") from None


def missing_reason() -> str | None:
    """Why there is no device; None when there is one."""
    try:
        driver()
    except RuntimeError as error:
        return str(error)
    return None


def synchronize() -> None:
    driver().cuCtxSynchronize()


def unwritten(x: np.ndarray) -> np.ndarray:
    """What there is where an array like `x` still has to be written: NaN."""
    return np.full(x.size * x.dtype.itemsize, _POISON, np.uint8).view(x.dtype).reshape(x.shape)


class Array:
    """A contiguous array in device memory, with margins on both sides that nothing may write to.

    There are none under the stand-in, which traps what reads or writes beside an allocation. `view` describes the
    array, and `part` any part of it that NumPy can name.
    """

    def __init__(self, values: np.ndarray, offset: int = 0):
        """Copies `values` there, `offset` elements off the alignment of an allocation."""
        values = np.asarray(values, order="C")
        self._values = values  # shape, dtype and strides
        margin = 0 if "ATTN_OPS_CUDA_DRIVER" in os.environ else _MARGIN
        self._before = margin + offset * values.itemsize
        content = np.full(max(self._before + values.nbytes + margin, 1), _POISON, np.uint8)
        content[self._before : self._before + values.nbytes] = values.reshape(-1).view(np.uint8)
        self._bytes = content.nbytes
        self._base = ctypes.c_uint64()
        size = ctypes.c_size_t(self._bytes)
        driver().cuMemAlloc_v2(ctypes.byref(self._base), size)
        driver().cuMemcpyHtoD_v2(self._base, ctypes.c_void_p(content.ctypes.data), size)

    @classmethod
    def unwritten(cls, shape, dtype, offset: int = 0) -> Array:
        """An array that still has to be written: NaN where it is not."""
        return cls(unwritten(np.empty(shape, dtype)), offset)

    def __del__(self):
        if getattr(self, "_base", None):
            driver().dll.cuMemFree_v2(self._base)

    @property
    def view(self) -> DeviceArray:
        return self.part(lambda values: values)

    def part(self, select) -> DeviceArray:
        """What `select` makes of an array of this shape: any of NumPy's views."""
        values = self._values
        chosen = select(values)
        item = values.itemsize
        # A view that is empty need not lie inside the array.
        distance = chosen.ctypes.data - values.ctypes.data if chosen.size else 0
        strides = tuple(stride // item for stride in chosen.strides)
        return DeviceArray(self._base.value + self._before + distance, values.dtype.name, chosen.shape, strides)

    def numpy(self) -> np.ndarray:
        """A copy, once all that was launched is done.

        Raises:
            AssertionError: something was written beside the array.
        """
        synchronize()
        content = np.empty(self._bytes, np.uint8)
        driver().cuMemcpyDtoH_v2(ctypes.c_void_p(content.ctypes.data), self._base, ctypes.c_size_t(self._bytes))
        end = self._before + self._values.nbytes
        assert (content[: self._before] == _POISON).all(), f"written before an array of shape {self._values.shape}"
        assert (content[end:] == _POISON).all(), f"written past an array of shape {self._values.shape}"
        return content[self._before : end].view(self._values.dtype).reshape(self._values.shape)


class Strided(Array):
    """An array that lies in device memory by the strides of a NumPy array, which must be multiples of its elements.
    Nothing may write to what is between the elements.
    """

    def __init__(self, values: np.ndarray, offset: int = 0):
        """Copies `values` there, what is first in memory `offset` elements off the alignment of an allocation."""
        steps = zip(values.shape, values.strides) if values.size else ()
        reach = [(n - 1) * stride // values.itemsize for n, stride in steps]
        self._first = -sum(x for x in reach if x < 0)
        self._shape, self._strides = values.shape, values.strides
        memory = unwritten(np.empty(1 + sum(map(abs, reach)), values.dtype))
        self._window(memory)[...] = values
        super().__init__(memory, offset)

    def _window(self, memory):
        return np.lib.stride_tricks.as_strided(memory[self._first :], self._shape, self._strides)

    @property
    def view(self) -> DeviceArray:
        return self.part(self._window)

    def numpy(self) -> np.ndarray:
        """As of `Array`."""
        memory = super().numpy()
        values = self._window(memory).copy()
        self._window(memory)[...] = self._window(unwritten(memory))
        beside = memory.view(np.uint8)
        assert (beside == _POISON).all(), f"written between the elements of an array of shape {self._shape}"
        return values

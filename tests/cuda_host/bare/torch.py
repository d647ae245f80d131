"""As much of PyTorch as benchmarks/gpu needs for attn_ops itself, with tensors in the memory of the stand-in driver,
which ATTN_OPS_CUDA_DRIVER names. Its peers do not run on it.

As in PyTorch, asking for properties makes no context; the first tensor does.
"""

import ctypes
import os
import time
import types

import ml_dtypes
import numpy as np

__version__ = "0 (the tests' own)"
version = types.SimpleNamespace(cuda="0.0")
float32, float16, uint8 = np.dtype("float32"), np.dtype("float16"), np.dtype("uint8")
float64, bfloat16 = np.dtype("float64"), np.dtype(ml_dtypes.bfloat16)

_driver = ctypes.CDLL(os.environ["ATTN_OPS_CUDA_DRIVER"])


def _call(name, *arguments):
    code = getattr(_driver, name)(*arguments)
    if code:
        raise RuntimeError(f"{name}: CUresult {code}")


class _Memory:
    """Of the device, as NumPy sees it: the stand-in's is the processor's."""

    def __init__(self, size):
        cuda.make_context()
        self.pointer = ctypes.c_uint64()
        _call("cuMemAlloc_v2", ctypes.byref(self.pointer), ctypes.c_size_t(max(size, 1)))
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.pointer.value))

    def __del__(self):
        _driver.cuMemFree_v2(self.pointer)


class Tensor:
    def __init__(self, values, device):
        self.device, self.dtype, self.shape = str(device), values.dtype, values.shape
        self.is_cuda = self.device == "cuda"
        self.values = values
        if self.is_cuda:
            self._memory = _Memory(values.nbytes)
            self.values = self._memory.bytes.view(values.dtype).reshape(values.shape)
            self.values[...] = values

    def data_ptr(self):
        return self.values.ctypes.data

    def stride(self):
        return tuple(stride // self.values.itemsize for stride in self.values.strides)

    def to(self, device, dtype):
        return Tensor(self.values.astype(dtype), device)

    def double(self):
        return Tensor(self.values.astype(float64), self.device)

    def cpu(self):
        return Tensor(self.values.copy(), "cpu")

    def detach(self):
        return self

    def numpy(self):
        return self.values

    def copy_(self, other):
        self.values[...] = other.values


class Generator:
    def __init__(self, device):
        self.rng = np.random.default_rng()

    def manual_seed(self, seed):
        self.rng = np.random.default_rng(seed)
        return self


def randn(*shape, generator=None, device="cpu", dtype=float32):
    shape = shape[0] if isinstance(shape[0], tuple) else shape
    rng = generator.rng if generator else np.random.default_rng(0)
    return Tensor(rng.standard_normal(shape, np.float32).astype(dtype), device)


def zeros(*shape, device="cpu", dtype=float32):
    return Tensor(np.zeros(shape, dtype), device)


empty = zeros


def empty_like(tensor):
    return Tensor(np.full_like(tensor.values, np.nan), tensor.device)


def from_numpy(values):
    return Tensor(values, "cpu")


def mm(a, b, out):
    out.values[...] = a.values.astype(float32) @ b.values.astype(float32)


class _Event:
    def __init__(self, enable_timing):
        self.seconds = 0.0

    def record(self):
        self.seconds = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.seconds - self.seconds)


class _Cuda(types.ModuleType):
    Event = _Event

    def make_context(self):
        context = ctypes.c_void_p()
        _call("cuInit", 0)
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        _call("cuCtxSetCurrent", context)

    def is_available(self):
        return True

    def current_device(self):
        return 0

    def get_device_properties(self, device):
        return types.SimpleNamespace(name="Stand-in", multi_processor_count=16, L2_cache_size=1 << 16)

    def current_stream(self):
        return types.SimpleNamespace(cuda_stream=0)

    def synchronize(self):
        pass

    def empty_cache(self):
        pass

    def _sleep(self, cycles):
        pass


cuda = _Cuda("torch.cuda")

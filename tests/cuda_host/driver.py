"""As much of the CUDA driver as tests need, through ctypes: the stand-in's, or a real one's."""

import ctypes
import json

import numpy as np


class DriverError(RuntimeError):
    def __init__(self, function, code, text):
        super().__init__(f"{function}: {code} {text}")
        self.function, self.code = function, code


class Driver:
    """Loads the driver and makes the primary context of `device` current."""

    def __init__(self, path="libcuda.so.1", device=0):
        self.dll = ctypes.CDLL(str(path))
        self.cuInit(0)
        context = ctypes.c_void_p()
        self.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        self.cuCtxSetCurrent(context)

    def __getattr__(self, name):
        """A function of the driver, by its name in the library. Addresses and sizes must be given as ctypes."""
        if not name.startswith("cu"):
            raise AttributeError(name)
        function = getattr(self.dll, name)

        def call(*arguments):
            code = function(*arguments)
            if code:
                raise DriverError(name, code, self.error_text(code))

        return call

    def error_text(self, code):
        text = ctypes.c_char_p()
        self.dll.cuGetErrorString(code, ctypes.byref(text))
        return (text.value or b"").decode()

    def empty(self, shape, dtype=np.uint8):
        return DeviceArray(self, shape, dtype)

    def array(self, values):
        values = np.ascontiguousarray(values)
        array = self.empty(values.shape, values.dtype)
        if values.nbytes:
            self.cuMemcpyHtoD_v2(array.pointer, values.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(values.nbytes))
        return array

    def log(self):
        """The stand-in's: see standin_driver.cc."""
        self.dll.standin_log.restype = ctypes.c_char_p
        return json.loads(self.dll.standin_log())

    def reset(self):
        self.dll.standin_reset()

    def kernel(self, image, name):
        """The stand-in's kernels are its own, whatever the image."""
        library, kernel = ctypes.c_void_p(), ctypes.c_void_p()
        zero = ctypes.c_uint(0)
        self.cuLibraryLoadData(ctypes.byref(library), image, None, None, zero, None, None, zero)
        self.cuLibraryGetKernel(ctypes.byref(kernel), library, name.encode())
        return kernel

    def launch(self, kernel, args, blocks, threads, shared_bytes=0, stream=None):
        """`args` is the kernel's one parameter, a ctypes structure."""
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        self.cuLaunchKernel(kernel, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, parameters, None)


class DeviceArray:
    """Device memory, freed with the object."""

    def __init__(self, driver, shape, dtype):
        self.driver, self.shape, self.dtype = driver, shape, np.dtype(dtype)
        self.nbytes = int(np.prod(shape)) * self.dtype.itemsize
        self.pointer = ctypes.c_void_p()
        driver.cuMemAlloc_v2(ctypes.byref(self.pointer), ctypes.c_size_t(max(self.nbytes, 1)))

    def __del__(self):
        if self.pointer:
            self.driver.dll.cuMemFree_v2(self.pointer)

    def numpy(self):
        values = np.empty(self.shape, self.dtype)
        if values.nbytes:
            to = values.ctypes.data_as(ctypes.c_void_p)
            self.driver.cuMemcpyDtoH_v2(to, self.pointer, ctypes.c_size_t(values.nbytes))
        return values

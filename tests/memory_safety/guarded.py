"""NumPy arrays and workspaces between forbidden pages: the Python side of guard.c.

    environment()     for a child process whose arrays and workspaces may be guarded
    guarded(...)      in such a process: what is allocated inside ends, or begins, at a forbidden page
"""

import contextlib
import ctypes
import os
import subprocess
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_name("guard.c")
_SET_HANDLER = 304  # PyDataMem_SetHandler in NumPy's table of C functions


def environment(directory):
    """`os.environ` with guard.c, compiled into ``directory``, preloaded."""
    library = Path(directory) / "guard.so"
    command = [os.environ.get("CC", "cc"), "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", SOURCE, "-o", library]
    subprocess.run(command, check=True)
    return {**os.environ, "LD_PRELOAD": str(library), "ATTN_OPS_GUARD": str(library)}


def _library():
    return ctypes.CDLL(os.environ["ATTN_OPS_GUARD"])


def _set_handler(capsule):
    """Makes NumPy allocate arrays through ``capsule``; returns the capsule it had."""
    from numpy._core import _multiarray_umath

    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table = ctypes.cast(pointer(_multiarray_umath._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))
    return ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[_SET_HANDLER])(capsule)


def _handler():
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    handler = (ctypes.c_char * 256).in_dll(_library(), "guard_numpy_handler")
    return new(ctypes.addressof(handler), _NAME, None)


_NAME = ctypes.c_char_p(b"mem_handler")  # a capsule does not copy its name


@contextlib.contextmanager
def guarded(before=False, poison=0xFF, shortens=0):
    """Arrays and workspaces made inside are between forbidden pages, the one behind or ``before`` them next to them.

    They are full of ``poison``; a workspace is ``shortens`` bytes too short.
    """
    library = _library()

    def variable(type, name):
        return type.in_dll(library, name)

    variable(ctypes.c_int, "guard_before").value = before
    variable(ctypes.c_ubyte, "guard_poison").value = poison
    variable(ctypes.c_size_t, "guard_shortens").value = shortens
    old = _set_handler(_handler())
    variable(ctypes.c_int, "guard_on").value = 1
    try:
        yield
    finally:
        variable(ctypes.c_int, "guard_on").value = 0
        _set_handler(old)


def workspaces():
    """How many workspaces were guarded so far."""
    return ctypes.c_size_t.in_dll(_library(), "guard_workspaces").value


def copy(array):
    """``array`` in memory that ends with it: its own strides, whatever they are, and nothing around it."""
    array = np.asarray(array)
    order = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
    result = np.empty([array.shape[axis] for axis in order], array.dtype).transpose(np.argsort(order))
    result[...] = array
    return result


def scattered(array, rng, rows=None, whole=False):
    """``array`` as a view of memory that has not a byte more than it needs: axes in any order, either way, with gaps.

    With ``rows``, axis 1 is outermost, and unless it is to be there ``whole`` the memory ends after so many of its
    elements.
    """
    order = list(rng.permutation(array.ndim))
    if rows is not None:
        order = [1, *(axis for axis in order if axis != 1)]
    strides, step = [0] * array.ndim, 1
    for axis in reversed(order):
        strides[axis] = step
        step = step * max(array.shape[axis], 1) + int(rng.integers(0, 3)) * (rng.random() < 0.3)
    there = array if rows is None or whole else array[:, :rows]
    span = 1 + sum((n - 1) * stride for n, stride in zip(there.shape, strides)) if there.size else 1
    memory = np.empty(span, array.dtype)
    strides = [stride * array.itemsize for stride in strides]
    flips = tuple(slice(None, None, 1 if rows is not None else int(rng.choice([1, -1]))) for _ in strides)
    np.lib.stride_tricks.as_strided(memory, there.shape, strides)[flips] = there
    return np.lib.stride_tricks.as_strided(memory, array.shape, strides)[flips]

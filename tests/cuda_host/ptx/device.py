"""The stand-in driver's launches, run by the interpreter."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from . import compiled
from .machine import Machine, blocks_of
from .program import Program, PtxError
from .registers import SHARED
from .tensor_core import MODELS

_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, *(ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_size_t)
)


# Machines are kept, and those of one kernel are one: host threads that launch it at the same time take turns.
_turn = threading.Lock()


@lru_cache(maxsize=12)
def _machine(program: Program, blocks: int, shared_bytes: int) -> Machine:
    """Kept: to bind instructions takes longer than to execute them once."""
    return Machine(program, blocks, shared_bytes, SHARED)


@dataclass(frozen=True)
class Launch:
    kernel: str
    blocks: int
    shared_bytes: int
    executed: int  # instructions, each for many lanes


class Interpreter:
    """Runs what is launched while it is entered: `with Interpreter(driver) as interpreter: ...`.

    `program` gives the kernels by name, `model` is one of tensor_core.MODELS, `observers` watch shared memory and
    `ranks` are of the warps (machine.py). Where `observed` names a kernel, no other is watched.
    """

    def __init__(
        self,
        driver,
        program=compiled.program,
        model: str = "exact",
        observers=(),
        ranks=None,
        observed: str | None = None,
    ):
        self.driver, self.program, self.model, self.observers = driver, program, MODELS[model], tuple(observers)
        self.ranks, self.observed = ranks, observed
        self.launches: list[Launch] = []
        self._callback = _Callback(self._launch)

    def __enter__(self):
        self.driver.dll.standin_interpret(self._callback)
        self.driver.interpreter = self  # which the driver calls: it must live
        return self

    def __exit__(self, *_):
        self.driver.dll.standin_interpret(None)
        self.driver.interpreter = None

    def _launch(self, name, args, blocks, shared_bytes, error, error_bytes):
        try:
            with _turn:
                self._run(self.program(name.decode()), args, blocks, shared_bytes)
            return 0
        except Exception as problem:  # none may pass through the driver
            text = f"{problem}" if isinstance(problem, PtxError) else f"{type(problem).__name__}: {problem}"
            text = text.encode()[: error_bytes - 1] + b"\0"
            ctypes.memmove(error, text, len(text))
            return 1

    def _run(self, program: Program, args, blocks, shared_bytes):
        side_by_side = blocks_of(program, blocks)
        machine = _machine(program, side_by_side, shared_bytes)
        parameters = ctypes.string_at(args, program.parameter_bytes)
        executed, allocations = 0, self._allocations()
        observers = self.observers if self.observed in (None, program.name) else ()
        for first in range(0, blocks, side_by_side):
            count = min(side_by_side, blocks - first)
            machine.run(first, count, parameters, allocations, self.model, observers, self.ranks)
            executed += machine.executed
        self.launches.append(Launch(program.name, blocks, shared_bytes, executed))

    def _allocations(self):
        count = self.driver.dll.standin_allocations
        count.restype = ctypes.c_size_t
        size = count(None, None, ctypes.c_size_t(0))
        arrays = np.zeros((2, max(size, 1)), np.uint64)
        count(*(ctypes.c_void_p(array.ctypes.data) for array in arrays), ctypes.c_size_t(size))
        return [(int(begin), int(bytes_)) for begin, bytes_ in arrays.T[:size]]

"""The registers of all lanes, and operands as arrays over them."""

from __future__ import annotations

import re

import numpy as np

from .program import Program, PtxError, split_operands

TYPES = {
    **{"pred": np.bool_, "u8": np.uint8, "s8": np.int8, "b8": np.uint8},
    **{"u16": np.uint16, "s16": np.int16, "b16": np.uint16},
    **{"u32": np.uint32, "s32": np.int32, "b32": np.uint32, "f32": np.float32, "u64": np.uint64, "s64": np.int64},
    "b64": np.uint64,
}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
PARAMETERS = 0x10000  # the address of the parameters, in a space of their own
# Of dynamic shared memory, in a space of its own: cards keep the first 1024 bytes from 9.0 on, and kernels count on no
# more than the 128 that they ask to be aligned to.
SHARED = 1024 + 128
_POISON = 0xDEADBEEFDEADBEEF  # what registers hold that nothing was written to


class Registers:
    """One array of bits over the lanes for each register, made when it is first named."""

    def __init__(self, program: Program, lanes: int, threads: int):
        self.program = program
        self.lanes = lanes
        self.arrays: dict[str, np.ndarray] = {}
        self.thread = (np.arange(lanes) % threads).astype(np.uint32)
        self.block = np.zeros(lanes, np.uint32)

    def bits(self, name: str) -> np.ndarray:
        array = self.arrays.get(name)
        if array is None:
            kind = self.program.registers.get(name, self.program.registers.get(name.rstrip("0123456789")))
            if kind is None:
                raise PtxError(f"{self.program.name}: {name} is not declared")
            poison = False if kind is np.bool_ else _POISON & (1 << 8 * np.dtype(kind).itemsize) - 1
            array = self.arrays[name] = np.full(self.lanes, poison, kind)
        return array

    def target(self, operand: str, kind: str) -> np.ndarray:
        """The register as an array of `kind`, to be written to."""
        bits, dtype = self.bits(operand), np.dtype(TYPES[kind])
        if bits.dtype.itemsize != dtype.itemsize:
            raise PtxError(f"{self.program.name}: {operand} does not have the size of {kind}")
        return bits.view(dtype)

    def source(self, operand: str, kind: str):
        """An array over the lanes, or a number, of `kind`. Of a register that is wider, a part of it: its low bits."""
        dtype = np.dtype(TYPES[kind])
        if operand == "%tid.x":
            return self.thread.view(dtype)
        if operand == "%ctaid.x":
            return self.block.view(dtype)
        if operand.startswith("%"):
            bits = self.bits(operand)
            if bits.dtype.itemsize < dtype.itemsize:
                raise PtxError(f"{self.program.name}: {operand} is too small for {kind}")
            if bits.dtype == np.bool_:
                return bits
            return bits.view(dtype)[:: bits.dtype.itemsize // dtype.itemsize]
        return number(operand, dtype)

    def sources(self, operands, kind: str) -> list:
        return [self.source(operand, kind) for operand in operands]

    def vector(self, operand: str) -> list[str]:
        return split_operands(operand[1:-1]) if operand.startswith("{") else [operand]

    def address(self, operand: str):
        """Of `[base+offset]`: a function to int64 over the lanes, or a number where all lanes have the same."""
        base, offset = re.match(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+))?\s*\]$", operand).groups()
        offset = int(offset or 0)
        if not base.startswith("%"):
            return symbol(base) + offset
        bits = self.bits(base)
        if bits.dtype.itemsize == 8:
            signed = bits.view(np.int64)
            return lambda: signed + offset
        step = np.uint32(offset & 0xFFFFFFFF)
        return lambda: (bits + step).astype(np.int64)


def symbol(name: str) -> int:
    if name.endswith("memoryE"):
        return SHARED
    if re.search(r"_param_0$", name):
        return PARAMETERS
    raise PtxError(f"what is {name}?")


def number(text: str, dtype: np.dtype):
    """A literal, or the address of a symbol."""
    if dtype == np.bool_:
        return np.bool_(int(text) != 0)
    if text.startswith("0f"):
        value = int(text[2:], 16)
    elif re.match(r"-?\d", text):
        value = int(text, 0)
    else:
        value = symbol(text)
    bits = UNSIGNED[dtype.itemsize](value & (1 << 8 * dtype.itemsize) - 1)
    return bits.view(dtype)

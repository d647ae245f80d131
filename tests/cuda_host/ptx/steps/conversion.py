"""`cvt`, `cvta` and `mov`: numbers of one type as another, registers as parts of one another."""

import numpy as np

from .. import numbers
from ..registers import SIGNED, TYPES, UNSIGNED
from . import instruction


@instruction("cvt")
def cvt(i, machine):
    registers = machine.registers
    if "f16x2" in i.opcode or "bf16x2" in i.opcode:
        one = numbers.to_f16 if "f16x2" in i.opcode else numbers.to_bf16
        target, (high, low) = registers.target(i.operands[0], "b32"), registers.sources(i.operands[1:], "f32")

        def pack(mask):
            packed = one(np.asarray(high)).astype(np.uint32) << np.uint32(16) | one(np.asarray(low))
            np.copyto(target, packed, where=mask)

        return pack
    to, source = i.opcode[-2:]
    if to == "tf32":
        target, x = registers.target(i.operands[0], "b32"), registers.source(i.operands[1], "f32")
        return lambda mask: np.copyto(target, numbers.to_tf32(x), where=mask)
    target = registers.target(i.operands[0], to)
    if source == "f16":
        x = registers.source(i.operands[1], "b16")
        return lambda mask: np.copyto(target, x.view(np.float16), where=mask)
    if source == "f32" or (to == "f32" and "rn" not in i.opcode):
        raise ValueError("a rounding")
    x = registers.source(i.operands[1], source)
    return lambda mask: np.copyto(target, x, where=mask, casting="unsafe")


@instruction("cvta")
def cvta(i, machine):
    """Addresses of global memory and of parameters are generic ones."""
    registers = machine.registers
    target, x = registers.bits(i.operands[0]), registers.source(i.operands[1], "u64")
    return lambda mask: np.copyto(target, x, where=mask)


@instruction("mov")
def mov(i, machine):
    registers = machine.registers
    left, right = i.operands
    if left.startswith("{"):
        return _unpack(registers, registers.vector(left), registers.source(right, i.type))
    target = registers.target(left, i.type)
    if right.startswith("{"):
        return _pack(registers, target, registers.vector(right))
    x = registers.source(right, i.type)
    return lambda mask: np.copyto(target, x, where=mask)


def _unpack(registers, names, x):
    targets = [registers.bits(name) for name in names]
    size = targets[0].dtype.itemsize

    def step(mask):
        parts = np.ascontiguousarray(x).view(UNSIGNED[size]).reshape(-1, len(targets)).copy()
        for target, part in zip(targets, parts.T, strict=True):
            np.copyto(target, part, where=mask)

    return step


def _pack(registers, target, names):
    part = UNSIGNED[target.dtype.itemsize // len(names)]
    sources = [registers.source(name, f"b{8 * np.dtype(part).itemsize}") for name in names]

    def step(mask):
        packed = np.stack(np.broadcast_arrays(*sources), axis=-1).astype(part).view(target.dtype)[..., 0]
        np.copyto(target, packed, where=mask)

    return step


def extended(values, kind: str, size: int):
    """Bits of a number of `kind` as those of a register of `size` bytes."""
    if values.itemsize == size:
        return values
    wide = SIGNED if kind[0] == "s" else UNSIGNED
    return values.view(TYPES[kind]).astype(wide[size]).view(UNSIGNED[size])

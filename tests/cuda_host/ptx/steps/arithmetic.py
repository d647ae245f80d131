"""Sums, products, logic and comparisons."""

import numpy as np

from .. import numbers
from ..registers import SIGNED, TYPES, UNSIGNED
from . import instruction

_PLAIN = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "neg": np.negative, "abs": np.abs}
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
_FLOAT = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _to(target, function, *sources):
    """A step of a ufunc."""
    return lambda mask: function(*sources, out=target, where=mask)


def _copy(target, function, *sources):
    """A step of any function."""
    return lambda mask: np.copyto(target, function(*sources), where=mask)


def _float_step(i, machine, function):
    """Of a float32, whose NaN are all the same. `function(*sources, out, where)`."""
    registers = machine.registers
    target, bits = registers.target(i.operands[0], "f32"), registers.bits(i.operands[0])
    sources = registers.sources(i.operands[1:], "f32")

    def step(mask):
        function(*sources, out=target, where=mask)
        numbers.make_nan_canonical(bits, target, mask)

    return step


def _copied(function):
    """A function of arrays with the parameters of a ufunc."""
    return lambda *sources, out, where: np.copyto(out, function(*sources), where=where)


@instruction("add", "sub", "div", "min", "max", "neg", "abs", "and", "or", "xor", "not")
def plain(i, machine):
    registers = machine.registers
    if i.type == "f32" and i.name in _FLOAT:
        return _float_step(i, machine, _FLOAT[i.name])
    if i.type == "f32" and i.name in ("min", "max"):
        if "NaN" in i.opcode:
            return _float_step(i, machine, _PLAIN[i.name])
        return _float_step(i, machine, _copied(numbers.smaller if i.name == "min" else numbers.larger))
    target, sources = registers.target(i.operands[0], i.type), registers.sources(i.operands[1:], i.type)
    if i.name == "div":
        return _copy(target, lambda x, y: (x - np.fmod(x, y)) // y, *sources)  # towards zero
    return _to(target, {**_PLAIN, **_LOGIC}[i.name], *sources)


@instruction("rem")
def rem(i, machine):
    registers = machine.registers
    return _to(registers.target(i.operands[0], i.type), np.fmod, *registers.sources(i.operands[1:], i.type))


@instruction("mul")
def mul(i, machine):
    registers = machine.registers
    if i.type == "f32":
        return _float_step(i, machine, np.multiply)
    sources = registers.sources(i.operands[1:], i.type)
    size = np.dtype(TYPES[i.type]).itemsize
    twice = (UNSIGNED if i.type[0] in "ub" else SIGNED)[2 * size] if size < 8 else None
    if i.opcode[1] == "lo":
        return _to(registers.target(i.operands[0], i.type), np.multiply, *sources)
    if i.opcode[1] == "wide":
        wide = registers.bits(i.operands[0]).view(twice)
        return lambda mask: np.multiply(*sources, out=wide, where=mask, dtype=twice)
    target = registers.target(i.operands[0], i.type)

    def high_half(x, y):
        return (np.multiply(x, y, dtype=twice) >> twice(8 * size)).astype(target.dtype)

    return _copy(target, high_half, *sources)


@instruction("mad")
def mad(i, machine):
    registers = machine.registers
    target, (x, y, z) = registers.target(i.operands[0], i.type), registers.sources(i.operands[1:], i.type)
    return lambda mask: np.copyto(target, x * y + z, where=mask)


def _fused(x, y, z, out, where):
    """In double precision: of a sum that lies half way between two float32 but for what double cuts off, the other
    one.
    """
    total = np.multiply(x, y, dtype=np.float64)
    np.copyto(out, np.add(total, z), where=where, casting="same_kind")


@instruction("fma")
def fma(i, machine):
    return _float_step(i, machine, _fused)


@instruction("rcp")
def rcp(i, machine):
    """Exact also where the hardware's is approximate."""
    if "approx" in i.opcode:
        return _float_step(i, machine, _copied(lambda x: numbers.flush(np.float32(1) / numbers.flush(x))))
    return _float_step(i, machine, lambda x, out, where: np.divide(np.float32(1), x, out=out, where=where))


@instruction("ex2", "lg2")
def exponential(i, machine):
    return _float_step(i, machine, _copied(numbers.exp2 if i.name == "ex2" else numbers.log2))


@instruction("copysign")
def copysign(i, machine):
    """The sign of the first, the value of the second."""
    registers = machine.registers
    target, (sign, value) = registers.target(i.operands[0], "f32"), registers.sources(i.operands[1:], "f32")
    return _to(target, np.copysign, value, sign)


@instruction("shl", "shr")
def shift(i, machine):
    """By more than the bits there are, all of them."""
    registers = machine.registers
    target = registers.target(i.operands[0], i.type)
    value, count = registers.source(i.operands[1], i.type), registers.source(i.operands[2], "u32")
    bits = 8 * target.dtype.itemsize
    function = np.left_shift if i.name == "shl" else np.right_shift
    if np.ndim(count) == 0 and count < bits:
        return _to(target, function, value, target.dtype.type(count))

    def shifted(mask):
        result = function(value, np.minimum(count, np.uint32(bits - 1)).astype(target.dtype))
        if target.dtype.kind == "u" or i.name == "shl":
            result = np.where(count >= bits, target.dtype.type(0), result)
        np.copyto(target, result, where=mask)

    return shifted


@instruction("setp")
def setp(i, machine):
    registers = machine.registers
    comparison = i.opcode[1]
    target = registers.bits(i.operands[0])
    x, y = registers.sources(i.operands[1:], i.type)
    if comparison in _COMPARE and not (comparison == "ne" and i.type == "f32"):
        return _to(target, _COMPARE[comparison], x, y)
    unordered = lambda: np.isnan(x) | np.isnan(y)  # noqa: E731
    if comparison == "nan":
        return lambda mask: np.copyto(target, unordered(), where=mask)
    if comparison == "ne":  # of two numbers
        return lambda mask: np.copyto(target, np.not_equal(x, y) & ~unordered(), where=mask)
    function = _COMPARE[comparison[:-1]]  # equ, neu, ltu, leu, ...: true of NaN
    return lambda mask: np.copyto(target, function(x, y) | unordered(), where=mask)


@instruction("selp")
def selp(i, machine):
    registers = machine.registers
    target, (x, y) = registers.target(i.operands[0], i.type), registers.sources(i.operands[1:3], i.type)
    condition = registers.source(i.operands[3], "pred")
    return lambda mask: np.copyto(target, np.where(condition, x, y), where=mask)


@instruction("bfi")
def bfi(i, machine):
    """`length` bits of the first into the second, from `position` on."""
    registers = machine.registers
    target = registers.target(i.operands[0], "b32")
    field, into = registers.sources(i.operands[1:3], "b32")
    position, length = (np.uint32(int(text)) for text in i.operands[3:])
    bits = np.uint32(((1 << int(length)) - 1) << int(position) & 0xFFFFFFFF)
    return lambda mask: np.copyto(target, into & ~bits | field << position & bits, where=mask)

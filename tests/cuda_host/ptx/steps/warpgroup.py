"""What Hopper has for warpgroups: products (`wgmma`), barriers in shared memory (`mbarrier`), `setmaxnreg`."""

import re

import numpy as np

from .. import tensor_core
from ..products import Product, SharedOperand
from . import instruction
from .movement import addresses_of


def _of_lanes(source, lanes):
    return source[lanes] if np.ndim(source) else np.full(len(lanes), source)


@instruction("wgmma")
def wgmma(i, machine):
    products, what = machine.products, i.opcode[1]
    if what == "fence":
        return lambda mask: products.fence(machine.lanes(mask))
    if what == "commit_group":
        return lambda mask: products.commit(machine.lanes(mask))
    if what == "wait_group":
        pending = int(i.operands[0])
        return lambda mask: products.wait(machine.lanes(mask), pending)
    return _mma_async(i, machine)


def _mma_async(i, machine):
    registers, products = machine.registers, machine.products
    columns = int(re.fullmatch(r"m64n(\d+)k16", i.opcode[4])[1])
    kinds = i.opcode[5:]
    if kinds not in (("f32", "f16", "f16"), ("f32", "bf16", "bf16")):
        raise ValueError("types")
    accumulators, left, right, adds, *literals = i.operands
    names = tuple(registers.vector(accumulators))
    in_registers = left.startswith("{")
    # Factors of both operands, then whether they are transposed: that in registers never is.
    if len(names) != columns // 2 or literals[:2] != ["1", "1"] or len(literals) != (3 if in_registers else 4):
        raise ValueError("a form")
    left_transposed, right_transposed = ([0] + [int(text) for text in literals[2:]])[-2:]
    left = registers.sources(registers.vector(left), "b32") if in_registers else registers.source(left, "b64")
    right, adds = registers.source(right, "b64"), registers.source(adds, "pred")
    widen = tensor_core.WIDEN[kinds[1]]

    def step(mask):
        lanes = machine.lanes(mask).reshape(-1, 32)
        first = lanes[:, 0]
        own = left if in_registers else SharedOperand(64, bool(left_transposed), left[first])
        other = SharedOperand(columns, bool(right_transposed), right[first])
        products.issue(Product(i, lanes, None, names, own, other, _of_lanes(adds, first), widen))

    return step


@instruction("mbarrier")
def mbarrier(i, machine):
    """`arrive` and `init` for each lane; `try_wait` gives the lanes (machine.py) whose phase is over."""
    registers, barriers = machine.registers, machine.shared_barriers
    if "shared::cta" not in i.opcode:
        raise ValueError("a space")
    what, operands = i.opcode[1], [operand for operand in i.operands if operand != "_"]
    if what == "try_wait":
        target, operands = registers.bits(operands[0]), operands[1:]
    address = registers.address(operands[0])
    number = registers.source(operands[1], "u32") if len(operands) > 1 else np.uint32(0)

    def init(mask):
        lanes = machine.lanes(mask)
        barriers.init(i, lanes, addresses_of(address, lanes), _of_lanes(number, lanes))

    def arrive(mask):
        lanes = machine.lanes(mask)
        barriers.arrive(i, lanes, addresses_of(address, lanes), _of_lanes(number, lanes))

    def try_wait(lanes):
        over = barriers.is_over(i, lanes, addresses_of(address, lanes), _of_lanes(number, lanes))
        target[lanes] = over
        return over

    known = {
        ("init",): init,
        ("arrive",): arrive,
        ("arrive", "expect_tx"): arrive,
        ("try_wait", "parity"): try_wait,
    }
    return known[tuple(part for part in i.opcode[1:] if part not in ("shared::cta", "b64"))]


@instruction("setmaxnreg")
def setmaxnreg(i, machine):
    """Lanes have as many registers as they like here."""
    if not 24 <= int(i.operands[0]) <= 256 or int(i.operands[0]) % 8:
        raise ValueError("a number of registers")
    return lambda mask: None

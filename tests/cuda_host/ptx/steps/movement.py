"""Loads, stores, asynchronous copies, and the one atomic instruction."""

import numpy as np

from ..copy_engine import MAP_BYTES, Box, TensorMap
from ..registers import TYPES
from . import instruction
from .conversion import extended


def _space(i, machine):
    space = next(part for part in i.opcode if part in ("global", "shared", "param"))
    return {"global": machine.memory, "shared": machine.shared, "param": machine.parameters}[space]


def addresses_of(address, lanes):
    return address()[lanes] if callable(address) else np.full(len(lanes), address, np.int64)


@instruction("ld")
def ld(i, machine):
    registers, memory = machine.registers, _space(i, machine)
    names = registers.vector(i.operands[0])
    targets = [registers.bits(name) for name in names]
    address = registers.address(i.operands[1])
    element = np.dtype(TYPES[i.type]).itemsize
    size = element * len(names)
    event = {machine.shared: "read", machine.memory: "global_read"}.get(memory)

    def step(mask):
        lanes = machine.lanes(mask)
        addresses = addresses_of(address, lanes)
        values = memory.load(addresses, size, lanes)
        if event is not None:
            machine.observe(event, i, lanes, addresses, size)
        values = values.reshape(len(lanes), -1).view(f"u{element}")
        for target, column in zip(targets, values.T, strict=True):
            target[lanes] = extended(np.ascontiguousarray(column), i.type, target.dtype.itemsize)

    return step


@instruction("st")
def st(i, machine):
    registers, memory = machine.registers, _space(i, machine)
    address = registers.address(i.operands[0])
    element = np.dtype(TYPES[i.type]).itemsize
    sources = [registers.source(name, f"b{8 * element}") for name in registers.vector(i.operands[1])]
    size = element * len(sources)

    def step(mask):
        lanes = machine.lanes(mask)
        values = np.empty((len(lanes), len(sources)), f"u{element}")
        for column, source in enumerate(sources):
            values[:, column] = source[lanes] if np.ndim(source) else source
        addresses = addresses_of(address, lanes)
        if memory is machine.shared:
            machine.observe("write", i, lanes, addresses, size, values.view(np.uint8))
        else:
            machine.observe("global_write", i, lanes, addresses, size)
        memory.store(addresses, size, values.view(np.uint32) if size >= 4 else values.view(f"u{size}")[:, 0], lanes)

    return step


@instruction("cp")
def cp(i, machine):
    registers = machine.registers
    if "bulk" in i.opcode:
        return _copy_box(i, machine)
    if "commit_group" in i.opcode:
        return lambda mask: machine.copies.commit(machine.lanes(mask))
    if "wait_group" in i.opcode:
        pending = int(i.operands[0])
        return lambda mask: machine.copies.wait(i, machine.lanes(mask), pending)
    target, source = registers.address(i.operands[0]), registers.address(i.operands[1])
    size, given = int(i.operands[2]), registers.source(i.operands[3], "u32")
    if size not in (4, 8, 16) or ("cg" in i.opcode and size != 16):
        raise ValueError("a size")

    def step(mask):
        lanes = machine.lanes(mask)
        count = given[lanes] if np.ndim(given) else np.full(len(lanes), given)
        if not np.isin(count, (0, size)).all():
            raise ValueError("copies of a part")
        machine.copies.issue(i, lanes, addresses_of(target, lanes), addresses_of(source, lanes), size, count != 0)

    return step


def _copy_box(i, machine):
    """One copy for each lane, of which there is rarely more than one."""
    expected = "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
    if i.opcode != tuple(expected.split(".")):
        raise ValueError("a copy")
    registers, memory = machine.registers, machine.parameters
    names = registers.vector(i.operands[1].replace("[", "{", 1).removesuffix("]") + "}")
    described, at = registers.address(f"[{names[0]}]"), registers.sources(registers.vector(names[1]), "s32")
    target, barrier = registers.address(i.operands[0]), registers.address(i.operands[2])

    def step(mask):
        lanes = machine.lanes(mask)
        maps, targets, barriers = (addresses_of(address, lanes) for address in (described, target, barrier))
        for lane, where, to, told in zip(lanes, maps, targets, barriers):
            chunks = where + np.arange(0, MAP_BYTES, 16)
            content = memory.load(chunks, 16, np.full(len(chunks), lane)).tobytes()
            begin = tuple(int(x[lane]) if np.ndim(x) else int(x) for x in at)
            box = Box(i, TensorMap.read(content), begin, int(lane), int(to))
            machine.shared_barriers.bring(box, int(told))

    return step


@instruction("prefetch")
def prefetch(i, machine):
    return lambda mask: None


@instruction("atom")
def atom(i, machine):
    """Compare and swap of 8 bytes, lane after lane."""
    if i.opcode != ("atom", "global", "cas", "b64"):
        raise ValueError("an operation")
    registers, memory = machine.registers, machine.memory
    target, address = registers.bits(i.operands[0]), registers.address(i.operands[1])
    expected, desired = registers.sources(i.operands[2:], "b64")

    def step(mask):
        machine.observe("atom", i, machine.lanes(mask))
        for lane in machine.lanes(mask):
            lanes = np.array([lane])
            where = addresses_of(address, lanes)
            before = memory.load(where, 8, lanes).view(np.uint64)[0, 0]
            of_lane = [x[lane] if np.ndim(x) else x for x in (expected, desired)]
            if before == of_lane[0]:
                memory.store(where, 8, np.array([of_lane[1]], np.uint64).view(np.uint32)[None], lanes)
            target[lane] = before

    return step


@instruction("fence", "membar")
def fence(i, machine):
    """Memory is in order here: of interest to observers."""
    if i.opcode == ("fence", "mbarrier_init", "release", "cluster"):
        return lambda mask: None
    if i.opcode == ("fence", "proxy", "async", "shared::cta"):
        return lambda mask: machine.observe("proxy_fence", i, machine.lanes(mask))
    return lambda mask: machine.observe("fence", i, machine.lanes(mask))

"""What all lanes of a warp do together. Masks are of whole warps (machine.py)."""

import numpy as np

from .. import tensor_core
from ..program import PtxError
from . import instruction


def _by_warp(array, lanes):
    return array[lanes].reshape(-1, 32) if np.ndim(array) else np.full((len(lanes) // 32, 32), array)


@instruction("shfl")
def shfl(i, machine):
    registers = machine.registers
    mode = i.opcode[2]
    target = registers.bits(i.operands[0].split("|")[0])
    value, which, clamp, members = registers.sources(i.operands[1:], "b32")

    def step(mask):
        lanes = machine.lanes(mask)
        if not (_by_warp(members, lanes) == 0xFFFFFFFF).all():
            raise PtxError("a shuffle of some lanes")
        lane, b, c = (
            np.arange(32),
            _by_warp(which, lanes).astype(np.int64) & 31,
            _by_warp(clamp, lanes).astype(np.int64),
        )
        segment = c >> 8 & 31
        last, first = lane & segment | c & 31 & ~segment, lane & segment
        source = lane ^ b if mode == "bfly" else first | b & ~segment & 31
        source = np.where(source <= last, source, lane)
        target[lanes] = np.take_along_axis(_by_warp(value, lanes), source, axis=1).reshape(-1)

    if mode not in ("bfly", "idx"):
        raise ValueError(mode)
    return step


@instruction("vote")
def vote(i, machine):
    registers = machine.registers
    if i.opcode != ("vote", "sync", "any", "pred"):
        raise ValueError("a mode")
    target, value = registers.bits(i.operands[0]), registers.source(i.operands[1], "pred")

    def step(mask):
        lanes = machine.lanes(mask)
        target[lanes] = np.repeat(_by_warp(value, lanes).any(axis=1), 32)

    return step


@instruction("ldmatrix")
def ldmatrix(i, machine):
    registers = machine.registers
    if "x4" not in i.opcode:
        raise ValueError("a number of matrices")
    targets = [registers.bits(name) for name in registers.vector(i.operands[0])]
    address, transposes = registers.address(i.operands[1]), "trans" in i.opcode

    def step(mask):
        lanes = machine.lanes(mask)
        addresses = address()[lanes]
        matrices = machine.shared.load(addresses, 16, lanes).reshape(-1, 4, 8, 4)  # warp, matrix, row, word
        machine.observe("read", i, lanes, addresses, 16)
        if transposes:
            matrices = tensor_core.transpose(matrices)
        for n, target in enumerate(targets):
            target[lanes] = matrices[:, n].reshape(-1)

    return step


@instruction("mma")
def mma(i, machine):
    registers = machine.registers
    shape, kind = i.opcode[3], i.opcode[7]
    if (shape, kind) not in (("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "tf32")):
        raise ValueError("a shape")
    d, a, b, c = (registers.vector(operand) for operand in i.operands)
    targets = [registers.target(name, "f32") for name in d]
    a, b, c = registers.sources(a, "b32"), registers.sources(b, "b32"), registers.sources(c, "f32")

    def step(mask):
        lanes = machine.lanes(mask)
        fragments = ([_by_warp(word, lanes) for word in words] for words in (a, b, c))
        for target, values in zip(targets, tensor_core.mma(machine.model, kind, *fragments), strict=True):
            target[lanes] = values.reshape(-1)

    return step


@instruction("bar.warp")
def bar_warp(i, machine):
    def step(mask):
        machine.observe("warp_barrier", i, machine.lanes(mask))

    return step

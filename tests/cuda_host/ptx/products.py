"""`wgmma`: products of warpgroups, which run on their own and are there when they are waited for, and not before.

Until then their accumulators hold NaN, and operands have not been looked at: shared memory and the registers of a left
operand are read when the product is waited for, which is as late as hardware may. Operands in shared memory are as in
PTX ISA, "Strides" and "Matrix Descriptor Format" of wgmma, written here without a look at hopper/tiles.cuh; fragments
are those of mma.m16n8k16, for each warp of a warpgroup 16 of 64 rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from . import numbers, tensor_core
from .copy_engine import swizzled
from .memory import SharedMemory
from .program import PtxError
from .registers import Registers

_DEPTH = 16
_SWIZZLE_128 = 1
_POISON = np.uint32(0xFFFFFFFF)


@dataclass(frozen=True, eq=False)
class SharedOperand:
    """`rows` of 16 summed indices, which lie along 128 bytes or, transposed, across them. A descriptor for each warp."""

    rows: int
    transposed: bool
    descriptors: np.ndarray

    def select(self, chosen):
        return replace(self, descriptors=self.descriptors[chosen])

    def chunks(self):
        """[warps, .., ..] addresses of 16 bytes each, in the order of `matrices`."""
        d = self.descriptors.astype(np.int64)
        if not (self.descriptors >> np.uint64(62) == _SWIZZLE_128).all() or (d >> 49 & 7).any():
            raise PtxError("a descriptor that is not of panels with 128-byte swizzle")
        begin, lead, stride = (((d >> shift & 0x3FFF) << 4)[:, None, None] for shift in (0, 16, 32))
        if self.transposed:
            k, row = np.meshgrid(np.arange(_DEPTH), np.arange(0, self.rows, 8), indexing="ij")
            return swizzled(begin + row // 64 * lead + row % 64 * 2 + k // 8 * stride + k % 8 * 128)
        row, k = np.meshgrid(np.arange(self.rows), np.arange(0, _DEPTH, 8), indexing="ij")
        return swizzled(begin + row // 8 * stride + row % 8 * 128 + k * 2)

    def matrices(self, words, widen):
        """[warps, 16, rows] numbers."""
        elements = widen(np.ascontiguousarray(words).reshape(*words.shape[:2], -1))
        return elements if self.transposed else elements.swapaxes(1, 2)


@dataclass(frozen=True, eq=False)
class Product:
    """One instruction of many warps: `lanes` [warps, 32]. `left` is a SharedOperand or a list of registers."""

    instruction: object
    lanes: np.ndarray
    group: np.ndarray
    accumulators: tuple[str, ...]
    left: object
    right: SharedOperand
    adds: np.ndarray
    widen: object

    def select(self, chosen):
        left = self.left.select(chosen) if isinstance(self.left, SharedOperand) else self.left
        parts = dict(lanes=self.lanes[chosen], group=self.group[chosen], adds=self.adds[chosen])
        return replace(self, left=left, right=self.right.select(chosen), **parts)

    def reads(self):
        """(lanes, addresses) of what it reads of shared memory, 16 bytes each."""
        chunks = [
            x.chunks().reshape(len(self.lanes), -1) for x in (self.left, self.right) if isinstance(x, SharedOperand)
        ]
        lanes = [np.broadcast_to(self.lanes[:, :1], x.shape).reshape(-1) for x in chunks]
        return np.concatenate(lanes), np.concatenate([x.reshape(-1) for x in chunks])


class Products:
    """`model` (tensor_core.py) is set before each run. `observe` is told of products that begin and end."""

    def __init__(self, registers: Registers, shared: SharedMemory, observe):
        self.registers, self.shared, self.observe = registers, shared, observe
        self.clear(None)

    def clear(self, model):
        warps = self.registers.lanes // 32
        self.model = model
        self.group = np.zeros(warps, np.int64)  # that the next products of a warp are of
        self.fenced = np.zeros(warps, bool)  # since it waited
        self.pending: list[Product] = []
        self.values: dict[tuple[str, ...], np.ndarray] = {}  # of accumulators under way: [lanes, registers]
        self.under_way: dict[tuple[str, ...], np.ndarray] = {}  # how many products of a warp, by the same

    def fence(self, lanes):
        self.fenced[lanes[::32] // 32] = True

    def commit(self, lanes):
        self.group[lanes[::32] // 32] += 1

    def issue(self, product: Product):
        warps = product.lanes[:, 0] // 32
        if not self.fenced[warps].all():
            raise PtxError("no wgmma.fence since products were last waited for, whose registers may have been used")
        names = product.accumulators
        self._refuse_parts_of_others(names, warps)
        values = self.values.setdefault(names, np.empty((self.registers.lanes, len(names)), np.float32))
        under_way = self.under_way.setdefault(names, np.zeros(len(self.group), np.int64))
        fresh = product.lanes[under_way[warps] == 0].reshape(-1)
        if fresh.size:
            for n, name in enumerate(names):
                bits = self.registers.bits(name)
                values[fresh, n] = bits[fresh].view(np.float32)
                bits[fresh] = _POISON
        under_way[warps] += 1
        self.pending.append(replace(product, group=self.group[warps]))
        self.observe("product_begins", product)

    def wait(self, lanes, pending: int):
        """Until at most `pending` groups of these warps are under way."""
        warps = lanes[::32] // 32
        newest = np.full(len(self.group), -1, np.int64)
        newest[warps] = self.group[warps] - pending - 1
        self.fenced[warps] = False
        left = []
        for product in self.pending:
            arrives = product.group <= newest[product.lanes[:, 0] // 32]
            if arrives.any():
                self._finish(product if arrives.all() else product.select(arrives))
            if not arrives.all():
                left.append(product.select(~arrives))
        self.pending = left

    def _refuse_parts_of_others(self, names, warps):
        for others, under_way in self.under_way.items():
            if others != names and not set(others).isdisjoint(names) and under_way[warps].any():
                raise PtxError("accumulators that belong to another product under way")

    def _finish(self, product):
        self.observe("product_ends", product)
        names, lanes = product.accumulators, product.lanes.reshape(-1)
        left, right = self._left(product), self._from_shared(product.right, product)
        sums = tensor_core.matrix_of_fragments(self.values[names][lanes])
        sums = np.where(product.adds[:, None, None], sums, np.float32(0))
        result = self.model.multiply(left.astype(np.float64), right.astype(np.float64), sums)
        numbers.make_nan_canonical(result.view(np.uint32), result)
        self.values[names][lanes] = tensor_core.fragments_of_matrix(result)
        under_way = self.under_way[names]
        warps = product.lanes[:, 0] // 32
        under_way[warps] -= 1
        done = product.lanes[under_way[warps] == 0].reshape(-1)
        if done.size:
            for name, values in zip(names, self.values[names][done].T):
                self.registers.bits(name)[done] = values.view(np.uint32)

    def _left(self, product):
        """[warps, 16, 16]"""
        if not isinstance(product.left, SharedOperand):
            words = [word[product.lanes] for word in product.left]
            return tensor_core.left_operand(words, product.widen)
        rows = self._from_shared(product.left, product).swapaxes(1, 2).reshape(-1, 4, 16, _DEPTH)
        return rows[np.arange(len(rows)), product.lanes[:, 0] // 32 % 4]

    def _from_shared(self, operand, product):
        chunks = operand.chunks()
        lanes = np.broadcast_to(product.lanes[:, :1, None], chunks.shape).reshape(-1)
        words = self.shared.load(chunks.reshape(-1), 16, lanes)
        return operand.matrices(words.reshape(*chunks.shape[:2], -1), product.widen)

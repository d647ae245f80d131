"""Runs blocks of a kernel side by side.

Every lane has a program counter. Of the lanes that can go on, those go that have the lowest, all together, to where
the next ones wait or where their ways part. Instructions of a warp wait until all its lanes have come; barriers, until
all the block's have. Warps may be ranked: then those of a lower rank go on as long as they can, before any other.
"""

from __future__ import annotations

import numpy as np

from . import steps
from .copies import Copies
from .meetings import Meeting, Meetings
from .memory import GlobalMemory, Parameters, SharedMemory
from .products import Products
from .program import Program, PtxError
from .registers import PARAMETERS, Registers
from .shared_barriers import SharedBarriers
from .tensor_core import MODELS

_LANES = 1024  # that run side by side: as many as stay in the caches
_NOWHERE = np.iinfo(np.int64).max
_BRANCH, _RETURN, _BARRIER, _TOGETHER, _SIGNAL, _WAIT = range(6)


class Machine:
    """Of one kernel, for `blocks` blocks at a time, as often as wanted. Shared memory begins at `shared_begin`.

    Observers may have the methods read, copy_begins, copy_ends (step, lanes, addresses, size), write (the same and the
    bytes, before they are written), of shared memory; global_read, global_write; fence, atom, warp_barrier, barrier
    (step, lanes); begin (machine). For warpgroups: box_begins, box_ends (box, barrier), product_begins, product_ends
    (product), proxy_fence (step, lanes), arrives, leaves (step, lanes, barrier), phase_ends (barrier); barrier_used, as
    read, of an mbarrier.
    """

    def __init__(self, program: Program, blocks: int, shared_bytes: int, shared_begin: int = 0):
        self.program, self.blocks = program, blocks
        self.threads = program.threads
        count = blocks * self.threads
        self.all_lanes = np.arange(count)
        self.registers = Registers(program, count, self.threads)
        self.memory = GlobalMemory()
        self.shared = SharedMemory(shared_bytes, blocks, self.threads, shared_begin)
        self.parameters = Parameters(program.parameter_bytes, PARAMETERS)
        self.copies = Copies(count, self.memory, self.shared, self.observe)
        self.meetings = Meetings(self.threads, self.observe)
        self.shared_barriers = SharedBarriers(self.threads, self.memory, self.shared, self.observe, self._wake)
        self.products = Products(self.registers, self.shared, self.observe)
        self.instructions = [None] * len(program.instructions)  # bound when they are first executed

    def lanes(self, mask):
        return self.all_lanes if mask is True else np.flatnonzero(mask)

    def observe(self, event, *what):
        for observer in self.observers:
            getattr(observer, event, _ignore)(*what)

    # --- What each instruction is: (kind or None, step, more) ------------------------------------------------------

    def _bind(self, number):
        bound = self.instructions[number] = self._bound(self.program.instructions[number])
        return bound

    def _bound(self, i):
        if i.name == "bra":
            guard = i.guard and self.registers.bits(i.guard)
            return _BRANCH, (guard, i.negated), self.program.labels[i.operands[0]]
        if i.name == "ret" and i.guard is None:
            return _RETURN, None, None
        if i.name == "bar" and not steps.is_of_warps(i):
            return _BARRIER, self._meeting(i), None
        if i.name == "mbarrier" and i.opcode[1] in ("arrive", "try_wait"):
            return _SIGNAL if i.opcode[1] == "arrive" else _WAIT, steps.bind(i, self), None
        return _TOGETHER if steps.is_of_warps(i) else None, steps.bind(i, self), None

    def _meeting(self, i):
        registers, operands = self.registers, list(i.operands)
        if i.opcode not in (("bar", "sync"), ("bar", "arrive"), ("bar", "red", "or", "pred")):
            raise PtxError(f"the interpreter has no {i.text}")
        finish = _ignore
        if "red" in i.opcode:
            target, value = registers.bits(operands.pop(0)), registers.source(operands.pop(), "pred")

            def finish(lanes, count):
                target[lanes] = np.repeat(value[lanes].reshape(-1, count).any(axis=1), count)

        number, count = (*registers.sources(operands, "u32"), None)[:2]
        return Meeting(i, number, count, "arrive" not in i.opcode, finish)

    # --- Running ---------------------------------------------------------------------------------------------------

    def run(self, first_block, count, parameters: bytes, allocations, model=MODELS["exact"], observers=(), ranks=None):
        """Blocks `first_block` up to `count` more, at most as many as the machine has. `model` is what `mma` computes,
        `ranks` are of the warps of a block: all the same if there are none.

        Raises:
            PtxError: a kernel did what it must not do; with its name, the block, the thread and the instruction.
        """
        self.memory.allow(allocations)
        self.parameters.set(parameters)
        self.shared.clear()
        self.copies.clear()
        self.meetings.clear()
        self.shared_barriers.clear()
        self.products.clear(model)
        self.ranks = None if ranks is None else np.tile(np.repeat(ranks, 32), self.blocks)
        self.first_block, self.model, self.observers = first_block, model, observers
        self.registers.block[:] = first_block + self.all_lanes // self.threads
        for observer in self.observers:
            getattr(observer, "begin", _ignore)(self)
        self.at = np.zeros(len(self.all_lanes), np.int64)
        self.left = self.all_lanes >= count * self.threads  # have returned, or are of no block
        self.waits = self.left.copy()  # at a barrier, for the rest of a warp, or have left
        self.sleeps = np.zeros_like(self.left)  # of those: until a phase ends (shared_barriers.py)
        self.executed = 0
        try:
            with np.errstate(all="ignore"):
                while self._go_on():
                    pass
        except (PtxError, ValueError) as error:
            text = self.program.instructions[self.number].text
            raise PtxError(f"kernel {self.program.name}, blocks from {first_block} on, at `{text}`: {error}") from error

    def _go_on(self) -> bool:
        """One run of lanes that stand at the lowest number. Whether there is more to do."""
        ready = ~self.waits
        if not ready.any():
            if self.left.all():
                return False
            if self.shared_barriers.deliver():
                return True
            raise PtxError(self._why_nothing_goes_on())
        if self.ranks is not None:
            ready &= self.ranks == self.ranks[ready].min()
        counters = np.where(ready, self.at, _NOWHERE)
        number = self.number = int(counters.min())
        active = counters == number
        others = counters[~active & ready]
        limit = int(others.min()) if others.size else _NOWHERE
        mask = True if active.all() else active
        instructions = self.instructions
        while number < limit:
            self.number = number
            self.executed += 1
            kind, step, more = instructions[number] or self._bind(number)
            if kind is None:
                step(mask)
                number += 1
            elif kind == _BRANCH:
                guard, negated = step
                taken = self._taken(guard, negated, active, mask)
                if taken is None:
                    self.at[active] = np.where(guard[active] != negated, more, number + 1)
                    return True
                number = more if taken else number + 1
            elif kind == _TOGETHER:
                if mask is True:
                    step(True)
                    number += 1
                    continue
                self._together(number, active, step)
                return True
            elif kind == _BARRIER:
                if mask is True and step.is_of_block:
                    step.finish(self.all_lanes, self.threads)
                    self.observe("barrier", step.instruction, self.all_lanes)
                    number += 1
                    continue
                self._meet(number, active, step)
                return True
            elif kind == _SIGNAL:
                step(mask)
                self.at[active] = number + 1
                return True
            elif kind == _WAIT:
                lanes = self.lanes(active)
                over = step(lanes)
                self.at[lanes] = number + over
                self.waits[lanes] = self.sleeps[lanes] = ~over
                return True
            else:
                self.left |= active
                self.waits |= active
                self.at[active] = number
                return True
        self.at[active] = number
        return True

    @staticmethod
    def _taken(guard, negated, active, mask):
        """Whether all take the branch; None where their ways part."""
        if guard is None:
            return True
        taken = np.count_nonzero(guard if mask is True else guard & active)
        if taken == 0:
            return negated
        if taken == (len(guard) if mask is True else np.count_nonzero(active)):
            return not negated
        return None

    def _together(self, number, active, step):
        """Runs the warps of which all lanes are here; the others' wait for the rest of them."""
        here = active | (self.waits & ~self.left & (self.at == number))
        whole = np.repeat(here.reshape(-1, 32).all(axis=1), 32)
        part = active & ~whole
        self.at[part] = number
        self.waits |= part
        if whole.any():
            step(True if whole.all() else whole)
            self.at[whole] = number + 1
            self.waits &= ~whole

    def _meet(self, number, active, meeting):
        self.at[active] = number
        self.waits |= active
        for lanes in self.meetings.come(meeting, np.flatnonzero(active)):
            self.at[lanes] += 1
            self.waits[lanes] = False

    def _wake(self):
        self.waits &= ~self.sleeps
        self.sleeps.fill(False)

    def _why_nothing_goes_on(self):
        """A thread that waits, and one of its block that does not come."""
        lane = int(np.flatnonzero(self.waits & ~self.left)[0])
        block = lane // self.threads
        rest = self.all_lanes[block * self.threads : (block + 1) * self.threads]

        def where(lane):
            if self.left[lane]:
                return "has left the kernel"
            return f"is at `{self.program.instructions[self.at[lane]].text}`"

        other = next((int(o) for o in rest if self.left[o] or self.at[o] != self.at[lane]), lane)
        threads = self.threads
        return f"thread {other % threads} {where(other)}, while thread {lane % threads} {where(lane)}"


def _ignore(*_):
    """Of an observer that does not look at it."""


def blocks_of(program: Program, grid: int) -> int:
    """How many blocks of a grid run side by side."""
    return max(1, min(grid, _LANES // program.threads))

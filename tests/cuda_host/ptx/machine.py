"""Runs blocks of a kernel side by side.

Every lane has a program counter. Of the lanes that can go on, those go that have the lowest, all together, to where
the next ones wait or where their ways part. Instructions of a warp wait until all its lanes have come; barriers, until
all the block's have.
"""

from __future__ import annotations

import numpy as np

from . import steps
from .copies import Copies
from .memory import GlobalMemory, Parameters, SharedMemory
from .program import Program, PtxError
from .registers import PARAMETERS, Registers
from .tensor_core import MODELS

_LANES = 1024  # that run side by side: as many as stay in the caches
_NOWHERE = np.iinfo(np.int64).max
_BRANCH, _RETURN, _BARRIER, _TOGETHER = range(4)


class Machine:
    """Of one kernel, for `blocks` blocks at a time, as often as wanted.

    Observers may have the methods read, copy_begins, copy_ends (step, lanes, addresses, size), write (the same and the
    bytes, before they are written), of shared memory; global_read, global_write; fence, atom, warp_barrier, barrier
    (step, lanes); begin (machine).
    """

    def __init__(self, program: Program, blocks: int, shared_bytes: int):
        self.program, self.blocks = program, blocks
        self.threads = program.threads
        count = blocks * self.threads
        self.all_lanes = np.arange(count)
        self.registers = Registers(program, count, self.threads)
        self.memory = GlobalMemory()
        self.shared = SharedMemory(shared_bytes, blocks, self.threads)
        self.parameters = Parameters(program.parameter_bytes, PARAMETERS)
        self.copies = Copies(count, self.memory, self.shared, self.observe)
        self.instructions = [None] * len(program.instructions)  # bound when they are first executed

    def lanes(self, mask):
        return self.all_lanes if mask is True else np.flatnonzero(mask)

    def observe(self, event, step, lanes, *more):
        for observer in self.observers:
            getattr(observer, event, _ignore)(step, lanes, *more)

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
            return _BARRIER, self._barrier(i), "or" if "red" in i.opcode else "sync"
        return _TOGETHER if steps.is_of_warps(i) else None, steps.bind(i, self), None

    def _barrier(self, i):
        """What is done with the lanes of the blocks that have met."""
        if i.opcode == ("bar", "sync") and i.operands == ("0",):
            return lambda lanes: None
        if i.opcode != ("bar", "red", "or", "pred") or i.operands[1] != "0":
            raise PtxError(f"the interpreter has no {i.text}")
        target, value = self.registers.bits(i.operands[0]), self.registers.source(i.operands[2], "pred")

        def any_in_block(lanes):
            found = value[lanes].reshape(-1, self.threads).any(axis=1)
            target[lanes] = np.repeat(found, self.threads)

        return any_in_block

    # --- Running ---------------------------------------------------------------------------------------------------

    def run(self, first_block, count, parameters: bytes, allocations, model=MODELS["exact"], observers=()):
        """Blocks `first_block` up to `count` more, at most as many as the machine has. `model` is what `mma` computes.

        Raises:
            PtxError: a kernel did what it must not do; with its name, the block, the thread and the instruction.
        """
        self.memory.allow(allocations)
        self.parameters.set(parameters)
        self.shared.clear()
        self.copies.clear()
        self.first_block, self.model, self.observers = first_block, model, observers
        self.registers.block[:] = first_block + self.all_lanes // self.threads
        for observer in self.observers:
            getattr(observer, "begin", _ignore)(self)
        self.at = np.zeros(len(self.all_lanes), np.int64)
        self.left = self.all_lanes >= count * self.threads  # have returned, or are of no block
        self.waits = self.left.copy()  # at a barrier, for the rest of a warp, or have left
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
            raise PtxError(self._why_nothing_goes_on())
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
                if mask is True:
                    step(self.all_lanes)
                    self.observe("barrier", self.program.instructions[number], self.all_lanes)
                    number += 1
                    continue
                self.at[active] = number
                self.waits |= active
                self._release(active)
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

    def _release(self, arrived):
        """Lets blocks go on of which all threads wait at a barrier."""
        for block in np.unique(np.flatnonzero(arrived) // self.threads):
            lanes = self.all_lanes[block * self.threads : (block + 1) * self.threads]
            if not self.waits[lanes].all() or self.left[lanes].any():
                continue
            numbers = np.unique(self.at[lanes])
            bound = [self.instructions[n] for n in numbers]
            if any(one is None or one[0] != _BARRIER for one in bound):
                continue
            _, step, kind = bound[0]
            if len(bound) > 1 and {kind for _, _, kind in bound} != {"sync"}:
                raise PtxError(f"threads of block {block} meet at barriers of two kinds")
            step(lanes)
            self.at[lanes] += 1
            self.waits[lanes] = False
            self.observe("barrier", self.program.instructions[numbers[0]], lanes)

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

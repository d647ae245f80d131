"""What one block writes and another reads: global memory between blocks of one launch, which only a ticket orders.

In PTX's memory model a block tells another of what its threads have written so: they meet at a barrier, then one
thread fences, then it writes (`atom`). The other block reads that by an `atom`, the thread fences, the block meets,
and then its threads may load. Shared memory is the business of races.py; between launches everything is ordered.
"""

from __future__ import annotations

import numpy as np

from .program import PtxError

_NEVER = -1


class Publication:
    """An observer (machine.py).

    Raises:
        PtxError: at an `atom` that does not order what the block has written before, or a load of another block's that
        no `atom` orders.
    """

    def begin(self, machine):
        self.machine = machine
        lanes = len(machine.all_lanes)
        self.met = np.zeros(lanes, np.int64)  # how often a lane's block has met
        self.stored = np.full(lanes, _NEVER, np.int64)  # when it last stored to global memory, in such meetings
        self.fenced = np.full(lanes, _NEVER, np.int64)
        self.unfenced = np.zeros(lanes, bool)  # whether it has stored since its last fence
        self.took = np.zeros(lanes, bool)  # whether its last atom has no fence behind it
        self.acquired = np.full(lanes, _NEVER, np.int64)  # when a fence followed its atom
        if machine.first_block == 0:
            self.writers = {}  # by the beginning of an allocation: of each byte, the block

    def barrier(self, step, lanes):
        self.met[lanes] += 1

    def global_write(self, step, lanes, addresses, size):
        self.stored[lanes] = self.met[lanes]
        self.unfenced[lanes] = True
        for writers, chosen, places in self._by_allocation(addresses, size):
            writers[places] = self._block(lanes[chosen])[:, None]

    def fence(self, step, lanes):
        self.fenced[lanes] = self.met[lanes]
        self.unfenced[lanes] = False
        self.acquired[lanes] = np.where(self.took[lanes], self.met[lanes], self.acquired[lanes])
        self.took[lanes] = False

    def atom(self, step, lanes):
        for lane in lanes:
            block = self._lanes_of(lane)
            late = self.stored[block] >= self.fenced[lane]
            late[lane - block[0]] = self.unfenced[lane]
            if late[self.stored[block] != _NEVER].any():
                thread = int(np.argmax(late & (self.stored[block] != _NEVER)))
                raise PtxError(
                    f"race: `{step.text}` does not order what thread {thread} of its block has stored before"
                )
        self.took[lanes] = True

    def global_read(self, step, lanes, addresses, size):
        for writers, chosen, places in self._by_allocation(addresses, size):
            writer = writers[places]
            foreign = ((writer != _NEVER) & (writer != self._block(lanes[chosen])[:, None])).any(axis=1)
            for lane in lanes[chosen][foreign]:
                block = self._lanes_of(lane)
                known = (self.acquired[block] != _NEVER) & (self.acquired[block] < self.met[lane])
                if not known.any() and self.acquired[lane] == _NEVER:
                    thread = lane % self.machine.threads
                    what = "loads what another block has stored, which nothing orders"
                    raise PtxError(f"race: `{step.text}` of thread {thread} {what}")

    def _block(self, lanes):
        return self.machine.first_block + lanes // self.machine.threads

    def _lanes_of(self, lane):
        first = lane // self.machine.threads * self.machine.threads
        return self.machine.all_lanes[first : first + self.machine.threads]

    def _by_allocation(self, addresses, size):
        memory = self.machine.memory
        index = np.searchsorted(memory.begins, addresses, side="right") - 1
        for i in np.unique(index):
            begin, end = int(memory.begins[i]), int(memory.ends[i])
            writers = self.writers.setdefault(begin, np.full(end - begin, _NEVER, np.int64))
            chosen = index == i
            yield writers, chosen, (addresses[chosen] - begin)[:, None] + np.arange(size)

"""Accesses of two threads to the same byte of shared memory, one of them a write, that no barrier orders.

Of two accesses the earlier comes before the later if the block has met at a barrier in between, or, within a warp, the
warp (bar.warp). A copy (`cp.async`) writes when it is issued, and again when its thread has waited for it; in between
nobody may read. So this finds what a lucky order of warps hides: the machine's order is only one of them. Writes of
the same value are no race: so flags are set.
"""

from __future__ import annotations

import numpy as np

from .program import PtxError

_NOBODY, _MANY = -1, -2


class Races:
    """An observer (machine.py).

    Raises:
        PtxError: at the first race, with both instructions.
    """

    def begin(self, machine):
        self.machine = machine
        self.warps = machine.threads // 32
        size = machine.blocks * machine.shared.pitch
        self.met = np.zeros(len(machine.all_lanes), np.int32)  # how often a lane's block has met
        self.warp_met = np.zeros(len(machine.all_lanes), np.int32)  # and its warp, or the block
        self.writer = np.full(size, _NOBODY, np.int32)
        self.written, self.warp_written, self.write_step = (np.zeros(size, np.int32) for _ in range(3))
        self.copier = np.full(size, _NOBODY, np.int32)
        self.scratch = np.zeros(size, np.uint8)
        # Of each warp of the block by itself, its last reader: a lane, or more than one.
        self.reader = np.full((self.warps, size), _NOBODY, np.int32)
        self.was_read, self.warp_read, self.read_step = (np.zeros((self.warps, size), np.int32) for _ in range(3))

    # --- What the machine tells -----------------------------------------------------------------------------------

    def barrier(self, step, lanes):
        self.met[lanes] += 1
        self.warp_met[lanes] += 1

    def warp_barrier(self, step, lanes):
        self.warp_met[lanes] += 1

    def read(self, step, lanes, addresses, size):
        lanes, places = self._bytes(lanes, addresses, size)
        self._check_copies(step, lanes, places)
        self._check_writer(step, lanes, places)
        warp = lanes // 32 % self.warps
        now = (self.was_read[warp, places] == self.met[lanes]) & (self.warp_read[warp, places] == self.warp_met[lanes])
        another = now & (self.reader[warp, places] >= 0) & (self.reader[warp, places] != lanes)
        many = now & (self.reader[warp, places] == _MANY) | another
        self.reader[warp, places] = lanes
        many |= self.reader[warp, places] != lanes
        self.reader[warp[many], places[many]] = _MANY
        self.was_read[warp, places], self.warp_read[warp, places] = self.met[lanes], self.warp_met[lanes]
        self.read_step[warp, places] = step.number

    def write(self, step, lanes, addresses, size, values):
        lanes, places = self._bytes(lanes, addresses, size)
        self._check_copies(step, lanes, places)
        self._write(step, lanes, places, values.reshape(-1))

    def copy_begins(self, step, lanes, addresses, size):
        lanes, places = self._bytes(lanes, addresses, size)
        self._check_copies(step, lanes, places)
        self._write(step, lanes, places)
        self.copier[places] = lanes

    def copy_ends(self, step, lanes, addresses, size):
        lanes, places = self._bytes(lanes, addresses, size)
        self._write(step, lanes, places)
        self.copier[places] = _NOBODY

    # --- What is a race -------------------------------------------------------------------------------------------

    def _bytes(self, lanes, addresses, size):
        places = (addresses + self.machine.shared.base[lanes])[:, None] + np.arange(size)
        return np.repeat(lanes, size), places.reshape(-1)

    def _write(self, step, lanes, places, values=None):
        other = True if values is None else self.machine.shared.views[1][places] != values
        self._check_writer(step, lanes, places, other)
        self._check_readers(step, lanes, places)
        self.writer[places] = lanes
        twice = self.writer[places] != lanes  # in one instruction
        if values is not None and np.count_nonzero(twice):
            self.scratch[places] = values
            twice &= self.scratch[places] != values
        self._refuse(step, lanes, places, twice, self.writer, None)
        self.written[places], self.warp_written[places] = self.met[lanes], self.warp_met[lanes]
        self.write_step[places] = step.number

    def _check_copies(self, step, lanes, places):
        bad = self.copier[places] != _NOBODY
        if np.count_nonzero(bad):
            first = int(np.argmax(bad))
            where = self._describe(step, lanes[first], places[first])
            raise PtxError(f"race: {where}, whose copy has not been waited for")

    def _check_writer(self, step, lanes, places, other=True):
        writer = self.writer[places]
        same_warp = writer // 32 == lanes // 32
        ordered = (self.written[places] < self.met[lanes]) | same_warp & (
            self.warp_written[places] < self.warp_met[lanes]
        )
        self._refuse(
            step, lanes, places, (writer >= 0) & (writer != lanes) & ~ordered & other, self.writer, self.write_step
        )

    def _check_readers(self, step, lanes, places):
        own = lanes // 32 % self.warps
        for warp in range(self.warps):
            reader = self.reader[warp, places]
            ordered = self.was_read[warp, places] < self.met[lanes]
            ordered |= (own == warp) & (self.warp_read[warp, places] < self.warp_met[lanes])
            bad = (reader != _NOBODY) & (reader != lanes) & ~ordered
            self._refuse(step, lanes, places, bad, self.reader[warp], self.read_step[warp])

    def _refuse(self, step, lanes, places, bad, others, steps):
        if not np.count_nonzero(bad):
            return
        first = int(np.argmax(bad))
        lane, place = int(lanes[first]), int(places[first])
        other = int(others[place])
        thread = "more than one thread" if other == _MANY else f"thread {other % self.machine.threads}"
        before = step if steps is None else self.machine.program.instructions[int(steps[place])]
        raise PtxError(
            f"race: {self._describe(step, lane, place)}, and `{before.text}` of {thread} before it, are in no order"
        )

    def _describe(self, step, lane, place):
        thread, byte = lane % self.machine.threads, place % self.machine.shared.pitch
        return f"`{step.text}` of thread {thread} at byte {byte} of shared memory"

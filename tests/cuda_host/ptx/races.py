"""Accesses of two threads to the same byte of shared memory, one of them a write, that no barrier orders.

Of two accesses the earlier comes before the later if the later's thread knows of it (clocks.py). A copy (`cp.async`)
writes when it is issued, and again when its thread has waited for it; in between nobody may read. A box of the copy
engine writes from its beginning on until the barrier's phase ends that it is told to. A product of a warpgroup reads
from its beginning until it has been waited for. So this finds what a lucky order of warps hides: the machine's order is only
one of them. Writes of the same value are no race: so flags are set.
"""

from __future__ import annotations

import numpy as np

from .clocks import OrderObserver
from .program import PtxError

_NOBODY, _MANY, _ENGINE = -1, -2, -3
_CHUNK = 16  # bytes that products read at a time


class Races(OrderObserver):
    """An observer (machine.py).

    Raises:
        PtxError: at the first race, with both instructions.
    """

    def begin(self, machine):
        super().begin(machine)
        warps = self.warps = self.clocks.warps
        size = machine.blocks * machine.shared.pitch
        self.writer = np.full(size, _NOBODY, np.int32)
        self.written, self.write_step, self.column = (np.zeros(size, np.int32) for _ in range(3))
        self.copier = np.full(size, _NOBODY, np.int32)
        self.scratch = np.zeros(size, np.uint8)
        # Of each warp of the block by itself, its last reader: a lane, or more than one.
        self.reader = np.full((warps, size), _NOBODY, np.int32)
        self.was_read, self.read_step = (np.zeros((warps, size), np.int32) for _ in range(2))
        # And its products: when the last one ended, how many are under way.
        self.was_multiplied = np.full((warps, size // _CHUNK), -1, np.int32)
        self.under_way, self.product_step = (np.zeros((warps, size // _CHUNK), np.int32) for _ in range(2))

    # --- What the machine tells -----------------------------------------------------------------------------------

    def read(self, step, lanes, addresses, size):
        lanes, places = self._bytes(lanes, addresses, size)
        self._check_copies(step, lanes, places)
        self._check_writer(step, lanes, places)
        warp = self.clocks.of_lanes(lanes)
        reader = self.reader[warp, places]
        unknown = (reader != _NOBODY) & (self.was_read[warp, places] >= self.clocks.known[lanes, warp])
        many = unknown & (reader != lanes)
        self.reader[warp, places] = lanes
        many |= self.reader[warp, places] != lanes
        self.reader[warp[many], places[many]] = _MANY
        self.was_read[warp, places] = self.clocks.now
        self.read_step[warp, places] = step.number

    barrier_used = read  # of what its init has written

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

    def box_begins(self, box, key):
        self.copy_begins(box.instruction, box.lanes(), box.chunks(), _CHUNK)

    def box_ends(self, box, key):
        _, places = self._bytes(box.lanes(), box.chunks(), _CHUNK)
        self.writer[places], self.written[places] = _ENGINE, self.clocks.now
        self.column[places], self.write_step[places] = self.clocks.column(key), box.instruction.number
        self.copier[places] = _NOBODY

    def product_begins(self, product):
        lanes, addresses = product.reads()
        of_bytes = self._bytes(lanes, addresses, _CHUNK)
        self._check_copies(product.instruction, *of_bytes)
        self._check_writer(product.instruction, *of_bytes)
        chunks = self._chunks(lanes, addresses)
        np.add.at(self.under_way, chunks, 1)
        self.product_step[chunks] = product.instruction.number

    def product_ends(self, product):
        chunks = self._chunks(*product.reads())
        np.add.at(self.under_way, chunks, -1)
        self.was_multiplied[chunks] = self.clocks.now

    # --- What is a race -------------------------------------------------------------------------------------------

    def _bytes(self, lanes, addresses, size):
        return np.repeat(lanes, size), self.places(lanes, addresses, size).reshape(-1)

    def _chunks(self, lanes, addresses):
        return self.clocks.of_lanes(lanes), (addresses + self.machine.shared.base[lanes]) // _CHUNK

    def _write(self, step, lanes, places, values=None):
        other = True if values is None else self.machine.shared.views[1][places] != values
        self._check_writer(step, lanes, places, other)
        self._check_readers(step, lanes, places)
        self.writer[places] = lanes
        twice = self.writer[places] != lanes  # in one instruction
        if values is not None and np.count_nonzero(twice):
            self.scratch[places] = values
            twice &= self.scratch[places] != values
        self._refuse(step, lanes, places, twice, lambda place: (step, self.writer[place]))
        self.written[places], self.write_step[places] = self.clocks.now, step.number
        self.column[places] = self.clocks.of_lanes(lanes)

    def _check_copies(self, step, lanes, places):
        bad = self.copier[places] != _NOBODY
        if np.count_nonzero(bad):
            first = int(np.argmax(bad))
            where = self._describe(step, lanes[first], places[first])
            raise PtxError(f"race: {where}, whose copy has not been waited for")

    def _check_writer(self, step, lanes, places, other=True):
        writer = self.writer[places]
        unknown = self.written[places] >= self.clocks.known[lanes, self.column[places]]
        bad = (writer != _NOBODY) & (writer != lanes) & unknown & other
        self._refuse(step, lanes, places, bad, lambda place: (self.write_step[place], self.writer[place]))

    def _check_readers(self, step, lanes, places):
        own, chunks = self.clocks.of_lanes(lanes), places // _CHUNK
        for warp in range(self.warps):
            reader, known = self.reader[warp, places], self.clocks.known[lanes, warp]
            bad = (reader != _NOBODY) & (reader != lanes) & (self.was_read[warp, places] >= known)
            self._refuse(
                step, lanes, places, bad, lambda place: (self.read_step[warp, place], self.reader[warp, place])
            )
            bad = (own != warp) & (self.was_multiplied[warp, chunks] >= known) | (self.under_way[warp, chunks] > 0)
            self._refuse(step, lanes, places, bad, lambda place: (self.product_step[warp, place // _CHUNK], _MANY))

    def _refuse(self, step, lanes, places, bad, earlier):
        """`earlier`: the other instruction and who it was, of a place."""
        if not np.count_nonzero(bad):
            return
        first = int(np.argmax(bad))
        lane, place = int(lanes[first]), int(places[first])
        before, other = earlier(place)
        before = before if before is step else self.machine.program.instructions[int(before)]
        names = {_MANY: "more than one thread", _ENGINE: "the copy engine"}
        other = names.get(int(other), f"thread {other % self.machine.threads}")
        raise PtxError(
            f"race: {self._describe(step, lane, place)}, and `{before.text}` of {other} before it, are in no order"
        )

    def _describe(self, step, lane, place):
        thread, byte = lane % self.machine.threads, place % self.machine.shared.pitch
        return f"`{step.text}` of thread {thread} at byte {byte} of shared memory"

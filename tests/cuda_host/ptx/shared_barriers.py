"""`mbarrier`: barriers in shared memory, whose phases end when as many have come as they were made for, and all bytes
that were announced.

What the copy engine brings arrives as late as it may: when somebody waits for it and nobody else can go on. Until then
its place holds 0xff, and what it copies has not been read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .copy_engine import Box
from .memory import GlobalMemory, SharedMemory
from .program import PtxError


@dataclass
class _Barrier:
    count: int
    missing: int  # arrivals of this phase
    phase: int = 0  # how many are over
    expected: int = 0  # bytes that this phase was told of
    boxes: list[Box] = field(default_factory=list)


class SharedBarriers:
    """`phase_ends` is called when one does: those who wait may look again."""

    def __init__(self, threads: int, memory: GlobalMemory, shared: SharedMemory, observe, phase_ends):
        self.threads, self.memory, self.shared = threads, memory, shared
        self.observe, self.phase_ends = observe, phase_ends
        self.clear()

    def clear(self):
        self.barriers: dict[tuple[int, int], _Barrier] = {}
        self.waited: set[tuple[int, int]] = set()  # for which somebody does

    def init(self, step, lanes, addresses, counts):
        self.shared.place(addresses, 8, lanes)
        self.observe("write", step, lanes, addresses, 8, np.zeros((len(lanes), 8), np.uint8))
        for lane, address, count in zip(lanes, addresses, counts):
            self.barriers[int(lane) // self.threads, int(address)] = _Barrier(int(count), int(count))

    def arrive(self, step, lanes, addresses, expected):
        """`expected`: bytes that each lane announces."""
        self.observe("barrier_used", step, lanes, addresses, 8)
        for address in np.unique(addresses):
            for block in np.unique(lanes // self.threads):
                mine = (addresses == address) & (lanes // self.threads == block)
                if mine.any():
                    self._arrive(step, lanes[mine], (int(block), int(address)), expected[mine])

    def _arrive(self, step, lanes, key, expected):
        barrier = self._of(key)
        self.observe("arrives", step, lanes, key)
        for lane, announced in zip(lanes, expected):
            if barrier.missing == 0:
                thread = lane % self.threads
                raise PtxError(f"thread {thread} comes to a barrier (byte {key[1]}) that all have come to")
            barrier.missing -= 1
            barrier.expected += int(announced)
            self._end_phase(key, barrier)

    def bring(self, box: Box, address: int):
        """Starts a copy that this barrier is told of."""
        key = self._key(box.lane, address)
        self._of(key).boxes.append(box)
        self.shared.store(box.chunks(), 16, np.uint32(0xFFFFFFFF), box.lanes())
        self.observe("box_begins", box, key)

    def is_over(self, step, lanes, addresses, parities):
        """Of each lane, whether the phase of this parity is; the one before the first has parity 1."""
        self.observe("barrier_used", step, lanes, addresses, 8)
        over = np.empty(len(lanes), bool)
        for n, (lane, address, parity) in enumerate(zip(lanes, addresses, parities)):
            key = self._key(lane, address)
            over[n] = self._of(key).phase % 2 != parity
            if not over[n]:
                self.waited.add(key)
        for key in {self._key(*pair) for pair in zip(lanes[over], addresses[over])}:
            mine = over & (addresses == key[1]) & (lanes // self.threads == key[0])
            self.observe("leaves", step, lanes[mine], key)
        return over

    def deliver(self) -> bool:
        """Lets arrive what is waited for; whether anything has."""
        waited, self.waited = self.waited, set()
        ended = [self._end_phase(key, self.barriers[key], arrives=True) for key in sorted(waited)]
        return any(ended)

    def _end_phase(self, key, barrier, arrives=False):
        if barrier.missing or (barrier.expected and not arrives):
            return False
        brought = sum(box.bytes for box in barrier.boxes)
        if barrier.expected > brought:
            return False
        if barrier.expected != brought:
            raise PtxError(f"{brought} bytes come to a barrier (byte {key[1]}) that was told of {barrier.expected}")
        for box in barrier.boxes:
            self.shared.store(box.chunks(), 16, box.content(self.memory), box.lanes())
            self.observe("box_ends", box, key)
        barrier.boxes, barrier.expected, barrier.missing = [], 0, barrier.count
        barrier.phase += 1
        self.observe("phase_ends", key)
        self.phase_ends()
        return True

    def _key(self, lane, address):
        return int(lane) // self.threads, int(address)

    def _of(self, key):
        barrier = self.barriers.get(key)
        if barrier is None:
            raise PtxError(f"there is no barrier at byte {key[1]} of shared memory: no mbarrier.init")
        return barrier

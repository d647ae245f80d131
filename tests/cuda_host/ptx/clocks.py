"""What each thread knows of the others: which of their accesses come before its next one, by the barriers between them.

Time is counted in what barriers do. Of a warp (all its lanes), and of what the copy engine brings to a barrier, a lane
knows what happened before some time. Who comes to a barrier tells it; who goes on from there knows what all have told.
"""

from __future__ import annotations

import numpy as np

_BARRIERS = 64  # in shared memory, of a block


class Clocks:
    """`known` [lanes, columns]: before which time a lane knows all; columns are warps of the block, then barriers."""

    def __init__(self, machine):
        self.threads = machine.threads
        self.warps = self.threads // 32
        self.now = 1
        self.known = np.zeros((len(machine.all_lanes), self.warps + _BARRIERS), np.int64)
        self.told: dict[tuple[int, int], np.ndarray] = {}  # of a barrier, in its phase
        self.passed: dict[tuple[int, int], np.ndarray] = {}  # in the one before
        self.columns: dict[tuple[int, int], int] = {}

    def meet(self, lanes, together):
        """`together` lanes after each other know of each other what all of them do."""
        self.now += 1
        groups = lanes.reshape(-1, together)
        known = self.known[groups].max(axis=1)
        for group, row in zip(groups, known):
            self._tell(row, group)
        self.known[groups] = known[:, None]

    def arrive(self, lanes, key):
        self.now += 1
        told = self.told.setdefault(key, np.zeros(self.known.shape[1], np.int64))
        np.maximum(told, self.known[lanes].max(axis=0), out=told)
        self._tell(told, lanes)

    def end_phase(self, key):
        self.now += 1
        self.passed[key] = self.told.pop(key, np.zeros(self.known.shape[1], np.int64))
        self.passed[key][self.column(key)] = self.now

    def leave(self, lanes, key):
        if key in self.passed:  # the phase before the first tells nothing
            self.known[lanes] = np.maximum(self.known[lanes], self.passed[key])

    def column(self, key) -> int:
        """Of what the copy engine brings to a barrier."""
        of_block = sum(block == key[0] for block, _ in self.columns)
        return self.columns.setdefault(key, self.warps + of_block)

    def of_lanes(self, lanes):
        """The column of each one's warp."""
        return lanes // 32 % self.warps

    def _tell(self, known, lanes):
        """All that the warps do which are there as a whole."""
        warps, counts = np.unique(self.of_lanes(lanes), return_counts=True)
        known[warps[counts == 32]] = self.now


class OrderObserver:
    """What observers have that ask for an order: `clocks`, which the machine's barriers set."""

    def begin(self, machine):
        self.machine = machine
        self.clocks = Clocks(machine)

    def barrier(self, step, lanes):
        self.clocks.meet(lanes, self.machine.threads)

    def warp_barrier(self, step, lanes):
        self.clocks.meet(lanes, 32)

    def arrives(self, step, lanes, key):
        self.clocks.arrive(lanes, key)

    def phase_ends(self, key):
        self.clocks.end_phase(key)

    def leaves(self, step, lanes, key):
        self.clocks.leave(lanes, key)

    def places(self, lanes, addresses, size):
        """[lanes, size]: where the bytes lie in the shared memory of all blocks."""
        return (addresses + self.machine.shared.base[lanes])[:, None] + np.arange(size)

"""`cp.async`: copies of each lane in groups, which arrive when they are waited for, and not before.

Until then their place in shared memory holds 0xff, and what they copy has not been read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .memory import GlobalMemory, SharedMemory


@dataclass
class _Copy:
    """One instruction of many lanes."""

    lanes: np.ndarray
    group: np.ndarray
    target: np.ndarray
    source: np.ndarray
    exists: np.ndarray
    size: int

    def select(self, chosen):
        parts = (self.lanes, self.group, self.target, self.source, self.exists)
        return _Copy(*(part[chosen] for part in parts), self.size)


class Copies:
    """`observe` is told when a copy begins and when it ends."""

    def __init__(self, lanes: int, memory: GlobalMemory, shared: SharedMemory, observe):
        self.memory, self.shared, self.observe = memory, shared, observe
        self.group = np.zeros(lanes, np.int64)  # that the next copies of a lane are of
        self.pending: list[_Copy] = []

    def clear(self):
        self.group.fill(0)
        self.pending = []

    def issue(self, step, lanes, target, source, size, exists):
        self.shared.store(target, size, _poison(len(lanes), size), lanes)
        self.observe("copy_begins", step, lanes, target, size)
        if np.count_nonzero(exists):
            self.memory.place(source[exists], size, lanes[exists])  # as early as it may be read
        self.pending.append(_Copy(lanes, self.group[lanes], target, source, exists, size))

    def commit(self, lanes):
        self.group[lanes] += 1

    def wait(self, step, lanes, pending: int):
        """Until at most `pending` groups of these lanes are on their way."""
        newest = np.full(len(self.group), -1, np.int64)
        newest[lanes] = self.group[lanes] - pending - 1
        left = []
        for copy in self.pending:
            arrives = copy.group <= newest[copy.lanes]
            if arrives.all():
                self.arrive(step, copy)
                continue
            if arrives.any():
                self.arrive(step, copy.select(arrives))
                copy = copy.select(~arrives)
            left.append(copy)
        self.pending = left

    def arrive(self, step, copy):
        values = np.zeros((len(copy.lanes), copy.size // 4), np.uint32)
        if np.count_nonzero(copy.exists):
            lanes = copy.lanes[copy.exists]
            values[copy.exists] = self.memory.load(copy.source[copy.exists], copy.size, lanes)
        self.shared.store(copy.target, copy.size, values, copy.lanes)
        self.observe("copy_ends", step, copy.lanes, copy.target, copy.size)


def _poison(lanes, size):
    return np.full((lanes, size // 4), 0xFFFFFFFF, np.uint32)

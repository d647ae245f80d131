"""`bar`: the barriers of a block, by number. Threads wait there for each other, or say that they came and go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import numpy as np

from .program import PtxError


@dataclass(frozen=True, eq=False)
class Meeting:
    """One instruction. `number` and `count` are operands (count None: of all threads of the block); `finish(lanes,
    count)` is what becomes of the lanes that waited, `count` for each barrier, when they go on."""

    instruction: object
    number: object
    count: object
    waits: bool
    finish: Callable

    @property
    def is_of_block(self):
        return self.count is None and np.ndim(self.number) == 0


class _Barrier:
    def __init__(self, count):
        self.count = count
        self.meetings: set[Meeting] = set()  # at which somebody waits
        self.came: list[np.ndarray] = []
        self.waiting: list[np.ndarray] = []


class Meetings:
    """`threads` of a block. `observe` is told of lanes that come (`arrives`, with the barrier) and go on (`leaves`)."""

    def __init__(self, threads: int, observe):
        self.threads, self.observe = threads, observe
        self.clear()

    def clear(self):
        self.barriers: dict[tuple[int, int], _Barrier] = {}

    def come(self, meeting: Meeting, lanes):
        """The lanes that go on by that."""
        numbers = np.broadcast_to(_of(meeting.number, lanes), len(lanes))
        counts = np.broadcast_to(self.threads if meeting.count is None else _of(meeting.count, lanes), len(lanes))
        keys = lanes // self.threads * 16 + numbers.astype(np.int64)
        free = [] if meeting.waits else [lanes]
        for key in np.unique(keys):
            chosen = keys == key
            free += self._come((int(key) // 16, int(key) % 16), meeting, lanes[chosen], set(map(int, counts[chosen])))
        return free

    def _come(self, key, meeting, lanes, counts):
        count = counts.pop()
        barrier = self.barriers.setdefault(key, _Barrier(count))
        if counts or barrier.count != count:
            raise PtxError(f"threads of block {key[0]} come to barrier {key[1]} for different numbers of threads")
        self.observe("arrives", meeting.instruction, lanes, (key[0], f"bar {key[1]}"))
        barrier.came.append(lanes)
        if meeting.waits:
            barrier.meetings.add(meeting)
            barrier.waiting.append(lanes)
        came = sum(map(len, barrier.came))
        if came < count:
            return []
        if came > count:
            raise PtxError(f"{came} threads of block {key[0]} are at barrier {key[1]} of {count}")
        del self.barriers[key]
        waiting = np.sort(np.concatenate([*barrier.waiting, lanes[:0]]))
        self._finish(key, barrier, waiting)
        return [waiting]

    def _finish(self, key, barrier, waiting):
        meetings = list(barrier.meetings)
        if len(meetings) > 1 and any("sync" not in one.instruction.opcode for one in meetings):
            raise PtxError(f"threads of block {key[0]} meet at barriers of two kinds")
        for meeting in meetings[:1]:
            meeting.finish(waiting, len(waiting))
            self.observe("phase_ends", (key[0], f"bar {key[1]}"))
            self.observe("leaves", meeting.instruction, waiting, (key[0], f"bar {key[1]}"))
            if len(waiting) == self.threads:
                self.observe("barrier", meeting.instruction, waiting)


def _of(operand, lanes):
    return operand[lanes] if np.ndim(operand) else operand

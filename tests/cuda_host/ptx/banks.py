"""How many passes (wavefronts) the accesses to shared memory take, counted from their addresses.

Shared memory has 32 banks of 4 bytes. Lanes of a warp go together: all 32 with 4 bytes or less, 16 with 8, 8 with 16
(so `ldmatrix`: a matrix at a time). One pass serves one word of each bank, to any number of lanes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

_BANKS = 32


@dataclass
class Count:
    """Of one instruction: passes, and as many as there would be without conflicts."""

    text: str
    passes: int = 0
    least: int = 0


class Banks:
    """An observer (machine.py): `counts` by kernel and number of the instruction."""

    def __init__(self):
        self.counts: dict[tuple[str, int], Count] = {}

    def begin(self, machine):
        self.kernel = machine.program.name

    def read(self, step, lanes, addresses, size, values=None):
        together = min(32, 128 // size)
        groups = lanes // together
        words = addresses[:, None] // 4 + np.arange(-(-size // 4))
        touched = np.unique(
            np.stack([np.broadcast_to(groups[:, None], words.shape), words], axis=-1).reshape(-1, 2), axis=0
        )
        _, group = np.unique(touched[:, 0], return_inverse=True)
        by_bank = np.bincount(group * _BANKS + touched[:, 1] % _BANKS, minlength=(group.max() + 1) * _BANKS)
        count = self.counts.setdefault((self.kernel, step.number), Count(step.text))
        count.passes += int(by_bank.reshape(-1, _BANKS).max(axis=1).sum())
        count.least += int((-(-by_bank.reshape(-1, _BANKS).sum(axis=1) // _BANKS)).sum())

    write = copy_begins = read

    def conflicts(self) -> dict[str, list[Count]]:
        """The instructions that take more passes than they must, by kernel."""
        found = defaultdict(list)
        for (kernel, _), count in self.counts.items():
            if count.passes > count.least:
                found[kernel].append(count)
        return dict(found)

    def passes(self, kernel: str) -> int:
        return sum(count.passes for (name, _), count in self.counts.items() if name == kernel)

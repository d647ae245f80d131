"""What threads write to shared memory, and tensor cores or the copy engine touch next. These look at memory in a way of
their own (the "async proxy"): they see it if the writer has fenced (`fence.proxy.async`) and a barrier is behind that.
"""

from __future__ import annotations

import numpy as np

from .clocks import OrderObserver
from .program import PtxError

_NOBODY, _NEVER = -1, np.iinfo(np.int64).max


class Proxies(OrderObserver):
    """An observer (machine.py).

    Raises:
        PtxError: at a product, or a box, over what a thread has written and not fenced.
    """

    def begin(self, machine):
        super().begin(machine)
        size = machine.blocks * machine.shared.pitch
        self.writer = np.full(size, _NOBODY, np.int32)
        self.fenced = np.zeros(size, np.int64)  # when the writer did

    def write(self, step, lanes, addresses, size, values=None):
        places = self.places(lanes, addresses, size)
        self.writer[places] = lanes[:, None]
        self.fenced[places] = _NEVER

    copy_ends = write

    def proxy_fence(self, step, lanes):
        self.fenced[(self.fenced == _NEVER) & np.isin(self.writer, lanes)] = self.clocks.now

    def product_begins(self, product):
        self._check(product.instruction, *product.reads())

    def box_begins(self, box, key):
        self._check(box.instruction, box.lanes(), box.chunks())

    def _check(self, step, lanes, addresses):
        places = self.places(lanes, addresses, 16)
        writer = self.writer[places]
        known = self.clocks.known[lanes[:, None], self.clocks.of_lanes(writer)]
        bad = (writer != _NOBODY) & (writer != lanes[:, None]) & (self.fenced[places] >= known)
        bad |= (writer == lanes[:, None]) & (self.fenced[places] == _NEVER)
        if bad.any():
            thread = int(writer[bad][0]) % self.machine.threads
            how = "with no fence.proxy.async and a barrier between"
            raise PtxError(f"race: `{step.text}` of what thread {thread} has written, {how}")

"""Memory that lanes load from and store to: global (this process's own), and shared of blocks that run side by side."""

from __future__ import annotations

import ctypes

import numpy as np

from .program import PtxError

_LOWEST = 1 << 16  # no allocation lies below
_HIGHEST = 1 << 47


def _everything(dtype, columns=None):
    """All addresses of the process as an array. Nothing is touched that is not indexed."""
    size = np.dtype(dtype).itemsize * (columns or 1)
    raw = (ctypes.c_uint8 * (_HIGHEST - _LOWEST)).from_address(_LOWEST)
    return np.frombuffer(raw, dtype).reshape((_HIGHEST - _LOWEST) // size, *([columns] if columns else []))


def _views(words):
    """The same memory by the sizes of accesses."""
    flat = words.reshape(-1)
    return {1: flat.view(np.uint8), 2: flat.view(np.uint16), **{n: flat.reshape(-1, n // 4) for n in (4, 8, 16)}}


class _Space:
    """Bytes as arrays of 1, 2, 4, 8 and 16 bytes, of which `_place` says where an address is."""

    name: str
    views: dict[int, np.ndarray]

    def load(self, addresses, size, lanes):
        """[lanes, size // 4] words, or [lanes] numbers of less than 4 bytes; `lanes` has those that load."""
        return self.views[size][self.place(addresses, size, lanes) // size]

    def store(self, addresses, size, values, lanes):
        self.views[size][self.place(addresses, size, lanes) // size] = values

    def place(self, addresses, size, lanes):
        odd = addresses % size != 0
        if np.count_nonzero(odd):
            self.fail(addresses, size, lanes, odd, "that is not aligned")
        return self._place(addresses, size, lanes)

    def fail(self, addresses, size, lanes, bad, how):
        first = int(np.argmax(bad))
        where = self.describe(int(addresses[first]))
        raise PtxError(f"lane {int(lanes[first])}: {size} bytes of {self.name} memory at an address {how}: {where}")

    def describe(self, address):
        return hex(address)


class GlobalMemory(_Space):
    """What `allow` was told of: begin and bytes of each allocation."""

    name = "global"
    views = {
        **{size: _everything(dtype) for size, dtype in ((1, np.uint8), (2, np.uint16))},
        **{size: _everything(np.uint32, size // 4) for size in (4, 8, 16)},
    }

    def allow(self, allocations):
        ordered = sorted(allocations)
        self.begins = np.array([begin for begin, _ in ordered], np.int64)
        self.ends = np.array([begin + size for begin, size in ordered], np.int64)

    def _place(self, addresses, size, lanes):
        if addresses.size:
            # All in one allocation, or each looked up.
            index = np.searchsorted(self.begins, addresses.min(), side="right") - 1
            if index < 0 or addresses.max() + size > self.ends[index]:
                index = np.searchsorted(self.begins, addresses, side="right") - 1
                bad = (index < 0) | (addresses + size > self.ends[index])
                if bad.any():
                    self.fail(addresses, size, lanes, bad, "outside all allocations")
        return addresses - _LOWEST

    def describe(self, address):
        index = int(np.searchsorted(self.begins, address, side="right")) - 1
        if index < 0:
            return hex(address)
        begin, end = int(self.begins[index]), int(self.ends[index])
        return f"{address - begin} bytes into an allocation of {end - begin}"


class SharedMemory(_Space):
    """Of each block `size` bytes, one block behind the other; the first of each has the address `begin`."""

    name = "shared"

    def __init__(self, size, blocks, threads, begin=0):
        self.size, self.begin = size, begin
        self.pitch = -(-size // 128) * 128
        words = np.full((blocks * self.pitch // 16 or 1, 4), 0xFFFFFFFF, np.uint32)
        self.views = _views(words)
        self.base = np.repeat(np.arange(blocks, dtype=np.int64) * self.pitch - begin, threads)

    def _place(self, addresses, size, lanes):
        bad = (addresses < self.begin) | (addresses + size > self.begin + self.size)
        if np.count_nonzero(bad):
            self.fail(addresses, size, lanes, bad, f"outside the block's {self.size}")
        return addresses + self.base[lanes]

    def clear(self):
        self.views[16].fill(0xFFFFFFFF)


class Parameters(_Space):
    """The kernel's one parameter, the same for all."""

    name = "parameter"

    def __init__(self, size: int, begin: int):
        words = np.zeros((-(-size // 16), 4), np.uint32)
        self.views = _views(words)
        self.begin, self.size = begin, size

    def set(self, content: bytes):
        self.views[1][: self.size] = np.frombuffer(content, np.uint8)

    def _place(self, addresses, size, lanes):
        places = addresses - self.begin
        bad = (places < 0) | (places + size > self.size)
        if np.count_nonzero(bad):
            self.fail(addresses, size, lanes, bad, f"outside the {self.size} bytes")
        return places

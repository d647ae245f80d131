"""What the copy engine brings (`cp.async.bulk.tensor`): boxes of arrays that tensor maps describe, swizzled.

As in CUDA's driver API, "Tensor Map Object Management", and PTX ISA, "Tensor Swizzling Modes"; the maps themselves are
those of the stand-in driver (cuTensorMapEncodeTiled), whose bytes NVIDIA does not publish.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from .program import PtxError

MAP_BYTES = 128
_MAP = struct.Struct("=8sQ4Q3Q4I")  # as of EncodedMap (../standin_driver.cc)
_ROW_BYTES, _CHUNK_BYTES = 128, 16


def swizzled(addresses):
    """Where 16 bytes lie of panels with "128-byte swizzle": the chunk of a row of 128 bytes changes with the row."""
    return addresses ^ (addresses >> 7 & 7) << 4


@dataclass(frozen=True)
class TensorMap:
    """An array of 4 dimensions of 16-bit elements, the first one dense; `stride`: of the others, in bytes."""

    address: int
    extent: tuple[int, ...]
    stride: tuple[int, ...]
    box: tuple[int, ...]

    @classmethod
    def read(cls, content: bytes) -> TensorMap:
        magic, address, *numbers = _MAP.unpack_from(content)
        if magic != b"standin4":
            raise PtxError("a tensor map that the driver has not made")
        return cls(address, tuple(numbers[:4]), tuple(numbers[4:7]), tuple(numbers[7:]))

    @property
    def box_bytes(self) -> int:
        return 2 * int(np.prod(self.box))


@dataclass(frozen=True)
class Box:
    """One copy under way, by `lane`: of the box that begins `at` an element, to `target` in shared memory."""

    instruction: object
    map: TensorMap
    at: tuple[int, ...]
    lane: int
    target: int

    @property
    def bytes(self) -> int:
        return self.map.box_bytes

    def chunks(self):
        """The addresses of its 16 bytes each, in the order of the array."""
        if self.target % _ROW_BYTES:
            raise PtxError(f"the copy engine writes to byte {self.target}, which is no multiple of {_ROW_BYTES}")
        return swizzled(self.target + np.arange(0, self.bytes, _CHUNK_BYTES, dtype=np.int64))

    def lanes(self):
        return np.full(self.bytes // _CHUNK_BYTES, self.lane)

    def content(self, memory):
        """[chunks, 4] words; zeros for what lies outside the array."""
        places = np.meshgrid(*(np.arange(n) + a for n, a in zip(self.map.box, self.at)), indexing="ij")
        places = [place.transpose().reshape(-1) for place in places]  # the first dimension is the fastest
        inside = np.all([(0 <= place) & (place < n) for place, n in zip(places, self.map.extent)], axis=0)
        sources = self.map.address + sum(n * place for n, place in zip((2, *self.map.stride), places))
        values = np.zeros(len(inside), np.uint16)
        values[inside] = memory.load(sources[inside], 2, np.full(np.count_nonzero(inside), self.lane))
        return values.view(np.uint32).reshape(-1, 4)

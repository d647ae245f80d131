"""PTX of a kernel with one mistake, for the tests that must find it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from . import compiled
from .program import parse


@dataclass(frozen=True)
class Mutant:
    """Instructions that match `pattern`, all of them or the `nth` alone (counted from 0), become `replacement`."""

    kernel: str
    pattern: str
    replacement: str
    nth: int | None = None

    def program(self):
        return _mutated(self)


@cache
def _mutated(mutant: Mutant):
    text = compiled.text(mutant.kernel)
    matches = list(re.finditer(mutant.pattern, text))
    if mutant.nth is not None:
        matches = matches[mutant.nth : mutant.nth + 1]
    if not matches:
        raise ValueError(f"{mutant}: nothing to change")
    for match in reversed(matches):
        text = text[: match.start()] + match.expand(mutant.replacement) + text[match.end() :]
    return parse(text, mutant.kernel)


# What can go wrong between ptx.cuh and the registers, or around them: (pattern, replacement).
SWAPPED_A = (r"(mma\.sync[^{]*\{[^}]*\}, \{)([^,]+), ([^,]+), ([^,]+), ([^}]+)\}", r"\1\2, \4, \3, \5}")
SWAPPED_B = (r"(mma\.sync[^{]*\{[^}]*\}, \{[^}]*\}, \{)([^,]+), ([^}]+)\}", r"\1\3, \2}")
SWAPPED_SUMS = (r"(mma\.sync[^{]*\{)([^,]+), ([^,]+), ([^,]+), ([^}]+)\}", r"\1\2, \3, \5, \4}")
SWAPPED_PAIR = (r"(cvt\.rn\.b?f16x2\.f32 %r\d+), (%f\d+), (%f\d+)", r"\1, \3, \2")
NO_TRANSPOSE = (r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans", "ldmatrix.sync.aligned.m8n8.x4")
TRANSPOSED = (r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared", "ldmatrix.sync.aligned.m8n8.x4.trans.shared")
NO_BARRIER = (r"bar\.sync\s+0;", "")
NO_WARP_BARRIER = (r"bar\.warp\.sync\s+-1;", "")
NO_FENCE = (r"fence\.acq_rel\.gpu;", "")
WEAK_WAIT = (r"cp\.async\.wait_group 0", "cp.async.wait_group 1")
WEAKER_WAIT = (r"cp\.async\.wait_group 1", "cp.async.wait_group 2")
NO_COMMIT = (r"cp\.async\.commit_group;", "")
EVERYTHING_COPIED = (r"(cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], 16), %r\d+", r"\1, 16")
WRONG_SHUFFLE = (r"shfl\.sync\.bfly", "shfl.sync.idx")

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

    def count(self) -> int:
        """How many there are."""
        return len(re.findall(self.pattern, compiled.text(self.kernel)))


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

# Where forward's maxima rise.
_EXPONENTIAL = r"\s+mul\.f32\s+%f\d+, %f\d+, 0f3FB8AA3B;\s+[^;]*ex2[^;]*;\s+// end inline asm\s+"
_FACTOR = r"sub\.f32(\s+%f\d+), (%f\d+), (%f\d+);(" + _EXPONENTIAL
NEVER_RISES = (r"vote\.sync\.any\.pred\s+(%p\d+), %p\d+, %r\d+;", r"setp.ne.s32 \1, 0, 0;")
WRONG_WAY = (r"setp\.gt\.f32(\s+%p\d+, %f\d+, %f\d+;)", r"setp.lt.f32\1")
WRONG_SLACK = (r"0f40B17218", "0fC0B17218")
SWAPPED_RISE = (_FACTOR + r"mul\.f32)", r"sub.f32\1, \3, \2;\4")
SWAPPED_FINISH = (_FACTOR + r"\$\w+:\s+mul\.f32)", r"sub.f32\1, \3, \2;\4")
UNSCALED_SUM = (r"(ex2[^;]*;\s+// end inline asm)\s+mul\.f32\s+(%f\d+), %f\d+, \2;", r"\1")

# Where dq is corrected by the mean of the keys.
NO_ROUNDED_SUMS = (r"mma\.sync[^;]*\{(%r\d+), \1\}[^;]*;", "")
WRONG_SHARE = (r"(div\.rn\.f32\s+(%f\d+), [^;]*;)", r"\1\nsub.f32 \2, 0f00000000, \2;")

# Of Hopper's kernels.
_PRODUCT = r"(wgmma\.mma_async[^{]*\{[^}]*\}, )"
SWAPPED_DESCRIPTORS = (_PRODUCT + r"(%rd\d+), (%rd\d+)", r"\1\3, \2")
SWAPPED_LEFT = (_PRODUCT + r"\{([^,]+), ([^,]+), ([^,]+), ([^}]+)\}", r"\1{\2, \4, \3, \5}")
ALONG_FOR_ACROSS = (_PRODUCT + r"(\{[^}]*\}, %rd\d+), 1, 1, 1, 1;", r"\1\2, 1, 1, 1, 0;")
ACROSS_FOR_ALONG = (_PRODUCT + r"(%rd\d+, %rd\d+, adds), 1, 1, 0, 0;", r"\1\2, 1, 1, 0, 1;")
NOTHING_ADDED = (_PRODUCT + r"(\{[^}]*\}, %rd\d+), 1, 1, 1, 1;", r"\1\2, 0, 1, 1, 1;")
WRONG_STRIDE = (r"(or\.b64\s+%rd\d+, %rd\d+), 4611686293305294848;", r"\1, 4611686155866341376;")
NO_PRODUCT_FENCE = (r"wgmma\.fence\.sync\.aligned;", "")
NO_PRODUCT_COMMIT = (r"wgmma\.commit_group\.sync\.aligned;", "")
WEAK_PRODUCT_WAIT = (r"wgmma\.wait_group\.sync\.aligned 0", "wgmma.wait_group.sync.aligned 1")
WEAKER_PRODUCT_WAIT = (r"wgmma\.wait_group\.sync\.aligned 1", "wgmma.wait_group.sync.aligned 2")
NO_ARRIVAL = (r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", "")
NOTHING_EXPECTED = (r"mbarrier\.arrive\.expect_tx(\.shared::cta\.b64 _, \[%r\d+\]), %r\d+;", r"mbarrier.arrive\1;")
NO_PHASE_WAIT = (r"mbarrier\.try_wait[^;]*;", "mov.pred done, -1;")
WRONG_PHASE = (r"(mbarrier\.try_wait[^;]*), (%r\d+);", r".reg .b32 other;\nxor.b32 other, \2, 1;\n\1, other;")
NO_PROXY_FENCE = (r"fence\.proxy\.async\.shared::cta;", "")
NO_NAMED_BARRIER = (r"bar\.sync %r\d+, %r\d+;", "")
NO_TURN = (r"bar\.arrive %r\d+, %r\d+;", "")

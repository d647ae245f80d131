"""The limits of the machine that speeds are given as a part of: `attn_ops._core.probe` under its names."""

from __future__ import annotations

from collections.abc import Callable

# In rounds; a probe of memory reads in eight ways, each of which takes this long.
_SECONDS = {"fma_float32": 0.02, "fma_float64": 0.02, "read": 0.01}
TITLES = {  # what `survey` measures
    "fma_float32": "FMA float32, GFLOP/s",
    "fma_float64": "FMA float64, GFLOP/s",
    "exp_float32": "e^x float32, Gelements/s",
    "read normal pages": "read, normal pages, GB/s",
    "read huge pages": "read, huge pages, GB/s",
}


def name_for(workload) -> str:
    """What bounds this work: reading keys and values for a decode step, else multiply-adds in the type sums have."""
    if workload.is_decode and workload.seqlen_k > 1:
        return "read"
    return "fma_float64" if workload.dtype == "float64" else "fma_float32"


def work_for(workload, mode: str) -> float:
    """Bytes or floating-point operations of one step, in the unit of `name_for`'s limit."""
    return workload.key_value_bytes() if name_for(workload) == "read" else workload.flops(mode)


def probe(name: str, threads: int) -> Callable[[], float]:
    """What measures a limit once. Memory is read from huge pages where the system has them."""
    from attn_ops import _core

    pages = {"huge_pages": True} if name == "read" else {}
    return lambda: _core.probe(name, num_threads=threads, seconds=_SECONDS[name], **pages)


def survey(threads: list[int], quick: bool) -> dict[str, dict[tuple[str, int], float]]:
    """Every limit (a key of TITLES) for every instruction set and number of threads: the best of three."""
    from attn_ops import _core

    found = {}
    for key in TITLES:
        name, _, pages = key.partition(" ")
        options = {"seconds": 0.002 if quick else 0.02, "huge_pages": pages == "huge pages"}
        if quick:
            options["bytes"] = 16 << 20  # which may be the cache's speed
        found[key] = {
            (isa, count): max(_core.probe(name, isa=isa, num_threads=count, **options) for _ in range(3))
            for isa in _core.isas()
            for count in threads
        }
    return found

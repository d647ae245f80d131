#!/usr/bin/env python3
"""Passes over shared memory (ptx/banks.py) for each score: what the tiles that pass cost, not what stays in a block.

    python tests/cuda_host/wavefronts.py        prints them beside FlashAttention-2's, computed

A multiprocessor makes one a cycle.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "helpers", "..")]

from cases import make_inputs  # noqa: E402
from implementations import Cuda  # noqa: E402

from cuda_host.ptx import launching  # noqa: E402
from cuda_host.ptx.banks import Banks  # noqa: E402

STAYS, PASSES = 128, (128, 256)  # rows, or keys: of both numbers the difference is counted


def per_score(dtype: str, head_dim: int) -> dict[str, float]:
    """Of the kernels of a plain call."""
    found = {}
    for roles, axis in ((("forward", "dq"), "seqlen_k"), (("dkdv",), "seqlen_q")):
        passes = [_passes(dtype, head_dim, axis, length) for length in PASSES]
        for role in roles:
            few, many = (next(n for name, n in of.items() if f"_{role}_" in name) for of in passes)
            found[role] = (many - few) / (STAYS * (PASSES[1] - PASSES[0]))
    return found


def _passes(dtype, head_dim, axis, length):
    shape = {"seqlen_q": STAYS, "seqlen_k": STAYS, axis: length}
    inputs = make_inputs(dtype, 1, num_heads=1, num_kv_heads=1, head_dim=head_dim, **shape)
    banks = Banks()
    with launching.interpreter(observers=[banks]) as interpreter:
        Cuda(False, False)(*inputs)
    return {launch.kernel: banks.passes(launch.kernel) for launch in interpreter.launches}


# Rows and keys of a tile of its backward on cards that lend a block 144 KB or more, and how many of its 8 warps lie
# along the first side of the products: scores and dp (rows, keys), dk and dv (keys, columns), dq (rows, columns). From
# flash_bwd_launch_template.h.
_TILES = {64: (128, 128, 4, 4, 4), 128: (64, 128, 2, 4, 2)}


def flash_attention_2(head_dim: int) -> float:
    """The same of its backward: operands of five products by ldmatrix (4 passes for 16 x 16), p and ds written, queries
    and their gradients arriving."""
    rows, keys, of_scores, of_keys, of_rows = _TILES[head_dim]

    def product(m, n, k, along_m):
        return 8 * k // 16 * (m // along_m + n * along_m // 8) // 16 * 4

    operands = 2 * product(rows, keys, head_dim, of_scores) + 2 * product(keys, head_dim, rows, of_keys)
    operands += product(rows, head_dim, keys, of_rows)
    return (operands + 2 * (rows * keys + rows * head_dim) * 2 // 128) / (rows * keys)


def main() -> int:
    launching.start(False)
    print("dtype     dim  forward     dq   dkdv  backward  FlashAttention-2's")
    for dtype, head_dim in (("bfloat16", 64), ("bfloat16", 96), ("bfloat16", 128), ("float16", 64), ("float16", 128)):
        of = per_score(dtype, head_dim)
        beside = f"{flash_attention_2(head_dim):.3f}" if head_dim in _TILES else ""
        numbers = (of["forward"], of["dq"], of["dkdv"], of["dq"] + of["dkdv"])
        print(f"{dtype:8}  {head_dim:3}" + "".join(f"  {x:5.3f}" for x in numbers) + f"  {beside:>10}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

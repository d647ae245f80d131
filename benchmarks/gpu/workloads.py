"""What is measured on a GPU: the shapes that papers and vendors publish, and decode steps of grouped queries."""

from __future__ import annotations

import dataclasses

from workloads import FORWARD, Workload

BACKWARD = "backward"  # the gradients alone, from what forward left
TITLES = {
    "forward": "forward, bfloat16",
    "backward": "backward, bfloat16",
    "decode": "decode, bfloat16: 1 query, 32/8 heads",
    "float32": "float32",
}
_TOKENS, _HIDDEN = 16384, 2048  # batch * seqlen, num_heads * head_dim
_HEAD_DIMS = (64, 128, 256)
_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
_DECODE = ((1, 1024), (1, 8192), (1, 65536), (8, 4096), (32, 4096))  # batch, keys


def prefill(head_dim, length, is_causal=False, dtype="bfloat16"):
    heads = _HIDDEN // head_dim
    name = f"d{head_dim}_{length}{'_causal' * is_causal}"
    return Workload(name, _TOKENS // length, heads, heads, length, length, head_dim, is_causal, dtype)


def decode(batch, keys):
    return Workload(f"decode_b{batch}_{keys}", batch, 32, 8, 1, keys, 128, dtype="bfloat16")


def section(name: str, quick: bool = False) -> list[tuple[Workload, str]]:
    """(workload, mode) of what a section measures."""
    if name == "decode":
        found = [(decode(*shape), FORWARD) for shape in _DECODE]
    elif name == "float32":
        shapes = [prefill(dim, 2048, causal, "float32") for dim in (64, 128) for causal in (False, True)]
        found = [(workload, mode) for workload in shapes for mode in (FORWARD, BACKWARD)]
    else:
        mode = FORWARD if name == "forward" else BACKWARD
        found = [(prefill(dim, n, causal), mode) for dim in _HEAD_DIMS for causal in (False, True) for n in _LENGTHS]
    if quick:
        found = [(_quick(workload), mode) for workload, mode in found[:: max(len(found) // 3, 1)]]
    return found


def _quick(workload: Workload) -> Workload:
    """A few hundred tokens of two sequences: to try the suite out, also without a GPU."""
    heads = min(workload.num_heads, 4)
    return dataclasses.replace(
        workload,
        name=f"{workload.name}-quick",
        batch=min(workload.batch, 2),
        num_heads=heads,
        num_kv_heads=heads * workload.num_kv_heads // workload.num_heads,
        seqlen_q=min(workload.seqlen_q, 128),
        seqlen_k=min(workload.seqlen_k, 128),
    )


def example(workload: Workload) -> Workload:
    """The same kind of work where the NumPy reference is instant, on which answers are checked; the head dimension
    stays, since it chooses the kernel."""
    group = workload.num_heads // workload.num_kv_heads
    length = 160
    rows = 1 if workload.is_decode else length
    heads = {"num_heads": 2 * group, "num_kv_heads": 2}
    return dataclasses.replace(workload, name="example", batch=2, seqlen_q=rows, seqlen_k=length, **heads)


def flops(workload: Workload, mode: str) -> float:
    """2 products forward, 5 backward, 2 operations a multiply-add; causal is half, recomputation does not count."""
    return workload.flops(FORWARD) * (2.5 if mode == BACKWARD else 1.0)


def input_bytes(workload: Workload) -> int:
    queries = workload.batch * workload.seqlen_q * workload.num_heads * workload.head_dim
    return workload.key_value_bytes() + 2 * queries * (4 if workload.dtype == "float32" else 2)

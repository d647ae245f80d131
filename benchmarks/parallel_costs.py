"""What it costs to divide attention among devices, on paper: `python benchmarks/parallel_costs.py`.

    python benchmarks/parallel_costs.py --links 50 --flops 400 --heads 32 --kv-heads 8 --head-dim 128 --dtype-bytes 2

For each method of `attn_ops.jax.parallel` the bytes that a device sends for one layer and one sequence, forward and
backward, the floating-point operations it does under a causal mask, and how long both take at the speeds given, if
neither waits for the other. tests/parallel holds the bytes to those of compiled programs.
"""

from __future__ import annotations

import argparse
import typing


METHODS = ("head_parallel", "all_gather_kv", "ring")


class Shape(typing.NamedTuple):
    """One layer of one sequence (or of a batch), of the whole."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    dtype_bytes: int = 2

    @property
    def query_bytes(self):
        return self.batch * self.tokens * self.heads * self.head_dim * self.dtype_bytes

    @property
    def key_bytes(self):
        return self.batch * self.tokens * self.kv_heads * self.head_dim * self.dtype_bytes


def sent(method: str, shape: Shape, devices: int) -> dict[str, float]:
    """Bytes that one device sends: {"forward": …, "backward": …}."""
    query, key = shape.query_bytes / devices, shape.key_bytes / devices  # of a device's share
    others = devices - 1
    if method == "head_parallel":  # query, key, value and out there; cotangent and gradients back
        copies = max(devices // shape.kv_heads, 1)  # of key heads that are fewer than devices
        once = (2 * query + 2 * key * copies) * others / devices
        return {"forward": once, "backward": once}
    if method == "all_gather_kv":  # each share to all others; the sums of gradients likewise
        return {"forward": 2 * key * others, "backward": 2 * key * others}
    if method == "ring":  # gradients are sums of 32 bits, and go once more, home
        wide = 4 / min(shape.dtype_bytes, 4)
        return {"forward": 2 * key * others, "backward": 2 * key * (others + wide * (devices if others else 0))}
    raise ValueError(f"sent: method must be head_parallel, all_gather_kv or ring, got {method!r}")


def operations(shape: Shape) -> float:
    """Of products, of the whole under a causal mask, forward and backward: 2 products there, 5 here, half of all
    pairs."""
    return (2 + 5) * 2 * shape.batch * shape.heads * shape.head_dim * shape.tokens**2 / 2


def busiest(method: str, shape: Shape, devices: int, order: str = "contiguous") -> float:
    """The share of `operations` that the device with the most to do has. A ring computes shares anew for its
    backward."""
    again = (2 + 5 + 2) / (2 + 5) if method == "ring" else 1
    if method == "head_parallel" or order == "zigzag":
        return again / devices
    return again * (2 * devices - 1) / devices**2  # the last rows see everything


def held(method: str, shape: Shape, devices: int) -> float:
    """Bytes of keys and values that a device holds at a time, forward."""
    share = 2 * shape.key_bytes / devices
    copies = max(devices // shape.kv_heads, 1) if method == "head_parallel" else 1
    return share * {"head_parallel": copies, "ring": 2, "all_gather_kv": devices}[method]


def rows(shape: Shape, devices: int, links: float, flops: float):
    """(method, order, bytes sent, bytes of keys held, seconds of links, seconds of work) of each method that can."""
    for method, order in (
        ("head_parallel", "contiguous"),
        ("all_gather_kv", "zigzag"),
        ("ring", "contiguous"),
        ("ring", "zigzag"),
    ):
        if method == "head_parallel" and (
            shape.heads % devices or (shape.kv_heads % devices and devices % shape.kv_heads)
        ):
            continue
        total = sum(sent(method, shape, devices).values())
        work = busiest(method, shape, devices, order) * operations(shape)
        yield method, order, total, held(method, shape, devices), total / links, work / flops


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--links", type=float, default=50, help="GB/s that a device sends (default: 50, a 400 Gbit/s network)"
    )
    parser.add_argument("--flops", type=float, default=400, help="Tflop/s of a device in attention (default: 400)")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype-bytes", type=int, default=2)
    given = parser.parse_args()
    print("| tokens | devices | method | order | MB sent | MB of keys held | ms of links | ms of work |")
    print("|---|---|---|---|---|---|---|---|")
    for tokens in (2**15, 2**17, 2**20):
        for devices in (8, 64, 1024):
            shape = Shape(tokens, given.heads, given.kv_heads, given.head_dim, 1, given.dtype_bytes)
            for method, order, total, keys, links, work in rows(shape, devices, given.links * 1e9, given.flops * 1e12):
                print(
                    f"| {tokens // 1024}k | {devices} | {method} | {order} | {total / 1e6:,.0f} | {keys / 1e6:,.1f} "
                    f"| {1e3 * links:,.2f} | {1e3 * work:,.2f} |"
                )


if __name__ == "__main__":
    main()

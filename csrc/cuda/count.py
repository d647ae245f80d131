#!/usr/bin/env python3
"""Counts what the compiled kernels are made of, without a card: counts.csv beside this file.

    python csrc/cuda/count.py                     compiles all kernels for sm_80 and sm_90a, and writes the table
    python csrc/cuda/count.py --kernels 'dq_bf16_128.*' --no-table      prints some of it
    python csrc/cuda/count.py --architectures sm_100,sm_120             prints the same of others

It needs nvcc, and for all but registers NVIDIA's disassembler: pip install nvidia-cuda-nvdisasm==13.2.86, or $NVDISASM.

Of each kernel and architecture:

    threads, shared_bytes, registers, spilled   of a block, of a thread
    blocks       that a multiprocessor has room for (by its shared memory: 164 KB on sm_80, 100 on sm_120, else 228)
    instructions, hmma, ldsm, ldgsts, lds, sts   in its code
    loop_...     the same on the way once around its main loop: the one with the most products, by the way with the most
                 products and copies and, of those, the fewest instructions: a tile that all see, aligned, not the last.
                 Loops inside it (over a part of the head dim) count once

tests/cuda_host/test_counts.py tells what has changed by more than 5 %.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import compile as compiler

HERE = Path(__file__).resolve().parent
TABLE = HERE / "counts.csv"
ARCHITECTURES = ("sm_80", "sm_90a")  # of the table
SHARED_KB = {"sm_80": 164, "sm_90a": 228, "sm_100": 228, "sm_120": 100}  # of a multiprocessor
OPCODES = ("HMMA", "LDSM", "LDGSTS", "LDS", "STS")
FIELDS = ["kernel", "architecture", "threads", "shared_bytes", "registers", "spilled", "blocks", "instructions"]
FIELDS += [opcode.lower() for opcode in OPCODES]
FIELDS += ["loop_instructions", *(f"loop_{opcode.lower()}" for opcode in OPCODES[:3])]

# --- What config.h says ---------------------------------------------------------------------------------------------

_SHAPES = r"""
#include <cstdio>
#include "kernel_names.h"
using namespace attn_ops::cuda;
int main() {
  for (int r = 0; r < kNumRoles; ++r)
    for (int m = 0; m < kNumMaths; ++m)
      for (int dim : kDims)
        for (int plain = 0; plain < 2; ++plain) {
          const Role role = static_cast<Role>(r);
          const Math math = static_cast<Math>(m);
          const KernelName name{role, math, dim, plain != 0};
          const BlockShape shape = block_shape(name);
          std::printf("%s %d %d\n", KernelText(name).data, shape.threads, shape.shared_bytes);
        }
}
"""


def shapes() -> dict[str, tuple[int, int]]:
    """Threads and bytes of shared memory of a block, by kernel."""
    with tempfile.TemporaryDirectory() as directory:
        source, program = Path(directory) / "shapes.cc", Path(directory) / "shapes"
        source.write_text(_SHAPES)
        command = [os.environ.get("CXX", "g++"), "-std=c++17", f"-I{HERE}", str(source), "-o", str(program)]
        subprocess.run(command, check=True)
        lines = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: (int(threads), int(size)) for name, threads, size in map(str.split, lines)}


def blocks(architecture: str, threads: int, shared_bytes: int, registers: int) -> int:
    """How many of a kernel a multiprocessor has room for: registers go by 256 to a warp, and a KB of shared memory is
    the system's.
    """
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // of_warp // (threads // 32)
    by_memory = SHARED_KB[architecture] * 1024 // (shared_bytes + 1024)
    return min(by_registers, by_memory, 2048 // threads, 32)


# --- What the code is made of ---------------------------------------------------------------------------------------


def find_disassembler() -> str | None:
    places = [os.environ.get("NVDISASM", "nvdisasm"), "/usr/local/cuda/bin/nvdisasm"]
    places += map(str, compiler.packages("nvidia/cu13/bin/nvdisasm"))
    return next(filter(None, map(shutil.which, places)), None)


_ENDS = ("BRA", "EXIT", "RET", "CALL")  # of basic blocks. With CALL, sm_80 leaves loops


class Block:
    """Instructions that are executed one after the other, and where it goes on."""

    def __init__(self):
        self.counts = dict.fromkeys(("instructions", *(opcode.lower() for opcode in OPCODES)), 0)
        self.targets: list[str] = []  # labels
        self.falls_through = True

    def add(self, guard: str | None, opcode: str, operands: str):
        name = opcode.split(".")[0]
        if name == "NOP":
            return
        self.counts["instructions"] += 1
        if name in OPCODES:
            self.counts[name.lower()] += 1
        if name in ("BRA", "CALL") and (label := re.search(r"\.L_\w+", operands)):
            self.targets.append(label[0])
        if guard is None and name in _ENDS and name != "CALL":
            self.falls_through = False


def blocks_of_code(text: str) -> dict[str, list[tuple[str | None, Block]]]:
    """By kernel, its basic blocks in their order, with their labels."""
    kernels: dict[str, list[tuple[str | None, Block]]] = {}
    current: list[tuple[str | None, Block]] = []
    for line in text.splitlines():
        if section := re.match(r"\.text\.(\w+):", line):
            current = kernels.setdefault(section[1], [(None, Block())])
        elif label := re.match(r"(\.L_\w+):", line):
            current.append((label[1], Block()))
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", line):
            current[-1][1].add(*instruction.groups())
            if instruction[2].split(".")[0] in _ENDS:
                current.append((None, Block()))
    return kernels


def around_the_loop(code: list[tuple[str | None, Block]]) -> dict[str, int]:
    """Counts on the way once around the main loop (see above); of no loop with products, zeros."""
    number = {label: i for i, (label, _) in enumerate(code) if label}
    following = [
        [number[label] for label in block.targets if label in number]
        + [i + 1] * (block.falls_through and i + 1 < len(code))
        for i, (_, block) in enumerate(code)
    ]
    order = _order(following)
    place = {block: i for i, block in enumerate(order)}
    loops = [(block, head) for block in order for head in following[block] if place[head] <= place[block]]
    ways = [_best_way(code, following, order, place, head, end) for end, head in loops]
    # Of a loop and those inside it, the outer one.
    found = max(ways, key=lambda way: (way["hmma"], way["ldgsts"], way["instructions"]), default=None)
    return found if found and found["hmma"] else dict.fromkeys(Block().counts, 0)


def _order(following) -> list[int]:
    """Blocks that can be reached, each before those that follow it, but for the edges that close loops."""
    seen, finished, stack = {0}, [], [(0, iter(following[0]))]
    while stack:
        block, rest = stack[-1]
        for other in rest:
            if other not in seen:
                seen.add(other)
                stack.append((other, iter(following[other])))
                break
        else:
            finished.append(block)
            stack.pop()
    return finished[::-1]


def _best_way(code, following, order, place, head, end):
    """From `head` to `end` without closing a loop."""
    best = {head: code[head][1].counts}
    for block in order[place[head] : place[end] + 1]:
        if block not in best or block == end:
            continue
        for other in following[block]:
            if place[block] < place[other] <= place[end]:
                counts = {name: best[block][name] + count for name, count in code[other][1].counts.items()}
                if other not in best or _rank(counts) > _rank(best[other]):
                    best[other] = counts
    return best.get(end, dict.fromkeys(Block().counts, 0))


def _rank(counts):
    return counts["hmma"], counts["ldgsts"], -counts["instructions"]


def measure(log: str, image: Path, architecture: str) -> list[dict]:
    """The rows of the kernels of a cubin and of what ptxas said of them. Without a disassembler they lack what is in
    the code.
    """
    disassembler = find_disassembler()
    code = {}
    if disassembler:
        found = subprocess.run([disassembler, "-c", str(image)], capture_output=True, text=True, check=True)
        code = blocks_of_code(found.stdout)
    known, rows = shapes(), []
    for kernel in compiler.kernels_in(log):
        if kernel.name not in known:
            continue
        threads, shared_bytes = known[kernel.name]
        row = {"kernel": kernel.name, "architecture": architecture, "threads": threads, "shared_bytes": shared_bytes}
        row |= {"registers": kernel.registers, "spilled": kernel.stores + kernel.loads}
        row["blocks"] = blocks(architecture, threads, shared_bytes, kernel.registers)
        if code:
            own = [block.counts for _, block in code[kernel.name]]
            row |= {name: sum(counts[name] for counts in own) for name in own[0]}
            loop = around_the_loop(code[kernel.name])
            row |= {field: loop[field.removeprefix("loop_")] for field in FIELDS if field.startswith("loop_")}
        rows.append(row)
    return rows


def count(source: Path, architecture: str) -> list[dict]:
    """The rows of a file of kernels, or of its PTX."""
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory) / "image.cubin"
        return measure(compiler.run_nvcc(compiler.find_nvcc(), source, architecture, image), image, architecture)


# --------------------------------------------------------------------------------------------------------------------


def read_table() -> tuple[str, dict[tuple[str, str], dict]]:
    """Of counts.csv: the compiler it was made with, and its rows by kernel and architecture, of integers."""
    version, *lines = TABLE.read_text().splitlines()
    rows = csv.DictReader(lines)
    numbers = ({k: v if k in FIELDS[:2] else int(v) for k, v in row.items()} for row in rows)
    return version.lstrip("# "), {(row["kernel"], row["architecture"]): row for row in numbers}


def nvcc_release() -> str:
    found = subprocess.run([str(compiler.find_nvcc()), "--version"], capture_output=True, text=True, check=True)
    return re.search(r"release [\d.]+, V[\d.]+", found.stdout)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default=".*", help="only those whose name has this regular expression in it")
    parser.add_argument("--architectures", help=f"of {', '.join(SHARED_KB)}; without it, those of the table")
    parser.add_argument("--ptx", type=Path, help="which they are made from, compiled before")
    parser.add_argument("--no-table", action="store_true", help="print, and write nothing")
    chosen = parser.parse_args()
    architectures = chosen.architectures.split(",") if chosen.architectures else ARCHITECTURES
    prints = chosen.no_table or chosen.architectures is not None
    if compiler.find_nvcc() is None or (find_disassembler() is None and not prints):
        print("count.py: nvcc and nvdisasm are needed (see --help)", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as directory:
        rows = []
        for architecture in architectures:
            source = compiler.ptx_of(architecture)
            ptx = chosen.ptx or Path(directory) / f"{source}.ptx"
            if chosen.ptx is None and not ptx.exists():
                compiler.run_nvcc(compiler.find_nvcc(), HERE / "kernels.cu", source, ptx)
            rows += count(ptx, architecture)
    rows = sorted(
        (row for row in rows if re.search(chosen.kernels, row["kernel"])),
        key=lambda row: (row["kernel"], row["architecture"]),
    )
    with open(os.devnull if prints else TABLE, "w", newline="") as file:
        file.write(f"# nvcc {nvcc_release()}\n")
        for out in (file, sys.stdout) if prints else (file,):
            writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

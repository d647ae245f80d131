"""Compares peers on workloads of your choice in interleaved rounds of one process, and prints Markdown tables.

    python benchmarks/compare.py                                      # the main workloads, 1 thread, then all
    python benchmarks/compare.py --quick                              # short versions, to try it out
    python benchmarks/compare.py --workloads long_2048 long_2048_causal --modes forward_backward --threads 1 2
    python benchmarks/compare.py --peers attn_ops keras_graph torch_sdpa --rounds 30 --output table.md

Each thread count is a process of its own, since the frameworks size their thread pools once. In a process, every
peer is first checked against the float64 reference, then all take turns in random order. Columns are the median and the
minimum over the rounds, by the clock (wall) and of the processor in all threads (cpu), useful GFLOP/s and the part of
the machine's limit (see limits.py) at the minimum wall time, and the ratio of the medians to those of the first peer:
above 1, that peer is slower. The same rows, and which targets they meet: python -m attn_ops bench --report DIR.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

import runner
from report import tables
from workloads import FORWARD, FORWARD_BACKWARD, MODES, WORKLOADS, default_names

_DEFAULT_WORKLOADS = ("bert_base_512", "gpt2_1024", "long_2048", "long_2048_causal", "llama8b_decode_8k")


def main() -> None:
    arguments = _arguments()
    effort = runner.Effort(arguments.rounds, arguments.seconds)
    groups = list(_groups(arguments))
    rows, notes = [], []
    for threads in arguments.threads:

        def progress(index, done, total, threads=threads):
            if done == 0:
                print(f"[{index + 1}/{len(groups)}] {groups[index]}, {threads} threads", file=sys.stderr, flush=True)

        measured, said = runner.run(groups, threads, effort, progress)
        rows += measured
        notes += said
    text = "\n\n".join([tables.heading(rows), tables.details(rows) or "Nothing was measured.", *notes])
    print(text)
    if arguments.output:
        pathlib.Path(arguments.output).write_text(text + "\n")


def _groups(arguments):
    peers = tuple(arguments.peers) if arguments.peers else None
    for mode in arguments.modes:
        for name in default_names(mode) if "all" in arguments.workloads else arguments.workloads:
            workload = WORKLOADS[name].quick() if arguments.quick else WORKLOADS[name]
            yield runner.Group("compare", (runner.Entry(workload, mode, peers),))


def _arguments() -> argparse.Namespace:
    cpus = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=_DEFAULT_WORKLOADS, choices=[*WORKLOADS, "all"])
    parser.add_argument("--modes", nargs="+", default=(FORWARD, FORWARD_BACKWARD), choices=MODES)
    parser.add_argument("--peers", nargs="+", help="only these (default: all that are installed)")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, cpus}))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60.0, help="no new round after this long (3 are run anyway)")
    parser.add_argument("--quick", action="store_true", help="short versions of the workloads")
    parser.add_argument("--output", help="also write the tables to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()

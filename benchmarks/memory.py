"""Memory growth of one step, measured in a fresh process for each peer.

    python benchmarks/memory.py                               # (1,16,4096,64), forward and forward + backward
    python benchmarks/memory.py --workload long_2048 --peers attn_ops keras_graph torch_sdpa

Growth is the peak of the resident set during the first step above the resident set just before it: inputs are
there already, outputs and gradients are counted. The step has been traced, and libraries and thread pools have been
warmed up on a miniature; XLA compiles within the step.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import runner
from attn_ops.cli import peak_memory
from workloads import FORWARD, FORWARD_BACKWARD, MODES, WORKLOADS, make_inputs

DEFAULT_PEERS = ("attn_ops", "attn_ops_composite", "keras_graph", "keras_xla", "torch_sdpa", "ort_mha")
_RESULT = "growth_bytes="


def measure(workload: str, mode: str, peer: str, threads: int, quick: bool = False) -> int:
    """Bytes by which one step grows the resident set of a fresh process.

    Raises:
        RuntimeError: the process failed, with the end of its output.
    """
    command = [sys.executable, __file__, "--child", "--workload", workload, "--mode", mode, "--peers", peer]
    command += ["--threads", str(threads)] + ["--quick"] * quick
    done = subprocess.run(command, capture_output=True, text=True, env=runner.environment(threads))
    for line in done.stdout.splitlines():
        if line.startswith(_RESULT):
            return int(line.removeprefix(_RESULT))
    raise RuntimeError(f"{peer} on {workload}, {mode}, ended with status {done.returncode}: {done.stderr[-2000:]}")


def _measure_here(workload, mode: str, peer_name: str, threads: int) -> int:
    import peers

    peers.set_threads(threads)
    peer = peers.PEERS[peer_name]
    small = workload.miniature()
    peer.prepare(small, mode, make_inputs(small))()
    step = peer.prepare(workload, mode, make_inputs(workload))
    return peak_memory.growth(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="long_4096", choices=WORKLOADS)
    parser.add_argument("--mode", nargs="+", default=[FORWARD, FORWARD_BACKWARD], choices=MODES)
    parser.add_argument("--peers", nargs="+", default=None)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="a short version of the workload")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    workload = WORKLOADS[arguments.workload]
    if arguments.quick:
        workload = workload.quick()
    if arguments.child:
        growth = _measure_here(workload, arguments.mode[0], arguments.peers[0], arguments.threads)
        print(f"{_RESULT}{growth}", flush=True)
        return

    import peers

    chosen = arguments.peers or DEFAULT_PEERS
    print(f"Memory growth of the first step, MB (10^6 bytes): {workload}, {arguments.threads} threads\n")
    print(f"| peer | {' | '.join(arguments.mode)} |\n|---|{'---:|' * len(arguments.mode)}")
    able = {mode: {peer.name for peer in peers.select(workload, mode, chosen)} for mode in arguments.mode}
    for name in chosen:
        cells = []
        for mode in arguments.mode:
            if name not in able[mode]:
                cells.append("–")
                continue
            print(f"  measuring {name}, {mode} ...", file=sys.stderr, flush=True)
            growth = measure(arguments.workload, mode, name, arguments.threads, arguments.quick)
            cells.append(f"{growth / 1e6:.0f}")
        if any(cell != "–" for cell in cells):
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

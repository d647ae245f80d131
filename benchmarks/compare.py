"""Compares all peers in interleaved rounds of one process and prints Markdown tables. Ratios come from here.

    python benchmarks/compare.py                                      # the main workloads, 1 thread, then all
    python benchmarks/compare.py --quick                              # short versions, to try it out
    python benchmarks/compare.py --workloads long_2048 long_2048_causal --modes forward_backward --threads 1 2
    python benchmarks/compare.py --peers attn_ops keras_graph torch_sdpa --rounds 30 --output table.md

Each thread count is a process of its own, since the frameworks size their thread pools once. In a process, every
peer is first checked against the float64 reference, then all take turns in random order. Columns are the median and the
minimum over the rounds, by the clock (wall) and of the processor in all threads (cpu), useful GFLOP/s at the
minimum wall time, and the ratio of the median to that of the first peer: above 1, that peer is slower.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import time

import interleave
from workloads import (
    FORWARD,
    FORWARD_BACKWARD,
    LAYER,
    LAYER_TRAINING,
    MODES,
    WORKLOADS,
    default_names,
    make_inputs,
)

_DEFAULT_WORKLOADS = ("bert_base_512", "gpt2_1024", "long_2048", "long_2048_causal", "llama8b_decode_8k")
_TITLES = {
    FORWARD: "forward",
    FORWARD_BACKWARD: "forward + backward",
    LAYER: "Keras layer, inference",
    LAYER_TRAINING: "Keras layer, training step",
}


def main() -> None:
    arguments = _arguments()
    if arguments.child:
        _child(arguments)
        return
    results = []
    for threads in arguments.threads:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", "--threads", str(threads)]
        environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, "OMP_NUM_THREADS": str(threads)}
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for line in child.stdout:
            if line.startswith("{"):
                results.append(json.loads(line))
            else:
                sys.stderr.write(line)
        if child.wait():
            sys.exit(f"compare.py: the process for {threads} threads ended with status {child.returncode}")
    report = _markdown(results)
    print(report)
    if arguments.output:
        pathlib.Path(arguments.output).write_text(report + "\n")


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
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _child(arguments: argparse.Namespace) -> None:
    import peers

    (threads,) = arguments.threads
    peers.set_threads(threads)
    for mode in arguments.modes:
        names = default_names(mode) if "all" in arguments.workloads else arguments.workloads
        for name in names:
            workload = WORKLOADS[name].quick() if arguments.quick else WORKLOADS[name]
            chosen = peers.select(workload, mode, arguments.peers)
            if not chosen:
                continue
            errors = {peer.name: peers.check(peer, workload, mode) for peer in chosen}
            inputs = make_inputs(workload)
            steps = {peer.name: peer.prepare(workload, mode, inputs) for peer in chosen}
            progress = _Progress(f"{workload}, {_TITLES[mode]}, {threads} threads, {len(steps)} peers")
            samples, rounds = interleave.run(steps, arguments.rounds, arguments.seconds, progress)
            record = {
                "workload": str(workload),
                "mode": mode,
                "threads": threads,
                "flops": workload.flops(mode),
                "rounds": rounds,
                "versions": peers.versions(),
                "peers": {
                    name: {
                        "error": errors[name],
                        **{f"{clock}_median": sample.median(clock) for clock in ("wall", "cpu")},
                        **{f"{clock}_min": sample.minimum(clock) for clock in ("wall", "cpu")},
                    }
                    for name, sample in samples.items()
                },
            }
            print(json.dumps(record), flush=True)


class _Progress:
    """Rounds done and time left, on one line of a terminal, or a line at the start and the end elsewhere."""

    def __init__(self, title: str):
        self._title = title
        self._begin = None
        print(f"{title}: warming up ...", file=sys.stderr, end="" if sys.stderr.isatty() else "\n", flush=True)

    def __call__(self, done: int, total: int) -> None:
        self._begin = self._begin or time.monotonic()
        spent = time.monotonic() - self._begin
        if done == total:
            line, end = f"{done} rounds in {spent:.0f} s", "\n"
        elif sys.stderr.isatty():
            left = f", {spent / done * (total - done):.0f} s left at most" if done else ""
            line, end = f"round {done + 1}/{total}{left}", ""
        else:
            return
        start = "\r\033[K" if sys.stderr.isatty() else ""
        print(f"{start}{self._title}: {line}", file=sys.stderr, end=end, flush=True)


def _markdown(results: list[dict]) -> str:
    if not results:
        return "Nothing was measured."
    versions = ", ".join(f"{name} {version}" for name, version in results[0]["versions"].items())
    lines = [f"{_processor()}, {datetime.date.today()}. {versions}, Python {platform.python_version()}.", ""]
    for result in results:
        threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
        lines += [f"**{result['workload']}, {_TITLES[result['mode']]}, {threads}** ({result['rounds']} rounds)", ""]
        lines += ["| peer | wall ms: median | min | cpu ms: median | min | GFLOP/s | x wall | x cpu | error |"]
        lines += ["|---|" + "---:|" * 8]
        first = next(iter(result["peers"].values()))
        for name, row in result["peers"].items():
            times = [f"{1e3 * row[key]:.3g}" for key in ("wall_median", "wall_min", "cpu_median", "cpu_min")]
            ratios = [f"{row[key] / first[key]:.2f}" for key in ("wall_median", "cpu_median")]
            rate = f"{result['flops'] / row['wall_min'] / 1e9:.1f}"
            lines.append(f"| {name} | {' | '.join([*times, rate, *ratios])} | {row['error']:.0e} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _processor() -> str:
    """The processor's name, which hypervisors shorten, so family and model too, and what our kernels use of it."""
    from attn_ops import _core

    lines = (line.split(":", 1) for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in lines}
    name = facts.get("model name", platform.machine())
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return f"{name}, {os.cpu_count()} CPUs, kernels for {_core.default_isa()}"


if __name__ == "__main__":
    main()

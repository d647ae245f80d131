"""Measures groups of work in interleaved rounds, in a process of its own for each number of threads.

The frameworks size their thread pools once, so a number of threads needs a process. What is to be compared stands in
one group: all its steps take turns in every round, with probes of the machine's limits among them, so that what
disturbs the machine disturbs all alike.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

import limits
from attn_ops.cli import interleave
from rows import Row
from workloads import Workload, make_inputs

_ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Entry:
    """A workload in a mode, by some peers (None: all that are installed)."""

    workload: Workload
    mode: str
    peers: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """What is interleaved."""

    section: str
    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        first = self.entries[0]
        more = f" and {len(self.entries) - 1} more" if len(self.entries) > 1 else ""
        return f"{self.section}: {first.workload}, {first.mode.replace('_', ' + ')}{more}"


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure each group."""

    rounds: int = 15
    seconds: float = 10.0
    turn: float = interleave.TURN


def environment(threads: int) -> dict[str, str]:
    """Of a process that measures: our package is found also where it is not installed."""
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    return {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}


def run(
    groups: Sequence[Group],
    threads: int,
    effort: Effort,
    progress: Callable[[int, int, int], None],
) -> tuple[list[Row], list[str]]:
    """Measures the groups in a new process.

    Args:
        groups: what to measure.
        threads: of every peer.
        effort: how long.
        progress: called with (index of the group, rounds done, rounds) as they go.

    Returns:
        The rows, and notes: peers that failed and why.

    Raises:
        RuntimeError: the process failed, with the end of what it said.
    """
    order = {"groups": [dataclasses.asdict(group) for group in groups], "threads": threads}
    order["effort"] = dataclasses.asdict(effort)
    rows, notes = [], []
    # Its standard error goes into a file: frameworks talk, and nobody wants to hear it unless something fails.
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=environment(threads),
        )
        try:
            child.stdin.write(json.dumps(order))
            child.stdin.close()
            for line in child.stdout:
                event, *content = json.loads(line) if line.startswith("[") else ("other",)
                if event == "progress":
                    progress(*content)
                elif event == "row":
                    rows.append(Row(**content[0]))
                elif event == "note":
                    notes.append(content[0])
            status = child.wait()
        finally:
            child.kill()  # where this process was interrupted; one that has ended does not mind
            child.wait()
        if status:
            said.seek(0)
            raise RuntimeError(f"the process for {threads} threads ended with status {status}: {said.read()[-2000:]}")
    return rows, notes


def _serve() -> None:
    """The new process: does the order on standard input and tells of it on standard output, a line an event."""
    order = json.load(sys.stdin)
    # Libraries print to standard output; the events must not be among that.
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(*event) -> None:
        print(json.dumps(event), file=events, flush=True)

    import peers

    peers.set_threads(order["threads"])
    versions = peers.versions()
    for index, group in enumerate(order["groups"]):
        entries = []
        for entry in group["entries"]:
            fields = entry["workload"]
            fields["window"] = fields["window"] and tuple(fields["window"])
            entries.append(Entry(Workload(**fields), entry["mode"], entry["peers"]))
        measured, notes = _measure(entries, Effort(**order["effort"]), order["threads"], versions, index, tell)
        for note in notes:
            tell("note", note)
        for row in measured:
            tell("row", dataclasses.asdict(row))


def _measure(entries, effort, threads, versions, index, tell) -> tuple[list[Row], list[str]]:
    import peers

    tell("progress", index, 0, effort.rounds)
    steps, about, notes = {}, {}, []
    for entry in entries:
        inputs = make_inputs(entry.workload)
        for peer in peers.select(entry.workload, entry.mode, entry.peers):
            name = f"{entry.workload.name} {entry.mode} {peer}"
            try:
                error = peers.check(peer, entry.workload.miniature(), entry.mode)
                step = peer.prepare(entry.workload, entry.mode, inputs)
                step()
            except Exception as failure:  # whatever another library raises; ours must not fail
                if peer.name.startswith("attn_ops"):
                    raise
                notes.append(f"{name}, {threads} threads: not measured, {type(failure).__name__}: {failure}"[:300])
                continue
            steps[name], about[name] = step, (entry, peer, error)
    probes = {name: limits.probe(name, threads) for name in {limits.name_for(entry.workload) for entry in entries}}
    samples, rates, rounds = interleave.run(
        steps,
        effort.rounds,
        effort.seconds,
        lambda done, total: tell("progress", index, done, total),
        probes,
        effort.turn,
    )
    rows = []
    for name, sample in samples.items():
        entry, peer, error = about[name]
        workload, limit = entry.workload, limits.name_for(entry.workload)
        # Best against best: a disturbed probe would make a speed look better than it is.
        best = sample.minimum("wall")
        rows.append(
            Row(
                workload=workload.name,
                mode=entry.mode,
                threads=threads,
                peer=peer.name,
                shape=workload.shape,
                options=workload.options,
                version=", ".join(f"{module} {versions[module]}" for module in peer.modules if module in versions),
                rounds=rounds,
                wall_median=sample.median("wall"),
                wall_min=best,
                cpu_median=sample.median("cpu"),
                cpu_min=sample.minimum("cpu"),
                gflops_per_second=workload.flops(entry.mode) / best / 1e9,
                limit=limit,
                limit_per_second=rates[limit],
                percent_of_limit=100 * limits.work_for(workload, entry.mode) / best / rates[limit],
                error=error,
            )
        )
    return rows, notes


if __name__ == "__main__":
    _serve()

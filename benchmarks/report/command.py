"""python -m attn_ops bench --report DIR: measures us and every installed peer, and says which speed targets are met.

Writes report.md, results.csv and charts (PNG) into DIR and prints the table of targets. All that is compared takes
turns in the rounds of one process, in a process of its own for each number of threads; every answer is first checked
against the float64 reference. A part of a limit is the best time against the best that probes of this machine gave in
the same rounds.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import pathlib
import sys
import tempfile

import limits
import memory
import peers
import rows
import runner
from attn_ops import kernels
from rows import Row
from workloads import FORWARD_BACKWARD, WORKLOADS

from . import comparison, sections, tables, targets
from .progress import Progress

_BAD_OPTIONS = 2  # exit status
_NEEDED = {"rich": "rich", "matplotlib": "matplotlib", "ml_dtypes": "ml_dtypes"}  # module: what pip installs
_QUICK = runner.Effort(rounds=3, seconds=0.2, turn=0.002)
_QUICK_NOTE = (
    "**Quick run: short shapes and few rounds. These figures are not to be quoted, and no target is judged by them.**"
)


def main(argv=None) -> int:
    """Returns the exit status: 0, 1 when a process failed, 2 for bad options, 3 when a row became slower."""
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        names = " ".join(missing)
        print(f"bench --report needs {', '.join(missing)}: pip install {names}", file=sys.stderr)
        return _BAD_OPTIONS
    arguments = _parser().parse_args(argv)
    if kernels.core() is None:
        print(f"bench --report: {kernels.core_unavailable_reason()}", file=sys.stderr)
        return _BAD_OPTIONS
    try:
        _check(arguments)
        old = rows.read(arguments.compare) if arguments.compare else []
        directory = _writable(arguments.report)
    except ValueError as error:
        print(f"bench --report: {error}", file=sys.stderr)
        return _BAD_OPTIONS
    try:
        measured, notes = _measure(arguments, directory / "results.csv")
        surveyed = limits.survey(arguments.threads, arguments.quick)
    except RuntimeError as error:
        print(f"bench --report: {error}", file=sys.stderr)
        return 1
    return _tell(arguments, directory, measured, notes, surveyed, old)


def _parser() -> argparse.ArgumentParser:
    cpus = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        prog="python -m attn_ops bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--report", metavar="DIR", type=pathlib.Path, required=True, help="where to write; made if it does not exist")
    add("--sections", nargs="+", metavar="SECTION", help=f"only these of {', '.join(sections.TITLES)}")
    add("--peers", nargs="+", metavar="PEER", help="only these beside attn_ops (default: all that are installed)")
    add("--threads", nargs="+", type=int, default=sorted({1, cpus}), help="numbers of threads (default: 1 and all)")
    add("--rounds", type=int, default=15, help="of each group of peers, at most (default: %(default)s)")
    add("--seconds", type=float, default=10.0, help="no new round of a group after this long; 3 are run anyway")
    add("--quick", action="store_true", help="short shapes, few rounds: to try it out in some 3 minutes")
    add("--compare", metavar="OLD.csv", type=pathlib.Path, help="results.csv of an earlier report")
    add("--fail-if-slower", metavar="FACTOR", type=float, help="status 3 if a row of attn_ops takes more than FACTOR "
        "times its median wall time in OLD.csv")  # fmt: skip
    return parser


def _check(arguments) -> None:
    """Raises ValueError for options that are none."""
    cpus = len(os.sched_getaffinity(0))
    if any(not 1 <= count <= cpus for count in arguments.threads):
        raise ValueError(f"--threads ({_words(arguments.threads)}) must be from 1 to the {cpus} CPUs of this process")
    unknown = [name for name in arguments.sections or () if name not in sections.TITLES]
    if unknown:
        raise ValueError(f"--sections ({', '.join(unknown)}) must be among {', '.join(sections.TITLES)}")
    if arguments.rounds < 1:
        raise ValueError(f"--rounds ({arguments.rounds}) must be at least 1")
    if not arguments.seconds > 0:
        raise ValueError(f"--seconds ({arguments.seconds}) must be above 0")
    comparison.check_options(arguments)
    if arguments.peers:
        unknown = [name for name in arguments.peers if name not in peers.PEERS]
        if unknown:
            raise ValueError(f"--peers ({', '.join(unknown)}) must be among {', '.join(peers.PEERS)}")
    arguments.threads = sorted(set(arguments.threads))
    arguments.sections = arguments.sections or list(sections.TITLES)


def _words(values) -> str:
    return ", ".join(map(str, values))


def _writable(directory: pathlib.Path) -> pathlib.Path:
    """The directory, made if need be; found out before anything is measured."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise ValueError(f"--report ({directory}) must be a directory that can be written: {error}") from None
    return directory


def _measure(arguments, results: pathlib.Path) -> tuple[list[Row], list[str]]:
    """Everything that the sections ask for; written whenever a process is done, for a run may be interrupted."""
    effort = _QUICK if arguments.quick else runner.Effort(arguments.rounds, arguments.seconds)
    most = max(arguments.threads)
    plan = {
        threads: [
            group
            for section in arguments.sections
            for group in sections.groups(section, threads, most, arguments.peers, arguments.quick)
        ]
        for threads in arguments.threads
    }
    fresh = sections.memory_runs(arguments.peers, arguments.quick) if "memory" in arguments.sections else []
    measured, notes, before = [], [], 0
    with Progress(sum(map(len, plan.values())) + len(fresh)) as progress:
        for threads, groups in plan.items():
            if groups:
                advance = functools.partial(_advance, progress, before, threads, groups)
                found, said = runner.run(groups, threads, effort, advance)
                measured = rows.merge(measured + found)
                notes += said
                rows.write(results, measured)
            before += len(groups)
        for name, peer in fresh:
            progress.advance(f"memory: {name}, {peer}", before)
            found, said = _measure_memory(name, peer, most, arguments.quick)
            measured = rows.merge(measured + found)
            notes += said
            rows.write(results, measured)
            before += 1
    return measured, notes


def _advance(progress, before, threads, groups, index, done, total) -> None:
    title = f"{groups[index]}, {threads} thread{'s' if threads > 1 else ''}"
    progress.advance(title, before + index + done / max(total, 1))


def _measure_memory(name, peer_name, threads, quick) -> tuple[list[Row], list[str]]:
    """The row, or nothing where the peer is not installed, or why it failed."""
    workload = WORKLOADS[name].quick() if quick else WORKLOADS[name]
    if not peers.select(workload, FORWARD_BACKWARD, [peer_name]):
        return [], []
    try:
        growth = memory.measure(name, FORWARD_BACKWARD, peer_name, threads, quick)
    except RuntimeError as failure:
        return [], [f"memory: {str(failure)[:300]}"]
    row = Row(workload.name, FORWARD_BACKWARD, threads, peer_name, workload.shape, workload.options)
    row.memory_growth_bytes = growth
    return [row], []


def _tell(arguments, directory, measured, notes, surveyed, old) -> int:
    """Writes the report, prints the targets, and returns the exit status."""
    verdicts = [
        verdict
        for verdict in targets.evaluate(measured)
        if verdict.section in {sections.TITLES[section] for section in arguments.sections}
    ]
    from . import charts

    drawn = charts.draw(directory, measured)
    head = [
        tables.heading(measured),
        *([_QUICK_NOTE] if arguments.quick else []),
        "Times and their ratios are medians by the clock. A part of a limit is the best time against the best of the "
        "probes in the same rounds. Keys and values that fit the processor's cache can be read faster than memory.",
    ]
    told = ["## Times", tables.times(measured)] if arguments.quick else ["## Targets", tables.verdicts(verdicts)]
    status = 0
    if arguments.compare:
        options = "--sections, --threads and --quick"
        status, said = comparison.tell(arguments, old, measured, tables.changes, options)
        told += said
    body = [*head, *told, "## Limits of the machine", tables.limits(surveyed), "## Memory", tables.memory(measured)]
    body += ["## Charts", *(f"![{name}]({name})" for name in drawn)] if drawn else []
    body += ["## Not measured", *(f"- {note}" for note in notes)] if notes else []
    body += ["## All rows", tables.details(measured)]
    (directory / "report.md").write_text("# attn_ops: speed and memory\n\n" + "\n\n".join(body) + "\n")
    print("\n\n".join([*head, *told]))
    print(f"\nWritten: {', '.join(str(directory / name) for name in ('report.md', 'results.csv', *drawn))}")
    return status

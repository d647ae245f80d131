"""python -m attn_ops bench --device cuda: measures the CUDA kernels and every installed peer on this machine's GPU.

Needs PyTorch (memory, events, most of the peers), not TensorFlow. Prints tables; with --report DIR also writes
gpu_report.md, gpu_results.csv and, where matplotlib is installed, charts (PNG). All peers take turns in the rounds of
a workload, with a product of matrices and a copy among them, on normal inputs that rotate through more memory than
the cache holds. Every answer is first checked against the float64 reference. Times are by the device's events, and
medians over the rounds.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import pathlib
import sys
import tempfile

import rows
from report import comparison
from report import tables as cpu_tables
from report.progress import Progress

from . import device as devices
from . import measure, tables
from .peers import TRITON_PATH, all_peers
from .workloads import TITLES, section

_BAD_OPTIONS = 2  # exit status
_SLOW_PEERS_AT = 4096  # tokens; all lengths with --every-peer
_QUICK = measure.Effort(rounds=3, seconds=0.2, turn=0.002)
_QUICK_NOTE = "**Quick run: short shapes and few rounds. These figures are not to be quoted.**"


def main(argv=None, device=None, peers=None) -> int:
    """Returns the exit status: 0, 2 for bad options or no device, 3 when a row became slower.

    Tests give a device and the peers.
    """
    arguments = _parser().parse_args(argv)
    peers = peers or all_peers()
    try:
        _check(arguments, peers)
        if device is None:
            reason = devices.unavailable_reason()
            if reason:
                raise ValueError(f"--device cuda needs a GPU: {reason}")
            device = devices.Cuda()
        absent = [f"{name}: {reason}" for name, reason in _absent(peers, device).items()]
        chosen = _chosen(arguments, peers, device)
        old = rows.read(arguments.compare) if arguments.compare else []
        if arguments.report:
            _make_writable(arguments.report)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return _BAD_OPTIONS
    measured, notes, conditions = _measure(arguments, device, chosen)
    return _tell(arguments, device, measured, absent + notes, conditions, old)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m attn_ops bench --device cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--report", metavar="DIR", type=pathlib.Path, help="where to write; made if it does not exist")
    add("--sections", nargs="+", metavar="SECTION", default=list(TITLES), help=f"only these of {', '.join(TITLES)}")
    add("--peers", nargs="+", metavar="PEER", help="only these beside attn_ops (default: all that are installed)")
    add("--rounds", type=int, default=15, help="of each workload, at most (default: %(default)s)")
    add("--seconds", type=float, default=2.0, help="no new round of a workload after this long; 3 are run anyway")
    add("--every-peer", action="store_true", help="at every length, also those that compile or start a process for each "
        f"shape (else at {_SLOW_PEERS_AT} tokens alone)")  # fmt: skip
    add("--quick", action="store_true", help="few and short shapes, few rounds: to try it out")
    add("--triton-tutorial", metavar="FILE", help="Triton's 06-fused-attention.py, as a peer")
    add("--compare", metavar="OLD.csv", type=pathlib.Path, help="gpu_results.csv of an earlier report")
    add("--fail-if-slower", metavar="FACTOR", type=float, help="status 3 if a row of attn_ops takes more than FACTOR "
        "times its median time in OLD.csv")  # fmt: skip
    return parser


def _check(arguments, peers) -> None:
    """Raises ValueError for options that are none."""
    for option, found, known in (("sections", arguments.sections, TITLES), ("peers", arguments.peers or (), peers)):
        unknown = [name for name in found if name not in known]
        if unknown:
            raise ValueError(f"--{option} ({', '.join(unknown)}) must be among {', '.join(known)}")
    if arguments.rounds < 1:
        raise ValueError(f"--rounds ({arguments.rounds}) must be at least 1")
    if not arguments.seconds > 0:
        raise ValueError(f"--seconds ({arguments.seconds}) must be above 0")
    comparison.check_options(arguments)
    if arguments.triton_tutorial:
        if not pathlib.Path(arguments.triton_tutorial).is_file():
            raise ValueError(f"--triton-tutorial ({arguments.triton_tutorial}) must be a file")
        os.environ[TRITON_PATH] = arguments.triton_tutorial


def _absent(peers, device) -> dict[str, str]:
    reasons = {name: peer.missing(device) for name, peer in peers.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def _chosen(arguments, peers, device):
    """The peers to measure, ours first. Raises ValueError where there is none of ours."""
    absent = _absent(peers, device)
    ours = [name for name in peers if name.startswith(measure.OURS)]
    for name in ours:
        if name in absent:
            raise ValueError(f"{name} cannot be measured: {absent[name]}")
    names = [name for name in peers if name in ours or not arguments.peers or name in arguments.peers]
    return [peers[name] for name in names if name not in absent]


def _make_writable(directory: pathlib.Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise ValueError(f"--report ({directory}) must be a directory that can be written: {error}") from None


def _measure(arguments, device, peers):
    effort = _QUICK if arguments.quick else measure.Effort(arguments.rounds, arguments.seconds)
    plan = [(name, *work) for name in arguments.sections for work in section(name, arguments.quick)]
    measured, notes, conditions = [], [], []
    with Progress(len(plan)) as progress:
        for index, (name, workload, mode) in enumerate(plan):
            progress.advance(f"{name}: {workload}", index)
            everybody = arguments.every_peer or arguments.quick or workload.seqlen_k == _SLOW_PEERS_AT
            taking_part = [peer for peer in peers if everybody or not peer.starts_slowly]
            found, said = measure.run(device, workload, mode, taking_part, effort)
            measured += found
            notes += said
            condition = device.condition()
            conditions += [f"after {workload}, {mode}: {condition}"] if condition else []
            if arguments.report:  # at once, for a run may be interrupted
                rows.write(arguments.report / "gpu_results.csv", measured)
    return measured, notes, conditions


def _tell(arguments, device, measured, notes, conditions, old) -> int:
    head = [f"{device.name}, {datetime.date.today()}. {cpu_tables.versions(measured)}."]
    head += [_QUICK_NOTE] if arguments.quick else []
    head += [
        "FLOPs are 4 batch heads rows keys head_dim forward and 2.5 times that backward, half when causal. Bytes of "
        "decode steps are keys and values, read once. Copying counts reading and writing. Parts of a limit are medians "
        "against the best that was measured of it in the same rounds."
    ]
    told, status = [], 0
    if arguments.compare:
        status, told = comparison.tell(arguments, old, measured, cpu_tables.changes, "--sections and --quick")
    body = [*head, *told, "## Limits", tables.limits(measured), "## All rows", tables.details(measured)]
    if arguments.report and importlib.util.find_spec("matplotlib") is None:
        notes = [*notes, "no charts were drawn: matplotlib is not installed"]
    body += ["## Not measured", *(f"- {note}" for note in notes)] if notes else []
    if arguments.report:
        drawn = []
        if importlib.util.find_spec("matplotlib"):
            from . import charts

            drawn = charts.draw(arguments.report, measured)
        more = ["## Charts", *(f"![{name}]({name})" for name in drawn)] if drawn else []
        more += ["## Clocks (SM, memory), power, temperature", *(f"- {x}" for x in conditions)] if conditions else []
        text = "# attn_ops on a GPU: speed\n\n" + "\n\n".join([*body, *more]) + "\n"
        (arguments.report / "gpu_report.md").write_text(text)
    print("\n\n".join(body))
    return status

"""The speed targets, and whether rows meet them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from rows import Row
from workloads import FORWARD, FORWARD_BACKWARD, WORKLOADS, Workload

from . import sections
from .sections import EAGER, OURS, RIVALS


class Measured:
    """Rows by what they measure."""

    def __init__(self, rows: Sequence[Row]):
        self.threads = sorted({row.threads for row in rows})
        self._quick = any(row.workload.endswith("-quick") for row in rows)
        self._rows = {(row.workload.removesuffix("-quick"), row.mode, row.threads, row.peer): row for row in rows}

    def workload(self, name: str) -> Workload:
        """What was measured under this name."""
        return WORKLOADS[name].quick() if self._quick else WORKLOADS[name]

    def row(self, workload: str, mode: str, threads: int, peer: str) -> Row | None:
        return self._rows.get((workload, mode, threads, peer))

    def seconds(self, workload, mode, threads, peer=OURS) -> float | None:
        """The median by the clock."""
        row = self.row(workload, mode, threads, peer)
        return row and row.wall_median

    def percent(self, workload, mode, threads, peer=OURS) -> float | None:
        row = self.row(workload, mode, threads, peer)
        return row and row.percent_of_limit

    def times_the_best(self, workload, mode, threads, peers, ours=OURS) -> float | None:
        """How many times our time the fastest of the peers takes."""
        ours = self.seconds(workload, mode, threads, ours)
        theirs = [t for t in (self.seconds(workload, mode, threads, peer) for peer in peers) if t]
        return min(theirs) / ours if ours and theirs else None


@dataclasses.dataclass(frozen=True)
class Target:
    """`value(measured, workload, threads)` of each workload must be at least (or at most) the bound."""

    section: str
    work: str  # what was measured
    workloads: tuple[str, ...]
    value: Callable[[Measured, str, int], float | None]
    bound: float | Callable[[int], float]  # of the number of threads, where it differs
    unit: str  # appended to the numbers: " %", "x", ...
    at_least: bool = True
    all_threads_only: bool = False


@dataclasses.dataclass(frozen=True)
class Verdict:
    section: str
    work: str
    threads: int
    target: str
    value: str
    met: bool | None  # None: not measured


def evaluate(rows: Sequence[Row]) -> list[Verdict]:
    """Every target of the sections, at one thread and at all that were measured. A target is met when the worst of its
    workloads meets it; what was not measured is neither met nor missed."""
    measured = Measured(rows)
    verdicts = []
    for target in TARGETS:
        counts = measured.threads[-1:] if target.all_threads_only else measured.threads
        verdicts += [_verdict(target, measured, threads) for threads in counts]
    return verdicts


def _verdict(target: Target, measured: Measured, threads: int) -> Verdict:
    bound = target.bound(threads) if callable(target.bound) else target.bound
    sign = ">=" if target.at_least else "<="
    values = {name: target.value(measured, name, threads) for name in target.workloads}
    values = {name: value for name, value in values.items() if value is not None}
    text, met = "not measured", None
    if values:
        worst = (min if target.at_least else max)(values, key=values.get)
        met = values[worst] >= bound if target.at_least else values[worst] <= bound
        text = f"{_number(values[worst])}{target.unit} ({worst})"
        best = (max if target.at_least else min)(values.values())
        if len(values) > 1:
            text += f", best {_number(best)}{target.unit}"
        if len(values) < len(target.workloads):
            text += f"; {len(target.workloads) - len(values)} not measured"
            met = met and None  # missed is missed, but met takes all of them
    wanted = f"{sign} {_number(bound)}{target.unit}"
    return Verdict(sections.TITLES[target.section], target.work, threads, wanted, text, met)


def _number(x: float) -> str:
    return f"{x:.0f}" if abs(x) >= 20 else f"{x:.3g}"


def _percent(mode, ours=OURS):
    return lambda measured, workload, threads: measured.percent(workload, mode, threads, ours)


def _against(mode, *peers, ours=OURS):
    return lambda measured, workload, threads: measured.times_the_best(workload, mode, threads, peers, ours)


def _compared_with(base, part_left=False):
    """Our time against our time of `base` in the same rounds; with `part_left`, against the part of it that the mask
    leaves to do."""

    def value(measured, workload, threads):
        time, whole = measured.seconds(workload, FORWARD, threads), measured.seconds(base, FORWARD, threads)
        part = measured.workload(workload).work_left() if part_left else 1.0
        return time / whole / part if time and whole else None

    return value


def _float32_takes(mode):
    """The time of the same work in float32, in the same rounds, against ours."""

    def value(measured, workload, threads):
        time, base = (measured.seconds(name, mode, threads) for name in (workload, sections.BF16[workload]))
        return base / time if base and time else None

    return value


def _speed_up(mode):
    def value(measured, workload, threads):
        one = measured.seconds(workload, mode, threads, "attn_ops_core_1_thread")
        every = measured.seconds(workload, mode, threads, "attn_ops_core")
        return one / every if one and every and threads > 1 else None

    return value


def _of_one_thread(mode, peer, time):
    """The time of a peer, by the clock ("wall") or of all processors together ("cpu"), against that of one thread."""

    def value(measured, workload, threads):
        one = measured.row(workload, mode, threads, "attn_ops_core_1_thread")
        row = measured.row(workload, mode, threads, peer)
        return getattr(row, f"{time}_median") / getattr(one, f"{time}_median") if row and one else None

    return value


def _busy_threads(measured, workload, threads):
    row = measured.row(workload, FORWARD, threads, EAGER)
    return row.cpu_median / row.wall_median if row and row.wall_median else None


def _overhead_us(measured, workload, threads):
    op = measured.seconds(workload, FORWARD, threads, "attn_ops_eager")
    kernel = measured.seconds(workload, FORWARD, threads, "attn_ops_core")
    return 1e6 * (op - kernel) if op and kernel else None


def _growth_mb(measured, workload, threads):
    row = measured.row(workload, FORWARD_BACKWARD, threads, OURS)
    if not row or row.memory_growth_bytes is None:
        return None
    return (row.memory_growth_bytes - output_bytes(measured.workload(workload))) / 1e6


def output_bytes(workload) -> int:
    """Of forward + backward: the output and the gradients of query, key and value, float32."""
    rows = workload.batch * workload.seqlen_q * workload.num_heads * workload.head_dim
    keys = workload.batch * workload.seqlen_k * workload.num_kv_heads * workload.head_dim
    return 4 * (2 * rows + 2 * keys)


_FMA, _READ = "part of the FMA peak", "part of the read bandwidth"
_BEST = "the best of torch, onnxruntime, OpenVINO takes"
_F, _FB = FORWARD, FORWARD_BACKWARD
_MODES = ((_F, "forward"), (_FB, "forward + backward"))
_TRAINING_SHORT_PEERS = ("torch_sdpa", "tf_xla", "keras_xla")

TARGETS = (
    Target("forward", f"full, N >= 512: {_FMA}", sections.FULL, _percent(_F), 85, " %"),
    Target(
        "forward",
        f"full, N >= 512: {_BEST}",
        sections.FULL,
        _against(_F, *RIVALS),
        lambda t: 1.15 if t == 1 else 1.25,
        "x",
    ),
    Target("forward", f"causal, N >= 512: {_FMA}", sections.CAUSAL_512 + sections.CAUSAL_2048, _percent(_F), 85, " %"),
    Target("forward", f"causal, N = 2048: {_BEST}", sections.CAUSAL_2048, _against(_F, *RIVALS), 1.5, "x"),
    Target("forward", f"causal, N = 512: {_BEST}", sections.CAUSAL_512, _against(_F, *RIVALS), 2, "x"),
    Target("short", f"full: {_FMA}", sections.SHORT, _percent(_F, EAGER), 75, " %"),
    Target("short", f"full: {_BEST}", sections.SHORT, _against(_F, *RIVALS, ours=EAGER), 1.15, "x"),
    Target("short", f"causal: {_FMA}", sections.SHORT_CAUSAL, _percent(_F, EAGER), 60, " %"),
    Target("short", f"causal: {_BEST}", sections.SHORT_CAUSAL, _against(_F, *RIVALS, ours=EAGER), 1.8, "x"),
    Target("training", f"full, N >= 512: {_FMA}", sections.TRAINING, _percent(_FB), 78, " %"),
    Target("training", f"causal, N >= 512: {_FMA}", sections.TRAINING_CAUSAL, _percent(_FB), 78, " %"),
    Target("training", "full, N >= 512: torch takes", sections.TRAINING, _against(_FB, "torch_sdpa"), 1.4, "x"),
    Target(
        "training", "causal, N >= 512: torch takes", sections.TRAINING_CAUSAL, _against(_FB, "torch_sdpa"), 1.8, "x"
    ),
    Target(
        "training",
        "N = 128: the best of torch, XLA takes",
        sections.TRAINING_SHORT,
        _against(_FB, *_TRAINING_SHORT_PEERS),
        1.3,
        "x",
    ),
    Target("decode", _READ, sections.DECODE, _percent(_F, EAGER), 80, " %"),
    Target(
        "decode",
        "batch 1: threads in use",
        sections.DECODE_BATCH_1,
        _busy_threads,
        lambda t: 0.9 * t,
        " busy",
        all_threads_only=True,
    ),
    Target("decode", "onnxruntime GroupQueryAttention takes", sections.DECODE, _against(_F, "ort_gqa", ours=EAGER), 2, "x"),
    Target("decode", "Keras takes", sections.DECODE_WITH_KERAS, _against(_F, "keras_graph", ours=EAGER), 40, "x"),
    Target("half", "of our float32 time", sections.HALF, _compared_with(sections.HALF_BASE), 1.15, "x", at_least=False),
    Target("half", "the best peer takes", sections.HALF, _against(_F, *RIVALS, "jax"), 1.3, "x"),
    Target("bf16", "forward: our float32 takes", tuple(sections.BF16), _float32_takes(_F), 1.7, "x"),
    Target("bf16", "forward: the best peer takes", tuple(sections.BF16), _against(_F, *RIVALS, "jax"), 1.15, "x"),
    Target("bf16", "forward + backward: our float32 takes", tuple(sections.BF16), _float32_takes(_FB), 1.5, "x"),
    Target("float64", f"{_FMA} in float64", (sections.FLOAT64,), _percent(_F), 75, " %"),
    Target(
        "masks",
        "50 % padding: of the full time",
        sections.MASKS[:1],
        _compared_with(sections.MASKS_BASE),
        0.6,
        "x",
        at_least=False,
    ),
    # The same allowance as for padding, 0.6 / 0.5.
    Target(
        "masks",
        "window, segments: of the full time's part that is left",
        sections.MASKS[1:],
        _compared_with(sections.MASKS_BASE, part_left=True),
        1.2,
        "x",
        at_least=False,
    ),
    Target(
        "bias", "of our unmasked time", sections.BIASES, _compared_with(sections.BIAS_BASE), 1.15, "x", at_least=False
    ),
    Target(
        "threads",
        "kernel, forward: 1 thread takes",
        sections.SCALING,
        _speed_up(_F),
        lambda t: 0.95 * t,
        "x",
        all_threads_only=True,
    ),
    Target(
        "threads",
        "kernel, forward + backward: 1 thread takes",
        sections.SCALING,
        _speed_up(_FB),
        lambda t: 0.95 * t,
        "x",
        all_threads_only=True,
    ),
    *(
        Target(
            "threads16",
            f"kernel, {mode}: processor time, of that of 1 thread",
            sections.SCALING,
            _of_one_thread(name, "attn_ops_core_16_threads", "cpu"),
            1.05,
            "x",
            at_least=False,
            all_threads_only=True,
        )
        for name, mode in _MODES
    ),
    *(
        Target(
            "tiny",
            f"kernel, {mode}, {threads}: of the time of 1",
            sections.TINY,
            _of_one_thread(name, peer, "wall"),
            1,
            "x",
            at_least=False,
            all_threads_only=True,
        )
        for name, mode in _MODES
        for peer, threads in (("attn_ops_core", "all threads"), ("attn_ops_core_16_threads", "16 threads"))
    ),
    Target(
        "memory",
        "forward + backward grows beyond inputs and outputs by",
        (sections.MEMORY,),
        _growth_mb,
        100,
        " MB",
        at_least=False,
        all_threads_only=True,
    ),
    Target(
        "overhead",
        "eager op, (1,1,1,64), above the kernel",
        (sections.OVERHEAD,),
        _overhead_us,
        20,
        " us",
        at_least=False,
    ),
)

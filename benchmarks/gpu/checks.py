"""Whether the kernels are right on this card: every one of every dtype and head dimension, and random calls."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT / "tests"), str(_ROOT / "tests/helpers")]

import cuda_run
from cases import DTYPES, TOLERANCES, make_inputs
from implementations import specification

_DIMS = (64, 80, 128, 192, 256)  # the last of each but 80, whose rows are shorter than the tiles
_ROWS, _HEADS = 150, 2


def on_stand_in() -> bool:
    """Whether the tests' stand-in is in the card's place."""
    return "ATTN_OPS_CUDA_DRIVER" in os.environ


# ------------------------------------------------------------------------------------------- every kernel, by features


def _masked(rng, keys, dtype):
    """Masks of which sixteen bytes are read at a time, or single ones, by the number of keys."""
    rows, few_rows = rng.random((2, 1, _ROWS, keys)) < 0.7, rng.random((1, _HEADS, 1, keys)) < 0.9
    return {"mask": [rows, few_rows], "bias": rng.standard_normal((1, _HEADS, _ROWS, keys)).astype(DTYPES[dtype])}


def _scores(rng, keys, dtype):
    slopes, sinks = np.float32([0.3, -0.1]), np.float32([0.5, 4.0])
    bias = rng.standard_normal((1, 1, 1, keys)).astype("float32")
    return {"logits_soft_cap": 3.0, "alibi_slopes": slopes, "sinks": sinks, "bias": bias}


def _structure(rng, keys, dtype):
    """Intervals, segments and blocks; rows that stand at an offset among the keys."""
    from attn_ops import masks

    begin = np.sort(rng.integers(0, keys // 2, (2, _ROWS)))
    ids = [rng.integers(0, 2, (1, n)) for n in (_ROWS, keys)]
    blocks = rng.random((-(-_ROWS // 30), -(-keys // 20))) < 0.7
    mask = masks.intervals(begin, begin + 80) & masks.segments(*ids, contiguous=False)
    return {"mask": mask & masks.block_sparse(blocks, 30, 20), "query_offset": np.array([40, 3]), "is_causal": True}


def _lengths(rng, keys, dtype):
    lengths = {"query_seq_lengths": np.array([_ROWS, 33]), "key_value_seq_lengths": np.array([77, keys])}
    return {**lengths, "causal_alignment": "bottom_right", "window": (60, 0)}


# What a call of this kind has beside rows and keys, by a random generator, the number of keys, and the dtype.
KINDS = {
    "full": lambda *_: {},
    "causal": lambda *_: {"is_causal": True},
    "lengths": _lengths,
    "offset, intervals": lambda rng, *_: {"query_offset": np.array([60, 9]), "window": (90, 20)},
    "masked": _masked,
    "masked, unaligned": _masked,
    "scores": _scores,
    "table": lambda rng, *_: {"relative_bias": rng.standard_normal((161, _HEADS)).astype("float32"), "is_causal": True},
    "structure": _structure,
    "dropout": lambda *_: {"dropout_rate": 0.3, "dropout_seed": np.array([5, 7])},
    "not finite": lambda *_: {"is_causal": True},
    "few rows": lambda *_: {},
    "few rows, masked": lambda rng, keys, _: {"mask": rng.random((2, 1, 1, keys)) < 0.6, "sinks": np.float32([0.5, 4])},
}


def kernels(dims=_DIMS, dtypes=("float32", "float16", "bfloat16"), kinds=tuple(KINDS)) -> int:
    """Against the float64 reference, forward and backward. Returns how many calls are wrong."""
    cuda_run.start(not on_stand_in())
    calls = [(dtype, dim, kind) for dtype in dtypes for dim in dims for kind in kinds]
    failed = 0
    for dtype, dim, kind in calls:
        errors = _errors(dtype, dim, kind)
        wrong = not all(error <= TOLERANCES[dtype] for error in errors.values())
        failed += wrong
        if wrong or dim == 128:
            told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
            print(f"{'WRONG ' * wrong}{dtype} {dim} {kind}: {told}")
    print(f"{failed} of {len(calls)} wrong")
    return failed


def _errors(dtype: str, dim: int, kind: str) -> dict[str, float]:
    """The largest errors of a call, as parts of the largest value (or of 1), by what is wrong."""
    rows, keys = 3 if kind.startswith("few rows") else _ROWS, 200 if "unaligned" in kind else 208
    inputs = make_inputs(dtype, 2, rows, keys, _HEADS, 1, dim)
    if kind == "not finite":  # which nobody sees: keys behind the last row, and the first row sees one key
        for x in inputs[1:3]:
            x[:, rows:] = np.nan
    options = KINDS[kind](np.random.default_rng(dim), keys, dtype)
    found = cuda_run.run(*inputs, dict(options))
    wanted = vars(specification(*inputs, **options))
    if found["d_relative_bias"] is not None:
        found["d_relative_bias"] = found["d_relative_bias"].T
    return {name: _error(x, wanted[name]) for name, x in found.items() if x is not None}


def _error(found, wanted) -> float:
    """Infinite where either is and the other is not: rows that see nothing have an lse of -inf."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(np.asarray(found, np.float64) - wanted)
    difference[found == wanted] = 0
    largest = np.abs(wanted[np.isfinite(wanted)]).max(initial=1)
    return float(np.nan_to_num(difference.max(initial=0) / largest, nan=np.inf))


# ------------------------------------------------------------------------------------------------------ random calls


def fuzz(out: Path, seconds: float = 80, processes: int = min(os.cpu_count() or 1, 12)) -> int:
    """tests/fuzz with all options, strides, pages and narrow keys, for these seconds. Returns how many processes found
    any that fail; what each tells is in its log."""
    where = "cuda" if on_stand_in() else "card"
    ways = ",".join([where, f"{where}-without-decode", f"{where}-stored"])
    command = [sys.executable, str(_ROOT / "tests/fuzz/run.py"), "--implementations", ways, "--shrink", "0"]
    command += ["--seconds", str(seconds), "--count", str(10**9)]
    running = []
    for seed in range(processes):
        log = out / f"fuzz_{seed}.log"
        with log.open("w") as file:
            own = [*command, "--seed", str(seed)]
            running.append((log, subprocess.Popen(own, stdout=file, stderr=subprocess.STDOUT)))
    failed = 0
    for log, process in running:
        failed += process.wait() != 0
        lines = log.read_text().splitlines()
        told = lines if process.returncode == 0 else [*lines[:12], "…"]
        print("\n".join(line[:300] for line in [*told[:-1], *lines[-1:]]))
    return failed

"""The stages of first_run.py: each is a function of the directory for its logs, and returns a status (None is well)."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

from workloads import FORWARD

from . import device as devices
from . import measure, peers
from .workloads import BACKWARD, decode, prefill

_ROOT = Path(__file__).resolve().parents[2]
# Of the tests that tests/cuda_host/sanitize.py runs.
_MEMCHECKED = "strides or head_dims or nan or split or neighbours or pages or narrow or everything or a_block"
_RACECHECKED = "groups or split or everything or a_block"


def facts(out: Path) -> int | None:
    """What is there, and whether the library can use it."""
    import torch

    from attn_ops.kernels import cuda

    if shutil.which("nvidia-smi"):
        query = "name,driver_version,compute_cap,clocks.sm,clocks.max.sm,power.limit,temperature.gpu,memory.total"
        subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], check=False)
    print(f"PyTorch {torch.__version__}, {devices.Cuda().name}")
    reason = cuda.unavailable_reason(0)
    print(f"attn_ops: {reason or 'usable'}")
    return int(reason is not None)


# ------------------------------------------------------------------------------------------------ is it right?

def kernels(out: Path) -> int:
    """Every kernel of every dtype and head dimension, against the float64 reference."""
    from . import checks

    return checks.kernels()


def fuzz(out: Path) -> int:
    """Random calls of all options."""
    from . import checks

    return checks.fuzz(out)


def tests(out: Path) -> int:
    """The tests of the kernels, on the card."""
    options = ["-m", "gpu", "-q", "-n", str(min(os.cpu_count() or 1, 12)), "--maxfail=40"]
    options += ["-p", "no:cacheprovider", "-p", "no:warnings", "-p", "no:benchmark"]
    # JAX would take three quarters of the card's memory, in each process.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", *options, "--tb=line", "tests"]
    return subprocess.call(command, cwd=_ROOT, env=environment)


def memcheck(out: Path) -> int:
    return _sanitize("memcheck", _MEMCHECKED)


def racecheck(out: Path) -> int:
    return _sanitize("racecheck", _RACECHECKED)


def _sanitize(tool: str, tests: str) -> int:
    script = _ROOT / "tests/cuda_host/sanitize.py"
    command = [sys.executable, str(script), tool, "-x", "-p", "no:cacheprovider", "-k", tests]
    return subprocess.call(command, cwd=_ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})


def soak(out: Path) -> int:
    """The same bits from thousands of launches."""
    from . import soak as soaking

    return soaking.soak()


# ------------------------------------------------------------------------------------------------ how fast, and why?


_NUMBERS = [
    *((prefill(dim, 4096, causal), mode) for dim in (64, 128) for causal in (False, True)
      for mode in (FORWARD, BACKWARD)),
    *((decode(batch, keys), FORWARD) for batch, keys in ((1, 8192), (8, 4096), (32, 4096))),
    *((prefill(64, 2048, dtype="float32"), mode) for mode in (FORWARD, BACKWARD)),
    (prefill(128, 16384), FORWARD),
    (prefill(256, 4096), FORWARD),
    (dataclasses.replace(prefill(128, 1024, True), name="short", batch=4), FORWARD),
]  # fmt: skip
_BESIDE = ("attn_ops_cuda", "torch_cudnn", "torch_flash", "torch_efficient")


def numbers(out: Path) -> None:
    """Teraflops (decode: terabytes of keys and values) a second, ours beside the others, in interleaved rounds."""
    device = devices.Cuda()
    beside = [peer for name, peer in peers.all_peers().items() if name in _BESIDE and not peer.missing(device)]
    words = os.environ.get("ATTN_OPS_FIRST_RUN_ONLY", "").split()
    for workload, mode in _NUMBERS:
        if words and not any(word in f"{workload.name} {workload.dtype} {mode}" for word in words):
            continue
        rows, notes = measure.run(device, workload, mode, beside, measure.Effort(rounds=5, seconds=2.0, turn=0.005))
        told = [
            f"{row.peer} {1e6 * row.wall_median:.1f} us"
            + (f" {workload.key_value_bytes() / row.wall_median / 1e12:.2f} TB/s" if workload.is_decode
               else f" {row.gflops_per_second / 1e3:.0f}")
            for row in rows
        ]  # fmt: skip
        limit = f"; {rows[0].limit} {rows[0].limit_per_second / 1e12:.2f}" if rows else ""
        print(f"{workload.name} {workload.dtype} {mode}: {', '.join(told)}{limit}")
        for note in notes:
            print(f"  {note[:150]}")


def profile(out: Path) -> int:
    """Nsight Compute's words on the kernels that matter."""
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if ncu is None:
        print("there is no ncu")
        return 1
    sections = ["SpeedOfLight", "WarpStateStats", "Occupancy", "MemoryWorkloadAnalysis", "InstructionStats"]
    command = [ncu, *(word for name in sections for word in ("--section", name)), "--clock-control", "none"]
    command += ["-k", "regex:attn_ops", "--launch-count", "8", "--csv", "--page", "details"]
    code = "from pathlib import Path; from gpu import stages; stages.launches(Path())"
    with (out / "profile.csv").open("w") as file:
        status = subprocess.call([*command, sys.executable, "-c", code], stdout=file)
    print((out / "profile.csv").read_text()[-600:])
    return status


def launches(out: Path) -> None:
    """What `profile` looks at: forward, backward and decode, twice each."""
    import torch

    ours, device = peers.all_peers()["attn_ops_cuda"], devices.Cuda()
    for workload, mode in ((prefill(128, 4096), BACKWARD), (decode(8, 4096), FORWARD)):
        inputs = measure.random_inputs(device, workload, 0)
        step = ours.prepare(device, workload, mode, inputs)
        for _ in range(2):
            step()
        torch.cuda.synchronize()
